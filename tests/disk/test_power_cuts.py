# SPDX-License-Identifier: LGPL-2.1-or-later
"""The power goes after any write: what was acknowledged is there, and nothing is there by half.

A kill never shows a sync that is missing: the kernel writes what the process left. Here each prefix of what a real
store did to its disk is replayed with what was not synced dropped, torn or reordered (model.py), and opened.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from kvmneg.errors import StoreError
from kvmneg.store.interface import Audit
from kvmneg.store.opening import open_store
from kvmneg.store.sqlite import SqliteStore
from tests.disk import model
from tests.disk.recording import Operation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.disk.model import Tree
    from tests.disk.recording import Disk

CUTS = 1  # at each operation, beside the extremes
LONG_CUTS = 400

# The program whose disk loses power. Each step is marked before it is asked for and when it is acknowledged.
WORKLOAD = """
import ctypes, hashlib, os, signal, sys
from kvmneg.store import audit as audit_of, levels, schema, sqlite, statedir
from kvmneg.store.interface import Audit, Lease, ProposalRow
from kvmneg.store.levels import Change
from kvmneg.store.sqlite import SqliteStore

directory, sabotage = sys.argv[1:]
exec(sabotage)
mark = ctypes.CDLL(None).disk_mark
generation = 0

def do(what, function):
    mark(f"ask {what}".encode())
    function()
    mark(f"done {what}".encode())

def sha256(text): return hashlib.sha256(text.encode()).hexdigest()

def audit(): return Audit(0, 1, "2026-11-21T06:00:00Z", f"reason {generation}", "child")

def fence():
    text = f"fence {generation}\\n" * 400
    return sha256(text), text

def pin(store):
    global generation
    generation += 1
    digest, text = fence()
    do(f"pin {generation}", lambda: store.pin(text, digest, expected_generation=generation - 1, audit=audit()))

def propose(store, kind):
    global generation
    lowers, base = kind == "lower", generation
    generation += lowers
    digest, text = fence() if lowers else (sha256("above"), "above")
    row = ProposalRow(kind, digest, text, base, 0, False, "now", None if lowers else 5.0, 0, 1, "child", "r", "{}")
    change = Change(f"{kind}-propose", {}, ("lower", digest, text) if lowers else None)
    do(f"{kind} {generation}", lambda: store.levels.propose(change, row, expected_generation=base, audit=audit()))

def finish(store):
    change = Change("lower-finish", {})
    do(f"finish {generation}", lambda: store.levels.close(change, expected_generation=generation, audit=audit()))

def commit(store, left):
    # the raised fence, and with it a combo leaves the roll-back set
    global generation
    generation += 1
    change = Change("raise-commit", {}, ("raise", *fence()), (left,))
    do(f"commit {left}", lambda: store.levels.close(change, expected_generation=generation - 1, audit=audit()))

def measure(store, combo):
    do(f"measure {combo}", lambda: store.record_report(f"r{combo}", combo, "now", combo.encode() * 300, "{}"))

def roll(store, combo): do(f"roll {combo}", lambda: store.rolls.add(combo, generation, audit()))

def begin(store, vm):
    grant = Lease(vm, sha256(vm), generation, 0, 1, "2026-11-21T06:00:00Z", 600.0, "begun")
    do(f"begin {vm}", lambda: store.leases.begin(grant, vm.encode() * 300))

def end(store, vm): do(f"end {vm}", lambda: store.leases.end(*store.leases.of(vm)))

with SqliteStore(directory, verify=sha256) as store:
    pin(store); begin(store, "a"); begin(store, "b"); pin(store); end(store, "a")
store = SqliteStore(directory, verify=sha256)
store._database.connection.execute("PRAGMA wal_autocheckpoint = 12")  # of 1000 pages: the log begins anew soon
for vm in "cd":
    begin(store, vm); pin(store)
