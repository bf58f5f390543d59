# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMs that nobody negotiated for: found in a recorded /proc, and in the real one while KVM makes and ends them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvmneg import limits
from kvmneg.errors import LimitExceeded, UsageError
from kvmneg.host import guests
from kvmneg.service.leases.unknown import UnknownGuests
from kvmneg.service.varlink.loop import Loop
from kvmneg.store.interface import Audit
from kvmneg.store.sqlite import SqliteStore
from kvmneg.store.waivers import Waivers

AUDIT = Audit(0, 1, "2026-11-21T12:00:00Z", "a test machine", "pytest")

# As the kernel sends it (read from its netlink group on a host that made one VM).
CREATED = (
    b"change@/devices/virtual/misc/kvm\0ACTION=change\0DEVPATH=/devices/virtual/misc/kvm\0SUBSYSTEM=misc\0"
    b"CREATED=7\0COUNT=2\0EVENT=create\0PID=4711\0STATS_PATH=/kvm/4711-5\0MAJOR=10\0MINOR=232\0DEVNAME=kvm\0SEQNUM=8\0"
)


class Tree:
    """A /proc with processes as a test makes them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, pid: int, *links: str, started: int = 1000, parent: int = 1, name: str = "qemu") -> None:
        folder = self.root / str(pid)
        (folder / "fd").mkdir(parents=True)
        # pid (name) state parent … and the start in place 22 (proc_pid_stat(5))
        fields = ["S", str(parent), *(["0"] * 17), str(started), "0", "0"]
        (folder / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}\n")
        (folder / "cmdline").write_bytes(b"")
        for place, link in enumerate(links):
            (folder / "fd" / str(place)).symlink_to(link)

    def remove(self, pid: int) -> None:
        import shutil

        shutil.rmtree(self.root / str(pid))


class Queue:
    """What stands in for the kernel's netlink socket: events as a test says they come."""

    def __init__(self) -> None:
        self.waiting: list[guests.Event] = []
        self.lost = False
        self.turns: list[list[guests.Event]] = []  # what comes in one turn each, after what waits
        self._pair = socket.socketpair()

    def fileno(self) -> int:
        return self._pair[0].fileno()

    def read(self) -> tuple[list[guests.Event], bool]:
        events, lost = self.waiting, self.lost
        self.waiting, self.lost = self.turns.pop(0) if self.turns else [], False
        return events, lost

    def waits(self) -> bool:
        return bool(self.waiting or self.turns)

    def close(self) -> None:
        for one in self._pair:
            one.close()


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "proc")


@pytest.fixture
def waivers(tmp_path: Path):
    with SqliteStore(str(tmp_path / "state")) as store:
        yield Waivers(store._database, "boot-1")


@pytest.fixture
def queue():
    queue = Queue()
    yield queue
    queue.close()


@pytest.fixture
def unknown(tree: Tree, waivers: Waivers, queue: Queue):
    tree.root.mkdir()
    found = UnknownGuests(waivers, proc=str(tree.root), events=lambda: queue)  # type: ignore[arg-type, return-value]
    loop = Loop()
    found.start(loop)
    yield found
    found.stop()
    loop.epoll.close()


def pids(found) -> list[int]:
    return [one.process.pid for one in found]


def test_a_vm_or_one_of_its_vcpus_is_a_guest(tree: Tree, unknown: UnknownGuests) -> None:
    tree.add(10, "/dev/null", "socket:[4711]")
    tree.add(11, "/dev/null", "anon_inode:kvm-vm")
    tree.add(12, "anon_inode:kvm-vcpu:0")
    tree.add(13, "/dev/kvm")  # who asks what KVM can has no VM
    tree.add(14, "anon_inode:kvm-vcpu-stats:0", "anon_inode:kvm-device")
    assert pids(unknown.all()) == [11, 12]
    assert unknown.missed() == ""


def test_a_name_with_brackets_does_not_move_the_fields(tree: Tree, unknown: UnknownGuests) -> None:
    tree.add(11, "anon_inode:kvm-vm", name="a) R 7 (b", started=77, parent=5)
    (one,) = unknown.all()
    assert one.process[:3] == (11, 77, 5) and one.process.name == "a) R 7 (b"


def test_those_of_the_daemon_and_its_children_are_not_unknown(tree: Tree, unknown: UnknownGuests) -> None:
    tree.add(os.getpid(), "anon_inode:kvm-vm")
    tree.add(3, "anon_inode:kvm-vm", parent=os.getpid())
    assert pids(unknown.all()) == []


def test_a_guest_with_a_lease_is_known_and_unknown_again_without(tree: Tree, unknown: UnknownGuests) -> None:
    tree.add(11, "anon_inode:kvm-vm")
    leased = {11}
    unknown.accounted = lambda process: process.pid in leased
    assert unknown.all() == []
    leased.clear()
    assert pids(unknown.all()) == [11]


