# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMs that run on this host, whoever started them: found in /proc, followed by KVM's uevents.

A process with a VM holds a descriptor of it or of a vCPU (anon_inode:kvm-vm, anon_inode:kvm-vcpu:N: a vCPU's keeps its
VM alive). KVM tells of each VM that is made and ends (kvm_uevent_notify_change in virt/kvm/kvm_main.c): EVENT=create or
destroy, PID of the process that made it, COUNT of all VMs there are now.

Looking through /proc takes 20 µs a descriptor and anybody may open many, so a look is taken in slices.
"""

from __future__ import annotations

import os
import time
from itertools import pairwise

from kvmneg import limits
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_VM_LINKS = ("anon_inode:kvm-vm", "anon_inode:kvm-vcpu:")
_HIDING = frozenset(("hidepid=2", "hidepid=invisible", "hidepid=4", "hidepid=ptraceable"))
_STAT_BYTES = 4096
_COMMAND_BYTES = 64 * 1024
# Fields of /proc/PID/stat after the name in brackets (proc_pid_stat(5)): 4 parent, 22 start time in clock ticks.
_PARENT, _STARTED = 4 - 3, 22 - 3


class Process(NamedTuple):
    """One process, told from every later one of its number: `started` is its start in clock ticks since boot."""

    pid: int
    started: int
    parent: int
    uid: int
    name: str


class Look:
    """One look through all processes for those with a VM.

    `found` are they. `unreadable` counts processes whose descriptors may not be read: there may be VMs among them.
    `hidden` says that others' processes are not even there (hidepid, proc(5)).
    """

    def __init__(self, proc: str = "/proc") -> None:
        self.found: list[Process] = []
        self.unreadable = 0
        self.hidden = hides(proc)
        self.done = False
        self._proc = proc
        self._steps = self._all()

    def step(self, seconds: float | None = None) -> bool:
        """Go on looking, for so long (None: to the end); whether the look is done."""
        end = None if seconds is None else time.monotonic() + seconds
        for _ in self._steps:
            if end is not None and time.monotonic() >= end:
                return False
        self.done = True
        return True

    def _all(self) -> Iterator[None]:
        for name in sorted(os.listdir(self._proc)):
            if name.isdecimal():
                yield from self._one(int(name))

    def _one(self, pid: int) -> Iterator[None]:
        """A step for every descriptor."""
        try:
            with os.scandir(f"{self._proc}/{pid}/fd") as entries:
                for entry in entries:
                    if _is_vm(entry.path):
                        found = process(pid, self._proc)
                        if found is not None:
                            self.found.append(found)
                        break
                    yield
        except PermissionError:
            self.unreadable += 1
        except OSError:
            pass  # it ended meanwhile
        yield


def hides(proc: str = "/proc") -> bool:
    """Whether that /proc keeps processes of others out of sight: by its options, and as the first one is not there."""
    try:
        with open(f"{proc}/self/mountinfo", encoding="utf-8", errors="replace") as file:
            rows = [line.split() for line in file]
    except OSError:
        return False
    options = [row[-1].split(",") for row in rows if len(row) > 5 and row[4] == proc]
    return bool(options and _HIDING.intersection(options[-1])) and not os.path.exists(f"{proc}/1")


def _is_vm(path: str) -> bool:
    return _link(path).startswith(_VM_LINKS)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def has_vm(pid: int, proc: str = "/proc") -> bool:
    """Whether a process holds a VM; false of one that is gone. Raises PermissionError."""
    try:
        names = os.listdir(f"{proc}/{pid}/fd")
    except PermissionError:
        raise
    except OSError:
        return False
    return any(_is_vm(f"{proc}/{pid}/fd/{name}") for name in names)


def vms(pid: int, proc: str = "/proc") -> int:
    """How many VMs a process has, at most: descriptors of them; 1 where they may not be read and it has one."""
    try:
        names = os.listdir(f"{proc}/{pid}/fd")
    except PermissionError:
        return 1
    except OSError:
        return 0
    links = [_link(f"{proc}/{pid}/fd/{name}") for name in names]
    return sum(link == _VM_LINKS[0] for link in links) or int(
        any(link.startswith(_VM_LINKS) for link in links)
    )


def process(pid: int, proc: str = "/proc") -> Process | None:
    """Who a process is; None where there is none (any more)."""
    try:
        with open(f"{proc}/{pid}/stat", "rb", buffering=0) as file:
            text = os.fsdecode(file.read(_STAT_BYTES))
        uid = os.stat(f"{proc}/{pid}").st_uid
    except OSError:
        return None
    # the name may hold brackets and blanks of its own
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    if len(fields) <= _STARTED:
        return None
    return Process(pid, int(fields[_STARTED]), int(fields[_PARENT]), uid, name)


def named(pid: int, proc: str = "/proc") -> dict[str, str]:
    """What QEMU's command line calls the guest: {"name", "uuid"}, as far as it says so.

    For people only: any process writes there what it likes.
    """
    try:
        with open(f"{proc}/{pid}/cmdline", "rb", buffering=0) as file:
            words = os.fsdecode(file.read(_COMMAND_BYTES)).split("\0")
    except OSError:
        return {}
    found = {}
    for option, value in pairwise(words):
        if option in ("-name", "--name"):
            first = value.split(",")[0]
            found["name"] = first.removeprefix("guest=")[: limits.GUEST_NAME_CHARACTERS]
        elif option in ("-uuid", "--uuid"):
            found["uuid"] = value[: limits.GUEST_NAME_CHARACTERS]
    return found


class Event(NamedTuple):
    """One uevent of KVM: `kind` is "create" or "destroy", `vms` those of the whole host after it."""

    kind: str
    pid: int
    vms: int


class Events:
    """KVM's uevents; every other that came goes to `on_other`. Raises OSError where there are none to be had.

    `fd` is as kvmneg.host.uevents takes it.
    """

    def __init__(self, fd: int = -1) -> None:
        from kvmneg.host.uevents import Uevents  # a daemon has it; `kvmneg host` need not

        self.on_other: Callable[[bytes], None] = lambda message: None
        self._uevents = Uevents(fd)

    def fileno(self) -> int:
        return self._uevents.fileno()

    def close(self) -> None:
        self._uevents.close()

    def waits(self) -> bool:
        """Whether there is more to read: messages of all devices come here."""
        import select

        poll = select.poll()
        poll.register(self._uevents.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def read(self) -> tuple[list[Event], bool]:
        """What came of KVM's events, at most UEVENTS_PER_TURN messages; and whether some were lost."""
        events: list[Event] = []
        messages, lost = self._uevents.read()
        for message in messages:
            event = parse(message)
            if event is not None:
                events.append(event)
            else:
                self.on_other(message)
        return events, lost


def parse(message: bytes) -> Event | None:
    """The event in a uevent's text, None where it is not one of KVM's VMs (its header is ACTION@DEVPATH)."""
    if b"SUBSYSTEM=misc\0" not in message or b"@/devices/virtual/misc/kvm\0" not in message:
        return None
    values = dict(field.partition("=")[::2] for field in message.decode("ascii", "replace").split("\0"))
    try:
        event = Event(values["EVENT"], int(values["PID"]), int(values["COUNT"]))
    except (KeyError, ValueError):
        return None
    return event if event.kind in ("create", "destroy") else None
