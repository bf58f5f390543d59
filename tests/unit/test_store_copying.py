# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the copy carries beside the fence: the level that floats, what is proposed, the roll-back set."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.errors import StoreError
from kvmneg.store import copies
from kvmneg.store.interface import Audit, ProposalRow
from kvmneg.store.levels import Change
from kvmneg.store.opening import open_store
from kvmneg.store.recovered import RecoveredStore
from kvmneg.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

AUDIT = Audit(1000, 42, "2026-11-21T06:00:00Z", "before the 6.12 roll-out", "kvmneg")
NOW = "2026-11-21T07:00:00Z"
GUESTS = '{"kind": "lower", "guests": [{"vm": "a", "uid": 1}]}'


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pin(store: SqliteStore, text: str) -> None:
    store.pin(text, sha256(text), expected_generation=None, audit=AUDIT)


def row(kind: str, text: str, base: int) -> ProposalRow:
    deadline = 9.5 if kind == "raise" else None
    return ProposalRow(
        kind, sha256(text), text, base, 0, False, NOW, deadline, 7, 42, "kvmneg", "a reason", GUESTS
    )


def lower(store: SqliteStore, text: str, base: int) -> None:
    change = Change("lower-propose", {}, ("lower", sha256(text), text))
    store.levels.propose(change, row("lower", text, base), expected_generation=None, audit=AUDIT)


def raise_(store: SqliteStore, text: str, base: int) -> None:
    change = Change("raise-propose", {})
    store.levels.propose(change, row("raise", text, base), expected_generation=None, audit=AUDIT)


def abort(store: SqliteStore, text: str) -> None:
    change = Change("lower-abort", {}, ("lower-abort", sha256(text), text))
    store.levels.close(change, expected_generation=None, audit=AUDIT)


def measure(store: SqliteStore, report: str, combo: str) -> None:
    store.record_report(report, combo, NOW, report.encode() * 3, json.dumps({"kernel": combo}))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    """Three combos measured, the first of them again and in the roll-back set; nothing pinned."""
    with SqliteStore(str(tmp_path / "state"), verify=sha256) as opened:
        for report, combo in (("r1", "c1"), ("r2", "c2"), ("r3", "c3"), ("r4", "c1")):
            measure(opened, report, combo)
        assert opened.rolls.add("c1", 0, AUDIT)
        yield opened


def lost(store: SqliteStore, tmp_path: Path) -> RecoveredStore:
    """The store of the copy, after the database was damaged."""
    store.copy_out(NOW)
    store.close()
    (tmp_path / "state/kvmneg.sqlite").write_bytes(b"no database at all" * 1000)
    found = open_store(str(tmp_path / "state"), sha256)
    assert isinstance(found, RecoveredStore)
    return found


def test_the_roll_back_set_is_in_the_copy(store: SqliteStore, tmp_path: Path) -> None:
    members, reports, combo = store.rolls.members(), store.rolls.reports(), store.rolls.find("c1")
    assert [one.digest for one in reports] == ["r4"]
    with lost(store, tmp_path) as copy:
        assert (copy.rolls.members(), copy.rolls.reports()) == (members, reports)
        for ask in (
            lambda: copy.rolls.combos(9),
            lambda: copy.rolls.find("c1"),
            lambda: copy.rolls.report("c1"),
            lambda: copy.rolls.before("r4"),
            lambda: copy.rolls.add("c1", 0, AUDIT),
            lambda: copy.rolls.remove("c1", 0, AUDIT),
            lambda: copy.report("r2"),
            copy.latest_report,
            lambda: copy.levels.floats_at("", "text"),
        ):
            with pytest.raises(StoreError, match="read-only until an admin acts"):
                ask()
        again = copy.restored(0, AUDIT)
        assert (again.rolls.members(), again.rolls.reports()) == (members, reports)
        assert again.rolls.find("c1") == combo
        assert again.audit(1)[0].detail == {"digest": "", "proposal": None, "rolls": ["c1"]}
        measure(again, "r5", "c5")
        assert again.rolls.add("c5", 1, AUDIT)
        assert [one.digest for one in again.rolls.reports()] == ["r4", "r5"]


def test_a_level_that_floats_is_in_the_copy(store: SqliteStore, tmp_path: Path) -> None:
    """As long as only a report says what it is, with that report, though it is not the newest of its combo."""
    assert store.level().report == "r1"
    body = store.report("r1")
    with lost(store, tmp_path) as copy:
        assert copy.level()[2:] == ("r1", None)
        assert copy.report("r1") == body
        again = copy.restored(0, AUDIT)
        assert (again.level()[2:], again.report("r1")) == (("r1", None), body)


def test_a_level_that_fell_is_in_the_copy(store: SqliteStore, tmp_path: Path) -> None:
    store.levels.floats_at("", "narrow", "level-fell", detail={}, audit=AUDIT)
    store.copy_out(NOW)
    assert [one.digest for one in copies.read(str(tmp_path / "state")).reports] == [
        "r4"
    ]  # r1 says nothing any more
    with lost(store, tmp_path) as copy:
        assert copy.level()[2:] == ("", "narrow")
        assert copy.restored(0, AUDIT).level()[2:] == ("", "narrow")


