# SPDX-License-Identifier: LGPL-2.1-or-later
"""The embedded store in trouble: full disks, rivals, kills. No fence is lost or half there."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvmneg
from kvmneg.errors import StoreError
from kvmneg.store.sqlite import SqliteStore

from .conftest import content, pin, sha256, text_of

if TYPE_CHECKING:
    from collections.abc import Iterator

# A child finds the package under test where this process did.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(kvmneg.__file__).parents[1])}

# What each child begins with: a fence's text is a function of its generation, so that a half one shows.
COMMON = """
import hashlib, os, sys
from kvmneg.errors import StoreError
from kvmneg.store.interface import Audit
from kvmneg.store.sqlite import SqliteStore

def sha256(text): return hashlib.sha256(text.encode()).hexdigest()
def text_of(generation): return f"fence {generation}\\n" * 4000
def pin(store, generation):
    text = text_of(generation)
    audit = Audit(0, os.getpid(), "2026-11-21T06:00:00Z", f"reason {generation}", "child")
    return store.pin(text, sha256(text), expected_generation=generation - 1, audit=audit)
directory = sys.argv[1]
"""
PIN_FOR_EVER = """
with SqliteStore(directory) as store:
    generation = store.generation()
    os.write(1, b"%d\\n" % generation)
    while True:
        generation += 1
        pin(store, generation)
        os.write(1, b"%d\\n" % generation)
"""


def spawn(script: str, directory: Path | str, *, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    command = [*before, sys.executable, "-P", "-c", COMMON + script, str(directory)]
    pipe = subprocess.PIPE
    # unbuffered: communicate() does not see what a readline() before it has read ahead
    return subprocess.Popen(command, bufsize=0, stdout=pipe, stderr=pipe, env=ENVIRONMENT)


def finish(child: subprocess.Popen[bytes]) -> str:
    output, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors.decode()
    return output.decode()


# No space

# `fill` leaves no room, `free` gives it back; both come before this. Each step prints one word when it held.
FULL_DISK = """
store = SqliteStore(directory, verify=sha256)
pin(store, 1)
fill()
failed = None
for generation in range(2, 1000):  # the log may have room of its own for some
    before = store.fence()
    try:
        pin(store, generation)
    except StoreError as error:
        failed = error
        break
assert failed is not None, "the disk never filled"
assert store.fence() == before and before.generation == generation - 1
assert len(store.history(1000)) == generation - 1
print(failed.fields["cause"], bool(failed.hint))
try:
    pin(store, generation)
    sys.exit("a pin with no room")
except StoreError:
    pass
store.close()
store = SqliteStore(directory, verify=sha256)  # a restart on the full disk serves what was pinned
assert store.fence() == before
free()
assert pin(store, generation).generation == generation
store.close()
with SqliteStore(directory, verify=sha256) as store:
    assert store.fence().text == text_of(generation)
    assert [row.generation for row in store.history(1000)] == list(range(generation, 0, -1))
print("recovered")
"""
# EFBIG where a disk says ENOSPC: needs no privilege. Python ignores SIGXFSZ.
SIZE_LIMIT = """
import resource
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
def fill(): resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, unlimited[1]))
def free(): resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
"""
TMPFS = """
import subprocess
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory], check=True)
ballast = os.path.join(directory, "ballast")
directory = os.path.join(directory, "state")
def fill():
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True: file.write(bytes(4096))
        except OSError: pass
def free(): os.unlink(ballast)
"""


def test_a_size_limit_while_pinning_changes_nothing(state: Path) -> None:
    output = finish(spawn(SIZE_LIMIT + FULL_DISK, state))
    assert output == "SQLITE_IOERR_WRITE True\nrecovered\n"


def own_mounts() -> tuple[str, ...]:
    """A command prefix under which a child may mount, unseen by anyone else; skips where there is none."""
    for flags in ("--mount", "--mount --user --map-root-user"):
        prefix = ("unshare", *flags.split())
        with tempfile.TemporaryDirectory() as directory:
            trial = [*prefix, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory]
            if (
                shutil.which("unshare")
                and subprocess.run(trial, capture_output=True, check=False).returncode == 0
            ):
                return prefix
    pytest.skip("this user may not mount a tmpfs of its own")


def test_a_full_disk_while_pinning_changes_nothing(tmp_path: Path) -> None:
    output = finish(spawn(TMPFS + FULL_DISK, tmp_path, before=own_mounts()))
    assert output == "SQLITE_FULL True\nrecovered\n"


def test_a_full_disk_at_the_first_start_leaves_nothing_behind(tmp_path: Path) -> None:
    script = """
