# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a client may do to hurt the daemon, each with a second client that is served throughout.

The server is a process of its own (tests/ipc/toy_server.py), so that its memory and its descriptors are its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits
from kvmneg.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT = 60.0  # of whatever is waited for; nothing here takes a tenth of it
TOY = Path(__file__).parents[1] / "ipc" / "toy_server.py"
COUNT = b'{"method":"org.example.toy.Count"}\0'
ONEWAY = b'{"method":"org.example.toy.Count","oneway":true}\0'
BIG = b'{"method":"org.example.toy.Big"}\0'
MIB = 1024 * 1024


class Target:
    """The server's process, and the second client that asks it again and again from another thread."""

    def __init__(self, path: str, process: subprocess.Popen[str]) -> None:
        self.path, self.process = path, process
        self.served = 0  # calls of the second client that were answered
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._control = Client(path, timeout=TIMEOUT)
        self.statistics()  # connected before anything can be used up
        self._thread.start()
        self.wait(lambda: self.served)

    def _ask(self) -> None:
        try:
            with Client(self.path, timeout=TIMEOUT) as client:
                while not self._stop.wait(0.005):
                    text = str(self.served)
                    assert client.call("org.example.toy.Echo", {"text": text}) == {"text": text}
                    self.served += 1
        except BaseException as error:
            self.failure = error

    def attack(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.path)  # blocking, as the backlog may be full
        connection.settimeout(TIMEOUT)
        return connection

    def statistics(self) -> dict[str, Any]:
        return self._control.call("org.example.toy.Statistics")

    def still_serves(self) -> None:
        """The second client was never failed, and is served from now on too."""
        before = self.served
        self.wait(lambda: self.served >= before + 5)

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.failure is None, f"the second client was failed: {self.failure}"
            assert self.process.poll() is None, "the server died"
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.005)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT)
        try:
            assert self.failure is None, f"the second client was failed: {self.failure}"
            assert self.served
            assert self.statistics()["internalErrors"] == 0
        finally:
            self._control.close()
            self.process.terminate()
            self.process.wait(TIMEOUT)
        assert self.process.returncode == 0


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Callable[..., Target]]:
    """target(reply_bytes, LIMIT=value …): a server in a process of its own."""
    started: list[Target] = []

    def start(reply_bytes: int = 8500, **changed: float) -> Target:
        path = str(tmp_path / "socket")
        settings = [f"{name}={json.dumps(value)}" for name, value in changed.items()]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(TOY), path, str(reply_bytes), *settings]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        with process.stdout:
            assert process.stdout.readline() == "READY\n"
        started.append(Target(path, process))
        return started[-1]

    yield start
    for one in started:
        one.end()


