# SPDX-License-Identifier: LGPL-2.1-or-later
"""The blocking client, against the real server and against servers that misbehave."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from kvmneg import errors, limits
from kvmneg.client import Client
from kvmneg.service.interfaces import introspection


@pytest.fixture
def client(served):
    with Client(served.path, timeout=20) as client:
        yield client


def test_calls_on_one_connection(served, client):
    assert client.call("org.example.toy.Echo", {"text": "é"}) == {"text": "é"}
    assert [client.call("org.example.toy.Count")["count"] for _ in range(3)] == [1, 2, 3]
    assert served.server.connections == 1


def test_introspection(client):
    info = client.get_info()
    assert (info["product"], info["interfaces"]) == ("kvmnegd", list(introspection.INTERFACES))
    for interface in info["interfaces"]:
        assert f"\ninterface {interface}\n" in client.get_interface_description(interface)


def test_what_the_daemon_refuses_is_raised_as_its_class(served, client):
    with pytest.raises(errors.Blocked) as blocked:
        client.call("org.example.toy.Refuse")
    assert (blocked.value.message, blocked.value.hint, blocked.value.blockers) == ("no", "ask otherwise", ())
    with pytest.raises(errors.KvmnegError, match="internal error") as internal:
        client.call("org.example.toy.Silent")
    assert internal.value.exit_code == 70
    assert [str(fault) for fault in served.faults()] == ["org.example.toy.Silent gave no reply"]


@pytest.mark.parametrize(
    ("method", "message", "exit_code"),
    [
        ("org.example.toy.Echo", "refuses the parameter 'text'", 2),
        ("org.example.toy.None", "no method org.example.toy.None", 70),
        ("org.none.Get", "no interface 'org.none'", 70),
        ("org.example.toy.Watch", "org.varlink.service.ExpectedMore", 70),
    ],
)
def test_errors_of_any_varlink_service(client, method, message, exit_code):
    with pytest.raises(errors.KvmnegError, match=message) as error:
        client.call(method)
    assert error.value.exit_code == exit_code


def test_watching(served, client):
    states = client.call_more("org.example.toy.Watch")
    assert next(states) == {"text": "first"}
    with Client(served.path) as other:
        other.call("org.example.toy.Publish", {"text": "second"})
        assert next(states) == {"text": "second"}
        states.close()  # leaving early closes the connection
        served.wait(lambda: len(served.toy.watchers) == 0)
    assert client.call("org.example.toy.Count") == {"count": 1}  # and the client goes on


def test_replies_that_end(client):
    assert [reply["left"] for reply in client.call_more("org.example.toy.Countdown", {"number": 2})] == [
        2,
        1,
        0,
    ]
    assert client.call("org.example.toy.Count") == {"count": 1}


def test_a_watcher_that_is_dropped(serve):
    served = serve(WATCHER_STALL_SECONDS=0.05)
    with Client(served.path) as slow, Client(served.path) as other:
        states = slow.call_more("org.example.toy.Watch")
        assert next(states) == {"text": "first"}
        for _ in range(50):
            other.call("org.example.toy.Publish", {"text": "x" * 20_000})
        served.wait(lambda: len(served.toy.watchers) == 0)
        with pytest.raises(errors.KvmnegError, match="nothing was read") as error:
            for _ in states:
                pass
    assert error.value.exit_code == 4


def test_refused_for_a_limit_though_the_call_could_not_be_sent(serve):
    """The error was written before the connection closed: it is read even where sending fails."""
    served = serve(CONNECTIONS=0)
    with Client(served.path, timeout=20) as client, pytest.raises(errors.LimitExceeded) as error:
        client.call("org.example.toy.Count")
    assert error.value.fields["limit"] == "CONNECTIONS"


@pytest.fixture
def restarting(tmp_path):
    """A daemon that answers one call on each connection and then closes it, with a last word where it has one."""
    calls, words = [], [b""]
    with sys.modules["toy_server"].listen(str(tmp_path / "socket")) as listener:

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    calls.append(json.loads(connection.recv(65536)[:-1])["method"])
                    connection.sendall(b'{"parameters":{}}\0')
                    closing.acquire()
                    if words[0]:
                        connection.sendall(words[0])

        closing = threading.Semaphore(0)
        thread = threading.Thread(target=serve)
        thread.start()
        path = str(tmp_path / "socket")
        yield SimpleNamespace(path=path, calls=calls, words=words, close=closing.release)
        for _ in range(8):
            closing.release()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def closed(client):
    """Wait until the daemon has closed the client's connection."""
    poll = select.poll()
    poll.register(client._socket, select.POLLHUP)
    assert poll.poll(20_000)


