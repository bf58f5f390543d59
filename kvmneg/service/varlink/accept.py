# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who gets in: accepting connections, and refusing them, without ever hanging the listener."""

from __future__ import annotations

import errno
import os
import select
import socket

from kvmneg.errors import LimitExceeded
from kvmneg.service.varlink import message
from kvmneg.service.varlink.connection import Connection
from kvmneg.service.varlink.peer import refuse_descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmneg.service.varlink.loop import Timer
    from kvmneg.service.varlink.peer import Peer
    from kvmneg.service.varlink.server import Server


class Acceptor:
    """Accepts on a listening socket, which stays the caller's: not listened on again, not unlinked, not closed.

    Never stops accepting for long: whom it cannot serve it tells so and closes. A full backlog would block every
    connect(2), also of those who only want to know what is wrong.
    """

    def __init__(self, server: Server, listener: socket.socket, limits: Any) -> None:
        self._server = server
        self._listener = listener
        self._limits = limits
        self.preferred: Callable[[Peer], bool] = lambda peer: False  # for whom CONNECTIONS_RESERVED are
        self._per_uid: dict[int, int] = {}
        self._new: dict[Connection, float] = {}  # no whole call sent yet → until when it may; oldest first
        self._silence: Timer | None = None
        self._quiet_until = 0.0
        self._spare = -1  # a descriptor to give up for refusing when there are no others
        self._keep_spare()
        listener.setblocking(False)
        refuse_descriptors(listener)
        server.watch_fd(listener.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more."""
        self._server.unwatch_fd(self._listener.fileno())
        if self._spare >= 0:
            os.close(self._spare)

    def called(self, connection: Connection) -> None:
        """A connection sent its first whole call: it may now be silent as long as it likes."""
        connection.new = False
        self._new.pop(connection, None)

    def gone(self, connection: Connection) -> None:
        """A connection was closed."""
        self._new.pop(connection, None)
        uid = connection.peer.uid
        self._per_uid[uid] -= 1
        if not self._per_uid[uid]:
            del self._per_uid[uid]

    def _accept(self) -> None:
        for _ in range(self._limits.ACCEPT_PER_TURN):
            try:
                connected, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._shed():
                    self._pause(error)
                    return
            else:
                self._admit(connected)

    def _admit(self, connected: socket.socket) -> None:
        limits = self._limits
        try:
            connected.setblocking(False)
            connection = Connection(self._server, connected)
        except OSError:
            connected.close()
            return
        uid = connection.peer.uid
        count = self._per_uid.get(uid, 0)
        if self.is_full(self._server.connections, limits.CONNECTIONS, connection.peer):
            self._refuse(connection, LimitExceeded("CONNECTIONS", limits.CONNECTIONS))
        elif count >= limits.CONNECTIONS_PER_UID:
            self._refuse(connection, LimitExceeded("CONNECTIONS_PER_UID", limits.CONNECTIONS_PER_UID))
        else:
            self._per_uid[uid] = count + 1
            self._new[connection] = self._server.clock() + limits.FIRST_CALL_SECONDS
            if self._silence is None:
                self._silence = self._server.after(limits.FIRST_CALL_SECONDS, self._close_silent)
            self._server.add_connection(connection)

    def is_full(self, count: int, most: int, peer: Peer) -> bool:
        """Whether one more of this peer's has no room: above `most`, CONNECTIONS_RESERVED are for preferred ones."""
        return count >= most and (
            count >= most + self._limits.CONNECTIONS_RESERVED or not self.preferred(peer)
        )

    def _refuse(self, connection: Connection, error: LimitExceeded) -> None:
        _refuse(connection.socket, error)
        self._server.guarded(lambda: self._server.on_limit(error, connection.peer))

    def adopt(self, fd: int) -> Connection:
        """Serve a connection that an earlier daemon served: it takes the descriptor over, and may be silent.

        Raises OSError where it is no connected Unix socket.
        """
        connected = socket.socket(fileno=fd)
        try:
            connected.setblocking(False)
            connection = Connection(self._server, connected)
        except OSError:
            connected.close()
            raise
        uid = connection.peer.uid
        self._per_uid[uid] = self._per_uid.get(uid, 0) + 1
        connection.new = False
        self._server.add_connection(connection)
        return connection

    def _close_silent(self) -> None:
        """Close what has sent no whole call in time; come again when the next one is due."""
        self._silence = None
        now = self._server.clock()
        for connection, deadline in list(self._new.items()):
            if deadline > now:
                self._silence = self._server.after(deadline - now, self._close_silent)
                return
            self._server.close_connection(connection)

    def _shed(self) -> bool:
        """Out of descriptors: with the spare one, tell the next client and close. False where even that failed."""
        self._trouble("out of file descriptors: new connections are refused")
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1
        try:
            connected, _ = self._listener.accept()
            _refuse(connected, LimitExceeded("descriptors", self._server.connections))
        except BlockingIOError:
            pass  # it did not wait for the answer
        except OSError:
            return False
        return self._keep_spare()

    def _keep_spare(self) -> bool:
        if self._spare < 0:
            try:
                self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return False
        return True

    def _pause(self, error: OSError) -> None:
        """Look away for a moment instead of turning in circles on a listener that stays readable."""
        self._trouble(f"cannot accept connections: {error.strerror}")
        self._server.epoll.modify(self._listener.fileno(), 0)
        self._server.after(self._limits.ACCEPT_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._keep_spare()
        self._server.epoll.modify(self._listener.fileno(), select.EPOLLIN)

    def _trouble(self, text: str) -> None:
        """Say so, once in a while: a client can bring this about a thousand times a second."""
        now = self._server.clock()
        if now >= self._quiet_until:
            self._quiet_until = now + self._limits.TROUBLE_SECONDS
            self._server.guarded(lambda: self._server.on_trouble(text))


def _refuse(connected: socket.socket, error: LimitExceeded) -> None:
    """The error is what the client reads as the reply to its first call."""
    try:
        connected.send(message.error_reply(error.varlink, error.parameters()), socket.MSG_DONTWAIT)
    except OSError:
        pass
    connected.close()
