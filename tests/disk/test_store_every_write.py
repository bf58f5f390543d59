# SPDX-License-Identifier: LGPL-2.1-or-later
"""The disk refuses the first, the second, … each write and sync of a change: a clear error, and nothing by half."""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.disk.recording import Disk

# The program that changes its store on that disk. Before each try the disk is told to fail the next change but n,
# until n is beyond what a change takes. It prints how many of them failed, by SQLite's word for it.
TRY_EACH = """
import hashlib, json, mmap, os, shutil, struct, sys
from collections import Counter
from kvmneg.errors import StoreError
from kvmneg.store.interface import Audit, Lease, ProposalRow
from kvmneg.store.levels import Change
from kvmneg.store.sqlite import SqliteStore

directory, copy, action, error, count, half = sys.argv[1:4] + [int(word) for word in sys.argv[4:]]
with open(os.environ["DISK_CONTROL"], "r+b") as file:
    control = mmap.mmap(file.fileno(), 40)

def seen(): return struct.unpack_from("=Q", control)[0]
def fail(after): struct.pack_into("=4Q", control, 8, seen() + after + 1, count, error, half)
def heal(): struct.pack_into("=4Q", control, 8, 0, 0, 0, 0)
def sha256(text): return hashlib.sha256(text.encode()).hexdigest()

store = SqliteStore(directory, verify=sha256)
store._database.connection.execute("PRAGMA wal_autocheckpoint = 15")  # of 1000 pages: its writes are among them
told = []
store.on_fault(lambda: told.append(store.fault is not None))
serial = 0
audit = Audit(0, 1, "2026-11-21T06:00:00Z", "a reason", "child")

def fence():
    text = f"fence {store.generation() + 1}\\n" * 800
    return sha256(text), text

def pin():
    digest, text = fence()
    store.pin(text, digest, expected_generation=store.generation(), audit=audit)

def propose(kind):
    digest, text = fence()
    row = ProposalRow(
        kind, digest, text, store.generation(), 0, False, "now", None if kind == "lower" else 5.0, 0, 1, "p", "r", "{}"
    )
    change = Change(f"{kind}-propose", {}, ("lower", digest, text) if kind == "lower" else None)
    store.levels.propose(change, row, expected_generation=store.generation(), audit=audit)

def lower(): propose("lower")

def measure():
    # what a commit and a change of the roll-back set need
    global serial
    serial += 1
    store.record_report(f"r{serial}", f"c{serial}", "now", b"report" * 600, "{}")

def roll(): assert store.rolls.add(f"c{serial}", store.generation(), audit)

def proposed(): measure(); roll(); propose("raise")

def commit():
    change = Change("raise-commit", {"left": 1}, ("raise", *fence()), (f"c{serial}",))
    store.levels.close(change, expected_generation=store.generation(), audit=audit)

def begin():
    global serial
    serial += 1
    grant = Lease(f"vm {serial}", sha256(str(serial)), 0, 0, 1, "2026-11-21T06:00:00Z", 600.0, "begun")
    store.leases.begin(grant, b"contract" * 600)

def reading(store):
    fence = store.fence()
    assert fence is None or fence.text == f"fence {fence.generation}\\n" * 800
    assert fence is None or fence.generation == store.generation()
    told = Counter(row.action for row in store.audit(100000))
    assert told["pin"] + told["lower-propose"] + told["raise-commit"] == store.generation()
    assert len(store.history(1000)) == store.generation()
    proposal, members = store.levels.proposal(), store.rolls.members()
    assert store.level().proposal == (proposal.kind if proposal else "")
    assert told["raise-propose"] - told["raise-commit"] == (store.level().proposal == "raise")
    assert told["rollback-add"] - told["raise-commit"] == len(members)
    assert {row.body for row in store.rolls.reports()} <= {b"report" * 600}
    assert all(body == b"contract" * 600 for _, body in store.leases.contracts_outstanding())
    return store.generation(), [grant.vm for grant in store.leases.outstanding()], told.total()

def elsewhere():
    # what the next start finds, should the process be killed now
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    with SqliteStore(copy, verify=sha256) as another:
        return reading(another)

changes = {"pin": pin, "begin": begin, "lower": lower, "roll": roll, "commit": commit}
change, prepare = changes[action], {"roll": measure, "commit": proposed}.get(action, lambda: None)
refusals = Counter()
for after in range(1000):
    prepare()
    before = reading(store)
    limit = seen() + after
    fail(after)
    refused = None
    try:
        change()
    except StoreError as caught:
        refused = caught
        assert refused.hint, refused
        assert store.fault is not None
        refusals[refused.fields["cause"]] += 1
        assert reading(store) == before  # served on, the disk as it is
        try:
            change()
            assert count == 1, "a change on a disk that takes none"
        except StoreError:
            assert count > 1
    reached = seen() > limit
    heal()
    kept = reading(store)
    if refused and count > 1:
        assert kept == before
        found = elsewhere()  # the change that failed at its sync may be there, whole: never more than that
        assert found[0] - kept[0] in (0, 1) and len(found[1]) - len(kept[1]) in (0, 1) and found[2] - kept[2] in (0, 1)
        store.retry()
        assert store.fault is None
    elif not refused:
        assert kept != before and elsewhere() == kept
        prepare()
    elif count == 1:
        prepare()  # the second try was made
    change()
    assert reading(store) != kept and store.fault is None and elsewhere() == reading(store)
    if not reached:
        break
assert told == [True, False] * (len(told) // 2)
store.close()
with SqliteStore(directory, verify=sha256) as again:
    reading(again)
print(json.dumps([after, sum(refusals.values()), sorted(refusals)]))
"""
FOR_EVER = 1 << 40


FAULTS = {
    "ENOSPC-on": ("ENOSPC", FOR_EVER, 0, "SQLITE_FULL"),
    "ENOSPC-on-half": ("ENOSPC", FOR_EVER, 1, "SQLITE_FULL"),
    "EIO-on": ("EIO", FOR_EVER, 0, "SQLITE_IOERR_WRITE"),
    "EIO-once": ("EIO", 1, 0, "SQLITE_IOERR_WRITE"),
    "EROFS-on": ("EROFS", FOR_EVER, 0, "SQLITE_IOERR_WRITE"),
}
# all changes are made by the same transactions: each fault under one of them, the worst under the others
WORST = ("ENOSPC-on-half", "EIO-once")
TRIED = [("pin", fault) for fault in FAULTS]
TRIED += [(action, fault) for action in ("begin", "lower", "roll", "commit") for fault in WORST]


@pytest.mark.parametrize(("action", "fault"), TRIED)
def test_each_write_and_sync_of_a_change_fails(
    disk: Disk, run: Callable[..., str], action: str, fault: str
) -> None:
    error, count, half, cause = FAULTS[fault]
    state, copy = disk.root / "state", disk.root.parent / "copy"
    tried, refused, causes = json.loads(
        run(TRY_EACH, state, copy, action, getattr(errno, error), count, half)
    )
    assert tried > 5
    assert refused > 3
    assert causes == sorted([cause, "SQLITE_IOERR_FSYNC"])
