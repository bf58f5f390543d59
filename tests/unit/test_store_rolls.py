# SPDX-License-Identifier: LGPL-2.1-or-later
"""The combos ever measured and the roll-back set: kept for ever, in the order of recording, within their limit."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.errors import LimitExceeded
from kvmneg.store import migrations, schema, statedir
from kvmneg.store.interface import Audit
from kvmneg.store.rolls import ComboRow
from kvmneg.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Iterator

AUDIT = Audit(1000, 42, "2026-11-21T06:00:00Z", "before the 6.12 roll-out", "kvmneg")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    with SqliteStore(str(tmp_path / "state")) as opened:
        yield opened


def test_a_combo_counts_by_its_newest_report(store: SqliteStore) -> None:
    assert store.record_report("r1", "c1", "2026-11-21T06:00:00Z", b"one", '{"kernel":"6.1"}')
    assert store.record_report("r2", "c2", "2026-11-22T06:00:00Z", b"two", '{"kernel":"6.12"}')
    assert store.record_report("r3", "c1", "2020-01-01T00:00:00Z", b"three", '{"kernel":"6.1"}')
    old = ComboRow("c1", '{"kernel":"6.1"}', "r3", "2026-11-21T06:00:00Z", "2020-01-01T00:00:00Z")
    new = ComboRow("c2", '{"kernel":"6.12"}', "r2", "2026-11-22T06:00:00Z", "2026-11-22T06:00:00Z")
    assert store.rolls.combos(10) == [old, new]
    assert store.rolls.combos(1) == [old] and store.rolls.combos(0) == []
    assert store.rolls.report("c1") == store.report("r3")
    assert store.rolls.report("c3") is None
    assert store.rolls.before("r3") == store.report("r2")
    assert store.rolls.before("r1") is None


def test_a_report_that_is_seen_again_is_the_newest_of_its_combo_again(store: SqliteStore) -> None:
    for report in ("r1", "r2", "r1"):
        store.record_report(report, "c1", "2026-11-21T06:00:00Z", report.encode(), "{}")
    assert [row.report for row in store.rolls.combos(9)] == ["r1"]
    assert not store.record_report("r1", "c1", "2026-11-23T06:00:00Z", b"r1", "{}")


def test_combos_are_found_by_the_beginning_of_their_digest(store: SqliteStore) -> None:
    for name in ("sha256:ab1", "sha256:ab2", "sha256:b%_"):
        store.record_report(f"r{name}", name, "2026-11-21T06:00:00Z", b"", "{}")
    assert [row.digest for row in store.rolls.find("sha256:ab1")] == ["sha256:ab1"]
    assert len(store.rolls.find("sha256:a")) == 2
    assert store.rolls.find("sha256:%") == [] and store.rolls.find("sha256:_") == []


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM reports",
        "DELETE FROM combos",
        "UPDATE reports SET body = x'00'",
        "UPDATE reports SET at = 'then'",
        "UPDATE reports SET digest = 'other'",
    ],
)
def test_what_was_measured_is_never_deleted_or_rewritten(store: SqliteStore, statement: str) -> None:
    store.record_report("r1", "c1", "2026-11-21T06:00:00Z", b"one", "{}")
    with pytest.raises(sqlite3.IntegrityError, match=r"for ever|rewritten"):
        store._database.connection.execute(statement)
    assert store.report("r1") == ("r1", "c1", "2026-11-21T06:00:00Z", b"one")


def test_the_roll_back_set(store: SqliteStore) -> None:
    for number in (1, 2):
        store.record_report(f"r{number}", f"c{number}", "2026-11-21T06:00:00Z", b"%d" % number, "{}")
    assert store.rolls.add("c2", 3, AUDIT) and store.rolls.add("c1", 3, AUDIT)
    assert not store.rolls.add("c1", 3, AUDIT._replace(reason="again"))
    assert [(row.combo, row.uid, row.reason) for row in store.rolls.members()] == [
        ("c2", 1000, AUDIT.reason),
        ("c1", 1000, AUDIT.reason),
    ]
    assert [row.body for row in store.rolls.reports()] == [b"1", b"2"]
    store.record_report("r3", "c1", "2026-11-22T06:00:00Z", b"3", "{}")
    assert [row.body for row in store.rolls.reports()] == [b"2", b"3"]
    assert store.rolls.remove("c1", 3, AUDIT) and not store.rolls.remove("c1", 3, AUDIT)
    assert [row.combo for row in store.rolls.members()] == ["c2"]
    assert store.rolls.report("c1") is not None
    told = [(row.action, row.generation, row.detail) for row in store.audit(9)]
    assert told == [
        ("rollback-remove", 3, {"combo": "c1"}),
        ("rollback-add", 3, {"combo": "c1"}),
        ("rollback-add", 3, {"combo": "c2"}),
    ]


def test_the_roll_back_set_has_a_limit(store: SqliteStore) -> None:
    for number in range(limits.ROLLBACK_COMBOS + 1):
        store.record_report(f"r{number}", f"c{number}", "2026-11-21T06:00:00Z", b"", "{}")
    for number in range(limits.ROLLBACK_COMBOS):
        store.rolls.add(f"c{number}", 0, AUDIT)
    with pytest.raises(LimitExceeded, match="ROLLBACK_COMBOS"):
        store.rolls.add(f"c{limits.ROLLBACK_COMBOS}", 0, AUDIT)
    assert len(store.rolls.members()) == limits.ROLLBACK_COMBOS


def test_reports_of_the_first_schema_get_their_combos(tmp_path: Path) -> None:
    """As the first kvmneg left them: two combos, one seen again after the other, a clock that went back."""
    state = str(tmp_path / "state")
    SqliteStore(state).close()
    path = Path(state) / statedir.DATABASE
    path.unlink()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(
        f"PRAGMA application_id = {schema.APPLICATION_ID}; {migrations.MIGRATIONS[0]}; PRAGMA user_version = 1;"
    )
    rows = [("r1", "c1", "2026-01-01", b"1", 3), ("r2", "c2", "2026-01-02", b"2", 2)]
    rows.append(("r3", "c2", "2025-01-02", b"3", 4))
    connection.executemany("INSERT INTO reports VALUES (?, ?, ?, ?, ?)", rows)
    connection.close()
    with SqliteStore(state) as store:
        assert store.rolls.combos(9) == [
            ComboRow("c2", None, "r3", "2025-01-02", "2026-01-02"),
            ComboRow("c1", None, "r1", "2026-01-01", "2026-01-01"),
        ]
        store.record_report("r4", "c1", "2026-01-03", b"4", "{}")
        assert store.rolls.combos(1) == [ComboRow("c1", "{}", "r4", "2026-01-01", "2026-01-03")]
