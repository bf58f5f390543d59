# SPDX-License-Identifier: LGPL-2.1-or-later
"""What clients may do to hurt the installed daemon through its own socket, with another client served throughout.

tests/hostile has the same list against the transport alone, with limits changed and memory measured; this is the
service as it is installed, with the descriptors and the memory that systemd gives it.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.client import Client

if TYPE_CHECKING:
    from tests.units.conftest import Installed

pytestmark = pytest.mark.hosts

TIMEOUT = 60.0
MIB = 1024 * 1024
INFO = b'{"method":"org.varlink.service.GetInfo"}\0'
ONEWAY = b'{"method":"org.kvmneg.GetHost","oneway":true}\0'
BIG = b'{"method":"org.kvmneg.GetHost"}\0'
GROWTH_KIB = 64 * 1024  # far below what any of these sends or has coming


class Second:
    """Another client, which asks again and again and must not notice anything."""

    def __init__(self, path: str) -> None:
        self.answered = 0
        self.failure: BaseException | None = None
        self._path = path
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        try:
            with Client(self._path, timeout=TIMEOUT) as client:
                while not self._stop.wait(0.02):
                    assert client.get_info()["product"] == "kvmnegd"
                    self.answered += 1
        except BaseException as error:
            self.failure = error

    def end(self) -> None:
        self._stop.set()
        self._thread.join(TIMEOUT)
        assert self.failure is None, f"the second client was failed: {self.failure}"


@pytest.fixture
def attack(shared: Installed) -> Iterator[Callable[[], socket.socket]]:
    """attack(): a connection. Afterwards it is the same daemon, not much larger, and the second client was served."""
    shared.run("kvmneg", "guests")
    pid, before = shared.main_pid(), shared.resident_kib()
    second = Second(shared.socket)
    made: list[socket.socket] = []

    def connect() -> socket.socket:
        made.append(socket.socket(socket.AF_UNIX))
        made[-1].settimeout(TIMEOUT)
        made[-1].connect(shared.socket)
        return made[-1]

    try:
        shared.wait("the second client is served", lambda: second.answered)
        yield connect
        answered = second.answered
        shared.wait("the second client is still served", lambda: second.answered > answered + 3)
        assert shared.resident_kib() < before + GROWTH_KIB
    finally:
        for connection in made:
            connection.close()
        second.end()
    assert shared.main_pid() == pid
    assert shared.show("kvmneg.service", "NRestarts") == {"NRestarts": "0"}


def send_all_it_takes(connection: socket.socket, data: bytes) -> int:
    """Send until the daemon closes; how many bytes it took."""
    sent = 0
    try:
        while sent < len(data):
            sent += connection.send(data[sent : sent + 65536])
    except (BrokenPipeError, ConnectionResetError):
        pass
    return sent


def answers(connection: socket.socket) -> list[bytes]:
    """All that comes until the daemon closes."""
    received = bytearray()
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received).split(b"\0")[:-1]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"x" * 8 * MIB, id="no NUL for 8 MiB"),
        pytest.param(b"[" * 60_000 + b"\0", id="nested arrays"),
        pytest.param(b'{"method":' + b"[" * 20_000 + b"]" * 20_000 + b"}\0", id="nested in a call"),
        pytest.param(
            b'{"method":"org.kvmneg.GetHost","parameters":{"x":' + b"9" * 5000 + b"}}\0", id="5000 digits"
        ),
        pytest.param(b"\xff\xfe\0", id="no UTF-8"),
        pytest.param(b'{"method":"org.kvmneg.GetHost","parameters":{"x":NaN}}\0', id="NaN"),
        pytest.param(b'{"method":"org.kvmneg.GetHost","upgrade":1}\0', id="a flag that is none"),
    ],
)
def test_malformed(attack: Callable[[], socket.socket], data: bytes) -> None:
    """It is answered with an error at most, and closed."""
    connection = attack()
    send_all_it_takes(connection, data)
    connection.shutdown(socket.SHUT_WR)
    assert all(b'"error"' in answer for answer in answers(connection))


def test_a_one_way_flood(attack: Callable[[], socket.socket]) -> None:
    connection = attack()
    connection.sendall(ONEWAY * 5000 + INFO)
    connection.shutdown(socket.SHUT_WR)
    assert len(answers(connection)) == 1


def test_pipelined_calls(attack: Callable[[], socket.socket]) -> None:
    connection = attack()
    sender = threading.Thread(target=lambda: connection.sendall(INFO * 5000))
    sender.start()
    count = 0
    while count < 5000:
        count += connection.recv(65536).count(0)
    sender.join()
    assert count == 5000


def test_peers_that_never_read(attack: Callable[[], socket.socket]) -> None:
    for _ in range(20):
        connection = attack()
        connection.setblocking(False)
        try:
            connection.send(BIG * 10_000)
        except BlockingIOError:
            pass


def test_one_byte_at_a_time_and_half_closed(attack: Callable[[], socket.socket]) -> None:
    slow = [attack() for _ in range(10)]
    for byte in INFO:
        for connection in slow:
            connection.send(bytes((byte,)))
    for connection in slow:
        connection.shutdown(socket.SHUT_WR)
        (answer,) = answers(connection)
        assert json.loads(answer)["parameters"]["product"] == "kvmnegd"


def test_connections_that_come_and_go(attack: Callable[[], socket.socket], shared: Installed) -> None:
    """And nothing is left of them."""
    with closing(attack()) as connection:
        connection.sendall(INFO)
        assert connection.recv(65536)

    def descriptors() -> int:
        return len(list((shared.root / f"proc/{shared.main_pid()}/fd").iterdir()))

    before = descriptors()
    for number in range(1000):
        with closing(attack()) as connection:
            send_all_it_takes(connection, (b"", INFO[:10], INFO, BIG * 3, b"x\0")[number % 5])
    shared.wait("they are closed", lambda: descriptors() <= before)


def test_no_descriptors_left(served: Installed) -> None:
    """New clients are told; the log gets a line, not a storm; with descriptors back all is well."""
    served.drop_in("LimitNOFILE=60")
    served.run("kvmneg", "guests")
    held = []
    refused = 0
    for _ in range(120):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT)
        connection.connect(served.socket)
        try:
            connection.sendall(INFO)
            refused += b"LimitExceeded" in connection.recv(65536)
        except ConnectionError:
            refused += 1
        held.append(connection)
    assert refused >= 60
    for connection in held:
        connection.close()
    served.wait("it serves again", lambda: not served.run("kvmneg", "guests", check=False).returncode)
    assert served.journal("kvmneg.service").count("out of file descriptors") == 1
    assert served.show("kvmneg.service", "NRestarts") == {"NRestarts": "0"}


def test_limits_are_told_of(shared: Installed) -> None:
    """One call that is too long: what is refused names the limit."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(shared.socket)
        send_all_it_takes(connection, b"x" * (limits.CALL_BYTES + 2))
        assert b'"CALL_BYTES"' in answers(connection)[0]
