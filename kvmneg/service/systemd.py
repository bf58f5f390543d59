# SPDX-License-Identifier: LGPL-2.1-or-later
"""What kvmnegd tells systemd, and the socket it inherits. The only module that imports systemd-python.

Without systemd (no NOTIFY_SOCKET, no LISTEN_FDS) nothing is imported and every call does nothing, so that the
daemon reads the same both ways.
"""

from __future__ import annotations

import os
import socket
import time

from kvmneg.errors import UsageError
from kvmneg.records import NamedTuple
from kvmneg.service.leases.descriptors import Descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "varlink"  # FileDescriptorName= of the socket unit (UAPI.20, "Socket Activation")
EVENTS = "uevents"  # that of kvmneg-uevents.socket
STORED = "held-"  # how names of stored descriptors begin (kvmneg.service.leases.keepers)


# FileDescriptorStoreMax= of kvmneg.service: what a manager before systemd 254 does not say ($FDSTORE)
STORE_DESCRIPTORS = 1152


def notify(*assignments: str, fd: int = -1) -> bool:
    """Send state to the service manager (sd_notify(3)), with a descriptor; false where it cannot be told."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return False
    from systemd import daemon  # loads libsystemd, 5 ms: of no use without systemd

    try:
        return bool(daemon.notify("\n".join(assignments), fds=[fd] if fd >= 0 else []))
    except OSError:
        return False  # a manager that is gone or has no room is no reason to fail a client's call


def ready(status: str) -> bool:
    """READY=1, after the first measurement."""
    return notify("READY=1", status_line(status))


def status(text: str) -> bool:
    """STATUS=, what `systemctl status` shows."""
    return notify(status_line(text))


def reloading() -> bool:
    """RELOADING=1 at the start of a reload, to be followed by ready()."""
    return notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def stopping() -> bool:
    """STOPPING=1, when the daemon was told to end."""
    return notify("STOPPING=1")


def watchdog() -> bool:
    """WATCHDOG=1, from the event loop: it says that the loop turns."""
    return notify("WATCHDOG=1")


def status_line(text: str) -> str:
    """STATUS= in one line: a line feed would begin another assignment."""
    return "STATUS=" + " ".join(text.split())


def watchdog_seconds() -> float | None:
    """How often to call watchdog(): half of WatchdogSec= (sd_watchdog_enabled(3)); None where it is off."""
    try:
        microseconds = int(os.environ.get("WATCHDOG_USEC", ""))
        meant_for = int(os.environ.get("WATCHDOG_PID") or os.getpid())
    except ValueError:
        return None
    return microseconds / 2_000_000 if microseconds > 0 and meant_for == os.getpid() else None


class Inherited(NamedTuple):
    """What the service manager passed on: the socket to serve (None: make one), the kernel's events, and `stored`."""

    listener: socket.socket | None = None
    events: int = -1  # a descriptor, bound to the kernel's uevents
    stored: tuple[tuple[str, int], ...] = ()  # what an earlier daemon had kept, by name


def inherited() -> Inherited:
    """The descriptors of the socket units and of the descriptor store. LISTEN_* leave the environment.

    The listener is the one that is left, of several the one named "varlink". Raises UsageError where none is, or where
    it is not a listening Unix stream socket. The path it is bound to is systemd's: it is neither unlinked nor listened
    on again.
    """
    if not os.environ.get("LISTEN_FDS"):
        return Inherited()
    from systemd import daemon

    passed: dict[int, str] = daemon.listen_fds_with_names(unset_environment=True)
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        os.environ.pop(name, None)  # Python's copy, which children would get
    for fd in passed:
        os.set_inheritable(fd, False)
    stored = tuple((name, fd) for fd, name in passed.items() if name.startswith(STORED))
    events = [fd for fd, name in passed.items() if name == EVENTS]
    rest = [fd for fd, name in passed.items() if not name.startswith(STORED) and name != EVENTS]
    if not rest:  # LISTEN_PID: meant for another process; or a service without its socket
        return Inherited(None, events[0] if events else -1, stored)
    named = [fd for fd in rest if passed[fd] == NAME] if len(rest) > 1 else rest
    if len(named) != 1:
        raise UsageError(
            f"{len(rest)} sockets were inherited, {len(named)} of them named {NAME}",
            hint=f"give one socket unit FileDescriptorName={NAME}",
        )
    return Inherited(_checked(named[0]), events[0] if events else -1, stored)


def _checked(fd: int) -> socket.socket:
    listener = socket.socket(fileno=fd)
    listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not listening:
        raise UsageError(
            "the inherited descriptor is not a listening Unix stream socket",
            hint="the socket unit needs ListenStream=",
        )
    return listener


class StoredDescriptors(Descriptors):
    """The manager's descriptor store (FDSTORE=1 of sd_notify(3)): it outlives the daemon, up to the unit's stop."""

    def __init__(self, stored: Sequence[tuple[str, int]]) -> None:
        self._stored = list(stored)

    def kept(self) -> list[tuple[str, int]]:
        taken, self._stored = self._stored, []
        return taken

    def keep(self, name: str, fd: int) -> None:
        """Not watched by the manager (FDPOLL=0): it would drop what is closed, and nobody would be told."""
        notify("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fd=fd)

    def drop(self, name: str) -> None:
        notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def store_room() -> int | None:
    """How many descriptors the manager keeps for this service; None without a manager."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return None
    told = os.environ.get("FDSTORE", "")
    return int(told) if told.isdecimal() else STORE_DESCRIPTORS


def descriptors(inherited: Inherited) -> Descriptors:
    """Where descriptors are kept over a restart: with the manager, where there is one."""
    return StoredDescriptors(inherited.stored) if os.environ.get("NOTIFY_SOCKET") else Descriptors()
