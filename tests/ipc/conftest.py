# SPDX-License-Identifier: LGPL-2.1-or-later
"""A server in a thread on a real Unix socket, and raw connections to it."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.service.varlink import server as varlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT = 20.0  # for anything that has to happen; a test that waits for it to pass has failed


def _load_toy() -> Any:
    spec = importlib.util.spec_from_file_location("toy_server", Path(__file__).parent / "toy_server.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_server"] = module
    spec.loader.exec_module(module)
    return module


toy_server = _load_toy()


class Wire:
    """A raw connection: bytes out, messages in."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIMEOUT)
        self.socket.connect(path)
        self.received = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def call(self, method: str, parameters: Any = None, **flags: Any) -> None:
        message = {
            "method": method,
            **({"parameters": parameters} if parameters is not None else {}),
            **flags,
        }
        self.send(json.dumps(message).encode() + b"\0")

    def read(self) -> dict[str, Any]:
        """The next message; EOFError where the server closed instead."""
        while b"\0" not in self.received:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self.received += data
        message, _, self.received = self.received.partition(b"\0")
        return json.loads(message)  # type: ignore[no-any-return]

    def ask(self, method: str, parameters: Any = None, **flags: Any) -> dict[str, Any]:
        self.call(method, parameters, **flags)
        return self.read()

    def closed(self) -> bool:
        """Whether the server closed the connection without another byte; waits until it says something."""
        try:
            return not self.received and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


class Served:
    """A running server with its toy."""

    def __init__(self, path: str, toy: Any, server: varlink.Server) -> None:
        self.path, self.toy, self.server = path, toy, server
        self.waiting: list[Wire] = []
        self._wires: list[Wire] = []

    def connect(self) -> Wire:
        wire = Wire(self.path)
        self._wires.append(wire)
        return wire

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.002)

    def faults(self) -> list[BaseException]:
        """What was reported as internal errors since the last time."""
        faults = list(self.toy.internal)
        self.toy.internal.clear()
        return faults

    def close(self) -> None:
        for wire in self._wires:
            wire.socket.close()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """serve(reply_bytes=…, LIMIT=value …): a server with these limits changed, ended with the test.

    `waiting` is what clients that connected before it runs have sent; their wires are `served.waiting`.
    """
    running: list[tuple[Served, threading.Thread, socket.socket]] = []

    def start(
        reply_bytes: int = 100, path: str = "", waiting: tuple[bytes, ...] = (), **changed: float
    ) -> Served:
        path = path or str(tmp_path / f"socket{len(running)}")
        listener = toy_server.listen(path)
        bounds = toy_server.changed_limits(**changed)
        toy = toy_server.Toy(reply_bytes, bounds)
        server = varlink.Server(listener, toy, limits=bounds)
        toy.attach(server)
        thread = threading.Thread(target=server.run)
        served = Served(path, toy, server)
        for sent in waiting:
            served.waiting.append(served.connect())
            served.waiting[-1].send(sent)
        thread.start()
        running.append((served, thread, listener))
        return served

    yield start
    for served, thread, listener in running:
        served.server.stop()
        thread.join(TIMEOUT)
        served.close()
        listener.close()
        served.toy.memory.close()
        assert not thread.is_alive()
        assert not served.toy.internal  # a test that expects faults takes them with faults()


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """A server with the limits as they are."""
    return serve()
