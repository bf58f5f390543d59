# SPDX-License-Identifier: LGPL-2.1-or-later
"""D-Bus and polkit, as the daemon sees them: a child that serves the one and asks the other (kvmneg.service.bus.dbus).

sd-bus works off whatever lies in its socket before it returns, and a client of the bus can send faster than that: six
seconds for one that asked for the introspection again and again. In the daemon's loop that would hang every VM monitor,
and in a thread too, as the interpreter is not given away meanwhile. So nothing of it runs here, and a daemon without a
bus starts as if there were none. The two speak varlink over two socket pairs. On one the child calls, without replies;
the other is held, and carries in their order what changed, the answers, and what polkit is to be asked.
"""

from __future__ import annotations

import json
import os
import socket
import sys

from kvmneg import limits
from kvmneg.errors import KvmnegError, LimitExceeded, NotPermitted
from kvmneg.service.varlink import message
from kvmneg.service.varlink.message import InterfaceNotFound, ServiceError, error_reply
from kvmneg.service.varlink.server import Later

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from kvmneg.service.interfaces.router import Router
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.loop import Timer
    from kvmneg.service.varlink.peer import Peer
    from kvmneg.service.varlink.server import Server

SYSTEM = "unix:path=/run/dbus/system_bus_socket"
# Not before the calls that wait have their answers; whoever activated us by D-Bus waits for the child.
_LATER_SECONDS = 0.2
_RETRY_SECONDS = 1.0
_MEASURED_SECONDS = 0.1  # until a permitted call is tried again that waits for a measurement
_STEADY_SECONDS = 60.0  # a child that served as long is tried again at once
_NO_BUS, _NO_NAME, _NO_SDBUS = 3, 4, 5  # exit statuses of the child
_INTERNAL = {"message": "an internal error of kvmnegd", "hint": "its log has more"}


class Caller:
    """Who called by D-Bus, as the bus says it; stands where a handler has a connection, and `peer` in it."""

    __slots__ = ("final", "groups", "permitted", "pid", "raw", "uid", "why")

    def __init__(self, credentials: dict[str, Any], raw: bytes) -> None:
        self.uid: int = credentials["uid"]
        self.pid: int = credentials["pid"]
        self.groups = frozenset[int](credentials["groups"])
        self.permitted = tuple[str, ...](credentials["permitted"])
        self.final: bool = credentials["final"]  # polkit has been asked
        self.why: str = credentials["why"]  # and why it did not permit it
        self.raw = raw  # the call, for the replies that are kept

    @property
    def peer(self) -> Caller:
        return self


class Question:
    """A call that waits for polkit."""

    __slots__ = ("again", "asked", "connection", "number", "timer")

    def __init__(
        self,
        number: int,
        connection: Connection,
        asked: dict[str, Any],
        again: Callable[[str], bytes],
        timer: Timer,
    ) -> None:
        self.number, self.connection, self.timer = number, connection, timer
        self.asked, self.again = asked, again


