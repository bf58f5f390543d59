# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.kvmneg1 on D-Bus: a child of kvmnegd, and the only module that imports sdbus; child.py has the reason.

Calls go to the daemon under the name of whoever made them, as the bus knows it; what it answers and what it tells of
comes back in one order, so that a property is never older than an answer. Nothing of a fault here reaches a client but
that there was one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from functools import partial

from kvmneg import limits, settled
from kvmneg.errors import KvmnegError, LimitExceeded, NotPermitted, dbus_name
from kvmneg.service.bus import methods
from kvmneg.service.bus.flags import allows_interaction
from kvmneg.service.bus.link import INVALID, Daemon, Refused, refusal, told
from kvmneg.service.bus.methods import NAME, PATH
from kvmneg.service.bus.polkit import Polkit
from kvmneg.service.varlink.message import InvalidParameter

_NO_BUS, _NO_NAME, _NO_SDBUS = 3, 4, 5  # exit statuses, as kvmneg.service.bus.child reads them

try:
    from sdbus import sd_bus_internals as sd_bus
except ImportError:  # an optional dependency: the daemon says so, once
    sys.exit(_NO_SDBUS)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
_REFUSED_PER_TURN = 16
_TOLD_SECONDS = 1.0  # a caller's going over one limit is told once in that time
_TOLD_AT_ONCE = 16  # callers and limits, in that time


class Enough(Exception):
    """Raised to sd-bus by a call that is refused: it works off all that lies in the socket unless something fails."""


