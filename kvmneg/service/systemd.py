# SPDX-License-Identifier: LGPL-2.1-or-later
"""What kvmnegd tells systemd, and the socket it inherits. The only module that imports systemd-python.

Without systemd (no NOTIFY_SOCKET, no LISTEN_FDS) nothing is imported and every call does nothing, so that the
daemon reads the same both ways.
"""

from __future__ import annotations

import os
import socket

from kvmneg.errors import UsageError

NAME = "varlink"  # FileDescriptorName= of the socket unit (UAPI.20, "Socket Activation")


def notify(*assignments: str) -> bool:
    """Send state to the service manager (sd_notify(3)); false where there is none, or it cannot be told."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return False
    from systemd import daemon  # loads libsystemd, 5 ms: of no use without systemd

    try:
        return bool(daemon.notify("\n".join(assignments)))
    except OSError:
        return False  # a manager that is gone or has no room is no reason to fail a client's call


def ready(status: str) -> bool:
    """READY=1, after the first measurement."""
    return notify("READY=1", status_line(status))


def status(text: str) -> bool:
    """STATUS=, what `systemctl status` shows."""
    return notify(status_line(text))


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


def inherited_listener() -> socket.socket | None:
    """The listening socket of kvmnegd.socket, None where none was passed. LISTEN_* leave the environment.

    Of several descriptors it is the one named "varlink". Raises UsageError where none is, or where it is not a
    listening Unix stream socket. The path it is bound to is systemd's: it is neither unlinked nor listened on again.
    """
    if not os.environ.get("LISTEN_FDS"):
        return None
    from systemd import daemon

    passed: dict[int, str] = daemon.listen_fds_with_names(unset_environment=True)
    for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        os.environ.pop(name, None)  # Python's copy, which children would get
    if not passed:
        return None  # LISTEN_PID: meant for another process
    named = [fd for fd, name in passed.items() if name == NAME] if len(passed) > 1 else list(passed)
    if len(named) != 1:
        raise UsageError(
            f"{len(passed)} sockets were inherited, {len(named)} of them named {NAME}",
            hint=f"give one socket unit FileDescriptorName={NAME}",
        )
    listener = socket.socket(fileno=named[0])
    listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not listening:
        raise UsageError(
            "the inherited descriptor is not a listening Unix stream socket",
            hint="the socket unit needs ListenStream=",
        )
    os.set_inheritable(listener.fileno(), False)
    return listener