def test_a_daemon_that_was_restarted_between_two_calls(restarting):
    with Client(restarting.path, timeout=20) as client:
        client.call("org.example.First")
        restarting.close()
        closed(client)
        client.call("org.example.Second")
    assert restarting.calls == ["org.example.First", "org.example.Second"]


def test_a_connection_that_keeps_a_contract_is_not_replaced(restarting):
    with Client(restarting.path, timeout=20) as client:
        client.call("org.example.First", {"hold": True})
        restarting.close()
        closed(client)
        with pytest.raises(errors.Unreachable):
            client.call("org.example.Second")
        client.call("org.example.Third")  # who was told may go on
    assert restarting.calls == ["org.example.First", "org.example.Third"]


def test_a_last_word_is_heard(restarting):
    restarting.words[0] = b'{"error":"org.kvmneg.LimitExceeded","parameters":{"limit":"CALL_BYTES"}}\0'
    with Client(restarting.path, timeout=20) as client:
        client.call("org.example.First")
        restarting.close()
        closed(client)
        with pytest.raises(errors.LimitExceeded):
            client.call("org.example.Second")
    assert restarting.calls == ["org.example.First"]


def test_a_call_that_is_too_long_is_not_sent(served, client):
    with pytest.raises(errors.LimitExceeded):
        client.call("org.example.toy.Echo", {"text": "x" * limits.CALL_BYTES})
    assert served.server.connections == 0


# --- not reachable


@pytest.mark.parametrize("below", ["", "/socket"])
def test_what_is_no_socket(tmp_path, below):
    """kvmnegd would not serve there either: starting it is no advice."""
    path = tmp_path / "file"
    path.write_text("not a socket")
    with pytest.raises(errors.Unreachable, match="no socket") as error, Client(f"{path}{below}") as client:
        client.get_host()
    assert "start it" not in error.value.hint


def test_a_folder_is_no_socket(tmp_path):
    with pytest.raises(errors.Unreachable, match="no socket"), Client(str(tmp_path)) as client:
        client.get_host()


def test_a_socket_that_nobody_listens_on(tmp_path):
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "socket"))
    with pytest.raises(errors.Unreachable) as error, Client(str(tmp_path / "socket")) as client:
        client.get_host()
    assert "kvmnegd --socket" in error.value.hint


def test_no_socket(tmp_path):
    with (
        pytest.raises(errors.Unreachable, match="No such file") as error,
        Client(str(tmp_path / "none")) as client,
    ):
        client.get_host()
    assert str(tmp_path / "none") in error.value.message and "kvmnegd --socket" in error.value.hint
    assert error.value.exit_code == 4