def answer_until_closed(connection: socket.socket) -> bytes:
    """Everything that comes until the server closes, by an end of file or a reset."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def send_all_it_takes(connection: socket.socket, data: bytes) -> int:
    """Send until the server closes; how many bytes it took."""
    sent = 0
    view = memoryview(data)
    try:
        while sent < len(data):
            sent += connection.send(view[sent : sent + 65536])
    except (BrokenPipeError, ConnectionResetError):
        pass
    return sent


def test_no_nul_for_8_mib(target):
    hit = target()
    resident = hit.statistics()["residentBytes"]
    with hit.attack() as connection:
        sent = send_all_it_takes(connection, b"x" * (8 * MIB))
        assert sent < 2 * MIB  # it was not let in; the rest lay in socket buffers
        assert json.loads(answer_until_closed(connection)[:-1])["parameters"]["limit"] == "CALL_BYTES"
    hit.still_serves()
    assert hit.statistics()["residentBytes"] < resident + 4 * MIB


@pytest.mark.parametrize("depth", [100_000, 30_000, 2_000, limits.NESTING_DEPTH])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])
def test_nested_arrays(target, depth, closed):
    """100,000 are longer than any call; fewer get to the parser, and over its head or NESTING_DEPTH."""
    hit = target()
    with hit.attack() as connection:
        value = b"[" * depth + b"]" * depth * closed
        send_all_it_takes(
            connection, b'{"method":"org.example.toy.Count","parameters":{"x":' + value + b"}}\0"
        )
        answer = answer_until_closed(connection)
        assert answer == b"" or json.loads(answer[:-1])["parameters"]["limit"] == "CALL_BYTES"
    hit.still_serves()
    assert hit.statistics()["counted"] == 0


def test_an_integer_of_5000_digits(target):
    hit = target()
    with hit.attack() as connection:
        connection.sendall(b'{"method":"org.example.toy.Count","parameters":{"x":' + b"9" * 5000 + b"}}\0")
        assert answer_until_closed(connection) == b""
    with hit.attack() as connection:  # one that Python reads is refused as no 64-bit integer
        connection.sendall(b'{"method":"org.example.toy.Add","parameters":{"number":' + b"9" * 4000 + b"}}\0")
        assert b'"org.varlink.service.InvalidParameter"' in connection.recv(4096)
    hit.still_serves()
    assert hit.statistics()["counted"] == 0


def test_a_oneway_flood(target):
    hit = target()
    resident = hit.statistics()["residentBytes"]
    with hit.attack() as connection:
        before = hit.served
        for _ in range(100):
            connection.sendall(ONEWAY * 1000)
        during = hit.served
        connection.sendall(COUNT)
        assert json.loads(connection.recv(4096)[:-1]) == {
            "parameters": {"count": 100_001}
        }  # and not one reply
    assert during > before  # the second client had its turns in between
    hit.still_serves()
    assert hit.statistics()["residentBytes"] < resident + 4 * MIB


def test_5000_pipelined_calls_get_5000_replies(target):
    hit = target()
    with hit.attack() as connection:
        writer = threading.Thread(target=connection.sendall, args=(COUNT * 5000,))
        writer.start()
        received = b""
        while received.count(b"\0") < 5000:
            data = connection.recv(65536)
            assert data, "closed before all replies"
            received += data
        writer.join(TIMEOUT)
    replies = [json.loads(reply)["parameters"]["count"] for reply in received.split(b"\0")[:-1]]
    assert replies == list(range(1, 5001))
    hit.still_serves()


def test_a_peer_that_never_reads_10000_replies(target):
    """85 MB of replies are owed; the queue stays at its high water, and the calls stay in the client's socket."""
    hit = target()
    resident = hit.statistics()["residentBytes"]
    with hit.attack() as connection:
        connection.settimeout(1)
        sent, calls = 0, BIG * 10_000
        try:
            while sent < len(calls):
                sent += connection.send(calls[sent : sent + 65536])
        except TimeoutError:
            pass  # it reads no more of them: what it must do
        hit.still_serves()
        seen = hit.statistics()
        assert 0 < seen["queuedBytes"] <= limits.REPLY_QUEUE_BYTES + 9000
        assert seen["residentBytes"] < resident + 4 * MIB
    hit.wait(lambda: hit.statistics()["queuedBytes"] == 0)  # and it is all let go


def test_many_peers_that_never_read(target):
    """The bound holds for each, up to the number of connections."""
    hit = target()
    resident = hit.statistics()["residentBytes"]
    attackers = [hit.attack() for _ in range(50)]
    try:
        for connection in attackers:
            connection.setblocking(False)
            try:
                connection.send(BIG * 1000)
            except BlockingIOError:
                pass
        hit.still_serves()
        hit.wait(lambda: hit.statistics()["queuedBytes"] > 40 * 50_000)
        assert hit.statistics()["residentBytes"] < resident + 50 * 4 * limits.REPLY_QUEUE_BYTES
    finally:
        for connection in attackers:
            connection.close()
    hit.still_serves()


def test_no_descriptors_left(target):
    """EMFILE: new clients are told and closed, the log gets one line, and with descriptors back all is well."""
    hit = target(NOFILE=40)
    held, refused = [], 0
    for _ in range(200):
        connection = hit.attack()
        send_all_it_takes(connection, COUNT)  # it may be refused before it asks
        try:
            answer = json.loads(connection.recv(4096)[:-1])
        except ConnectionResetError:
            answer = {"error": "org.kvmneg.LimitExceeded"}
        if "error" in answer:
            assert answer["error"] == "org.kvmneg.LimitExceeded"
            refused += 1
            connection.close()
        else:
            held.append(connection)
    assert refused >= 160 and len(held) >= 20
    hit.still_serves()
    assert hit.statistics()["trouble"] == ["out of file descriptors: new connections are refused"]
    for connection in held:
        connection.close()
    hit.wait(lambda: hit.statistics()["connections"] == 2)
    with hit.attack() as connection:
        connection.sendall(COUNT)
        assert json.loads(connection.recv(4096)[:-1]) == {"parameters": {"count": len(held) + 1}}
    assert len(hit.statistics()["trouble"]) == 1