end(store, "b"); measure(store, "x"); roll(store, "x"); propose(store, "lower"); end(store, "c"); finish(store)
measure(store, "y"); roll(store, "y"); propose(store, "raise"); commit(store, "x")
propose(store, "lower"); propose(store, "lower")
store._database.connection.close()  # without the store's own end: the lock stays, as it does when it is killed
store._database.connection = None
os.close(store._lock)
store = SqliteStore(directory, verify=sha256)
pin(store); begin(store, "g"); pin(store); pin(store)
os.kill(os.getpid(), signal.SIGKILL)
"""


class Promise(NamedTuple):
    """What was acknowledged so far, and the step that was asked for and is on its way, or "".

    `held` are the VMs with a contract, `proposal` is what is proposed, `rolls` the roll-back set, `told` counts the
    audit's rows.
    """

    generation: int = 0
    held: frozenset[str] = frozenset()
    proposal: str = ""
    rolls: frozenset[str] = frozenset()
    told: int = 0
    asked: str = ""

    def marked(self, words: str) -> Promise:
        event, what = words.split(" ", 1)
        return self._replace(asked=what) if event == "ask" else self.then(what)

    def then(self, what: str) -> Promise:
        verb, value = what.split()
        now = self._replace(asked="")
        if verb in ("begin", "end"):
            return now._replace(held=self.held | {value} if verb == "begin" else self.held - {value})
        if verb == "measure":
            return now
        now = now._replace(told=self.told + 1)
        if verb == "roll":
            return now._replace(rolls=self.rolls | {value})
        if verb == "commit":
            return now._replace(generation=self.generation + 1, proposal="", rolls=self.rolls - {value})
        return now._replace(generation=int(value), proposal=verb if verb in ("raise", "lower") else "")

    def allows(self) -> list[Promise]:
        """As the store may be found."""
        return [self._replace(asked=""), *([self.then(self.asked)] if self.asked else [])]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def cuts(operations: list[Operation], chance: random.Random, number: int) -> Iterator[tuple[Promise, Tree]]:
    """Each different tree that a power cut after each operation may leave, with what was promised by then."""
    disk, promise = model.Disk(), Promise()
    known: set[tuple[Promise, int]] = set()
    for operation in operations:
        if operation.kind == "mark":
            promise = promise.marked(operation.data.decode())
        else:
            disk.do(operation)
        for tree in (*disk.extremes(), *(disk.after_power_cut(chance) for _ in range(number))):
            key = promise, hash(frozenset(tree.items()))
            if key not in known:
                known.add(key)
                yield promise, tree


def put(tree: Tree, root: str, folder: Path) -> Path:
    """Write a tree out below `folder`; the state directory in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path, content in tree.items():
        place = folder / Path(path).relative_to(root)
        if content is None:
            place.mkdir(mode=0o700)
        else:
            place.write_bytes(content)
    return folder / "state"


def loss(state: Path, promise: Promise) -> str:
    """What the store lost, or has by half; "" where it kept its promise."""
    try:
        with SqliteStore(str(state), verify=sha256) as store:
            generation, proposal = store.generation(), store.levels.proposal()
            found = Promise(
                generation,
                frozenset(grant.vm for grant in store.leases.outstanding()),
                proposal.kind if proposal else "",
                frozenset(row.combo for row in store.rolls.members()),
                len(store.audit(1000)),
            )
            if found not in promise.allows() or store.level().proposal != found.proposal:
                return f"found {found}, not {promise}"
            reports = {row.combo_digest: row.body for row in store.rolls.reports()}
            fence = store.fence()
            rows = [(row.generation, row.reason) for row in store.history(1000)]
            contracts = dict(store.leases.contracts_outstanding())
            audit = Audit(0, 1, "2026-11-21T06:00:00Z", "life goes on", "pytest")
            store.pin("next", sha256("next"), expected_generation=generation, audit=audit)
    except StoreError as error:
        return str(error)
    whole = {
        "fence": (fence.text if fence else "", f"fence {generation}\n" * 400 if generation else ""),
        "history": (rows, [(number, f"reason {number}") for number in range(generation, 0, -1)]),
        "contract": (contracts, {sha256(vm): vm.encode() * 300 for vm in found.held}),
        "report": (reports, {combo: combo.encode() * 300 for combo in found.rolls}),
    }
    if proposal is not None and fence is not None:
        whole["proposal"] = proposal.text, fence.text if proposal.kind == "lower" else "above"
    return "; ".join(
        f"half a {name}: {is_there}" for name, (is_there, all_of_it) in whole.items() if is_there != all_of_it
    )


def losses(disk: Disk, scratch: Path, number: int) -> Iterator[str]:
    """What each power cut lost, "" for nothing."""
    for promise, tree in cuts(disk.operations(), random.Random(20261121), number):
        yield loss(put(tree, str(disk.root), scratch / "disk"), promise)


def test_a_power_cut_loses_nothing_that_was_acknowledged(
    disk: Disk, run: Callable[..., str], scratch: Path, pytestconfig: pytest.Config
) -> None:
    run(WORKLOAD, disk.root / "state", "", status=-9)
    marks = [one.data.decode() for one in disk.operations() if one.kind == "mark"]
    assert marks[-1] == "done pin 11"
    number = LONG_CUTS if pytestconfig.getoption("long") else CUTS
    found = list(losses(disk, scratch, number))
    assert len(found) > 500
    assert [one for one in found if one] == []


SABOTAGES = {
    "no sync at all": "schema._configure = lambda c: [c.execute('PRAGMA ' + p) for p in"
    " ('locking_mode = EXCLUSIVE', 'synchronous = OFF')]",
    "syncs at checkpoints only": "schema._configure = lambda c: [c.execute('PRAGMA ' + p) for p in"
    " ('locking_mode = EXCLUSIVE', 'synchronous = NORMAL')]",
    "a new directory's name is not synced": "statedir.sync_directory = lambda directory: None",
    "what is proposed, and then its audit": "levels.audits = type('', (), {'append': lambda c, *row:"
    " [c.execute('COMMIT'), c.execute('BEGIN'), audit_of.append(c, *row)]})",
}


