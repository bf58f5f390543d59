# SPDX-License-Identifier: LGPL-2.1-or-later
"""Each limit on what a client controls, crossed, with another client served meanwhile."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import socket
import sys
import threading
from types import SimpleNamespace

import pytest

from kvmneg import limits
from kvmneg.service.varlink import server as varlink


def sized_call(size: int) -> bytes:
    """A call of `size` bytes without its NUL."""
    frame = b'{"method":"org.example.toy.Echo","parameters":{"text":"%s"}}'
    return frame % (b"x" * (size - len(frame) + 2))


def refused(wire, limit):
    """The server answers with the limit's error and closes."""
    reply = wire.read()
    assert reply["error"] == "org.kvmneg.LimitExceeded"
    assert reply["parameters"]["limit"] == limit
    assert wire.closed()
    return True


@pytest.mark.parametrize("whole", [True, False], ids=["with its NUL", "without a NUL"])
def test_call_bytes(served, whole):
    other, wire = served.connect(), served.connect()
    wire.send(sized_call(limits.CALL_BYTES) + b"\0")
    assert len(wire.read()["parameters"]["text"]) > limits.CALL_BYTES - 100
    wire.send(sized_call(limits.CALL_BYTES + 1) + b"\0" * whole)
    assert refused(wire, "CALL_BYTES")
    assert other.ask("org.example.toy.Count") == {"parameters": {"count": 1}}


def test_call_bytes_after_calls_that_are_answered(served):
    wire = served.connect()
    wire.send(b'{"method":"org.example.toy.Count"}\0' * 3 + sized_call(limits.CALL_BYTES + 1))
    assert [wire.read()["parameters"]["count"] for _ in range(3)] == [1, 2, 3]
    assert refused(wire, "CALL_BYTES")