def test_nobody_listens(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(path)
    with pytest.raises(errors.Unreachable, match="Connection refused"):
        Client(path).call("x.y.Z")


def test_a_path_that_is_too_long(tmp_path):
    with pytest.raises(errors.Unreachable, match="too long"):
        Client("/" + "x" * 200).call("x.y.Z")


def test_not_permitted(monkeypatch):
    def denied(self, _path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", denied)
    with pytest.raises(errors.NotPermitted) as error:
        Client("/run/x").call("x.y.Z")
    assert error.value.exit_code == 6


def test_a_full_backlog_is_waited_for(tmp_path):
    """A daemon that starts many VMs at once takes its time; only after the time-out it counts as not reachable."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(0)
        first, second = (
            Client(str(tmp_path / "socket"), timeout=20),
            Client(str(tmp_path / "socket"), timeout=0.05),
        )
        with first, second:
            first._connected()  # fills the backlog
            with pytest.raises(errors.Unreachable, match=r"took no connection for 0\.05 seconds"):
                second._connected()
            second.timeout = 20
            thread = threading.Thread(target=second._connected)
            thread.start()
            listener.accept()[0].close()
            thread.join(20)
            assert second._socket is not None


# --- servers that misbehave


@pytest.fixture
def misbehave(tmp_path):
    """misbehave(bytes or None): a server that takes a call and answers these bytes; None: it waits. Then it closes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    done, threads = threading.Event(), []

    def answer(reply: bytes | None) -> None:
        while not done.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                if reply is None:
                    done.wait(20)
                else:
                    try:
                        connection.sendall(reply)
                    except OSError:
                        pass  # the client had enough

    def start(reply: bytes | None) -> str:
        threads.append(threading.Thread(target=answer, args=(reply,)))
        threads[0].start()
        return str(tmp_path / "socket")

    yield start
    done.set()
    listener.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(20)
    listener.close()


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (b"", "without a reply"),
        (b'{"parameters":{}', "in the middle of a reply"),
        (b"x\0", "not JSON"),
        (b"\xff\0", "not JSON"),
        (b"[" * 100_000 + b"\0", "not JSON"),
        (b"[]\0", "not an object"),
        (b'{"parameters":[]}\0', "not one of varlink"),
        (b'{"error":1}\0', "not one of varlink"),
        (b'{"parameters":{},"continues":true}\0', "more than once"),
        (b"x" * (limits.REPLY_BYTES + 70_000), f"longer than {limits.REPLY_BYTES}"),
    ],
)
def test_a_reply_that_is_none(misbehave, reply, why):
    with Client(misbehave(reply), timeout=20) as client:
        with pytest.raises(errors.Unreachable, match=why):
            client.call("x.y.Z")
        assert client._socket is None


def test_no_reply_in_time(misbehave):
    with (
        Client(misbehave(None), timeout=0.05) as client,
        pytest.raises(errors.Unreachable, match=r"within 0\.05"),
    ):
        client.call("x.y.Z")