def test_a_lowering_goes_on_from_the_copy(store: SqliteStore, tmp_path: Path) -> None:
    pin(store, "wide")
    pin(store, "wider")
    lower(store, "narrow", 2)
    with lost(store, tmp_path) as copy:
        fence = copy.fence()
        assert fence is not None and (fence.generation, fence.text) == (3, "narrow")
        found = copy.levels.proposal()
        # who stood above is left out: without leases all of them would seem to be gone
        plan = json.dumps({"kind": "lower", "guests": []})
        assert found == row("lower", "narrow", 2)._replace(generation=3, plan=plan)
        assert copy.level().proposal == "lower"
        base = copy.past_fence(2)
        assert base is not None and base.text == "wider"
        with pytest.raises(StoreError, match="read-only"):
            copy.past_fence(1)
        with pytest.raises(StoreError, match="read-only"):
            abort(copy, "wider")
        again = copy.restored(7, AUDIT)
        # both fences are above every generation known
        assert [(one.action, one.generation) for one in again.history(9)] == [("lower", 9), ("pin", 8)]
        found = again.levels.proposal()
        assert found is not None and (found.base, found.generation) == (8, 9)
        base = again.past_fence(found.base)
        assert base is not None and base.text == "wider"
        abort(again, "wider")
        assert (again.generation(), again.level().proposal) == (10, "")


def test_a_raise_goes_on_from_the_copy(store: SqliteStore, tmp_path: Path) -> None:
    pin(store, "narrow")
    raise_(store, "wide", 1)
    with lost(store, tmp_path) as copy:
        fence, found = copy.fence(), copy.levels.proposal()
        assert fence is not None and fence.text == "narrow"
        assert found is not None and (found.kind, found.base, found.deadline) == ("raise", 1, 9.5)
        again = copy.restored(0, AUDIT)
        found = again.levels.proposal()
        assert found is not None and (found.base, found.generation, found.text) == (2, 2, "wide")
        change = Change("raise-commit", {}, ("raise", sha256("wide"), "wide"))
        assert again.levels.close(change, expected_generation=2, audit=AUDIT) == 3


CHANGES: dict[str, Callable[[SqliteStore], object]] = {
    "a combo is added": lambda store: store.rolls.add("c2", 0, AUDIT),
    "a combo is removed": lambda store: store.rolls.remove("c1", 0, AUDIT),
    "a combo of the set is measured again": lambda store: measure(store, "r5", "c1"),
    "the level falls": lambda store: store.levels.floats_at("", "low", "fell", detail={}, audit=AUDIT),
    "another report offers the level": lambda store: store.levels.floats_at("r3", "low"),
    "a fence is pinned": lambda store: pin(store, "fence"),
    "a raise is proposed": lambda store: (pin(store, "one"), store.copy_out(NOW), raise_(store, "two", 1)),
    "a lowering is proposed": lambda store: (pin(store, "one"), store.copy_out(NOW), lower(store, "two", 1)),
    "a lowering is finished": lambda store: (
        pin(store, "one"),
        lower(store, "two", 1),
        store.copy_out(NOW),
        store.levels.close(Change("lower-finish", {}), expected_generation=None, audit=AUDIT),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_copy_follows_whatever_it_carries(
    store: SqliteStore, change: Callable[[SqliteStore], object]
) -> None:
    assert store.copy_out(NOW)
    assert not store.copy_out(NOW)
    change(store)
    assert store.copy_out(NOW)
    assert not store.copy_out(NOW)


@pytest.mark.parametrize("other", ["a breach", "a combo outside the set", "the report of a pinned host"])
def test_the_copy_is_not_made_again_for_what_it_does_not_carry(store: SqliteStore, other: str) -> None:
    pin(store, "fence")
    store.copy_out(NOW)
    if other == "a breach":
        store.levels.breached(True, {}, AUDIT)
    else:
        measure(store, "r9", "c2" if other == "a combo outside the set" else "c9")
    assert not store.copy_out(NOW)


def test_a_copy_that_could_not_be_read_back_is_not_written(
    store: SqliteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin(store, "one")
    store.copy_out(NOW)
    size = (tmp_path / "state/fence.copy").stat().st_size
    monkeypatch.setattr(limits, "COPY_BYTES", size)
    pin(store, "two")
    assert store.copy_out(NOW)  # of the same length
    pin(store, "three")
    with pytest.raises(StoreError, match="larger than"):
        store.copy_out(NOW)
    assert copies.read(str(tmp_path / "state")).text == "two"


@pytest.mark.parametrize(
    "fields",
    [{"rolls": [["c1"]]}, {"proposal": ["lower"]}, {"base": "x"}, {"reports": [["r", "c", NOW, "§"]]}],
)
def test_a_copy_of_another_shape_is_not_served(
    store: SqliteStore, tmp_path: Path, fields: dict[str, object]
) -> None:
    store.copy_out(NOW)
    path = tmp_path / "state/fence.copy"
    document = json.loads(path.read_bytes().partition(b"\n")[2])
    body = json.dumps({**document, **fields}).encode()
    path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    with pytest.raises(StoreError, match="another kvmneg"):
        copies.read(str(tmp_path / "state"))


def test_a_copy_that_contradicts_itself_is_not_served(store: SqliteStore, tmp_path: Path) -> None:
    """A combo without its report: whoever wrote that knew the format."""
    store.copy_out(NOW)
    store.close()
    state = tmp_path / "state"
    copies.write(str(state), copies.read(str(state))._replace(reports=()))
    (state / "kvmneg.sqlite").unlink()
    with pytest.raises(StoreError, match=r"cannot read .*fence\.copy"):
        open_store(str(state), sha256)