def test_no_descriptors_left_does_not_turn_in_circles(target):
    """While nobody comes, a server without descriptors sleeps."""
    hit = target(NOFILE=40)
    held = [hit.attack() for _ in range(60)]
    hit.still_serves()
    hit._stop.set()
    hit._thread.join(TIMEOUT)

    def cpu_ticks() -> int:
        fields = Path(f"/proc/{hit.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = cpu_ticks()
    time.sleep(0.5)
    assert (cpu_ticks() - before) / os.sysconf("SC_CLK_TCK") < 0.2  # in circles it would be 0.5
    for connection in held:
        connection.close()


def test_connections_that_are_opened_and_never_used(target):
    hit = target(FIRST_CALL_SECONDS=0.3)
    held = [hit.attack() for _ in range(200)]
    hit.wait(lambda: hit.statistics()["connections"] == 2)  # the second client's and the one that asks
    for connection in held:
        connection.close()
    hit.still_serves()


def test_one_byte_at_a_time(target):
    """Slow senders hold nobody up, and their calls are answered when they are whole."""
    hit = target()
    slow = [hit.attack() for _ in range(20)]
    for byte in COUNT:
        for connection in slow:
            connection.sendall(bytes((byte,)))
    answers = sorted(json.loads(connection.recv(4096)[:-1])["parameters"]["count"] for connection in slow)
    assert answers == list(range(1, 21))
    with (
        hit.attack() as connection
    ):  # up to the limit, in small pieces: the buffer is not searched again and again
        call = b'{"method":"org.example.toy.Echo","parameters":{"text":"' + b"x" * 60_000 + b'"}}\0'
        for start in range(0, len(call), 7):
            connection.sendall(call[start : start + 7])
        received = b""
        while not received.endswith(b"\0"):
            received += connection.recv(65536)
        assert len(json.loads(received[:-1])["parameters"]["text"]) == 60_000
    for connection in slow:
        connection.close()
    hit.still_serves()


def test_a_half_closed_peer(target):
    """It gets every reply it asked for, then the server closes; half a call is no call."""
    hit = target()
    with hit.attack() as connection:
        connection.sendall(BIG * 100 + COUNT[:-5])
        connection.shutdown(socket.SHUT_WR)
        assert answer_until_closed(connection).count(b"\0") == 100
    with hit.attack() as connection:  # one that does not read either
        connection.sendall(BIG * 100)
        connection.shutdown(socket.SHUT_WR)
        hit.still_serves()
        assert 0 < hit.statistics()["queuedBytes"] <= limits.REPLY_QUEUE_BYTES + 9000
    hit.wait(lambda: hit.statistics()["connections"] == 2)
    assert hit.statistics()["counted"] == 0


def test_a_peer_that_shuts_down_reading(target):
    hit = target()
    with hit.attack() as connection:
        connection.shutdown(socket.SHUT_RD)
        send_all_it_takes(connection, BIG * 1000)
        hit.wait(lambda: hit.statistics()["connections"] == 2)
    hit.still_serves()


def test_peers_that_come_and_go(target):
    """Thousands of connections closed in every state leave nothing behind."""
    hit = target()
    descriptors = hit.statistics()["descriptors"]
    resident = []
    for _ in range(3):
        for number in range(1000):
            with hit.attack() as connection:
                send_all_it_takes(connection, (b"", COUNT[:10], COUNT, BIG * 3, b"x\0")[number % 5])
        # those that wait to be accepted are none of its descriptors yet
        hit.wait(
            lambda: hit.statistics()["connections"] == 2 and hit.statistics()["descriptors"] == descriptors
        )
        resident.append(hit.statistics()["residentBytes"])
    assert hit.statistics()["connections"] == 2
    assert resident[2] < resident[0] + MIB


def test_watchers_that_do_not_read(target):
    hit = target(WATCHER_STALL_SECONDS=0.5)
    resident = hit.statistics()["residentBytes"]
    watchers = [hit.attack() for _ in range(20)]
    for connection in watchers:
        connection.sendall(b'{"method":"org.example.toy.Watch","more":true}\0')
    hit.wait(lambda: hit.statistics()["watchers"] == 20)
    with Client(hit.path, timeout=TIMEOUT) as client:
        for _ in range(200):
            client.call("org.example.toy.Publish", {"text": "x" * 50_000})
    assert hit.statistics()["queuedBytes"] <= 20 * 60_000
    assert hit.statistics()["residentBytes"] < resident + 20 * 4 * 60_000
    hit.wait(lambda: hit.statistics()["watchers"] == 0)
    for connection in watchers:
        *_, last = answer_until_closed(connection).rstrip(b"\0").split(b"\0")
        assert json.loads(last)["error"] == "org.kvmneg.SlowWatcher"
        connection.close()


def test_noise(target):
    """Bytes of all sorts: the connection is closed or answered, the process stays."""
    import random

    hit = target()
    random.seed(20)
    for _ in range(200):
        data = bytearray(
            b'{"method":"org.example.toy.Add","parameters":{"inner":{"name":"x","tags":["y"]}}}\0' * 3
        )
        for _ in range(random.randrange(1, 6)):
            data[random.randrange(len(data))] = random.randrange(256)
        with hit.attack() as connection:
            send_all_it_takes(connection, bytes(data))
            try:
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # closed already
            for message in answer_until_closed(connection).split(b"\0")[:-1]:
                assert json.loads(message).keys() <= {"parameters", "error"}
    hit.still_serves()