def test_an_event_finds_one_and_its_end_is_seen(tree: Tree, unknown: UnknownGuests, queue: Queue) -> None:
    told = []
    unknown.on_found = told.append
    assert unknown.all() == []
    tree.add(4711, "anon_inode:kvm-vm")
    assert unknown.all() == []  # one look was enough: events tell of the rest
    queue.waiting.append(guests.Event("create", 4711, 1))
    assert pids(unknown.all()) == [4711] and [one.pid for one in told] == [4711]
    tree.remove(4711)
    assert unknown.all() == []


def test_another_process_of_the_same_number_is_another_guest(
    tree: Tree, unknown: UnknownGuests, queue: Queue
) -> None:
    tree.add(4711, "anon_inode:kvm-vm", started=1)
    assert unknown.waive(4711, AUDIT, 3).waived == AUDIT.reason
    assert unknown.blocking() == [] and pids(unknown.all()) == [4711]
    tree.remove(4711)
    tree.add(4711, "anon_inode:kvm-vm", started=2)
    queue.waiting.append(guests.Event("create", 4711, 1))
    assert pids(unknown.blocking()) == [4711]


def test_who_asks_gets_all_events_that_wait(tree: Tree, unknown: UnknownGuests, queue: Queue) -> None:
    """Other devices' messages fill turns of their own: a burst of them hides no VM behind it."""
    assert unknown.all() == [] and unknown.missed() == ""
    tree.add(4711, "anon_inode:kvm-vm")
    queue.turns = [[] for _ in range(3)] + [[guests.Event("create", 4711, 1)]]
    assert pids(unknown.all()) == [4711]
    tree.add(4712, "anon_inode:kvm-vm")
    queue.turns = [[] for _ in range(limits.UEVENT_TURNS + 9)]  # without an end: a look finds what they hide
    assert pids(unknown.all()) == [4711, 4712]
    assert queue.turns


def test_a_vm_that_cannot_be_seen_is_told(tree: Tree, unknown: UnknownGuests, queue: Queue) -> None:
    """Its process is in another pid namespace: its number says nothing here, and no look finds it."""
    tree.add(4711, "anon_inode:kvm-vm")
    assert pids(unknown.all()) == [4711] and unknown.missed() == ""
    queue.waiting = [guests.Event("create", 99, 3)]
    assert pids(unknown.all()) == [4711]
    assert "2 VMs" in unknown.missed()
    queue.waiting = [guests.Event("destroy", 99, 1)]
    assert unknown.missed() == ""


@pytest.mark.parametrize("option", ["hidepid=2", "hidepid=invisible", "hidepid=ptraceable", "hidepid=4"])
def test_a_proc_that_hides_others_is_told(tree: Tree, unknown: UnknownGuests, option: str) -> None:
    """proc(5): their folders are not there at all, so that none can be counted as unreadable."""
    tree.add(11, "anon_inode:kvm-vm")
    (tree.root / "self").mkdir()
    mounts = tree.root / "self/mountinfo"
    mounts.write_text(f"24 29 0:22 / {tree.root} rw,nosuid - proc proc rw,{option}\n")
    assert pids(unknown.all()) == [11]
    assert "hidden" in unknown.missed()
    tree.add(1, name="init")  # who may see that one sees all
    unknown._looked = False
    assert unknown.missed() == ""


def test_a_proc_of_another_place_hides_nothing_here(tree: Tree, unknown: UnknownGuests) -> None:
    (tree.root / "self").mkdir(parents=True)
    line = "25 29 0:23 / /elsewhere rw - proc proc rw,hidepid=2\n24 29 0:22 / {} rw - proc proc rw,hidepid=noaccess\n"
    (tree.root / "self/mountinfo").write_text(line.format(tree.root))
    assert unknown.all() == [] and unknown.missed() == ""


def test_lost_events_bring_a_new_look(tree: Tree, unknown: UnknownGuests, queue: Queue) -> None:
    assert unknown.all() == []
    tree.add(4711, "anon_inode:kvm-vm")
    queue.lost = True
    assert pids(unknown.all()) == [4711]


def test_without_events_each_answer_looks(tree: Tree, waivers: Waivers) -> None:
    def none() -> guests.Events:
        raise PermissionError

    tree.root.mkdir()
    found = UnknownGuests(waivers, proc=str(tree.root), events=none)
    loop = Loop()
    found.start(loop)
    assert found.all() == []
    tree.add(4711, "anon_inode:kvm-vm")
    assert pids(found.all()) == [4711]
    loop.epoll.close()


