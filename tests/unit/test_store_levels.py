# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proposals and the level that floats, as the store keeps them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvmneg.errors import GenerationMismatch, StoreError
from kvmneg.store.interface import Audit, ProposalRow
from kvmneg.store.levels import Change
from kvmneg.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WHO = Audit(7, 42, "2026-11-21T06:00:00Z", "before the roll-out", "kvmneg")
LOWER = ProposalRow("lower", "d2", "t2", 1, 0, True, WHO.at, None, 7, 42, "kvmneg", "down\ud800", "{}")
RAISE = LOWER._replace(kind="raise", digest="d3", text="t3", urgent=False, deadline=5.0)
DOWN = Change("lower-propose", {"digest": "d2"}, ("lower", "d2", "t2"))
UP = Change("raise-propose", {})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(str(tmp_path / "state")) as opened:
        opened.pin("t1", "d1", expected_generation=0, audit=WHO)
        yield opened


def test_a_lowering_is_in_force_with_its_proposal(store: SqliteStore) -> None:
    assert store.levels.propose(DOWN, LOWER, expected_generation=1, audit=WHO) == 2
    fence = store.fence()
    assert fence is not None and (fence.generation, fence.digest) == (2, "d2")
    assert store.level().proposal == "lower"
    kept = LOWER._replace(generation=2, reason="down?")
    assert store.levels.proposal() == kept
    assert [row.action for row in store.history(9)] == ["lower", "pin"]
    assert [row.action for row in store.audit(9)] == ["lower-propose", "pin"]
    assert store.levels.close(Change("lower-finish", {}), expected_generation=2, audit=WHO) == 2
    assert (store.levels.proposal(), store.level().proposal) == (None, "")


def test_a_raise_is_in_force_when_it_is_closed(store: SqliteStore) -> None:
    assert store.levels.propose(UP, RAISE, expected_generation=1, audit=WHO) == 1
    fence = store.fence()
    assert fence is not None and fence.digest == "d1"
    change = Change("raise-commit", {}, ("raise", "d3", "t3"))
    assert store.levels.close(change, expected_generation=1, audit=WHO) == 2
    assert [row.action for row in store.history(9)] == ["raise", "pin"]


def test_one_proposal_is_open_at_a_time(store: SqliteStore) -> None:
    store.levels.propose(UP, RAISE, expected_generation=None, audit=WHO)
    store.levels.propose(DOWN, LOWER, expected_generation=None, audit=WHO)
    row = store.levels.proposal()
    assert row is not None and row.kind == "lower"
    store.unpin(expected_generation=2, audit=WHO)  # it was about another fence
    assert (store.levels.proposal(), store.level().proposal) == (None, "")


def test_a_generation_that_moved_on_changes_nothing(store: SqliteStore) -> None:
    before = store.audit(9)
    with pytest.raises(GenerationMismatch):
        store.levels.propose(DOWN, LOWER, expected_generation=0, audit=WHO)
    with pytest.raises(GenerationMismatch):
        store.levels.close(DOWN, expected_generation=2, audit=WHO)
    assert (store.audit(9), store.levels.proposal(), store.generation()) == (before, None, 1)


def test_a_change_is_whole_or_not_at_all(store: SqliteStore) -> None:
    """The last statement of the transaction fails: nothing of the others is left."""
    before = store.audit(9)
    store._database.connection.execute("DROP TABLE audit")
    with pytest.raises(StoreError, match="no such table: audit"):
        store.levels.propose(DOWN, LOWER, expected_generation=1, audit=WHO)
    assert (store.generation(), store.levels.proposal(), store.level().proposal) == (1, None, "")
    assert before


def test_the_level_that_floats(store: SqliteStore) -> None:
    assert store.level().report is None
    store.record_report("r1", "c1", WHO.at, b"one")
    store.record_report("r2", "c2", WHO.at, b"two")
    assert store.level()[2:] == ("r1", None)  # the first one, until it moves
    audited = len(store.audit(9))
    store.levels.floats_at("r2", "same")
    assert len(store.audit(9)) == audited
    store.levels.floats_at("", "less", "level-fell", detail={"digest": "x"}, audit=WHO)
    assert (store.level()[2:], store.audit(1)[0].detail) == (("", "less"), {"digest": "x"})
    store.unpin(expected_generation=1, audit=WHO)
    assert store.level()[2:] == ("r2", None)  # what the latest report offers


def test_a_breach_is_remembered(store: SqliteStore) -> None:
    store.levels.breached(True, {"features": ["avx2"]}, WHO)
    assert store.level().breached
    store.levels.breached(False, {}, WHO)
    assert not store.level().breached
    assert [row.action for row in store.audit(2)] == ["healed", "breached"]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM level",
        "INSERT INTO level (id) VALUES (2)",
        "UPDATE level SET proposal = 'else'",
        "INSERT INTO proposals SELECT 2, 'raise', 'd', 't', 1, 1, 0, 'at', 1.0, 0, 0, 'p', 'r', '{}'",
        "INSERT INTO proposals SELECT 1, 'raise', 'd', 't', 1, 1, 0, 'at', NULL, 0, 0, 'p', 'r', '{}'",
    ],
)
def test_a_hand_in_the_database_is_stopped(tmp_path: Path, statement: str) -> None:
    with SqliteStore(str(tmp_path / "state")):
        pass
    with (
        closing(sqlite3.connect(tmp_path / "state" / "kvmneg.sqlite")) as connection,
        pytest.raises(sqlite3.IntegrityError),
    ):
        connection.execute(statement)
