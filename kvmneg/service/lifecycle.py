# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon does between its start and its end when nobody asks: signals, the watchdog, settings, upkeep."""

from __future__ import annotations

import os
import resource
import signal

from kvmneg import limits
from kvmneg.errors import KvmnegError
from kvmneg.service import systemd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.service.interfaces.router import Router
    from kvmneg.service.node import Node
    from kvmneg.service.options import Options
    from kvmneg.service.varlink.server import Server

_OWN_DESCRIPTORS = 128  # SQLite's, epoll's, and those a measurement opens


def schedule(server: Server, node: Node, arguments: Options, tell: Callable[[], str], router: Router) -> None:
    """Signals, the watchdog, and what the node does when nobody asks, in the server's loop.

    `tell` gives the line for `systemctl status`.
    """
    bus = router.bus

    def stop(*_: object) -> None:
        systemd.stopping()
        node.leases.stop()
        if bus is not None:
            bus.stop()
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    poll = server.every(limits.WATCH_POLL_SECONDS, node.keep_up)

    def taken() -> None:
        nonlocal poll
        server.cancel(poll)
        poll = server.every(limits.WATCH_POLL_SECONDS, node.keep_up)
        router.limits_changed()

    _take_hangups(server, Reloader(arguments, tell, taken).reload)
    seconds = systemd.watchdog_seconds()
    if seconds:
        server.every(seconds, _watchdog)


def _take_hangups(server: Server, reload: Callable[[], None]) -> None:
    """SIGHUP: the handler may run within a call, so it only wakes the loop."""
    wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # the daemon's, to its end

    def woken() -> None:
        os.eventfd_read(wake)
        reload()

    server.watch_fd(wake, woken)
    signal.signal(signal.SIGHUP, lambda *_: os.eventfd_write(wake, 1))


class Reloader:
    """Reads the settings again. A bad file changes nothing; what it says goes to the journal and the status."""

    def __init__(self, arguments: Options, tell: Callable[[], str], taken: Callable[[], None]) -> None:
        """`taken` is called when limits may be others."""
        self._arguments = arguments
        self._tell = tell
        self._taken = taken

    def reload(self) -> None:
        """One reload, between RELOADING=1 and READY=1."""
        from kvmneg.service import settings, telling  # tomllib: no start needs it

        systemd.reloading()
        file = self._arguments.config
        try:
            found = settings.load(file, groups=True)
        except KvmnegError as error:
            telling.not_reloaded(file, error)
            systemd.ready(f"{self._tell()}; settings not reloaded: {error.message}")
            return
        settings.apply(found)
        raise_descriptor_limit()
        self._taken()
        waiting = (found or settings.parse(b"", file)).waits(self._arguments.settings)
        telling.reloaded(file, found is not None, waiting)
        tell_store()
        systemd.ready(self._tell())


def raise_descriptor_limit() -> None:
    """Room for every connection and every process with a lease, beside what the daemon itself needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.CONNECTIONS + limits.CONNECTIONS_RESERVED + limits.LEASES + _OWN_DESCRIPTORS
    if soft < wanted and (hard == resource.RLIM_INFINITY or soft < hard):
        hardest = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hardest, hard))


def tell_store() -> None:
    """Say where connections that keep a lease may be more than the service manager has room for."""
    room, most = systemd.store_room(), min(limits.CONNECTIONS + limits.CONNECTIONS_RESERVED, limits.LEASES)
    if room is None or most <= room:
        return
    from kvmneg.service import telling  # rarely

    telling.trouble(
        f"up to {most} connections may keep a lease, and the service manager has room for {room} of them: over a "
        "restart the others close\n  raise FileDescriptorStoreMax= of kvmneg.service with CONNECTIONS and LEASES"
    )


def _watchdog() -> None:
    systemd.watchdog()
