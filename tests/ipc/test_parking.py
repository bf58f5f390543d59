# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that cannot be answered yet: they wait, their connection's next ones behind them, nobody else."""

from __future__ import annotations

import json
import socket
from typing import Any

GATED, GATE = "org.example.toy.Gated", "org.example.toy.Gate"


def parked(served: Any, count: int) -> None:
    served.wait(lambda: len(served.server._parked) == count)


def test_it_is_answered_once_and_in_order(served: Any) -> None:
    waiting, other = served.connect(), served.connect()
    waiting.call(GATED, {"text": "first"})
    waiting.call("org.example.toy.Echo", {"text": "second"})
    waiting.call(GATED, {"text": "third"})
    parked(served, 1)
    other.call("org.example.toy.Echo", {"text": "meanwhile"})
    assert other.read()["parameters"] == {"text": "meanwhile"}
    other.call(GATE, {"open": False})  # asked again, and put off again
    other.read()
    parked(served, 1)
    other.call(GATE, {"open": True})
    other.read()
    assert [waiting.read()["parameters"]["text"] for _ in range(3)] == ["first", "second", "third"]
    waiting.call("org.example.toy.Echo", {"text": "still there"})
    assert waiting.read()["parameters"] == {"text": "still there"}


def test_who_has_left_is_forgotten(served: Any) -> None:
    waiting, other = served.connect(), served.connect()
    waiting.call(GATED, {"text": "x"})
    parked(served, 1)
    waiting.socket.close()
    served.wait(lambda: served.server.connections == 1)
    other.call(GATE, {"open": True})
    assert "error" not in other.read()
    assert served.server._parked == []


def test_who_only_sends_no_more_gets_the_answer(served: Any) -> None:
    waiting, other = served.connect(), served.connect()
    waiting.call(GATED, {"text": "x"})
    waiting.socket.shutdown(socket.SHUT_WR)
    parked(served, 1)
    other.call(GATE, {"open": True})
    other.read()
    assert waiting.read()["parameters"] == {"text": "x"}


def test_a_call_without_reply_waits_too(served: Any) -> None:
    waiting, other = served.connect(), served.connect()
    waiting.call(GATED, {"text": "x"}, oneway=True)
    waiting.call("org.example.toy.Echo", {"text": "y"})
    parked(served, 1)
    other.call(GATE, {"open": True})
    other.read()
    assert waiting.read()["parameters"] == {"text": "y"}


def test_what_is_sent_meanwhile_stays_in_the_socket(served: Any) -> None:
    """Nothing is read for a connection that waits: its peer fills its own buffer, not the server's memory."""
    waiting, other = served.connect(), served.connect()
    waiting.call(GATED, {"text": "x"})
    parked(served, 1)
    waiting.socket.settimeout(0.5)
    call = json.dumps({"method": "org.example.toy.Count"}).encode() + b"\0"
    sent = 0
    try:
        for _ in range(100_000):
            waiting.send(call * 100)
            sent += 100
    except TimeoutError:
        pass
    assert sent < 100_000 * 100
    (connection,) = served.server._parked
    assert len(connection.buffer) < 2 * 65536
    waiting.socket.close()
    served.wait(lambda: served.server.connections == 1)
    other.call(GATE, {"open": True})
    assert "error" not in other.read()


def test_a_server_that_stops_waits_for_nobody(served: Any) -> None:
    waiting = served.connect()
    waiting.call(GATED, {"text": "x"})
    parked(served, 1)
    served.server.stop()
    assert waiting.socket.recv(10) == b""
