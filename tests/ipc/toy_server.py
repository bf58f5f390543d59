# SPDX-License-Identifier: LGPL-2.1-or-later
"""A varlink service for tests of the transport: no KVM, no store, methods that do one thing each.

As a program: toy_server.py SOCKET REPLY-BYTES [LIMIT=VALUE …] serves until SIGTERM and prints READY. A limit is one
of kvmneg.limits, or NOFILE for the process's descriptors.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import sys
from types import SimpleNamespace
from typing import Any

from kvmneg import limits
from kvmneg.errors import Blocked, KvmnegError
from kvmneg.service.interfaces import introspection, parameters
from kvmneg.service.varlink import server as varlink

TYPES = {"Inner": {"name": "string", "tags": "?[]string"}}
METHODS = {
    "org.varlink.service.GetInfo": {},
    "org.varlink.service.GetInterfaceDescription": {"interface": "string"},
    "org.example.toy.Echo": {"text": "string"},
    "org.example.toy.Big": {},
    "org.example.toy.Count": {},
    "org.example.toy.Add": {"inner": "?Inner", "number": "?int"},
    "org.example.toy.Refuse": {},
    "org.example.toy.Fail": {},
    "org.example.toy.Unencodable": {},
    "org.example.toy.Silent": {},
    "org.example.toy.Gated": {"text": "string"},
    "org.example.toy.Gate": {"open": "bool"},
    "org.example.toy.Watch": {},
    "org.example.toy.Publish": {"text": "string"},
    "org.example.toy.Countdown": {"number": "int"},
    "org.example.toy.Statistics": {},
}


class Toy(varlink.Dispatch):
    """Answers the methods above. `counted` is the number of Count calls, one-way ones included."""

    def __init__(self, reply_bytes: int = 100, limits: Any = limits) -> None:
        self.replies: dict[bytes, bytes] = {}
        self.cached = self.replies.get  # type: ignore[method-assign]
        self.big = varlink.reply({"data": "x" * reply_bytes})
        self.watchers = varlink.Subscriptions(limits=limits)
        self.counted = 0
        self.open = False  # whether Gated is answered
        self.called: list[str] = []
        self.server: varlink.Server | None = None
        self.internal: list[BaseException] = []
        self.trouble: list[str] = []
        self.memory = open("/proc/self/statm", "rb", buffering=0)  # noqa: SIM115

    def attach(self, server: varlink.Server) -> None:
        self.server = server
        server.on_internal_error = self.internal.append
        server.on_trouble = self.trouble.append

    def call(
        self, connection: varlink.Connection, method: str, given: dict[str, Any], more: bool, oneway: bool
    ) -> bytes | None:
        self.called.append(method)
        del self.called[:-100]
        if method not in METHODS:
            interface = method.rpartition(".")[0]
            known = {name.rpartition(".")[0] for name in METHODS}
            raise (
                varlink.MethodNotFound(method) if interface in known else varlink.InterfaceNotFound(interface)
            )
        checked = parameters.check(given, METHODS[method], TYPES)
        handler = getattr(self, "_" + method.rpartition(".")[2].lower())
        result = handler(connection, checked, more)
        return varlink.reply(result) if isinstance(result, dict) else result

    def _getinfo(self, *_: Any) -> dict[str, Any]:
        return introspection.get_info()

    def _getinterfacedescription(self, _c: Any, given: dict[str, Any], _m: bool) -> dict[str, Any]:
        return introspection.get_interface_description(given["interface"])

    def _echo(self, _c: Any, given: dict[str, Any], _m: bool) -> dict[str, Any]:
        return given

    def _big(self, connection: varlink.Connection, _g: Any, _m: bool) -> bytes:
        self.replies[connection.raw] = self.big
        return self.big

    def _count(self, *_: Any) -> dict[str, Any]:
        self.counted += 1
        return {"count": self.counted}

    def _add(self, _c: Any, given: dict[str, Any], _m: bool) -> dict[str, Any]:
        return {"given": given}

    def _refuse(self, *_: Any) -> dict[str, Any]:
        raise Blocked("no", [], hint="ask otherwise")

    def _fail(self, *_: Any) -> dict[str, Any]:
        raise ValueError("a secret")

    def _unencodable(self, *_: Any) -> dict[str, Any]:
        raise KvmnegError("no", field=object())

    def _silent(self, *_: Any) -> None:
        return None

    def _gated(self, _c: Any, given: dict[str, Any], _m: bool) -> dict[str, Any]:
        if not self.open:
            raise varlink.Later
        return given

    def _gate(self, _c: Any, given: dict[str, Any], _m: bool) -> dict[str, Any]:
        assert self.server is not None
        self.open = given["open"]
        self.server.unpark()
        return {}

    def _watch(self, connection: varlink.Connection, _g: Any, more: bool) -> None:
        if not more:
            raise varlink.ExpectedMore
        self.watchers.add(connection, {"text": "first"})

    def _publish(self, _c: Any, given: dict[str, Any], _m: bool) -> dict[str, Any]:
        self.watchers.publish(given)
        return {"watchers": len(self.watchers)}

    def _countdown(
        self, connection: varlink.Connection, given: dict[str, Any], more: bool
    ) -> dict[str, Any] | None:
        """Answers from a timer, one number at a time, when called with `more`."""
        if not more:
            return {"left": 0}
        connection.hold(lambda _: None)
        self._tick(connection, given["number"])
        return None

    def _tick(self, connection: varlink.Connection, left: int) -> None:
        if connection.closed:
            return
        connection.reply({"left": left}, continues=left > 0)
        if left:
            connection.server.after(0.005, lambda: self._tick(connection, left - 1))

    def _statistics(self, *_: Any) -> dict[str, Any]:
        assert self.server is not None
        # without a new descriptor: some tests leave none
        resident = int(os.pread(self.memory.fileno(), 100, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "connections": self.server.connections,
            "queuedBytes": self.server.queued_bytes,
            "residentBytes": resident,
            "internalErrors": len(self.internal),
            "trouble": self.trouble,
            "counted": self.counted,
            "watchers": len(self.watchers),
            "descriptors": sum(map(is_open, range(1024))),
        }


def is_open(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def changed_limits(**changed: float) -> SimpleNamespace:
    """kvmneg.limits with some of them changed."""
    values = {name: value for name, value in vars(limits).items() if name.isupper()}
    assert not set(changed) - set(values)
    return SimpleNamespace(**values | changed)


def listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    listener.bind(path)
    listener.listen(1024)
    return listener


def main() -> None:
    path, reply_bytes, *settings = sys.argv[1:]
    changed: dict[str, float] = {
        name: json.loads(value) for name, _, value in (s.partition("=") for s in settings)
    }
    descriptors = int(changed.pop("NOFILE", 0))
    if descriptors:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    bounds = changed_limits(**changed)
    toy = Toy(int(reply_bytes), bounds)
    listener = listen(path)
    server = varlink.Server(listener, toy, limits=bounds)
    toy.attach(server)
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    sys.stdout.write("READY\n")
    sys.stdout.flush()
    server.run()


if __name__ == "__main__":
    main()