class Bus:
    """The child, kept alive; what it is told, and what it answers."""

    def __init__(self, address: str, router: Router, event: Callable[[], dict[str, Any]]) -> None:
        self.on_trouble: Callable[[str], None] = lambda text: None
        self._address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", SYSTEM) if address == "system" else address
        self._router = router
        self._event = event
        self._server: Server | None = None
        self._calls: Connection | None = None  # on which the child calls
        self._listener: Connection | None = None  # on which it listens
        self._questions: dict[int, Question] = {}
        self._number = 0
        self._retry = _RETRY_SECONDS
        self._started = 0.0
        self._coming = False  # the child is about to listen, for all that is known
        self._told = False  # of this absence of the bus
        self._stopping = False

    def start(self, server: Server, node: Node) -> None:
        """Bring the child up, a little later."""
        self._server = server
        node.changed.append(lambda: self._push({"event": self._event()}))
        self._coming = True
        server.after(_LATER_SECONDS, self._spawn)

    def stop(self) -> None:
        """Start no other child. The one there is ends by itself, when its connections do."""
        self._stopping = True

    def limits_changed(self) -> None:
        """The child keeps those of its callers."""
        from kvmneg import settled  # rarely

        self._push({"limits": settled.numbers()})

    # -- the child --------------------------------------------------------------------------------

    def _spawn(self) -> None:
        server = self._server
        assert server is not None  # it was started
        if self._stopping or not _present(self._address):
            self._again("there is no bus at " + self._address)
            return
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)), strict=True)
        for one in theirs:
            one.set_inheritable(True)
        try:
            child = os.posix_spawn(
                sys.executable,
                [
                    sys.executable,
                    "-P",
                    "-u",  # what sd-bus prints is there when it has printed it: kvmneg.service.bus.flags
                    "-m",
                    "kvmneg.service.bus.dbus",
                    *(str(one.fileno()) for one in theirs),
                ],
                self._environment(),
            )
            ended = os.pidfd_open(child)
        except OSError as error:
            for one in ours:
                one.close()
            self._again(f"no process serves it: {error.strerror}")
            return
        finally:
            for one in theirs:
                one.close()
        self._started, self._coming = server.clock(), True
        self._calls = server.acceptor.adopt(ours[0].detach())
        self._listener = server.acceptor.adopt(ours[1].detach())
        server.watch_fd(ended, lambda: self._ended(child, ended))

    def _environment(self) -> dict[str, str]:
        """Ours, with the bus and the limits as they are set, and without what only the daemon may tell systemd."""
        from kvmneg import settled  # rarely

        given = {**settled.environment(), "DBUS_SYSTEM_BUS_ADDRESS": self._address}
        return {name: text for name, text in given.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_PID")}

    def _ended(self, child: int, descriptor: int) -> None:
        server = self._server
        assert server is not None
        server.unwatch_fd(descriptor)
        os.close(descriptor)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for connection in (self._calls, self._listener):
            if connection is not None:
                server.close_connection(connection)
        self._calls = self._listener = None
        from kvmneg.service.bus import verdicts  # when there is a no

        for question in list(self._questions.values()):
            self._answered(question.number, verdicts.GONE)
        if server.clock() - self._started >= _STEADY_SECONDS:
            self._retry, self._told = _RETRY_SECONDS, False
        known = {
            _NO_BUS: f"the bus at {self._address} is gone",
            _NO_NAME: "the name org.kvmneg1 is not to be had",
            _NO_SDBUS: "python-sdbus is not installed",
        }
        self._again(known.get(status, f"the child that serves it ended with status {status}"))

    def _again(self, why: str) -> None:
        """Try again later, each time later; say so once."""
        self._coming = False
        if self._questions:
            from kvmneg.service.bus import verdicts  # when there is a no

            for question in list(self._questions.values()):
                self._answered(question.number, verdicts.NO_BUS)
        server = self._server
        if self._stopping or server is None:
            return
        if not self._told:
            self._told = True
            self.on_trouble(f"D-Bus: {why}; it is tried again")
        server.after(self._retry, self._spawn)
        self._retry = min(2 * self._retry, limits.BUS_RETRY_SECONDS)

    def _push(self, parameters: dict[str, Any]) -> None:
        if self._listener is not None and self._listener.busy:
            self._listener.reply(parameters, continues=True)

    # -- what the child says ----------------------------------------------------------------------

    def call(self, connection: Connection, method: str, given: dict[str, Any], more: bool) -> bytes | None:
        """A call of the child. For everybody else there is no such interface."""
        if connection not in (self._calls, self._listener):
            raise InterfaceNotFound("org.kvmneg.Bus")
        if method.endswith(".Listen") and more:
            connection.hold(lambda _: None)
            self._push({"event": self._event()})
            for question in self._questions.values():  # that came before it
                self._push(question.asked)
        elif method.endswith(".Call"):
            self._relay(given["id"], self._answer(given))
        elif method.endswith(".Answer"):
            self._answered(given["id"], given["why"])
        elif method.endswith(".Limit"):
            self._tell_limit(given)
        elif method.endswith(".Serving"):
            self._told, self._retry = False, _RETRY_SECONDS
        return None

    def _answer(self, given: dict[str, Any]) -> bytes:
        """The answer to one caller of the bus, as varlink has it; a no that polkit could turn says which action."""
        call = {"method": given["method"], "parameters": given["parameters"]}
        caller = Caller(given["caller"], json.dumps(call).encode())
        try:
            answer = self._router.call(caller, given["method"], given["parameters"], False, False)  # type: ignore[arg-type]
        except Later:
            raise  # the child's calls wait, as any connection's
        except NotPermitted as no:
            return error_reply(no.varlink, {**no.parameters(), "action": no.action})
        except (KvmnegError, ServiceError) as error:
            return error_reply(error.varlink, error.parameters())
        except Exception as error:
            if self._server is not None:
                self._server.report(error)
            return error_reply(KvmnegError.varlink, _INTERNAL)
        return answer or message.reply({})

    def _tell_limit(self, given: dict[str, Any]) -> None:
        """A caller of the bus went over a limit that the child keeps."""
        from kvmneg.service import telling  # rarely

        name = given["limit"]
        caller = {"groups": (), "permitted": (), "final": True, "why": "", **given}
        error = LimitExceeded(name, getattr(limits, name))
        telling.limit(error, Caller(caller, b""), given["method"])  # type: ignore[arg-type]

    def _relay(self, number: int, answer: bytes) -> None:
        """An answer whose bytes may be kept ones: wrapped, not read."""
        if self._server is not None and self._listener is not None and self._listener.busy:
            wrapped = b'{"continues":true,"parameters":{"id":%d,"answer":%b}}\0' % (number, answer[:-1])
            self._server.transmit(self._listener, wrapped)

    # -- polkit -----------------------------------------------------------------------------------

    def will_ask(self, connection: Connection, no: KvmnegError) -> bool:
        """Whether this is not the last word: of callers of the bus the child asks polkit."""
        asks = isinstance(no, NotPermitted) and bool(no.action)
        return asks and isinstance(connection, Caller) and not connection.final

    def ask(
        self, connection: Connection, no: NotPermitted, interactive: bool, again: Callable[[str], bytes]
    ) -> None:
        """Have the call wait for polkit, and answer it then by what `again` gives, told why not ("": permitted).

        Raises `no` where nobody can be asked, LimitExceeded.
        """
        from kvmneg.service.bus import verdicts  # when there may be a no

        server = self._server
        if isinstance(connection, Caller):
            no.why = connection.why
            raise no
        if server is None or not (self._coming or (self._listener and self._listener.busy)):
            no.why = verdicts.NO_BUS
            raise no
        peer = connection.peer
        started = _started(peer)
        if started is None:
            no.why = verdicts.ENDED
            raise no
        if len(self._questions) >= limits.POLKIT_QUESTIONS:
            raise LimitExceeded("POLKIT_QUESTIONS", limits.POLKIT_QUESTIONS)
        if sum(one.connection.peer.uid == peer.uid for one in self._questions.values()) >= (
            limits.POLKIT_QUESTIONS_PER_UID
        ):
            raise LimitExceeded("POLKIT_QUESTIONS_PER_UID", limits.POLKIT_QUESTIONS_PER_UID)
        self._number += 1
        number = self._number
        timer = server.after(limits.POLKIT_SECONDS, lambda: self._answered(number, verdicts.LATE))
        subject = {"pid": peer.pid, "started": started, "uid": peer.uid}
        asked = {"ask": number, "action": no.action, "interactive": interactive, **subject}
        self._questions[number] = Question(number, connection, asked, again, timer)
        connection.wait(lambda _: self._forget(number))
        self._push(asked)

    def _answered(self, number: int, why: str) -> None:
        question = self._questions.pop(number, None)
        if question is None or self._server is None:
            return  # whoever asked has gone
        self._server.cancel(question.timer)
        self._carry_out(question, why)

    def _carry_out(self, question: Question, why: str) -> None:
        server, peer = self._server, question.connection.peer
        if server is None or question.connection.closed:
            return
        peer.permitted = () if why else (question.asked["action"],)
        try:
            reply = question.again(why)
        except Later:  # this host is measured again: the permission is not asked for anew
            server.after(_MEASURED_SECONDS, lambda: self._carry_out(question, why))
            return
        except Exception as error:
            fault = error
            question.connection.finish(lambda: _raise(fault))
        else:
            question.connection.finish(lambda: reply)
        finally:
            peer.permitted = ()

    def _forget(self, number: int) -> None:
        """The caller has gone; nothing happens where it has its answer."""
        question = self._questions.pop(number, None)
        if question is not None and self._server is not None:
            self._server.cancel(question.timer)
            self._push({"forget": number})


def _raise(error: Exception) -> NoReturn:
    raise error


def _present(address: str) -> bool:
    """Whether a bus can be there: of an address that is a path, whether that exists."""
    first = address.partition(";")[0].partition(",")[0]
    return not first.startswith("unix:path=") or os.path.exists(first.removeprefix("unix:path="))


def _started(peer: Peer) -> int | None:
    """When the peer's process started (clock ticks since boot): with the pid, one process. None where it has ended.

    The descriptor is of the process that connected, whatever has its number by now: what /proc tells while that lives
    is told of it.
    """
    import signal

    from kvmneg.host.guests import process

    try:
        fd = peer.pidfd()
    except OSError:
        return None
    try:
        found = process(peer.pid)
        signal.pidfd_send_signal(fd, 0)
    except PermissionError:
        pass  # another user's, and alive
    except OSError:
        return None
    finally:
        os.close(fd)
    return found.started if found else None
