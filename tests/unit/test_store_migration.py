# SPDX-License-Identifier: LGPL-2.1-or-later
"""A database as the first version left it is opened by today's, and everything in it is kept and understood.

tests/unit/data/store-1.sql was written by that version's store: three pins and an unpin, five contracts of which one
was ended and one expired, two reports of which the first was measured again.
"""

from __future__ import annotations

import sqlite3
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.features.report import Report
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence
from kvmneg.service.leases.contracts import ContractFiles
from kvmneg.service.node import Node
from kvmneg.service.watching.recorded import RecordedMeasurer
from kvmneg.store import schema
from kvmneg.store.interface import Audit
from kvmneg.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Iterator

DUMP = Path(__file__).parent / "data/store-1.sql"
RECORDED = Path(__file__).parents[2] / "kvmneg/data/recorded-host.json"
TABLES = {
    "fence_history": "generation, action, digest, text, at, uid, pid, process, reason",
    "grants": "id, vm, digest, generation, uid, pid, begun_at, deadline, state, finished",
    "contracts": "digest, body",
    "reports": "digest, combo_digest, at, body, seen",
}


def digest_of(text: str) -> str:
    return Fence.parse(text).digest


def vm(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def rows(connection: sqlite3.Connection) -> dict[str, list[tuple[Any, ...]]]:
    return {
        table: connection.execute(f"SELECT {columns} FROM {table} ORDER BY 1").fetchall()
        for table, columns in TABLES.items()
    }


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory of the first version."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    connection = sqlite3.connect(folder / "kvmneg.sqlite", isolation_level=None)
    connection.executescript(DUMP.read_text("utf-8"))
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    connection.close()
    return folder


@pytest.fixture
def before(state: Path) -> dict[str, list[tuple[Any, ...]]]:
    """What was in it, read with no store of ours."""
    connection = sqlite3.connect(state / "kvmneg.sqlite")
    found = rows(connection)
    connection.close()
    return found


@pytest.fixture
def store(state: Path, before: object) -> Iterator[SqliteStore]:
    """Opened by today's store, after `before` was read."""
    with SqliteStore(str(state), verify=digest_of) as opened:
        yield opened


def test_every_row_is_kept(store: SqliteStore, before: dict[str, list[tuple[Any, ...]]]) -> None:
    connection = store._database.connection
    assert connection.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS),)
    assert rows(connection) == before
    assert {table: len(found) for table, found in before.items()} == {
        "fence_history": 4,
        "grants": 5,
        "contracts": 2,
        "reports": 2,
    }


def test_fence_and_history_are_understood(store: SqliteStore) -> None:
    fence = store.fence()
    assert fence is not None
    assert (store.generation(), fence.generation, fence.digest) == (4, 4, digest_of(fence.text))
    assert [(row.action, row.generation, row.uid, row.pid, row.reason) for row in store.history(10)] == [
        ("pin", 4, 1000, 4004, "again"),
        ("unpin", 3, 1000, 4003, "nothing"),
        ("pin", 2, 1000, 4002, "before the 6.12 roll-out; ünïcode"),
        ("pin", 1, 1000, 4001, 'the hosts of rack 4, "wide"'),
    ]
    wide = store.past_fence(1)
    assert wide is not None
    assert wide.digest == digest_of(wide.text) != fence.digest
    assert store.past_fence(3) is None


def test_contracts_are_held_as_before(store: SqliteStore) -> None:
    assert [(one.vm, one.uid, one.state) for one in store.leases.outstanding()] == [
        (vm(1), 1000, "begun"),
        (vm(2), 1001, "started"),
        (vm(3), 1000, "started"),
    ]
    held = store.leases.contracts_outstanding()
    assert len(held) == 2
    for digest, body in held:
        assert Contract.from_binary(body).digest == f"sha256:{digest}"
        assert Contract.from_binary(body).fence[0] == 2
    assert store.leases.end(*store.leases.of(vm(3)))
    assert store.leases.started(store.leases.of(vm(1))[0], "").state == "started"


def test_reports_are_understood(store: SqliteStore) -> None:
    latest = store.latest_report()
    assert latest is not None
    assert latest.at == "2026-09-01T09:59:00Z"  # the first, seen again after the second
    for (digest,) in store._database.connection.execute("SELECT digest FROM reports"):
        row = store.report(digest)
        assert row is not None
        assert Report.loads(zlib.decompress(row.body)).digest() == digest


def test_life_goes_on(store: SqliteStore, state: Path) -> None:
    audit = Audit(0, 1, "2026-11-21T06:00:00Z", "with today's", "kvmneg")
    fence = store.fence()
    assert fence is not None
    assert store.pin(fence.text, fence.digest, expected_generation=4, audit=audit).generation == 5
    node = Node(store, RecordedMeasurer(str(RECORDED)), ContractFiles(str(state.parent / "contracts")))
    assert (node.generation, node.fence_digest) == (5, fence.digest)
    assert len(node.files.digests()) == 2
    assert store.copy_out("now")
    with pytest.raises(sqlite3.IntegrityError, match="one by one"):
        store._database.connection.execute(
            "INSERT INTO fence_history (generation, action, digest, text, at, uid, pid, process, reason)"
            " VALUES (7, 'pin', 'd', 't', 'at', 0, 0, 'p', 'r')"
        )