class Service:
    """The object /org/kvmneg1."""

    def __init__(self, bus: sd_bus.SdBus, daemon: Daemon) -> None:
        self._bus = bus
        self._daemon = daemon
        self._polkit = Polkit(bus)
        self._calls: dict[str, int] = {}  # that wait, by caller
        self._uids: dict[int, int] = {}  # and by user
        self._refused = 0
        self._over: dict[tuple[str, str], asyncio.Task[None]] = {}  # who went over which limit, told just now
        self._tasks: set[asyncio.Task[None]] = set()
        self._credentials: dict[str, dict[str, Any]] = {}
        self._questions: dict[int, asyncio.Task[None]] = {}  # of varlink's peers
        self._interfaces: list[sd_bus.SdBusInterface] = []  # sd-bus refers to them
        self.state: dict[str, Any] = {}

    def offer(self) -> None:
        """Put the interfaces on the bus."""
        for interface, offers in methods.METHODS.items():
            offered = sd_bus.SdBusInterface()
            for method, outputs in offers.items():
                inputs = methods.inputs(interface, method)
                offered.add_method(
                    method, "".join(inputs.values()), [*inputs], "".join(outputs.values()), [*outputs],
                    sd_bus.DbusUnprivilegedFlag, partial(self._called, interface, method),  # type: ignore[arg-type]
                )  # fmt: skip
            if interface == "org.kvmneg":
                self._describe(offered)
            self._bus.add_interface(offered, PATH, methods.interface_name(interface))
            self._interfaces.append(offered)

    def _describe(self, offered: sd_bus.SdBusInterface) -> None:
        for name, kind in methods.PROPERTIES.items():

            def get(reply: sd_bus.SdBusMessage, name: str = name, kind: str = kind) -> None:
                reply.append_data(kind, self.state[name])

            offered.add_property(name, kind, get, None, sd_bus.DbusPropertyEmitsChangeFlag)
        for name, arguments in methods.SIGNALS.items():
            offered.add_signal(name, "".join(arguments.values()), [*arguments], 0)

    # -- calls ------------------------------------------------------------------------------------

    def _called(self, interface: str, method: str, call: sd_bus.SdBusMessage) -> None:
        """By sd-bus, for each call: what is too much is refused here, before anything is done for it."""
        sender = call.sender or ""
        waiting = self._calls.get(sender, 0)
        if waiting >= limits.BUS_CALLS_PER_CALLER:
            over = LimitExceeded("BUS_CALLS_PER_CALLER", limits.BUS_CALLS_PER_CALLER)
            self._refuse(call, self._over_limit(over, sender, f"{interface}.{method}"))
        elif len(self._tasks) >= limits.BUS_CALLS:
            over = LimitExceeded("BUS_CALLS", limits.BUS_CALLS)
            self._refuse(call, self._over_limit(over, sender, f"{interface}.{method}"))
        else:
            self._calls[sender] = waiting + 1
            task = asyncio.get_running_loop().create_task(self._serve(interface, method, sender, call))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _refuse(self, call: sd_bus.SdBusMessage, error: LimitExceeded) -> None:
        """Refuse a call. Now and then that ends sd-bus's turn: others wait for theirs while one floods us."""
        self._refused += 1
        if self._refused % _REFUSED_PER_TURN:
            _fail(call, refusal(error))
            return
        asyncio.get_running_loop().call_soon(
            self._bus.process
        )  # what it has read already, epoll does not tell
        raise Enough  # the caller gets its D-Bus name, without a text

    def _over_limit(self, error: LimitExceeded, sender: str, method: str) -> LimitExceeded:
        """Have the daemon told of it, which only sees the calls that are let through."""
        key = sender, error.fields["limit"]
        if key not in self._over and len(self._over) < _TOLD_AT_ONCE:
            self._over[key] = asyncio.get_running_loop().create_task(self._tell_limit(error, sender, method))
            self._over[key].add_done_callback(lambda _: self._over.pop(key))
        return error

    async def _tell_limit(self, error: LimitExceeded, sender: str, method: str) -> None:
        try:
            caller = await self._caller(sender)
        except Refused:
            return  # it has gone: whose fault it was cannot be told
        told = {"limit": error.fields["limit"], "uid": caller["uid"], "pid": caller["pid"], "method": method}
        self._daemon.tell("Limit", told)
        await asyncio.sleep(_TOLD_SECONDS)

    async def _serve(self, interface: str, method: str, sender: str, call: sd_bus.SdBusMessage) -> None:
        try:
            given = methods.to_varlink(interface, method, call.parse_to_tuple())
            answer = await self._answer(sender, f"{interface}.{method}", given, call)
            if call.expect_reply:
                reply = call.create_reply()
                signature, values = methods.from_varlink(interface, method, answer)
                if signature:
                    reply.append_data(signature, *values)
                reply.send()
        except InvalidParameter as error:
            _fail(call, Refused(INVALID, f"invalid: {error.value}"))
        except Refused as no:
            _fail(call, no)
        except Exception:
            from traceback import print_exc

            print_exc()
            _fail(
                call,
                Refused(dbus_name(KvmnegError.varlink), "an internal error of kvmnegd\n  its log has more"),
            )
        finally:
            self._calls[sender] -= 1
            if not self._calls[sender]:
                del self._calls[sender]

    async def _answer(
        self, sender: str, method: str, given: dict[str, Any], message: sd_bus.SdBusMessage
    ) -> dict[str, Any]:
        """The answer's parameters, with polkit's permission where that is needed. Raises Refused."""
        caller = await self._caller(sender)
        uid = caller["uid"]
        if self._uids.get(uid, 0) >= limits.BUS_CALLS_PER_UID:
            over = LimitExceeded("BUS_CALLS_PER_UID", limits.BUS_CALLS_PER_UID)
            raise refusal(self._over_limit(over, sender, method))
        self._uids[uid] = self._uids.get(uid, 0) + 1
        try:
            call = {
                "method": method,
                "parameters": given,
                "caller": {**caller, "permitted": [], "final": False, "why": ""},
            }
            answer = await self._daemon.call(call)
            action = answer.get("parameters", {}).pop("action", "") if answer.get("error") else ""
            if action:  # the daemon has the last word, whichever it is
                asked_for = given.get("allowInteractiveAuthentication") is True
                interactive = asked_for or allows_interaction(message)
                try:
                    why = await self._refusal(sender, uid, action, interactive)
                except LimitExceeded as error:
                    raise refusal(self._over_limit(error, sender, method)) from None
                permitted = [] if why else [action]
                call["caller"] = {**caller, "permitted": permitted, "final": True, "why": why}
                answer = await self._daemon.call(call)
        finally:
            self._uids[uid] -= 1
            if not self._uids[uid]:
                del self._uids[uid]
        parameters: dict[str, Any] = answer.get("parameters", {})
        if "error" in answer:
            raise told(answer["error"], parameters)
        return parameters

    async def _refusal(self, sender: str, uid: int, action: str, interactive: bool) -> str:
        subject = "system-bus-name", {"name": ("s", sender)}
        return await self._polkit.permits(subject, uid, action, interactive)

    async def _caller(self, sender: str) -> dict[str, Any]:
        """Who is behind a name of the bus; it never becomes another's. Raises Refused where it has gone."""
        known = self._credentials.get(sender)
        if known is not None:
            return known
        ask = self._bus.new_method_call_message(*_BUS, "GetConnectionCredentials")
        ask.append_data("s", sender)
        try:
            found: dict[str, Any] = (await self._bus.call_async(ask)).get_contents()  # type: ignore[assignment]
            uid = found["UnixUserID"][1]
        except (sd_bus.SdBusBaseError, KeyError):
            raise Refused(dbus_name(NotPermitted.varlink), "the bus does not say who calls") from None
        pid, groups = found.get("ProcessID", ("u", 0))[1], found.get("UnixGroupIDs", ("au", []))[1]
        if len(self._credentials) >= limits.BUS_CALLERS:
            del self._credentials[next(iter(self._credentials))]
        self._credentials[sender] = {"uid": uid, "pid": pid, "groups": list(groups)}
        return self._credentials[sender]

    # -- news -------------------------------------------------------------------------------------

    def hear(self, news: dict[str, Any]) -> None:
        """One thing that the daemon tells."""
        if "limits" in news:
            settled.take(news["limits"])
        elif "event" in news:
            self._tell(news["event"])
        elif "ask" in news:
            number = news["ask"]
            task = asyncio.get_running_loop().create_task(self._judge(number, news))
            self._questions[number] = task
            task.add_done_callback(lambda _: self._questions.pop(number, None))
        elif "forget" in news and news["forget"] in self._questions:
            self._questions[news["forget"]].cancel()

    def _tell(self, event: dict[str, Any]) -> None:
        """Each change once: in the properties, and as the signals that it is."""
        before = self.state
        self.state = {
            "Generation": event["generation"],
            "FenceDigest": event["fenceDigest"] or "",
            "State": event["state"],
            "Host": event["hostDigest"] or "",
        }
        changed = {name for name, value in self.state.items() if before and before[name] != value}
        if not changed:
            return
        rows = {name: (methods.PROPERTIES[name], self.state[name]) for name in sorted(changed)}
        tell = self._bus.new_signal_message(PATH, "org.freedesktop.DBus.Properties", "PropertiesChanged")
        tell.append_data("sa{sv}as", NAME, rows, [])
        tell.send()
        generation, fence, state = (self.state[name] for name in ("Generation", "FenceDigest", "State"))
        if changed & {"Generation", "FenceDigest", "State"}:
            self._signal("FenceChanged", generation, fence, state)
        if "Host" in changed:
            self._signal("HostChanged", self.state["Host"])
        if state == "breached" and "State" in changed:
            self._signal("Breached", generation, fence)

    def _signal(self, name: str, *values: Any) -> None:
        tell = self._bus.new_signal_message(PATH, NAME, name)
        tell.append_data("".join(methods.SIGNALS[name].values()), *values)
        tell.send()

    async def _judge(self, number: int, asked: dict[str, Any]) -> None:
        """Ask polkit for a peer of varlink's."""
        subject = {
            "pid": ("u", asked["pid"]),
            "start-time": ("t", asked["started"]),
            "uid": ("i", asked["uid"]),
        }
        try:
            why = await self._polkit.permits(
                ("unix-process", subject), asked["uid"], asked["action"], asked["interactive"]
            )
        except LimitExceeded as error:
            why = f"polkit was not asked: {error.message}"
        self._daemon.tell("Answer", {"id": number, "why": why})