os.mkdir(directory, 0o700)
fill()
try:
    SqliteStore(directory)
    sys.exit("made a database with no room")
except StoreError as error:
    print(error.fields["cause"])
free()
with SqliteStore(directory) as store:
    print(pin(store, 1).generation)
"""
    output = finish(spawn(TMPFS + script, tmp_path, before=own_mounts()))
    assert output == "SQLITE_FULL\n1\n"


# Directories that cannot be used


@contextmanager
def unprivileged() -> Iterator[None]:
    """As root, without root's way past file modes (capabilities(7): the effective ones go with the uid)."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_read_only_directory_is_said(pinned: bool) -> None:
    with tempfile.TemporaryDirectory() as parent:  # pytest's own may not be entered by others
        state = Path(parent) / "state"
        if pinned:
            with SqliteStore(str(state)) as store:
                pin(store, "one")
        else:
            state.mkdir()
        Path(parent).chmod(0o755)
        state.chmod(0o555)
        with unprivileged(), pytest.raises(StoreError, match=re.escape(str(state))) as caught:
            SqliteStore(str(state))
        assert "writable" in caught.value.hint
        state.chmod(0o755)
        with SqliteStore(str(state)) as store:
            assert store.generation() == int(pinned)


def test_a_directory_that_others_may_write_to_is_refused(state: Path) -> None:
    state.mkdir()
    state.chmod(0o777)
    with pytest.raises(StoreError, match="anybody may write"):
        SqliteStore(str(state))
    assert list(state.iterdir()) == []


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for path in (file, file / "below", tmp_path / "not" / "there"):
        with pytest.raises(StoreError, match=re.escape(str(path))):
            SqliteStore(str(path))
    assert file.read_text() == "precious"