def test_reply_queue_bytes(serve):
    """Reading and answering stop at the high water; what comes out later is complete."""
    served = serve(reply_bytes=10_000, REPLY_QUEUE_BYTES=20_000)
    wire, other = served.connect(), served.connect()
    wire.socket.settimeout(0.5)
    call = b'{"method":"org.example.toy.Big"}\0'
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 10_000_000:
            sent += wire.socket.send(call * 1000)
    assert other.ask("org.example.toy.Count") == {"parameters": {"count": 1}}
    assert served.server.queued_bytes <= 20_000 + 10_100
    wire.socket.settimeout(20)
    for _ in range(sent // len(call)):
        assert len(wire.read()["parameters"]["data"]) == 10_000


COUNT, ADD = b'{"method":"org.example.toy.Count"}\0', b'{"method":"org.example.toy.Add"}\0'


@pytest.mark.parametrize(
    ("changed", "at_once"),
    [({"CALLS_PER_TURN": 4}, 4), ({"CALLS_PER_TURN": 1000, "READ_CHUNK_BYTES": 10 * len(COUNT)}, 10)],
    ids=["CALLS_PER_TURN", "READ_CHUNK_BYTES"],
)
def test_two_that_pipeline_take_turns(serve, changed, at_once):
    """Both have hundreds of calls waiting; neither gets more than its turn while the other waits."""
    served = serve(**changed)
    order: list[str] = []
    both_sent = threading.Event()
    served.toy._count = lambda *_: (order.append("count"), {"count": 0})[1]
    served.toy._add = lambda *_: (order.append("add"), {"given": {}})[1]
    served.toy._refuse = lambda *_: (both_sent.wait(20), {})[1]
    counting, adding, holding = served.connect(), served.connect(), served.connect()
    for wire in (counting, adding):  # known to the server before it is held up
        wire.ask("org.example.toy.Echo", {"text": "here"})
    holding.call("org.example.toy.Refuse")
    served.wait(lambda: "org.example.toy.Refuse" in served.toy.called)
    counting.send(COUNT * 300)
    adding.send(ADD * 300)
    both_sent.set()
    for _ in range(300):
        counting.read()
        adding.read()
    contested = order[: 300 + order[:300].count("add")]  # until one of them has no more
    runs = [len(list(run)) for _, run in itertools.groupby(contested)]
    assert len(order) == 600
    assert max(runs[:-2]) <= at_once + 2  # ADD is a little shorter than COUNT: a chunk holds a few more


def test_connections(serve):
    served = serve(CONNECTIONS=3)
    wires = [served.connect() for _ in range(3)]
    assert all(wire.ask("org.example.toy.Count") for wire in wires)
    assert refused(served.connect(), "CONNECTIONS")
    assert wires[0].ask("org.example.toy.Count") == {"parameters": {"count": 4}}
    wires[1].socket.close()
    served.wait(lambda: served.server.connections == 2)
    assert served.connect().ask("org.example.toy.Count") == {"parameters": {"count": 5}}


def test_some_watchers_are_reserved(serve):
    served = serve(WATCHERS=1, CONNECTIONS_RESERVED=1)

    def watch():
        return served.connect().ask("org.example.toy.Watch", more=True).get("error", "")

    assert [watch(), watch()] == ["", "org.kvmneg.LimitExceeded"]
    served.server.acceptor.preferred = lambda peer: True
    assert [watch(), watch()] == ["", "org.kvmneg.LimitExceeded"]


def test_some_connections_are_reserved(serve):
    served = serve(CONNECTIONS=2, CONNECTIONS_RESERVED=1)
    wires = [served.connect(), served.connect()]
    assert all(wire.ask("org.example.toy.Count") for wire in wires)
    assert refused(served.connect(), "CONNECTIONS")
    asked = []
    served.server.acceptor.preferred = lambda peer: asked.append(peer.uid) or True
    assert "parameters" in served.connect().ask("org.example.toy.Count")
    assert refused(served.connect(), "CONNECTIONS")  # those have an end too
    assert asked == [os.getuid()]


def test_connections_per_uid(serve):
    served = serve(CONNECTIONS_PER_UID=2)
    wires = [served.connect(), served.connect()]
    assert all(wire.ask("org.example.toy.Count") for wire in wires)
    assert refused(served.connect(), "CONNECTIONS_PER_UID")
    wires[0].socket.close()
    served.wait(lambda: served.server.connections < 2)
    assert "parameters" in served.connect().ask("org.example.toy.Count")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to be another user for one connection")
def test_connections_per_uid_are_each_users_own(serve):
    served = serve(
        path=f"\0kvmneg-test-{os.getpid()}", CONNECTIONS_PER_UID=1
    )  # abstract: no directory to enter
    assert served.connect().ask("org.example.toy.Count") == {"parameters": {"count": 1}}
    assert refused(served.connect(), "CONNECTIONS_PER_UID")
    wires = []

    def as_nobody() -> None:
        # The bare system call: it changes this one thread, which ends right after.
        setresuid = {"x86_64": 117, "aarch64": 147}[os.uname().machine]
        assert ctypes.CDLL(None).syscall(setresuid, 65534, 65534, 65534) == 0
        wires.append(served.connect())

    thread = threading.Thread(target=as_nobody)
    thread.start()
    thread.join(20)
    assert wires[0].ask("org.example.toy.Count") == {"parameters": {"count": 2}}


def test_first_call_seconds(serve):
    """Only who never sent a whole call is closed; who did may be silent."""
    served = serve(FIRST_CALL_SECONDS=0.2)
    wire, silent = served.connect(), served.connect()
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 1}}
    silent.send(b'{"method":"org.example')
    late = served.connect()
    assert silent.closed() and late.closed()
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 2}}
    after = served.connect()
    assert after.ask("org.example.toy.Count") == {"parameters": {"count": 3}}
    assert served.connect().closed()
    assert after.ask("org.example.toy.Count") == {"parameters": {"count": 4}}


def test_first_call_keeps_one_timer(serve):
    """However many come and go: a timer for each would pile up."""
    served = serve()
    for _ in range(50):
        wire = served.connect()
        wire.ask("org.example.toy.Count")
        wire.socket.close()
    served.wait(lambda: served.server.connections == 0)
    assert len(served.server._timers) == 1


