# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a call's name to its method, and the replies that are kept as bytes.

The same host and the same fence give the same bytes: a reply of a cacheable method is kept under the call's own
bytes. Whatever changes an answer (the node tells) empties it, and none is given out that is older than
VOLATILE_SECONDS without having looked again whether the host changed.
"""

from __future__ import annotations

from functools import partial

from kvmneg import limits
from kvmneg.errors import Blocked, KvmnegError, NotPermitted
from kvmneg.service.interfaces import introspection, parameters
from kvmneg.service.interfaces.kvmneg import CACHEABLE, Interfaces
from kvmneg.service.shares import Shares
from kvmneg.service.varlink.server import (
    Dispatch,
    ExpectedMore,
    InterfaceNotFound,
    Later,
    Subscriptions,
    error_reply,
    reply,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    from kvmneg.service.bus.child import Bus
    from kvmneg.service.interfaces.answers import Handler
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.server import Server

    Reply = TypeVar("Reply", bytes, bytes | None)


# between the daemon and its child that serves D-Bus, and nobody else: kvmneg.service.bus.child
BUS = "org.kvmneg.Bus."

# interfaces that no negotiation needs: the modules with their handlers
_ROOMS = {
    "org.kvmneg.Fence": "kvmneg.service.interfaces.fence",
    "org.kvmneg.Guests": "kvmneg.service.interfaces.guests",
    "org.kvmneg.Rollback": "kvmneg.service.interfaces.rollback",
}


class Router(Dispatch):
    """The dispatch of one node's interfaces."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._interfaces = Interfaces(node)
        self._handlers = self._interfaces.handlers()
        self._watchers = Subscriptions()
        self._replies: dict[bytes, bytes] = {}  # what may be given out without a look at the host
        # what may be given out after one, with the digest that it offers, if any
        self._known: Shares[bytes, tuple[bytes, str]] = Shares()
        self._known.on_forgotten = self._forget_call
        self._fresh_until = 0.0
        self._server: Server | None = None
        self.bus: Bus | None = None  # where D-Bus is on
        # a call that is known costs this one look into a dictionary
        self.cached = self._replies.get  # type: ignore[method-assign, assignment]
        node.changed.append(self._forget)
        node.doubted.append(self._doubt)
        node.offers.on_forgotten = self._forget_offer

    def event(self) -> dict[str, Any]:
        """Where host and fence stand now, as Watch tells it."""
        return self._interfaces.event()

    def attach(self, server: Server) -> None:
        """The server whose clock and timers tell when replies have become old."""
        self._server = server

    def limits_changed(self) -> None:
        """What keeps a limit beyond the call it is for."""
        if self._server is not None:
            self._watchers.retime(self._server)
        if self.bus is not None:
            self.bus.limits_changed()

    def call(
        self, connection: Connection, method: str, given: dict[str, Any], more: bool, oneway: bool
    ) -> bytes | None:
        if self.bus is not None and method.startswith(BUS):
            return self.bus.call(connection, method, given, more)
        return self._telling(
            connection, method, given, lambda: self._call(connection, method, given, more, oneway)
        )

    def _telling(
        self, connection: Connection, method: str, given: dict[str, Any], answer: Callable[[], Reply]
    ) -> Reply:
        """What this gives; what it raises is told. Raises Later in the place of Measuring."""
        try:
            return answer()
        except KvmnegError as no:
            from kvmneg.service import telling  # a yes needs no word
            from kvmneg.service.watching.again import Measuring

            if isinstance(no, Measuring):
                raise Later from no
            if self.bus is None or not self.bus.will_ask(connection, no):
                dry_run = bool(given.get("dryRun"))
                telling.refused(method, connection.peer, no, self._node.generation, dry_run=dry_run)
            raise

    def _call(
        self, connection: Connection, method: str, given: dict[str, Any], more: bool, oneway: bool
    ) -> bytes | None:
        fields = _fields(method)
        checked = parameters.check(given, fields)
        if method in CACHEABLE:
            self._look()
            known = self._known.values.get(connection.raw)
            if known is not None:
                self._keep(connection, *known)
                return known[0]
        if method.startswith("org.varlink.service."):
            return reply(_introspect(method, checked))
        if method == "org.kvmneg.Watch":
            if not more:
                raise ExpectedMore
            self._watchers.add(connection, self._interfaces.event())
            return None
        try:
            answer, digest = self._answer(method, connection, checked)
        except NotPermitted as no:
            if not no.action:
                raise
            if self.bus is None or oneway:
                from kvmneg.service.bus import verdicts  # of a no

                no.why = verdicts.OFF if self.bus is None else verdicts.ONEWAY
                raise
            refusal = no

            def judged(why: str) -> bytes:
                if why:
                    refusal.why = why
                    raise refusal
                return self._answer(method, connection, checked)[0]

            interactive = checked.get("allowInteractiveAuthentication", False)
            again = partial(self._judged, connection, method, given, judged)
            self.bus.ask(connection, no, interactive, again)
            return None
        if method in CACHEABLE and not (more or oneway):
            self._keep(connection, answer, digest)
        return answer

    def _judged(
        self,
        connection: Connection,
        method: str,
        given: dict[str, Any],
        answer: Callable[[str], bytes],
        why: str,
    ) -> bytes:
        """The answer to a call that polkit was asked about."""
        return self._telling(connection, method, given, partial(answer, why))

    def _answer(self, method: str, connection: Connection, checked: dict[str, Any]) -> tuple[bytes, str]:
        """The reply, and the digest of the contract it offers, "" for none."""
        try:
            answer = self._handler(method)(connection, checked)
        except Blocked as no:
            if method not in CACHEABLE:
                raise
            return error_reply(no.varlink, no.parameters()), ""  # as lasting as a yes
        return reply(answer), answer["digest"] if method == "org.kvmneg.Negotiate" else ""

    def _handler(self, method: str) -> Handler:
        """The handler of a method that exists; those of a room come with its first call."""
        found = self._handlers.get(method)
        if found is None:
            from importlib import import_module  # a VMM's calls need no room

            room = import_module(_ROOMS[method.rpartition(".")[0]])
            self._handlers.update(room.handlers(self._node))
            found = self._handlers[method]
        return found

    def _keep(self, connection: Connection, answer: bytes, digest: str) -> None:
        """Keep a reply and the offer in it for this user too: it is not lost when another one's are."""
        call, uid = connection.raw, connection.peer.uid
        if len(call) > limits.CACHED_CALL_BYTES or len(answer) > limits.CACHED_REPLY_BYTES:
            return
        self._replies[call] = answer
        self._known.put(call, (answer, digest), uid, limits.CACHED_REPLIES)
        if digest:
            self._node.offers.hold(digest, uid, limits.CACHED_OFFERS)

    def _forget_call(self, call: bytes) -> None:
        self._replies.pop(call, None)

    def _forget_offer(self, digest: str) -> None:
        """No reply is given out whose offer Begin would not know."""
        for call, (_, offered) in list(self._known.values.items()):
            if offered == digest:
                self._known.drop(call)

    def _look(self) -> None:
        """Inputs that change without an event are never older than VOLATILE_SECONDS in an answer."""
        server = self._server
        if server is None or server.clock() < self._fresh_until:
            return
        self._node.refresh(fresh=True)  # a look that somebody else took may be a second old already
        self._fresh_until = server.clock() + limits.VOLATILE_SECONDS
        # one-shot, and only while somebody asks: an idle daemon does not wake up
        server.after(limits.VOLATILE_SECONDS, self._replies.clear)

    def _doubt(self) -> None:
        """Nothing is given out without a look, which waits for the measurement."""
        self._replies.clear()
        self._fresh_until = 0.0

    def _forget(self) -> None:
        self._replies.clear()
        self._known.clear()
        self._watchers.publish(self._interfaces.event())


def _fields(method: str) -> dict[str, str]:
    """The input of a method. Raises InterfaceNotFound, MethodNotFound."""
    interface = method.rpartition(".")[0]
    if interface not in parameters.METHODS:
        raise InterfaceNotFound(interface)
    return parameters.fields_of(method)


def _introspect(method: str, checked: dict[str, Any]) -> dict[str, Any]:
    if method.endswith(".GetInfo"):
        return introspection.get_info()
    return introspection.get_interface_description(checked["interface"])
