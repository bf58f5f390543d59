# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watchers of one `more` method that want the newest state, not every state there was.

A watcher that reads slowly gets fewer messages, never old ones later; one that takes nothing for
WATCHER_STALL_SECONDS is dropped with org.kvmneg.SlowWatcher, so that it cannot believe it is up to date.
"""

from __future__ import annotations

from kvmneg import limits as default_limits
from kvmneg.errors import LimitExceeded, SlowWatcher
from kvmneg.service.varlink import message

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.loop import Timer
    from kvmneg.service.varlink.server import Server


class Subscriptions:
    """The watchers, up to WATCHERS of them."""

    def __init__(self, *, limits: Any = default_limits) -> None:
        self._limits = limits
        self._watchers: dict[Connection, None] = {}  # in the order they came
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._watchers)

    def add(self, connection: Connection, parameters: dict[str, Any]) -> None:
        """Hold the connection of a call with `more` and send it the state as of now; the method then returns None.

        Raises LimitExceeded.
        """
        acceptor = connection.server.acceptor  # as of connections, some are reserved
        if acceptor.is_full(len(self._watchers), self._limits.WATCHERS, connection.peer):
            raise LimitExceeded("WATCHERS", self._limits.WATCHERS)
        uid = connection.peer.uid
        if sum(watching.peer.uid == uid for watching in self._watchers) >= self._limits.WATCHERS_PER_UID:
            raise LimitExceeded("WATCHERS_PER_UID", self._limits.WATCHERS_PER_UID)
        connection.hold(self._gone)
        self._watchers[connection] = None
        if self._timer is None:
            self._timer = connection.server.every(self._limits.WATCHER_STALL_SECONDS / 4, self._drop_stalled)
        connection.offer(message.reply(parameters, continues=True))

    def retime(self, server: Server) -> None:
        """WATCHER_STALL_SECONDS may be another."""
        if self._timer is not None:
            server.cancel(self._timer)
            self._timer = server.every(self._limits.WATCHER_STALL_SECONDS / 4, self._drop_stalled)

    def publish(self, parameters: dict[str, Any]) -> None:
        """Tell all watchers the new state."""
        if not self._watchers:
            return
        encoded = message.reply(parameters, continues=True)
        for connection in list(self._watchers):
            connection.offer(encoded)

    def _gone(self, connection: Connection) -> None:
        self._watchers.pop(connection, None)
        if not self._watchers and self._timer:
            connection.server.cancel(self._timer)
            self._timer = None

    def _drop_stalled(self) -> None:
        for connection in list(self._watchers):
            server = connection.server
            silent = server.clock() - connection.moved
            # epoll reports room only once most of the buffer was read; a try may find some earlier
            if (
                connection.queue
                and silent >= self._limits.WATCHER_STALL_SECONDS
                and not server.flush(connection)
            ):
                connection.drop(
                    SlowWatcher(
                        f"nothing was read for {silent:.0f} seconds", hint="watch again, and read faster"
                    )
                )