def test_watchers(serve):
    served = serve(WATCHERS=2)
    watchers = [served.connect() for _ in range(2)]
    first = {"parameters": {"text": "first"}, "continues": True}
    assert [wire.ask("org.example.toy.Watch", more=True) for wire in watchers] == [first, first]
    wire = served.connect()
    reply = wire.ask("org.example.toy.Watch", more=True)
    assert (reply["error"], reply["parameters"]["limit"]) == ("org.kvmneg.LimitExceeded", "WATCHERS")
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 1}}  # and it goes on
    watchers[0].socket.close()
    served.wait(lambda: len(served.toy.watchers) == 1)
    assert wire.ask("org.example.toy.Watch", more=True) == first


def test_accept_per_turn(serve):
    """With one accept a turn all get in, one after the other, and nobody else waits for it."""
    served = serve(ACCEPT_PER_TURN=1)
    wires = [served.connect() for _ in range(30)]
    assert [wire.ask("org.example.toy.Count")["parameters"]["count"] for wire in wires] == list(range(1, 31))


def test_accept_takes_no_more_than_its_turn():
    """Counted on a listener that always has one more."""
    from kvmneg.service.varlink.accept import Acceptor

    class Listener:
        accepted = 0

        def accept(self):
            self.accepted += 1
            ours, theirs = socket.socketpair()
            theirs.close()
            return ours, ""

        def setblocking(self, _flag):
            pass

        def setsockopt(self, *_):
            raise OSError

        def fileno(self):
            return -1

    class Server:
        connections = 1000

        def watch_fd(self, _fd, callback):
            self.callback = callback

        def guarded(self, callback):
            callback()

        def on_limit(self, error, peer):
            told.append((error.fields["limit"], peer.uid))

    told = []
    listener, server = Listener(), Server()
    bounds = SimpleNamespace(ACCEPT_PER_TURN=7, CONNECTIONS=0, CONNECTIONS_RESERVED=0, CONNECTIONS_PER_UID=1)
    acceptor = Acceptor(server, listener, bounds)
    server.callback()
    assert listener.accepted == 7
    assert told == [("CONNECTIONS", os.getuid())] * 7
    os.close(acceptor._spare)


def test_no_descriptor_even_for_refusing(served, monkeypatch):
    """ENOMEM and the like: the listener is looked at again after a moment, and the trouble is told once."""
    acceptor = served.server.acceptor
    real, failures = acceptor._listener, []

    class Broken:
        def accept(self):
            if len(failures) < 3:
                failures.append(1)
                raise OSError(12, "Cannot allocate memory")
            return real.accept()

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(acceptor, "_listener", Broken())
    assert served.connect().ask("org.example.toy.Count") == {"parameters": {"count": 1}}
    assert len(failures) == 3
    assert served.toy.trouble == ["cannot accept connections: Cannot allocate memory"]


def test_watchers_per_uid(serve):
    """One user cannot take every watcher there is."""
    served = serve(WATCHERS_PER_UID=1)
    watcher = served.connect()
    assert watcher.ask("org.example.toy.Watch", more=True)["continues"]
    wire = served.connect()
    reply = wire.ask("org.example.toy.Watch", more=True)
    assert (reply["error"], reply["parameters"]["limit"]) == ("org.kvmneg.LimitExceeded", "WATCHERS_PER_UID")
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 1}}


def test_calls_that_are_work_take_turns(tmp_path):
    """What two clients pipelined before the server looked is answered one call each in turn."""
    toy_server = sys.modules["toy_server"]
    toy = toy_server.Toy()
    path = str(tmp_path / "socket")
    with toy_server.listen(path) as listener:
        server = varlink.Server(listener, toy)
        toy.attach(server)
        clients = []
        for _ in range(2):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(20)
            client.connect(path)
            client.sendall(b'{"method":"org.example.toy.Count"}\0' * 20)
            clients.append(client)
        thread = threading.Thread(target=server.run)
        thread.start()
        counts = []
        for client in clients:
            received = b""
            while received.count(b"\0") < 20:
                received += client.recv(65536)
            client.close()
            counts.append([json.loads(row)["parameters"]["count"] for row in received.split(b"\0")[:-1]])
        server.stop()
        thread.join(20)
    toy.memory.close()
    assert sorted(counts[0] + counts[1]) == list(range(1, 41))
    assert max(later - earlier for one in counts for earlier, later in itertools.pairwise(one)) <= 3
