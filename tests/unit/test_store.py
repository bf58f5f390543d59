# SPDX-License-Identifier: LGPL-2.1-or-later
"""The embedded store on a healthy disk: fence, grants, reports, schema."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import subprocess
import sys
import zlib
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.errors import GenerationMismatch, LimitExceeded, NotPinned, StoreError, UsageError
from kvmneg.store import schema
from kvmneg.store.interface import Audit, FenceRow, HistoryRow, Holder, Lease
from kvmneg.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AUDIT = Audit(1000, 42, "2026-11-21T06:00:00Z", "before the 6.12 roll-out", "kvmneg")
VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def vm(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def grant(of: str = VM, digest: str = "a" * 64, uid: int = 1000, deadline: float = 600.0) -> Lease:
    return Lease(of, digest, 0, uid, 42, "2026-11-21T06:00:00Z", deadline, "begun")


def held(store: SqliteStore, of: str = VM) -> Lease:
    (found,) = store.leases.of(of)
    return found


def plain(lease: Lease) -> Lease:
    """A lease without what the store gave it."""
    return lease._replace(incarnation=0)


@pytest.fixture
def state(tmp_path: Path) -> str:
    return str(tmp_path / "state")


@pytest.fixture
def store(state: str) -> Iterator[SqliteStore]:
    with SqliteStore(state, verify=sha256) as opened:
        yield opened


def pin(store: SqliteStore, text: str, expected: int | None = None) -> FenceRow:
    return store.pin(text, sha256(text), expected_generation=expected, audit=AUDIT)


def synced_commits(store: SqliteStore, call: Callable[[], object]) -> int:
    """How many transactions that change something `call` makes: as many as there are syncs of the log."""
    commits = 0

    def count(statement: str) -> None:
        nonlocal commits
        commits += statement == "COMMIT"

    before = store._database.connection.total_changes
    store._database.connection.set_trace_callback(count)
    call()
    store._database.connection.set_trace_callback(None)
    return commits if store._database.connection.total_changes > before else 0


# The state directory and the schema


def test_a_new_state_directory_is_private_and_durable(store: SqliteStore, state: str) -> None:
    assert stat.S_IMODE(Path(state).stat().st_mode) == 0o700
    for path in Path(state).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path

    def pragma(name: str) -> object:
        return store._database.connection.execute(f"PRAGMA {name}").fetchone()[0]

    assert pragma("journal_mode") == "wal"
    assert pragma("synchronous") == 2  # FULL
    assert pragma("foreign_keys") == 1
    assert pragma("user_version") == len(schema.MIGRATIONS)
    assert pragma("application_id") == int.from_bytes(b"kvmn", "big")


def test_the_lock_names_its_holder_and_goes_with_it(store: SqliteStore, state: str) -> None:
    with pytest.raises(StoreError, match=str(os.getpid())) as caught:
        SqliteStore(state)
    assert caught.value.fields["pid"] == os.getpid()
    store.close()
    store.close()  # twice is once
    SqliteStore(state).close()


def test_the_lock_is_not_inherited_by_programs_the_daemon_runs(store: SqliteStore, state: str) -> None:
    # Inherited, it would outlive the daemon for as long as such a program runs.
    program = [sys.executable, "-P", "-c", "print(flush=True); input()"]
    child = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        store.close()
        SqliteStore(state).close()
    finally:
        child.communicate(b"\n")


def test_a_newer_schema_is_refused_and_left_alone(state: str) -> None:
    SqliteStore(state).close()
    newer = len(schema.MIGRATIONS) + 1
    with closing(sqlite3.connect(f"{state}/kvmneg.sqlite", isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version = {newer}")
    with pytest.raises(StoreError, match=f"schema version {newer}"):
        SqliteStore(state)
    assert sorted(path.name for path in Path(state).iterdir()) == ["kvmneg.sqlite", "lock"]


def test_the_ladder_takes_each_missing_step_whole_or_not(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with SqliteStore(state) as store:
        pin(store, "old")
    step = "CREATE TABLE later (x); INSERT INTO later VALUES (7)"
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step, "CREATE TABLE more (x); no SQL"))
        with pytest.raises(StoreError, match="syntax"):
            SqliteStore(state)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, step, "CREATE TABLE more (y)"))
    with SqliteStore(state) as store:
        assert store._database.connection.execute("PRAGMA user_version").fetchone() == (
            len(schema.MIGRATIONS),
        )
        assert store._database.connection.execute("SELECT x FROM later").fetchall() == [
            (7,)
        ]  # that step ran once
        assert store._database.connection.execute("SELECT y FROM more").fetchall() == []
        fence = store.fence()
    assert fence is not None
    assert fence.text == "old"


# The fence


def test_a_store_begins_with_no_fence(store: SqliteStore) -> None:
    assert store.generation() == 0
    assert store.fence() is None
    assert store.past_fence(0) is None
    assert store.history(10) == []
    with pytest.raises(NotPinned):
        store.unpin(expected_generation=None, audit=AUDIT)


def test_a_fence_and_its_history_survive_the_process(state: str) -> None:
    other = AUDIT._replace(uid=0, reason="not needed", at="2026-11-22T06:00:00Z")
    first = FenceRow(1, sha256("one"), "one", AUDIT.at, AUDIT.uid, AUDIT.pid, AUDIT.reason)
    with SqliteStore(state) as store:
        assert pin(store, "one", expected=0) == first
        assert store.fence() == first
        assert pin(store, "two").generation == 2
        assert store.unpin(expected_generation=2, audit=other) == 3
        assert store.fence() is None
    with SqliteStore(state) as store:
        assert store.generation() == 3
        assert store.fence() is None
        assert pin(store, "four", expected=3).generation == 4
        assert store.past_fence(1) == first
        assert store.past_fence(3) is None
        rows = store.history(3)
    assert [(row.action, row.generation, row.digest) for row in rows] == [
        ("pin", 4, sha256("four")),
        ("unpin", 3, sha256("two")),
        ("pin", 2, sha256("two")),
    ]
    assert rows[1] == HistoryRow("unpin", 3, other.at, 0, 42, other.reason, sha256("two"), "kvmneg")


def test_a_generation_is_compared_and_swapped(store: SqliteStore) -> None:
    pin(store, "one")
    for attempt in (
        lambda: pin(store, "two", expected=0),
        lambda: pin(store, "two", expected=2),
        lambda: store.unpin(expected_generation=2, audit=AUDIT),
    ):
        with pytest.raises(GenerationMismatch) as caught:
            attempt()
        assert caught.value.fields["actual"] == 1
        assert caught.value.fields["expected"] in {0, 2}
    assert len(store.history(10)) == store.generation() == 1


def test_a_pin_is_one_transaction(store: SqliteStore) -> None:
    assert synced_commits(store, lambda: pin(store, "one")) == 1


def test_history_gives_no_more_than_asked(store: SqliteStore) -> None:
    for text in "abc":
        pin(store, text)
    assert [row.generation for row in store.history(2)] == [3, 2]
    assert store.history(0) == []
    assert store.history(-1) == []  # to SQLite a negative LIMIT is none


def test_words_that_utf8_cannot_hold_do_not_stop_a_pin(store: SqliteStore) -> None:
    odd = AUDIT._replace(reason="half \ud800 a pair", process="\udcff")
    fence = store.pin("one", sha256("one"), expected_generation=None, audit=odd)
    assert fence.reason == "half ? a pair"
    assert store.fence() == fence


@pytest.mark.parametrize("statement", ["UPDATE fence_history SET reason = 'x'", "DELETE FROM fence_history"])
def test_history_is_never_rewritten(store: SqliteStore, statement: str) -> None:
    pin(store, "one")
    with pytest.raises(sqlite3.IntegrityError, match="never rewritten"):
        store._database.connection.execute(statement)


def test_a_generation_is_never_left_out(store: SqliteStore) -> None:
    pin(store, "one")
    for generation in (1, 3):
        with pytest.raises(sqlite3.IntegrityError):
            store._database.connection.execute(
                "INSERT OR REPLACE INTO fence_history VALUES (?, 'pin', 'd', 't', 'at', 0, 0, 'p', 'r', NULL)",
                (generation,),
            )


def test_a_wrong_digest_does_not_go_in(store: SqliteStore) -> None:
    with pytest.raises(ValueError, match="digest"):
        store.pin("one", sha256("two"), expected_generation=None, audit=AUDIT)
    assert store.generation() == 0


# Contracts and leases


def test_a_grant_runs_its_course(state: str) -> None:
    with SqliteStore(state) as store:
        assert plain(store.leases.begin(grant(), b"contract")) == grant()
        assert plain(held(store)) == grant()
        assert store.leases.of(vm(99)) == []
        assert store.leases.holds("a" * 64)
        assert not store.leases.holds("b" * 64)
        first = held(store)
    with SqliteStore(state) as store:
        assert store.leases.outstanding() == [first]
        assert store.leases.contracts_outstanding() == [("a" * 64, b"contract")]
        runs = first._replace(state="started", boot="boot-1")
        assert store.leases.started(first, "boot-1") == runs
        assert store.leases.started(first, "boot-1").state == "started"
        assert store.leases.outstanding() == [runs]
        assert store.leases.end(first) == 1
        assert store.leases.end(first) == 0
        assert store.leases.of(VM) == []
        assert not store.leases.holds("a" * 64)
        assert store.leases.outstanding() == []
        assert store.leases.contracts_outstanding() == []
        assert store.leases.contract("a" * 64) == b"contract"  # for a while
        assert store.leases.contract("b" * 64) is None
        with pytest.raises(UsageError):
            store.leases.started(first, "boot-1")
        store.leases.begin(grant(digest="b" * 64), b"another")  # the same VM, next life
        assert store.leases.contracts_outstanding() == [("b" * 64, b"another")]
        assert held(store).incarnation > first.incarnation
        assert store.leases.end(first) == 0  # what is said of the one before does not hit it
        assert held(store).digest == "b" * 64


def test_each_user_has_vms_of_their_own(store: SqliteStore) -> None:
    store.leases.begin(grant(uid=1000), b"contract")
    store.leases.begin(grant(uid=7, digest="b" * 64), b"another")  # whoever is first blocks nobody
    assert [(one.uid, one.digest[0]) for one in store.leases.of(VM)] == [(7, "b"), (1000, "a")]


def test_an_incarnation_is_never_used_again(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LEASES_FINISHED", 0)  # what has ended is forgotten at once
    seen = set()
    for _ in range(4):
        lease = store.leases.begin(grant(), b"contract")
        store.leases.end(lease)
        seen.add(lease.incarnation)
    assert len(seen) == 4


def test_a_lease_ends_with_its_last_holder(store: SqliteStore) -> None:
    old, new, other = Holder(10, 1, "process"), Holder(11, 2, "connection"), Holder(12, 3, "process")
    lease = store.leases.begin(grant(), b"contract", old)
    store.leases.hold(lease, new)
    store.leases.hold(lease, new)  # again is once
    with pytest.raises(LimitExceeded, match="HOLDERS_PER_LEASE"):
        store.leases.hold(lease, other)
    assert store.leases.holders() == {lease.incarnation: [old, new]}
    assert store.leases.expire(1e12) == []  # held by a process, begun or not
    assert store.leases.let_go([(lease.incarnation, other)]) == []  # it was none
    assert store.leases.let_go([(lease.incarnation, old)]) == []
    assert store.leases.speak_of(11, 2, "")
    assert store.leases.let_go([(lease.incarnation, new), (lease.incarnation, new)]) == [lease.incarnation]
    assert store.leases.outstanding() == [] and store.leases.holders() == {}
    assert not store.leases.speak_of(11, 2, "")


def test_a_saved_vm_counts_and_nobody_keeps_it(store: SqliteStore) -> None:
    lease = store.leases.begin(grant(), b"contract", Holder(10, 1, "process"))
    assert store.leases.saved(lease).state == "saved"
    assert store.leases.holders() == {} and store.leases.expire(1e12) == []
    assert [one.state for one in store.leases.outstanding()] == ["saved"]


def test_what_a_vm_reported_is_kept_while_it_counts(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.leases.begin(grant(vm(1)), b"contract")
    second = store.leases.begin(grant(vm(2)), b"contract")
    store.leases.report(first, "c" * 64, b"more")
    store.leases.report(second, "c" * 64, b"more")
    store.leases.report(second, "d" * 64, b"less")
    assert [store.leases.reported(digit * 64) for digit in "cd"] == [b"more", b"less"]
    assert [one.reported for one in store.leases.outstanding()] == ["c" * 64, "d" * 64]
    monkeypatch.setattr(limits, "LEASES_FINISHED", 0)
    store.leases.end(first)
    assert [store.leases.reported(digit * 64) for digit in "cd"] == [None, b"less"]
    rows = store._database.connection.execute("SELECT digest FROM reported_sets").fetchall()
    assert rows == [("d" * 64,)]


def test_begin_again_keeps_the_first_grant(store: SqliteStore) -> None:
    first = store.leases.begin(grant(), b"contract")
    store.leases.started(first, "boot-1")
    again = grant(deadline=9999.0)
    runs = first._replace(state="started", boot="boot-1")
    assert store.leases.begin(again, b"contract") == runs
    assert synced_commits(store, lambda: store.leases.begin(again, b"contract")) == 0


def test_a_vm_holds_one_contract(store: SqliteStore) -> None:
    store.leases.begin(grant(), b"contract")
    with pytest.raises(UsageError) as caught:
        store.leases.begin(grant(digest="b" * 64), b"another")
    assert caught.value.fields == {"vm": VM, "held": "a" * 64, "asked": "b" * 64}
    assert [plain(one) for one in store.leases.outstanding()] == [grant()]
    assert store.leases.contract("b" * 64) is None


def test_vms_share_a_contract_of_the_same_bytes_only(store: SqliteStore) -> None:
    store.leases.begin(grant(vm(1)), b"contract")
    store.leases.begin(grant(vm(2)), b"contract")
    assert store.leases.contracts_outstanding() == [("a" * 64, b"contract")]
    with pytest.raises(StoreError, match="other bytes"):
        store.leases.begin(grant(vm(3)), b"forged")
    assert len(store.leases.outstanding()) == 2


def test_distinct_contracts_are_limited(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files lie in memory, and those that come with guests may be large. Each counts once."""
    monkeypatch.setattr(limits, "CONTRACTS_PER_UID", 2)
    monkeypatch.setattr(limits, "CONTRACTS", 3)

    def begin(number: int, digit: str, uid: int = 1000) -> Lease:
        return store.leases.begin(grant(vm(number), digit * 64, uid), digit.encode())

    def refused(number: int, digit: str, uid: int = 1000) -> object:
        with pytest.raises(LimitExceeded) as caught:
            begin(number, digit, uid)
        return caught.value.fields["limit"]

    begin(1, "a")
    begin(2, "a")
    begin(3, "b")
    assert refused(4, "c") == "CONTRACTS_PER_UID"
    begin(4, "c", 1001)
    begin(5, "c")  # it is there
    assert refused(6, "d", 1001) == "CONTRACTS"
    begin(6, "d", limits.SYSTEM_UIDS - 1)
    begin(7, "e", limits.SYSTEM_UIDS - 1)
    assert refused(8, "f", 0) == "CONTRACTS"
    store.leases.end(held(store, vm(3)), held(store, vm(5)))
    assert refused(8, "b") == "CONTRACTS"  # kept for the record, and held by nobody