def test_a_planted_lock_link_is_not_followed(state: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    state.mkdir(mode=0o700)
    (state / "lock").symlink_to(victim)
    with pytest.raises(StoreError):
        SqliteStore(str(state))
    assert victim.read_text() == "precious"


# Rivals


def test_a_second_process_is_told_who_has_the_directory(state: Path) -> None:
    child = spawn(COMMON + PIN_FOR_EVER, state)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(StoreError, match=f"in use by process {child.pid}") as caught:
            SqliteStore(str(state))
        assert caught.value.fields["pid"] == child.pid
    finally:
        child.kill()
        child.communicate()
    SqliteStore(str(state)).close()  # the lock went with its holder, its file's pid means nothing


def test_an_admin_with_the_database_open_is_no_damage(state: Path) -> None:
    with SqliteStore(str(state)) as store:
        pin(store, "one")
    before = sorted(path.name for path in state.iterdir())
    reader = sqlite3.connect(state / "kvmneg.sqlite", isolation_level=None)
    try:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM fence_history").fetchall()
        with pytest.raises(StoreError) as caught:
            SqliteStore(str(state))
        assert caught.value.fields["cause"] == "SQLITE_BUSY"
        assert "another program" in caught.value.hint
    finally:
        reader.close()
    assert sorted(path.name for path in state.iterdir()) == before
    with SqliteStore(str(state)) as store:
        assert store.generation() == 1


def test_another_programs_database_is_left_as_it_is(state: Path) -> None:
    state.mkdir(mode=0o700)
    with closing(sqlite3.connect(state / "kvmneg.sqlite", isolation_level=None)) as other:
        other.execute("CREATE TABLE music (title)")
    before = content(state)
    with pytest.raises(StoreError, match="not a kvmneg database"):
        SqliteStore(str(state))
    assert content(state) == before


def test_a_closed_store_says_so(state: Path) -> None:
    store = SqliteStore(str(state))
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.generation()


# Kills

# Of 50 kills (1000 with --long) the rest are those of tests/daemon: a kill there takes longer.
ROUNDS = 35
LONG_ROUNDS = 700

# Pins, and gives each generation's VM a contract and takes the last one's away. Prints each step once it is done.
CHANGE_FOR_EVER = """
from kvmneg.store.interface import Lease

def begin(store, vm):
    digest = sha256(vm)
    store.leases.begin(Lease(vm, digest, 0, 0, os.getpid(), "2026-11-21T06:00:00Z", 600.0, "begun"), vm.encode() * 999)

def say(step, number): os.write(1, b"%s %d\\n" % (step, number))

with SqliteStore(directory) as store:
    say(b"start", store.generation())
    held = [grant.vm for grant in store.leases.outstanding()]
    while True:
        generation = store.generation() + 1
        pin(store, generation)
        say(b"pin", generation)
        begin(store, str(generation))
        say(b"begin", generation)
        for vm in held:
            store.leases.end(*store.leases.of(vm))
            say(b"end", int(vm))
        held = [str(generation)]
"""


def kill_after(child: subprocess.Popen[bytes], seconds: float, steps: int = 0) -> list[tuple[str, int]]:
    """Let it acknowledge its start and so many steps, kill it `seconds` later; return what it acknowledged."""
    assert child.stdout is not None
    first = b"".join(child.stdout.readline() for _ in range(1 + steps))
    assert first, child.communicate()[1].decode()
    time.sleep(seconds)
    child.kill()
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL, errors.decode()
    lines = (line.split() for line in (first + rest).decode().splitlines())
    return [(name, int(number)) for name, number in lines]


def allowed(
    generation: int, held: frozenset[int], steps: list[tuple[str, int]]
) -> list[tuple[int, frozenset[int]]]:
    """(generation, VMs that hold a contract) as it may be after these steps: the next one may have been on its way."""
    for name, number in steps:
        if name == "pin":
            generation = number
        elif name != "start":
            held = held | {number} if name == "begin" else held - {number}
    ended = [(generation, held - {vm}) for vm in held]
    return [(generation, held), (generation + 1, held), (generation, held | {generation}), *ended]


def test_a_kill_while_pinning_and_granting_leaves_the_old_or_the_new_state(
    state: Path, pytestconfig: pytest.Config
) -> None:
    chance = random.Random(20261121)
    at, held = 0, frozenset[int]()
    for round_ in range(LONG_ROUNDS if pytestconfig.getoption("long") else ROUNDS):
        # each second time at once; on a busy machine nothing might be changed by then
        steps = kill_after(spawn(CHANGE_FOR_EVER, state), chance.uniform(0.0, 0.04), round_ % 2)
        assert steps[0] == ("start", at)
        with SqliteStore(str(state), verify=sha256) as store:
            found = store.generation(), frozenset(int(grant.vm) for grant in store.leases.outstanding())
            assert found in allowed(at, held, steps)
            at, held = found
            fence = store.fence()
            assert (fence.text if fence else None) == (text_of(at) if at else None)
            rows = store.history(at + 1)
            contracts = store.leases.contracts_outstanding()
        assert [(row.generation, row.reason, row.digest) for row in rows] == [
            (generation, f"reason {generation}", sha256(text_of(generation)))
            for generation in range(at, 0, -1)
        ]
        assert sorted(contracts) == sorted((sha256(str(vm)), str(vm).encode() * 999) for vm in held)
    assert at >= ROUNDS // 2  # it did change meanwhile


PIN_ONCE = """
import signal
os.write(1, b"start 0\\n")
with SqliteStore(directory) as store:
    os.write(1, b"pin %d\\n" % pin(store, 1).generation)
    signal.pause()
"""


def test_a_kill_during_the_first_start_is_no_damage(tmp_path: Path) -> None:
    chance = random.Random(20261122)
    for number in range(10):
        state = tmp_path / str(number)
        acknowledged = kill_after(spawn(PIN_ONCE, state), chance.uniform(0.0, 0.02))
        with SqliteStore(str(state), verify=sha256) as store:
            assert store.generation() >= acknowledged[-1][1]
            assert pin(store, text_of(99)) == store.generation()
        assert list(content(state)) == ["kvmneg.sqlite"]
