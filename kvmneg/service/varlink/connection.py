# SPDX-License-Identifier: LGPL-2.1-or-later
"""One client of the server: its buffers, its reply queue, and what a method may do with it."""

from __future__ import annotations

import select
import socket
from collections import deque

from kvmneg.errors import LimitExceeded
from kvmneg.service.varlink import message
from kvmneg.service.varlink.peer import Peer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmneg.errors import KvmnegError
    from kvmneg.service.varlink.server import Server

_LAST_WORDS_BYTES = 1 << 20  # SO_SNDBUF for a last message; the kernel gives what net.core.wmem_max allows


class Connection:
    """One client. `peer` says who it is; `raw` is the call being answered, its NUL included."""

    __slots__ = (
        "buffer", "busy", "closed", "ended", "fd", "interest", "latest", "more", "moved", "new", "on_closed",
        "on_release", "parked", "peer", "queue", "queued", "raw", "recv", "send", "server", "socket", "waits", "warm",
    )  # fmt: skip

    def __init__(self, server: Server, connected: socket.socket) -> None:
        """Takes the socket over. Raises OSError where the peer cannot be asked for."""
        self.server = server
        self.socket = connected
        self.fd = connected.fileno()
        self.recv, self.send = connected.recv, connected.send  # bound once: each call needs both
        self.peer = Peer(connected)
        self.raw = b""
        self.buffer = b""  # received and not answered yet
        self.queue: deque[bytes | memoryview] = deque()  # replies; of the first perhaps only the rest
        self.queued = 0  # bytes in the queue
        self.moved = 0.0  # when the peer last took something of it
        self.latest: bytes | None = (
            None  # of a watcher: the newest message, while older bytes are in the queue
        )
        self.interest = select.EPOLLIN
        self.new = True  # has sent no whole call yet
        self.warm = False  # nothing is pending: the server's short way may be taken
        self.more = False  # the call being answered allows several replies
        self.busy = False  # held by a call whose last reply is to come
        self.waits = False  # its turn was over before its calls were
        self.parked = False  # waits, and not for its turn: its next call cannot be answered yet
        self.ended = False  # the peer sends no more
        self.closed = False
        self.on_release: Callable[[Connection], None] | None = None
        self.on_closed: Callable[[Connection], None] | None = None  # called once, however it closes

    def hold(self, on_release: Callable[[Connection], None]) -> None:
        """Keep the connection for a call with `more`: no further call is answered before its last reply.

        `on_release` is called once, when the holding ends: with the last reply, or because the connection closed.
        """
        if not self.more:
            raise RuntimeError("only a call with `more` can be answered more than once")
        self.busy, self.on_release = True, on_release

    def wait(self, on_release: Callable[[Connection], None]) -> None:
        """Keep the connection for a call whose one reply comes later (`finish`)."""
        self.busy, self.on_release = True, on_release

    def finish(self, answer: Callable[[], bytes]) -> None:
        """Answer the call that was waited for by what this gives or raises."""
        if self.closed:
            return
        try:
            encoded = answer()
        except Exception as error:
            encoded = self.server.failed(self, error)
        self.server.transmit(self, encoded)
        if self.busy:
            self.release()

    def release(self) -> None:
        """End the holding; calls that came meanwhile are answered from the next turn on."""
        self.busy = False
        on_release, self.on_release = self.on_release, None
        if on_release:
            on_release(self)
        self.server.resume(self)

    def reply(self, parameters: dict[str, Any], *, continues: bool = False) -> None:
        """Queue a reply of a held call; the one without `continues` is the last."""
        if not self.busy:
            raise RuntimeError("the connection is not held")
        self.server.transmit(self, message.reply(parameters, continues=continues))
        if not continues and not self.closed:
            self.release()

    def offer(self, encoded: bytes) -> None:
        """Send a message of which only the newest counts: while older bytes are queued it waits, or is replaced."""
        if self.queue:
            self.latest = encoded
        else:
            self.server.transmit(self, encoded)

    def drop(self, error: KvmnegError) -> None:
        """Close, with an error as the last message where it can be delivered.

        A peer that does not read has let its buffer fill; a larger one makes room for what is queued and the error.
        """
        if self.closed:
            return
        farewell = message.error_reply(error.varlink, error.parameters())
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LAST_WORDS_BYTES)
            self.send(b"".join((*self.queue, farewell)))
        except OSError:
            pass  # it has gone
        self.server.close_connection(self)
        if isinstance(error, LimitExceeded):
            self.server.guarded(lambda: self.server.on_limit(error, self.peer))