def test_a_reply_in_drops_does_not_stretch_the_time(tmp_path):
    """The time-out counts for the whole reply, not for each piece."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        stop = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                while not stop.wait(0.02):
                    try:
                        connection.send(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        begin = time.monotonic()
        with (
            Client(str(tmp_path / "socket"), timeout=0.2) as client,
            pytest.raises(errors.Unreachable, match="within"),
        ):
            client.call("x.y.Z")
        stop.set()
        thread.join(20)
        assert time.monotonic() - begin < 15  # without the rule it would never end


def test_a_reply_too_many_is_not_taken_for_the_next(misbehave):
    path = misbehave(b'{"parameters":{"n":1}}\0{"parameters":{"n":2}}\0')
    with Client(path, timeout=20) as client:
        assert client.call("x.y.Z") == {"n": 1}
        assert client.call("x.y.Z") == {"n": 1}


# --- convenience


@pytest.mark.parametrize(
    ("call", "method", "parameters"),
    [
        (lambda c: c.get_host(), "org.kvmneg.GetHost", None),
        (lambda c: c.negotiate({"max": True}), "org.kvmneg.Negotiate", {"request": {"max": True}}),
        (
            lambda c: c.negotiate({}, digest_only=True),
            "org.kvmneg.Negotiate",
            {"request": {}, "digestOnly": True},
        ),
        (lambda c: c.begin("sha256:1", "u"), "org.kvmneg.Begin", {"digest": "sha256:1", "vm": "u"}),
        (lambda c: c.started("u"), "org.kvmneg.Started", {"vm": "u"}),
        (lambda c: c.end("u"), "org.kvmneg.End", {"vm": "u"}),
        (lambda c: c.check({"max": True}), "org.kvmneg.Check", {"request": {"max": True}}),
        (lambda c: c.check({}), "org.kvmneg.Check", {"request": {}}),
        (lambda c: c.check(digest="d"), "org.kvmneg.Check", {"digest": "d"}),
        (lambda c: c.get_contract("d"), "org.kvmneg.GetContract", {"digest": "d"}),
        (lambda c: list(c.watch()), "org.kvmneg.Watch", None),
        (lambda c: c.fence_get(), "org.kvmneg.Fence.Get", None),
        (
            lambda c: c.fence_pin("why", source="host"),
            "org.kvmneg.Fence.Pin",
            {"from": "host", "reason": "why"},
        ),
        (
            lambda c: c.fence_pin("why", text="t", expected_generation=0),
            "org.kvmneg.Fence.Pin",
            {"text": "t", "reason": "why", "expectedGeneration": 0},
        ),
        (lambda c: c.fence_unpin("why"), "org.kvmneg.Fence.Unpin", {"reason": "why"}),
        (
            lambda c: c.fence_plan(without=("hle",)),
            "org.kvmneg.Fence.Plan",
            {"without": ["hle"]},
        ),
        (lambda c: c.fence_plan(), "org.kvmneg.Fence.Plan", None),
        (
            lambda c: c.fence_raise("why", source="host", dry_run=True),
            "org.kvmneg.Fence.Raise",
            {"from": "host", "reason": "why", "dryRun": True},
        ),
        (
            lambda c: c.fence_lower("why", text="t", expected_generation=3),
            "org.kvmneg.Fence.Lower",
            {"text": "t", "reason": "why", "expectedGeneration": 3},
        ),
        (lambda c: c.fence_emergency("why"), "org.kvmneg.Fence.Emergency", {"reason": "why"}),
        (
            lambda c: c.fence_commit("why", consent=("c",), override=("vm",)),
            "org.kvmneg.Fence.Commit",
            {"reason": "why", "consent": ["c"], "override": ["vm"]},
        ),
        (
            lambda c: c.fence_abort("why", dry_run=True),
            "org.kvmneg.Fence.Abort",
            {"reason": "why", "dryRun": True},
        ),
        (lambda c: c.fence_audit(5, before=9), "org.kvmneg.Fence.Audit", {"limit": 5, "before": 9}),
        (lambda c: c.fence_progress(), "org.kvmneg.Fence.Progress", None),
        (lambda c: c.fence_history(5), "org.kvmneg.Fence.History", {"limit": 5}),
        (lambda c: c.fence_history(), "org.kvmneg.Fence.History", None),
    ],
)
def test_methods_call_their_twins_with_what_the_interface_takes(tmp_path, call, method, parameters):
    from kvmneg.service.interfaces.parameters import check, fields_of

    heard = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                heard.append(json.loads(connection.recv(65536)[:-1]))
                connection.sendall(b"{}\0")

        thread = threading.Thread(target=answer)
        thread.start()
        with Client(str(tmp_path / "socket"), timeout=20) as client:
            call(client)
        thread.join(20)
    assert heard[0]["method"] == method
    assert heard[0].get("parameters") == parameters
    assert check(parameters or {}, fields_of(method)) == (parameters or {})
    assert heard[0].get("more", False) == (method == "org.kvmneg.Watch")


def test_importing_the_client_stays_light():
    program = (
        "import sys; import kvmneg.client;"
        "print(*sorted({'asyncio', 'dataclasses', 'logging', 'pathlib', 'argparse', 'typing', 'inspect',"
        " 'kvmneg.service', 'kvmneg.features', 'kvmneg.policy'} & set(sys.modules)))"
    )
    # -S -E: what site or an editable install imports is not the client's
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
