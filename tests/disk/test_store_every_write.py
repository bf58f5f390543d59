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
from kvmneg.store.interface import Audit, Lease
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

def pin():
    text = f"fence {store.generation() + 1}\\n" * 800
    audit = Audit(0, 1, "2026-11-21T06:00:00Z", "a reason", "child")
    store.pin(text, sha256(text), expected_generation=store.generation(), audit=audit)

def begin():
    global serial
    serial += 1
    grant = Lease(f"vm {serial}", sha256(str(serial)), 0, 0, 1, "2026-11-21T06:00:00Z", 600.0, "begun")
    store.leases.begin(grant, b"contract" * 600)

def reading(store):
    fence = store.fence()
    assert fence is None or fence.text == f"fence {fence.generation}\\n" * 800
    assert fence is None or fence.generation == store.generation()
    assert len(store.history(1000)) == len(store.audit(1000)) == store.generation()
    assert all(body == b"contract" * 600 for _, body in store.leases.contracts_outstanding())
    return store.generation(), [grant.vm for grant in store.leases.outstanding()]

def elsewhere():
    # what the next start finds, should the process be killed now
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(directory, copy)
    with SqliteStore(copy, verify=sha256) as another:
        return reading(another)

change = {"pin": pin, "begin": begin}[action]
refusals = Counter()
for after in range(1000):
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
        assert found[0] - kept[0] in (0, 1) and len(found[1]) - len(kept[1]) in (0, 1)
        store.retry()
        assert store.fault is None
    elif not refused:
        assert kept != before and elsewhere() == kept
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


@pytest.mark.parametrize("action", ["pin", "begin"])
@pytest.mark.parametrize(
    "fault",
    [
        ("ENOSPC", FOR_EVER, 0, "SQLITE_FULL"),
        ("ENOSPC", FOR_EVER, 1, "SQLITE_FULL"),
        ("EIO", FOR_EVER, 0, "SQLITE_IOERR_WRITE"),
        ("EIO", 1, 0, "SQLITE_IOERR_WRITE"),
        ("EROFS", FOR_EVER, 0, "SQLITE_IOERR_WRITE"),
    ],
    ids=lambda fault: f"{fault[0]}-{'once' if fault[1] == 1 else 'on'}{'-half' if fault[2] else ''}",
)
def test_each_write_and_sync_of_a_change_fails(
    disk: Disk, run: Callable[..., str], action: str, fault: tuple[str, int, int, str]
) -> None:
    error, count, half, cause = fault
    state, copy = disk.root / "state", disk.root.parent / "copy"
    tried, refused, causes = json.loads(
        run(TRY_EACH, state, copy, action, getattr(errno, error), count, half)
    )
    assert tried > 5
    assert refused > 3
    assert causes == sorted([cause, "SQLITE_IOERR_FSYNC"])
