# SPDX-License-Identifier: LGPL-2.1-or-later
"""The audit: written with the change or not at all, never changed, no number left out."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from kvmneg.errors import GenerationMismatch, StoreError
from kvmneg.store import audit as audits
from kvmneg.store.interface import Audit
from kvmneg.store.sqlite import SqliteStore

WHO = Audit(7, 42, "2026-11-21T06:00:00Z", "before the roll-out", "kvmneg")


@pytest.fixture
def store(tmp_path: Path):
    with SqliteStore(str(tmp_path / "state")) as opened:
        yield opened


def test_each_change_of_the_fence_has_a_row(store: SqliteStore) -> None:
    store.pin("text", "digest", expected_generation=0, audit=WHO)
    store.unpin(expected_generation=1, audit=WHO._replace(uid=8, reason="done"))
    newest, oldest = store.audit(10)
    assert oldest == (1, 1, "pin", WHO.at, 7, 42, "kvmneg", "before the roll-out", {"digest": "digest"})
    assert (newest.id, newest.generation, newest.action, newest.uid, newest.reason) == (
        2,
        2,
        "unpin",
        8,
        "done",
    )


def test_what_is_refused_leaves_no_row(store: SqliteStore) -> None:
    with pytest.raises(GenerationMismatch):
        store.pin("text", "digest", expected_generation=3, audit=WHO)
    assert store.audit(10) == []


def test_a_row_goes_with_its_transaction(store: SqliteStore) -> None:
    with pytest.raises(StoreError, match="cannot try: no"), store._changing("try") as connection:
        assert audits.append(connection, "roll-add", 0, WHO, {"combo": "x"}) == 1
        raise sqlite3.OperationalError("no")
    assert store.audit(10) == []


def test_pages_go_back_from_a_number(store: SqliteStore) -> None:
    with store._changing("fill") as connection:
        for number in range(5):
            audits.append(connection, "step", number, WHO)
    assert [row.id for row in store.audit(2)] == [5, 4]
    assert [row.id for row in store.audit(2, before=4)] == [3, 2]
    assert [row.id for row in store.audit(9, before=2)] == [1]
    assert store.audit(-1) == []


def test_words_that_are_no_unicode_are_kept_as_far_as_they_go(store: SqliteStore) -> None:
    with store._changing("write") as connection:
        audits.append(connection, "step", 0, WHO._replace(reason="\ud800!", process="\udcff"))
    assert (store.audit(1)[0].reason, store.audit(1)[0].process) == ("?!", "?")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM audit", "never rewritten"),
        ("UPDATE audit SET reason = ''", "never rewritten"),
        (
            "INSERT INTO audit SELECT id + 2, generation, action, at, uid, pid, process, reason, detail FROM audit",
            "no gaps",
        ),
        (
            "INSERT INTO audit SELECT id + 1, generation, '', at, uid, pid, process, reason, detail FROM audit",
            "CHECK constraint",
        ),
    ],
)
def test_a_hand_in_the_database_cannot_rewrite_it(tmp_path: Path, statement: str, message: str) -> None:
    with SqliteStore(str(tmp_path / "state")) as store:
        store.pin("text", "digest", expected_generation=0, audit=WHO)
    with (
        closing(sqlite3.connect(tmp_path / "state" / "kvmneg.sqlite")) as connection,
        pytest.raises(sqlite3.IntegrityError, match=message),
    ):
        connection.execute(statement)


def test_a_detail_that_was_edited_is_a_fault(tmp_path: Path) -> None:
    with SqliteStore(str(tmp_path / "state")) as store:
        store.pin("text", "digest", expected_generation=0, audit=WHO)
        with store._changing("break it") as connection:
            connection.execute("DROP TRIGGER audit_update")
            connection.execute("UPDATE audit SET detail = 'x'")
        with pytest.raises(StoreError, match="row 1 of the audit"):
            store.audit(1)
