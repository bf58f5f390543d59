# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way from the child that serves D-Bus to the daemon, and its errors as D-Bus has them (see child.py)."""

from __future__ import annotations

import asyncio
import json
from collections import deque

from kvmneg import limits
from kvmneg.errors import LimitExceeded, dbus_name
from kvmneg.service.varlink import message

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

    from kvmneg.errors import KvmnegError

INVALID = "org.freedesktop.DBus.Error.InvalidArgs"
_BLOCKERS_TOLD = 16  # as sentences in an error; varlink has all of them, in their parts


class Refused(Exception):
    """What a caller is told: an error's D-Bus name, and its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(name)
        self.name, self.text = name, text


class Daemon:
    """The way to the daemon: calls out, answers and news in, in their order."""

    def __init__(self, calls: socket.socket, reader: asyncio.StreamReader) -> None:
        self._calls = calls
        self._reader = reader
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0
        self._unsent: deque[bytes] = deque()

    async def call(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The answer to one caller's call: {"parameters"} or {"error", "parameters"}. Raises Refused (too long)."""
        self._number += 1
        number = self._number
        encoded = _encoded("Call", {"id": number, **parameters})
        if len(encoded) > limits.CALL_BYTES:
            raise refusal(LimitExceeded("CALL_BYTES", limits.CALL_BYTES, "one call was longer"))
        try:
            message.parse_call(
                encoded
            )  # as the daemon will: what it would close the connection for ends here
        except message.Malformed:
            raise Refused(INVALID, "a document is no JSON, or nested too deeply") from None
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._send(encoded)
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    def tell(self, method: str, parameters: dict[str, Any]) -> None:
        """A call that nothing answers."""
        self._send(_encoded(method, parameters))

    async def news(self) -> dict[str, Any] | None:
        """The next thing that is no answer; None where the daemon has gone."""
        while True:
            try:
                text = await self._reader.readuntil(b"\0")
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
            parameters: dict[str, Any] = json.loads(text[:-1])["parameters"]
            if "answer" not in parameters:
                return parameters
            waiting = self._waiting.get(parameters["id"])
            if waiting is not None and not waiting.done():
                waiting.set_result(parameters["answer"])
                await asyncio.sleep(0)  # it is sent before later news: what is on the bus has this order too

    def _send(self, encoded: bytes) -> None:
        """Send, or keep what the socket does not take: calls are bounded by who may make how many."""
        self._unsent.append(encoded + b"\0")
        if len(self._unsent) == 1:
            self._flush()

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        while self._unsent:
            try:
                sent = self._calls.send(self._unsent[0])
            except BlockingIOError:
                loop.add_writer(self._calls.fileno(), self._flush)
                return
            except OSError:
                return  # the daemon has gone: `news` tells
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
            else:
                self._unsent.popleft()
        loop.remove_writer(self._calls.fileno())


def _encoded(method: str, parameters: dict[str, Any]) -> bytes:
    call = {"method": f"org.kvmneg.Bus.{method}", "parameters": parameters, "oneway": True}
    return json.dumps(call, separators=(",", ":")).encode()


def refusal(error: KvmnegError) -> Refused:
    return told(error.varlink, error.parameters())


def told(error: str, parameters: dict[str, Any]) -> Refused:
    """varlink's error as D-Bus has it: a name, and one text with the reasons."""
    if error == f"{message.SERVICE}.InvalidParameter":
        return Refused(INVALID, f"invalid: {parameters['parameter']}")
    reasons = [
        f"{one['feature']}: {one['because']} ({one['missingOn']})" for one in parameters.get("blockers", ())
    ]
    rest = [f"and {len(reasons) - _BLOCKERS_TOLD} more"] if len(reasons) > _BLOCKERS_TOLD else []
    lines = [parameters.get("message", error), *reasons[:_BLOCKERS_TOLD], *rest, parameters.get("hint")]
    return Refused(dbus_name(error), "\n  ".join(line for line in lines if line))