def test_what_may_not_be_looked_into_is_told(
    tree: Tree, unknown: UnknownGuests, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.add(11, "anon_inode:kvm-vm")
    tree.add(12, "anon_inode:kvm-vm")
    scandir = os.scandir

    def refused(path: str):
        if f"{os.sep}12{os.sep}" in path:
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert "1 processes whose descriptors" in unknown.missed()
    # KVM counts two VMs and one process with a VM is known: there is another
    queue.waiting.append(guests.Event("create", 11, 2))
    assert unknown.missed()
    # KVM counts one: it is that of the process that is known
    queue.waiting.append(guests.Event("destroy", 99, 1))
    assert unknown.missed() == ""


def test_more_than_the_limit_is_told(
    tree: Tree, unknown: UnknownGuests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "UNKNOWN_GUESTS", 2)
    for pid in (11, 12, 13):
        tree.add(pid, "anon_inode:kvm-vm")
    assert len(unknown.all()) == 2
    assert unknown.missed() == "more than 2 processes have a VM"


def test_a_look_is_taken_in_slices(tree: Tree, tmp_path: Path) -> None:
    tree.root.mkdir()
    for pid in range(10, 40):
        tree.add(pid, "/dev/null", "anon_inode:kvm-vm")
    look = guests.Look(str(tree.root))
    steps = 1
    while not look.step(0.0):  # no time at all: one descriptor, and the others get their turn
        steps += 1
    assert steps > 30 and len(look.found) == 30


def test_waivers_are_of_one_boot_audited_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = guests.Process(11, 5, 1, 107, "qemu")
    with SqliteStore(str(tmp_path / "state")) as store:
        first = Waivers(store._database, "boot-1")
        first.add(process, AUDIT, 4)
        first.add(process, AUDIT._replace(reason="again"), 4)
        assert first.all() == {(11, 5): "again"}
        second = Waivers(store._database, "boot-2")
        assert second.all() == {}
        monkeypatch.setattr(limits, "WAIVERS", 1)
        second.add(process, AUDIT, 4)  # those of the last boot do not count any more
        with pytest.raises(LimitExceeded, match="WAIVERS"):
            second.add(process._replace(pid=12), AUDIT, 4)
        assert [row.action for row in store.audit(10)] == ["waive"] * 3


def test_only_an_unknown_guest_can_be_waived(unknown: UnknownGuests) -> None:
    with pytest.raises(UsageError, match="process 1 has no VM"):
        unknown.waive(1, AUDIT, 0)


def test_the_event_as_the_kernel_writes_it() -> None:
    assert guests.parse(CREATED) == guests.Event("create", 4711, 2)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        CREATED.replace(b"SUBSYSTEM=misc", b"SUBSYSTEM=net"),
        CREATED.replace(b"@/devices/virtual/misc/kvm", b"@/devices/virtual/misc/vhost-net"),
        CREATED.replace(b"PID=4711", b"PID=many"),
        CREATED.replace(b"PID=4711\0", b""),
        CREATED.replace(b"EVENT=create", b"EVENT=bind"),
        b"libudev\0\xfe\xed\xca\xfe" + bytes(40),
    ],
)
def test_what_is_no_event_of_a_vm_is_none(message: bytes) -> None:
    assert guests.parse(message) is None


def test_a_guest_is_called_what_its_command_line_says(tree: Tree) -> None:
    tree.root.mkdir()
    tree.add(11)
    (tree.root / "11" / "cmdline").write_bytes(
        b"\0".join([b"qemu", b"-name", b"guest=web-1,debug-threads=on", b"-uuid", b"1b4e28ba", b"-S"])
    )
    assert guests.named(11, str(tree.root)) == {"name": "web-1", "uuid": "1b4e28ba"}
    assert guests.named(12, str(tree.root)) == {}


_HOLDER = """
import fcntl, os, sys
kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
vm = fcntl.ioctl(kvm, 0xAE01, 0)  # KVM_CREATE_VM
print(os.getpid(), flush=True)
sys.stdin.readline()
os.close(vm)
print("ended", flush=True)
sys.stdin.readline()
"""


@pytest.mark.kvm
def test_a_real_vm_comes_and_goes(waivers: Waivers) -> None:
    """Its process is no child of this one: a shell in between is."""
    found = UnknownGuests(waivers)
    loop = Loop()
    found.start(loop)
    holder = subprocess.Popen(
        ["/bin/sh", "-c", '"$0" -P -c "$1"; exit 0', sys.executable, _HOLDER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with holder:
        assert holder.stdout and holder.stdin
        pid = int(holder.stdout.readline())
        (new,) = [one for one in found.all() if one.process.pid == pid]
        assert new.process.name.startswith("python") and new.process.uid == os.getuid()
        holder.stdin.write("\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == "ended\n"
        assert new.process.pid not in pids(found.all())
        holder.stdin.write("\n")
    found.stop()
    loop.epoll.close()
