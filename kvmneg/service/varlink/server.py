# SPDX-License-Identifier: LGPL-2.1-or-later
"""The varlink transport: one thread, one epoll, bounded in everything a client controls (UAPI.20).

A call whose reply is known costs a receive, one look into a dictionary and a send; whatever is not that (a partial
call, several at once, a peer that does not read, an end of file) goes the long way through the connection's state.
What one client does never costs the others more than one chunk, CALLS_PER_TURN calls and its own queue.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections import deque

from kvmneg import limits as default_limits
from kvmneg.errors import KvmnegError, LimitExceeded
from kvmneg.service.varlink import message
from kvmneg.service.varlink.accept import Acceptor
from kvmneg.service.varlink.connection import Connection
from kvmneg.service.varlink.dispatch import Dispatch
from kvmneg.service.varlink.loop import Loop
from kvmneg.service.varlink.message import (
    ExpectedMore,
    InterfaceNotFound,
    InvalidParameter,
    Later,
    MethodNotFound,
    MethodNotImplemented,
    ServiceError,
    error_reply,
    reply,
)
from kvmneg.service.varlink.subscriptions import Subscriptions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmneg.service.varlink.peer import Peer

__all__ = (
    "Connection", "Dispatch", "ExpectedMore", "InterfaceNotFound", "InvalidParameter", "Later", "MethodNotFound",
    "MethodNotImplemented", "Server", "ServiceError", "Subscriptions", "error_reply", "reply",
)  # fmt: skip

_IN, _OUT, _GONE = select.EPOLLIN, select.EPOLLOUT, select.EPOLLHUP | select.EPOLLERR
_EVENTS_PER_TURN = 64
_INTERNAL = error_reply(
    KvmnegError.varlink, {"message": "an internal error of kvmnegd", "hint": "its log has more"}
)


class Server(Loop):
    """Serves one listening Unix socket until it is stopped."""

    def __init__(
        self,
        listener: socket.socket,
        dispatch: Dispatch,
        *,
        clock: Callable[[], float] = time.monotonic,
        limits: Any = default_limits,
    ) -> None:
        super().__init__(clock)
        # no descriptors left: once in a while, however often it happens; a peer went over a limit: each time
        self.on_trouble: Callable[[str], None] = lambda text: None
        self.on_limit: Callable[[LimitExceeded, Peer], None] = lambda error, peer: None
        self._limits = limits
        self._dispatch = dispatch
        self._connections: dict[int, Connection] = {}
        self._backlog: deque[Connection] = deque()  # with calls left over from their turn
        self._parked: list[Connection] = []
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch_fd(self._wake, lambda: None)  # never read: it says that the loop is to end
        self.acceptor = Acceptor(self, listener, limits)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    @property
    def queued_bytes(self) -> int:
        """Replies that wait for their peers to read."""
        return sum(connection.queued for connection in self._connections.values())

    def stop(self) -> None:
        """End `run` once the call at hand is answered and queued replies are out; from any thread or signal handler."""
        if not self._stopping:
            os.eventfd_write(self._wake, 1)  # first: once the flag is seen the descriptor goes
            self._stopping = True

    # --- the loop

    def run(self) -> None:
        """Serve until stopped; then every connection is closed."""
        poll, clock = self.epoll.poll, self.clock
        connections, cached = self._connections, self._dispatch.cached
        while not self._stopping:
            happened = poll(0.0 if self._backlog else max(0.0, self._due - clock()), _EVENTS_PER_TURN)
            if clock() >= self._due:
                self._run_timers()
            side, chunk = [], self._limits.READ_CHUNK_BYTES
            for fd, events in happened:
                connection = connections.get(fd)
                if connection is None:
                    side.append(fd)
                    continue
                if not connection.warm or events != _IN:
                    self._event(connection, events)
                    continue
                try:
                    data = connection.recv(chunk)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                reply = cached(data)
                if reply is None:
                    self._received(connection, data)
                    continue
                try:
                    sent = connection.send(reply)
                except OSError:  # full or gone: transmit finds out which
                    sent = 0
                if sent != len(reply):
                    self.transmit(connection, memoryview(reply)[sent:])
            # After the connections: accepting reuses numbers that events of this turn may still mean.
            self._call_back(side)
            if self._backlog:
                self._work_off()
        self._finish()

    def _event(self, connection: Connection, events: int) -> None:
        """Anything but a whole call on an idle connection."""
        if events & _OUT:
            self._flush(connection)
        if not connection.closed and connection.interest & _IN and events & ~_OUT:
            try:
                data = connection.recv(self._limits.READ_CHUNK_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self._received(connection, data)
        elif events & _GONE and (connection.parked or not connection.waits):
            self.close_connection(connection)  # nothing is being read that would say so

    def _received(self, connection: Connection, data: bytes) -> None:
        if data:
            connection.buffer += data
            self._answer_calls(connection)
        else:  # a peer that only shut down its sending half still gets its replies
            connection.ended, connection.buffer = True, b""
            self._settle(connection)

    def _answer_calls(self, connection: Connection) -> None:
        """Answer whole calls in the buffer: as many as its turn and its reply queue allow."""
        limits, cached = self._limits, self._dispatch.cached
        buffer, start, budget = connection.buffer, 0, limits.CALLS_PER_TURN
        end = buffer.find(0)
        while end >= 0 and end - start <= limits.CALL_BYTES:
            if connection.busy or connection.closed or connection.queued >= limits.REPLY_QUEUE_BYTES:
                break
            if not budget:
                self.resume(connection)
                break
            budget -= 1
            if connection.new:
                self.acceptor.called(connection)
            call = buffer[start : end + 1]
            reply = cached(call)
            if reply is None:
                reply = self._answer(connection, call)
                if connection.parked:
                    break
                budget = 0  # it was work: the others first
            if reply is not None:
                self.transmit(connection, reply)
            start = end + 1
            end = buffer.find(0, start)
        connection.buffer = buffer[start:]
        if (end if end >= 0 else len(buffer)) - start > limits.CALL_BYTES:
            connection.drop(LimitExceeded("CALL_BYTES", limits.CALL_BYTES, "one call was longer"))
        self._settle(connection)

    def _answer(self, connection: Connection, call: bytes) -> bytes | None:
        try:
            method, parameters, more, oneway, upgrade = message.parse_call(call[:-1])
        except message.Malformed:
            self.close_connection(connection)
            return None
        connection.raw, connection.more = call, more
        try:
            if upgrade:
                raise MethodNotImplemented(method)
            reply = self._dispatch.call(connection, method, parameters, more, oneway)
            if reply is None and not connection.busy and not oneway:
                raise RuntimeError(f"{method} gave no reply")
        except Later:
            connection.parked = connection.waits = True
            self._parked.append(connection)
            return None
        except Exception as error:
            reply = self.failed(connection, error)
        return None if oneway or connection.closed else reply

    def failed(self, connection: Connection, error: Exception) -> bytes:
        """The error reply; of a fault that is ours the text goes to the log, not to the client."""
        if connection.busy:
            connection.release()
        try:
            if isinstance(error, (KvmnegError, ServiceError)):
                return error_reply(error.varlink, error.parameters())
        except (TypeError, ValueError) as fault:  # a field that is not JSON
            error = fault
        self.report(error)
        return _INTERNAL

    # --- replies

    def transmit(self, connection: Connection, reply: bytes | memoryview) -> None:
        """Send, or queue what the socket does not take."""
        if connection.closed:
            return
        if not connection.queue:
            try:
                sent = connection.send(reply)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.close_connection(connection)
                return
            if sent == len(reply):
                return
            connection.moved = self.clock()
            reply = memoryview(reply)[sent:]
        connection.queue.append(reply)
        connection.queued += len(reply)
        self._settle(connection)

    def _flush(self, connection: Connection) -> None:
        """Send from the queue; once it is short enough, answer what was held back for it."""
        queue = connection.queue
        while queue:
            try:
                sent = connection.send(queue[0])
            except BlockingIOError:
                break
            except OSError:
                self.close_connection(connection)
                return
            connection.moved = self.clock()
            connection.queued -= sent
            if sent < len(queue[0]):
                queue[0] = memoryview(queue[0])[sent:]
                break
            queue.popleft()
        if not queue and connection.latest is not None:
            latest, connection.latest = connection.latest, None
            self.transmit(connection, latest)
        self._answer_calls(connection)

    def flush(self, connection: Connection) -> bool:
        """Try to send from the queue though the kernel did not say that there is room; true where some went out."""
        before = connection.queued
        self._flush(connection)
        return connection.closed or connection.queued < before

    def resume(self, connection: Connection) -> None:
        """Take up the calls in the buffer again in the next turn."""
        if not connection.waits and not connection.closed:
            connection.waits = True
            self._backlog.append(connection)
            self._settle(connection)

    def unpark(self) -> None:
        """Answer the calls that were put off by Later; once more, where they are put off again."""
        parked, self._parked = self._parked, []
        for connection in parked:
            connection.parked = connection.waits = False
            self.resume(connection)

    def _work_off(self) -> None:
        until = self.clock() + self._limits.TURN_SECONDS
        for _ in range(len(self._backlog)):
            if self.clock() >= until:
                return  # whoever sends meanwhile is not kept waiting for all of it
            connection = self._backlog.popleft()
            connection.waits = False
            if not connection.closed:
                self._answer_calls(connection)

    def _settle(self, connection: Connection) -> None:
        """Bring what epoll watches, and whether the short way may be taken, in line with the state."""
        if connection.closed:
            return
        held = connection.busy or connection.waits
        if connection.ended and not held and not connection.queue:
            self.close_connection(connection)
            return
        wanted = _OUT if connection.queue else 0
        if not (held or connection.ended or connection.queued >= self._limits.REPLY_QUEUE_BYTES):
            wanted |= _IN
        if wanted != connection.interest:
            connection.interest = wanted
            self.epoll.modify(connection.fd, wanted)
        connection.warm = wanted == _IN and not connection.buffer and not connection.new

    # --- connections coming and going

    def add_connection(self, connection: Connection) -> None:
        """Serve one that was accepted. Its first call is there as a rule: looked for at once, that saves a turn."""
        self._connections[connection.fd] = connection
        self.epoll.register(connection.fd, connection.interest)
        try:
            data = connection.recv(self._limits.READ_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        reply = self._dispatch.cached(data)
        if reply is None:
            self._received(connection, data)
            return
        self.acceptor.called(connection)
        connection.warm = True
        self.transmit(connection, reply)

    def close_connection(self, connection: Connection) -> None:
        """Close; what is queued for it is discarded. Nothing happens where it is closed already."""
        if connection.closed:
            return
        connection.closed, connection.warm = True, False
        del self._connections[connection.fd]
        self.acceptor.gone(connection)
        self.epoll.unregister(connection.fd)
        connection.socket.close()
        connection.queue.clear()
        connection.queued, connection.buffer, connection.latest = 0, b"", None
        if connection.busy:
            connection.release()
        on_closed, connection.on_closed = connection.on_closed, None
        if on_closed:
            self.guarded(lambda: on_closed(connection))

    # --- the end

    def _finish(self) -> None:
        """Answer what was sent up to now and hand it out, for STOP_SECONDS at most, then close everything."""
        deadline = self.clock() + self._limits.STOP_SECONDS
        self.acceptor.close()  # whoever connects now is the next daemon's
        self.unwatch_fd(self._wake)
        for connection in list(self._connections.values()):
            if connection.on_closed is None:
                # its peer is told by EPIPE what came too late, and loses nothing that did not
                connection.socket.shutdown(socket.SHUT_RD)
        self._close_done()
        while self._connections and (left := deadline - self.clock()) > 0:
            for fd, events in self.epoll.poll(0.0 if self._backlog else left, _EVENTS_PER_TURN):
                if fd in self._connections:
                    self._event(self._connections[fd], events)
            self._work_off()
            self._close_done()
        for connection in list(self._connections.values()):
            self.close_connection(connection)
        self.epoll.close()
        os.close(self._wake)

    def _close_done(self) -> None:
        """At the end: close whose answer comes some other time, and, between two calls, what the next daemon serves on.

        Half a call would be lost with the one that read it.
        """
        for connection in list(self._connections.values()):
            between = not (connection.buffer or connection.queue or connection.waits)
            if connection.busy or connection.parked or (connection.on_closed is not None and between):
                self.close_connection(connection)