def test_distinct_reports_are_limited(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    leases = [store.leases.begin(grant(vm(number)), b"contract") for number in range(3)]
    monkeypatch.setattr(limits, "CONTRACTS_PER_UID", 2)
    store.leases.report(leases[0], "a" * 64, b"a")
    store.leases.report(leases[1], "b" * 64, b"b")
    store.leases.report(leases[1], "c" * 64, b"c")  # in the place of the other
    with pytest.raises(LimitExceeded, match="CONTRACTS_PER_UID"):
        store.leases.report(leases[2], "d" * 64, b"d")
    store.leases.report(leases[2], "a" * 64, b"a")
    with pytest.raises(LimitExceeded, match="CONTRACTS_PER_UID"):
        store.leases.report(leases[2], "d" * 64, b"d")  # the other one stays where it is


@pytest.mark.parametrize("digest", ["A" * 64, "a" * 63, "../" + "a" * 61])
def test_a_contract_digest_is_64_hex_digits(store: SqliteStore, digest: str) -> None:
    with pytest.raises(StoreError):  # it becomes a file's name
        store.leases.begin(grant(digest=digest), b"contract")
    assert store.leases.outstanding() == []


def test_grants_are_limited_by_user_and_in_all(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LEASES_PER_UID", 2)
    monkeypatch.setattr(limits, "LEASES", 3)
    store.leases.begin(grant(vm(1)), b"contract")
    store.leases.begin(grant(vm(2)), b"contract")
    store.leases.started(held(store, vm(2)), "")  # counts like one begun
    with pytest.raises(LimitExceeded) as caught:
        store.leases.begin(grant(vm(3)), b"contract")
    assert caught.value.fields["limit"] == "LEASES_PER_UID"
    store.leases.begin(grant(vm(3), uid=1001), b"contract")
    with pytest.raises(LimitExceeded) as caught:
        store.leases.begin(grant(vm(4), uid=1002), b"contract")
    assert caught.value.fields["limit"] == "LEASES"
    monkeypatch.setattr(limits, "LEASES_RESERVED", 1)  # many users do not keep the system's from theirs
    system = store.leases.begin(grant(vm(4), uid=limits.SYSTEM_UIDS - 1), b"contract")
    with pytest.raises(LimitExceeded):
        store.leases.begin(grant(vm(5), uid=0), b"contract")
    store.leases.end(system)
    assert store.leases.begin(grant(vm(1)), b"contract").vm == vm(1)  # the grant it has costs nothing
    store.leases.end(held(store, vm(1)))
    store.leases.begin(grant(vm(4), uid=1002), b"contract")


def test_finished_grants_do_not_fill_the_disk(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LEASES_FINISHED", 2)
    store.leases.begin(grant(vm(99), "f" * 64), b"held throughout")
    for number in range(5):
        digest = f"{number:064x}"
        store.leases.begin(grant(vm(number), digest), digest.encode())
        store.leases.end(held(store, vm(number)))
    kept = [store.leases.contract(f"{number:064x}") is not None for number in range(5)]
    assert kept == [False, False, False, True, True]
    assert store.leases.contracts_outstanding() == [("f" * 64, b"held throughout")]
    assert store._database.connection.execute("SELECT COUNT(*) FROM grants").fetchone() == (3,)


def test_the_indexes_serve_the_limits_and_the_clock(store: SqliteStore) -> None:
    # with 16384 grants held, each of these runs at every Begin or every second
    for query, index in (
        ("SELECT COUNT(*) FROM grants WHERE finished IS NULL AND uid = 1", "grants_by_uid"),
        ("SELECT vm FROM grants WHERE vm = 'x' AND finished IS NULL", "grants_held"),
        ("SELECT vm FROM grants WHERE state = 'begun' AND deadline <= 5", "grants_due"),
        ("SELECT MAX(deadline) FROM grants WHERE state = 'begun'", "grants_due"),
        ("SELECT MAX(finished) FROM grants WHERE finished IS NOT NULL", "grants_finished"),
    ):
        plan = str(store._database.connection.execute(f"EXPLAIN QUERY PLAN {query}").fetchall())
        assert index in plan, query


# The clock


def test_an_unstarted_grant_expires_once_and_for_good(store: SqliteStore) -> None:
    store.leases.begin(grant(vm(1), deadline=1600.0), b"contract")
    second = store.leases.begin(grant(vm(2), deadline=1500.0), b"contract")
    store.leases.begin(grant(vm(3), deadline=1500.0), b"contract")
    store.leases.started(held(store, vm(3)), "")
    assert store.leases.expire(1499.9) == []
    assert store.leases.expire(1500.0) == [vm(2)]
    assert store.leases.expire(1000.0) == []  # the clock is set back: what expired stays so
    with pytest.raises(UsageError):
        store.leases.started(second, "")
    assert [one.vm for one in store.leases.outstanding()] == [vm(1), vm(3)]
    assert store.leases.expire(1e12) == [vm(1)]
    assert [one.vm for one in store.leases.outstanding()] == [vm(3)]


def test_a_clock_set_back_gives_at_most_one_more_term(store: SqliteStore) -> None:
    term = limits.LEASE_UNSTARTED_SECONDS
    store.leases.begin(grant(deadline=1_000_000.0 + term), b"contract")
    back = 900_000.0
    assert store.leases.expire(back) == []
    assert store.leases.outstanding()[0].deadline == back + term
    assert store.leases.expire(back + term - 1) == []  # not a second early
    assert store.leases.expire(back + term) == [VM]


def test_a_clock_once_ahead_does_not_count_against_younger_grants(store: SqliteStore) -> None:
    assert store.leases.expire(1e12) == []
    store.leases.begin(grant(deadline=1000.0 + limits.LEASE_UNSTARTED_SECONDS), b"contract")
    assert store.leases.expire(1001.0) == []
    assert store.leases.outstanding()[0].deadline == 1000.0 + limits.LEASE_UNSTARTED_SECONDS


def test_nothing_is_written_when_nothing_is_due(store: SqliteStore) -> None:
    store.leases.begin(grant(deadline=600.0), b"contract")
    assert synced_commits(store, lambda: store.leases.expire(1.0)) == 0


# Reports


def test_reports_are_kept_once_and_the_latest_is_the_last_recorded(state: str) -> None:
    body = zlib.compress(b'{"format":"kvmneg.report/1"}')
    with SqliteStore(state) as store:
        assert store.latest_report() is None
        store.record_report("r1", "c1", "2026-11-21T06:00:00Z", body)
        store.record_report("r2", "c2", "2020-01-01T00:00:00Z", b"two")  # a clock that went back
    with SqliteStore(state) as store:
        latest = store.latest_report()
        assert latest is not None
        assert latest.digest == "r2"
        store.record_report("r1", "c1", "2026-11-23T06:00:00Z", body)  # back on the old kernel
        assert store.latest_report() == store.report("r1") == ("r1", "c1", "2026-11-21T06:00:00Z", body)
        again = synced_commits(store, lambda: store.record_report("r1", "c1", "2026-11-24T06:00:00Z", body))
        assert again == 0
        assert store.report("r2") == ("r2", "c2", "2020-01-01T00:00:00Z", b"two")
        assert store.report("r3") is None