@pytest.mark.parametrize("sabotage", SABOTAGES.values(), ids=SABOTAGES)
def test_the_replay_finds_what_is_left_out(
    disk: Disk, run: Callable[..., str], scratch: Path, sabotage: str
) -> None:
    """A test of the test above: without it, it might be blind."""
    run(WORKLOAD, disk.root / "state", sabotage, status=-9)
    assert any(losses(disk, scratch, 0))


# A database whose log has the newest fence, and a page that is broken: what lies below the log is sound, and older.
# Then what a daemon does that starts on it, and what an admin has it do.
LOSS = """
import ctypes, hashlib, os, signal, sqlite3, sys
from kvmneg.store.interface import Audit
from kvmneg.store.opening import open_store
from kvmneg.store.sqlite import SqliteStore

directory = sys.argv[1]
mark = ctypes.CDLL(None).disk_mark
audit = Audit(0, 1, "2026-11-21T06:00:00Z", "a reason", "child")
def sha256(text): return hashlib.sha256(text.encode()).hexdigest()
def pin(store, text): store.pin(text, sha256(text), expected_generation=None, audit=audit)

with SqliteStore(directory, verify=sha256) as store:
    pin(store, "fence 1"); pin(store, "fence 2")
store = SqliteStore(directory, verify=sha256)
pin(store, "fence 3")
store.copy_out("now")
raw = store._database.connection
raw.executescript("PRAGMA writable_schema = ON; BEGIN; UPDATE sqlite_schema SET rootpage = 9999 WHERE name = 'grants';")
raw.execute("COMMIT")
mark(b"broken")
os.kill(os.getpid(), signal.SIGKILL)  # the log stays
"""
RESTORE = """
import ctypes, hashlib, sys
from kvmneg.store.interface import Audit
from kvmneg.store.opening import open_store

mark = ctypes.CDLL(None).disk_mark
audit = Audit(0, 1, "2026-11-21T06:00:00Z", "a reason", "child")
def sha256(text): return hashlib.sha256(text.encode()).hexdigest()
store = open_store(sys.argv[1], sha256)
assert store.recovered and store.generation() == 3
again = store.restored(10, audit)
mark(b"restored")
again.pin("fence 12", sha256("fence 12"), expected_generation=11, audit=audit)
mark(b"pinned")
"""


def test_a_lost_database_stays_lost_and_a_restored_one_stays(
    disk: Disk, run: Callable[..., str], scratch: Path, pytestconfig: pytest.Config
) -> None:
    """Whenever the power goes: never the older fence below the broken log, never less than was restored."""
    run(LOSS, disk.root / "state", status=-9)
    run(RESTORE, disk.root / "state")
    fences = {"broken": {3: "fence 3", 11: "fence 3"}, "restored": {11: "fence 3", 12: "fence 12"}}
    fences["pinned"] = {12: "fence 12"}
    now, chance, allowed, seen = model.Disk(), random.Random(20261121), dict[int, str](), set[int]()
    for operation in disk.operations():
        if operation.kind == "mark":
            allowed = fences[operation.data.decode()]
            continue
        now.do(operation)
        for tree in (*now.extremes(), *(now.after_power_cut(chance) for _ in range(2))) if allowed else ():
            key = hash((frozenset(tree.items()), len(allowed)))
            if key in seen:
                continue
            seen.add(key)
            with open_store(str(put(tree, str(disk.root), scratch / "cut")), sha256) as store:
                fence = store.fence()
                assert fence is not None
                assert fence.text == allowed.get(fence.generation), (fence, allowed, tree.keys())
                assert store.recovered == (fence.generation == 3)
    assert len(seen) > 50


def test_the_model_promises_no_more_than_a_disk() -> None:
    """A file that is replaced with no sync between may be the old one, the new one, or a new one with nothing in it."""

    def one(kind: str, path: str = "", file: int = 0, data: bytes = b"") -> Operation:
        return Operation(kind, path, file, 0, data)

    disk, seen = model.Disk(), set()
    steps = [
        one("create", "/d/a", 1),
        one("write", file=1, data=b"old"),
        one("sync", "/d/a", 1),
        one("sync", "/d", 9),
    ]
    steps += [
        one("create", "/d/b", 2),
        one("write", file=2, data=b"new"),
        one("rename", "/d/b", data=b"/d/a"),
    ]
    for step in steps:
        disk.do(step)
    chance = random.Random(20261121)
    for _ in range(2000):
        seen.add(frozenset(disk.after_power_cut(chance).items()))
    trees = [{"/d/a": b"old"}, {"/d/a": b"new"}, {"/d/a": b""}, {"/d/a": b"\0\0\0"}]
    trees += [{"/d/a": b"old", "/d/b": content} for content in (b"", b"new", b"\0\0\0")]
    assert seen == {frozenset(tree.items()) for tree in trees}