class Loop(asyncio.SelectorEventLoop):
    """asyncio's loop, which tells when sd-bus does not look at its bus any more: it does not say so itself."""

    bus: sd_bus.SdBus | None = None

    def remove_reader(self, fd: Any) -> bool:
        if self.bus is not None:
            try:
                self.bus.get_fd()
            except sd_bus.SdBusLibraryError:
                self.give_up()
        return super().remove_reader(fd)

    def give_up(self) -> None:
        """The bus has gone, or cannot be used any more."""
        self.bus = None
        self.stop()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """What sd-bus's turn ended with, and faults of tasks."""
        error = context.get("exception")
        if isinstance(error, sd_bus.SdBusLibraryError):
            self.give_up()
        elif not isinstance(error, Enough):
            super().call_exception_handler(context)


def _fail(call: sd_bus.SdBusMessage, no: Refused) -> None:
    if call.expect_reply:
        call.create_error_reply(no.name, no.text).send()


async def _serve(calls: socket.socket, listener: socket.socket, bus: sd_bus.SdBus) -> int:
    """Serve until the daemon has gone; the exit status."""
    reader, writer = await asyncio.open_unix_connection(sock=listener, limit=2 * limits.REPLY_BYTES)
    daemon = Daemon(calls, reader)
    writer.write(b'{"method":"org.kvmneg.Bus.Listen","more":true}\0')
    service = Service(bus, daemon)
    first = await daemon.news()
    if first is None:
        return 0
    service.hear(first)
    service.offer()
    try:
        await bus.request_name_async(NAME, 0)
    except Exception:  # refused by the bus's policy, or another's: sdbus has an exception for each error
        return _NO_NAME
    daemon.tell("Serving", {})
    while (news := await daemon.news()) is not None:
        service.hear(news)
    return 0


def main(arguments: list[str]) -> int:
    """The child: `arguments` are the numbers of its two sockets."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # it ends with the daemon
    settled.take()
    calls, listener = (socket.socket(fileno=int(text)) for text in arguments)
    for one in (calls, listener):
        one.setblocking(False)
    sd_bus.map_exception_to_dbus_error(Enough, dbus_name(LimitExceeded.varlink))
    loop = Loop()
    asyncio.set_event_loop(loop)
    try:
        loop.bus = bus = sd_bus.sd_bus_open_system()
        return loop.run_until_complete(_serve(calls, listener, bus))
    except sd_bus.SdBusLibraryError:
        return _NO_BUS
    except RuntimeError:
        if loop.bus is None:  # stopped before its end: the bus has gone
            return _NO_BUS
        raise


if __name__ == "__main__":
    ended = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(ended)  # tasks that wait need no end of their own
