# SPDX-License-Identifier: LGPL-2.1-or-later
"""Framing, flags, errors and order on a real socket (UAPI.20, "Wire Protocol")."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from kvmneg.service.varlink.peer import refuse_descriptors

ECHO = b'{"method":"org.example.toy.Echo","parameters":{"text":"%s"}}\0'


def test_a_call_in_one_piece_and_in_single_bytes(served):
    wire = served.connect()
    wire.send(ECHO % b"whole")
    assert wire.read() == {"parameters": {"text": "whole"}}
    for byte in ECHO % b"pieces":
        wire.send(bytes((byte,)))
    assert wire.read() == {"parameters": {"text": "pieces"}}


def test_whitespace_around_and_in_a_call(served):
    wire = served.connect()
    wire.send(b'\r\n\t {"method" :\n"org.example.toy.Echo", "parameters": {"text": "x"}}\n\0')
    assert wire.read() == {"parameters": {"text": "x"}}


def test_pipelined_calls_are_answered_in_order(served):
    wire = served.connect()
    wire.send(b"".join(ECHO % str(i).encode() for i in range(500)))
    assert [wire.read()["parameters"]["text"] for _ in range(500)] == [str(i) for i in range(500)]


def test_a_call_and_the_beginning_of_the_next(served):
    wire = served.connect()
    two = ECHO % b"one" + ECHO % b"two"
    wire.send(two[:-20])
    assert wire.read() == {"parameters": {"text": "one"}}
    wire.send(two[-20:])
    assert wire.read() == {"parameters": {"text": "two"}}


def test_text_that_is_not_ascii(served):
    wire = served.connect()
    assert wire.ask("org.example.toy.Echo", {"text": "é € 𝄞 \0"}) == {"parameters": {"text": "é € 𝄞 \0"}}
    wire.send(ECHO % "é € 𝄞".encode())
    assert wire.read() == {"parameters": {"text": "é € 𝄞"}}


def test_replies_carry_no_whitespace_and_no_empty_parameters(served):
    wire = served.connect()
    wire.call("org.example.toy.Echo", {"text": "a b"})
    wire.read()
    wire.send(b'{"method":"org.example.toy.Echo","parameters":{"text":"x"}}\0')
    data = b""
    while not data.endswith(b"\0"):
        data += wire.socket.recv(4096)
    assert data == b'{"parameters":{"text":"x"}}\0'


@pytest.mark.parametrize("parameters", ["null", "{}", None])
def test_null_empty_and_absent_parameters_are_the_same(served, parameters):
    wire = served.connect()
    given = "" if parameters is None else f',"parameters":{parameters}'
    wire.send(f'{{"method":"org.example.toy.Add"{given}}}\0'.encode())
    assert wire.read() == {"parameters": {"given": {}}}


@pytest.mark.parametrize(
    "call",
    [
        b"",
        b"x",
        b"{",
        b"[]",
        b"null",
        b'"org.example.toy.Count"',
        b"{}",
        b'{"parameters":{}}',
        b'{"method":null}',
        b'{"method":["org.example.toy.Count"]}',
        b'{"method":"org.example.toy.Count","parameters":[]}',
        b'{"method":"org.example.toy.Count","parameters":"x"}',
        b'{"method":"org.example.toy.Count","params":{}}',
        b'{"method":"org.example.toy.Count","X-Header":1}',
        b'{"method":"org.example.toy.Count","more":1}',
        b'{"method":"org.example.toy.Count","more":"true"}',
        b'{"method":"org.example.toy.Count","oneway":0}',
        b'{"method":"org.example.toy.Count","oneway":null}',
        b'{"method":"org.example.toy.Count","upgrade":[]}',
        b'{"method":"org.example.toy.Count","more":true,"oneway":true}',
        b'{"method":"org.example.toy.Count","more":true,"upgrade":true}',
        b'{"method":"org.example.toy.Count","oneway":true,"upgrade":true}',
        b'{"method":"org.example.toy.Count"} {}',
        b'{"method":"org.example.toy.Count","parameters":{"x":NaN}}',
        b'{"method":"org.example.toy.Count","parameters":{"x":-Infinity}}',
        b'{"method":"org.example.toy.Count\xff"}',
        b'{"method":"org.example.toy.Count\xc0\x80"}',
        b'{"method":"org.example.toy.Count\xed\xa0\x80"}',
        b'\xef\xbb\xbf{"method":"org.example.toy.Count"}',
        '{"method":"org.example.toy.Count"}'.encode("utf-16-le").replace(b"\0", b"\x01"),
        b'{"method":"org.example.toy.Count","parameters":{"x":"\n"}}',
        b'{"method":"org.example.toy.Count","parameters":{"x":' + b"[" * 40 + b"]" * 40 + b"}}",
    ],
)
def test_what_is_not_a_call_closes_the_connection(served, call):
    other = served.connect()
    wire = served.connect()
    wire.send(call + b"\0")
    assert wire.closed()
    assert other.ask("org.example.toy.Count") == {"parameters": {"count": 1}}  # and it was not called


def test_nesting_up_to_the_limit_is_read(served):
    # the call and its parameters are two levels of NESTING_DEPTH
    wire = served.connect()
    deep = "[" * (32 - 2) + "]" * (32 - 2)
    wire.send(f'{{"method":"org.example.toy.Count","parameters":{{"x":{deep}}}}}\0'.encode())
    assert wire.read()["error"] == "org.varlink.service.InvalidParameter"
    wire.send(f'{{"method":"org.example.toy.Count","parameters":{{"x":[{deep}]}}}}\0'.encode())
    assert wire.closed()


def test_a_vendors_member_is_ignored(served):
    wire = served.connect()
    assert wire.ask("org.example.toy.Count", **{"org.example": {"trace": 1}}) == {"parameters": {"count": 1}}


def test_flags_that_are_false_are_no_flags(served):
    wire = served.connect()
    flags = {"more": False, "oneway": False, "upgrade": False}
    assert wire.ask("org.example.toy.Count", **flags) == {"parameters": {"count": 1}}


def test_errors_and_their_parameters(served):
    wire = served.connect()
    assert wire.ask("org.example.toy.Refuse") == {
        "error": "org.kvmneg.Blocked",
        "parameters": {"message": "no", "hint": "ask otherwise", "blockers": []},
    }
    for method, error, parameters in (
        ("org.example.toy.None", "MethodNotFound", {"method": "org.example.toy.None"}),
        ("org.example.none.Echo", "InterfaceNotFound", {"interface": "org.example.none"}),
        ("Echo", "InterfaceNotFound", {"interface": ""}),
        ("org.example.toy.Echo", "InvalidParameter", {"parameter": "text"}),
        ("org.example.toy.Watch", "ExpectedMore", {}),
    ):
        reply = wire.ask(method)
        assert reply.pop("error") == f"org.varlink.service.{error}"
        assert reply.get("parameters", {}) == parameters


@pytest.mark.parametrize("method", ["Fail", "Unencodable", "Silent"])
def test_a_fault_of_ours_does_not_tell_its_text(served, method):
    wire = served.connect()
    reply = wire.ask(f"org.example.toy.{method}")
    assert reply["error"] == "org.kvmneg.Internal"
    assert "secret" not in json.dumps(reply)
    assert len(served.faults()) == 1
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 1}}


def test_a_broken_log_does_not_end_the_service(served):
    def broken(_error):
        raise OSError("the disk is full")

    served.server.on_internal_error = broken
    wire = served.connect()
    assert wire.ask("org.example.toy.Fail")["error"] == "org.kvmneg.Internal"
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 1}}


def test_upgrade_is_refused_and_the_connection_stays(served):
    wire = served.connect()
    assert wire.ask("org.example.toy.Count", upgrade=True) == {
        "error": "org.varlink.service.MethodNotImplemented",
        "parameters": {"method": "org.example.toy.Count"},
    }
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 1}}


def test_oneway_calls_get_no_reply_not_even_an_error(served):
    wire = served.connect()
    wire.call("org.example.toy.Count", oneway=True)
    for method in ("Refuse", "Fail", "None", "Watch", "Silent"):
        wire.call(f"org.example.toy.{method}", oneway=True)
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 2}}
    assert [str(fault) for fault in served.faults()] == ["a secret"]


def test_oneway_calls_count_though_the_peer_left_at_once(served):
    wire = served.connect()
    call = b'{"method":"org.example.toy.Count","oneway":true}\0'
    wire.send(call * 1000)
    wire.socket.close()
    served.wait(lambda: served.toy.counted == 1000)


def test_a_known_call_is_answered_from_its_bytes(serve):
    served = serve(reply_bytes=9000)
    wire = served.connect()
    for _ in range(3):
        assert len(wire.ask("org.example.toy.Big")["parameters"]["data"]) == 9000
    assert served.toy.called.count("org.example.toy.Big") == 1
    # other bytes are another call, and in a pipeline the same ones are found too
    wire.send(b'{"method": "org.example.toy.Big"}\0' * 5)
    assert all(len(wire.read()["parameters"]["data"]) == 9000 for _ in range(5))
    assert served.toy.called.count("org.example.toy.Big") <= 2


@pytest.mark.parametrize("reply_bytes", [9000, 3_000_000])
def test_calls_that_came_with_their_connections(serve, reply_bytes):
    """Known by then or not, several, half of one, nothing: as if they had come later."""
    big = b'{"method":"org.example.toy.Big"}\0'
    served = serve(
        reply_bytes, waiting=(big, big, big * 3, big + ECHO % b"x", big[:9], b""), FIRST_CALL_SECONDS=0.5
    )
    for wire, count in zip(served.waiting, (1, 1, 3, 1), strict=False):
        assert [len(wire.read()["parameters"]["data"]) for _ in range(count)] == [reply_bytes] * count
    assert served.toy.called.count("org.example.toy.Big") == 1  # the others were known when they came
    assert served.waiting[3].read() == {"parameters": {"text": "x"}}
    assert served.waiting[4].closed() and served.waiting[5].closed()  # they sent no call in time
    for wire in served.waiting[:4]:
        assert wire.ask("org.example.toy.Echo", {"text": "y"}) == {"parameters": {"text": "y"}}
    gone = [served.connect() for _ in range(20)]
    for wire in gone:
        wire.send(big)
        wire.socket.close()  # with the reply unread
    served.wait(lambda: served.server.connections == 4)


def test_a_reply_larger_than_any_socket_buffer(serve):
    served = serve(reply_bytes=3_000_000)
    wire, other = served.connect(), served.connect()
    wire.call("org.example.toy.Big")
    wire.call("org.example.toy.Count")
    assert other.ask("org.example.toy.Count") == {"parameters": {"count": 1}}
    assert len(wire.read()["parameters"]["data"]) == 3_000_000
    assert wire.read() == {"parameters": {"count": 2}}
    served.wait(lambda: served.server.queued_bytes == 0)


def test_a_peer_that_ended_its_sending_half_gets_all_replies(serve):
    served = serve(reply_bytes=50_000)
    wire = served.connect()
    wire.send(b'{"method":"org.example.toy.Big"}\0' * 200 + b'{"method":"org.example.toy.Cou')
    wire.socket.shutdown(socket.SHUT_WR)
    assert all(len(wire.read()["parameters"]["data"]) == 50_000 for _ in range(200))
    assert wire.closed()
    served.wait(lambda: served.server.connections == 0)


def test_method_with_more_that_does_not_need_it(served):
    wire = served.connect()
    assert wire.ask("org.example.toy.Count", more=True) == {"parameters": {"count": 1}}
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 2}}


def test_a_held_call_is_finished_before_the_next_is_answered(served):
    wire = served.connect()
    wire.call("org.example.toy.Countdown", {"number": 3}, more=True)
    wire.call("org.example.toy.Count")
    replies = [wire.read() for _ in range(5)]
    assert replies == [
        {"parameters": {"left": 3}, "continues": True},
        {"parameters": {"left": 2}, "continues": True},
        {"parameters": {"left": 1}, "continues": True},
        {"parameters": {"left": 0}},
        {"parameters": {"count": 1}},
    ]
    assert wire.ask("org.example.toy.Countdown", {"number": 3}) == {"parameters": {"left": 0}}


def test_descriptors_are_not_taken(served):
    """Refused by the kernel (SO_PASSRIGHTS, Linux 6.16), or else closed when they are received."""
    wire = served.connect()
    own, sent = socket.socketpair()
    refusing = refuse_descriptors(own)
    with own, sent:
        try:
            socket.send_fds(wire.socket, [b'{"method":"org.example.toy.Count"}\0'], [sent.fileno()])
        except PermissionError:
            assert refusing
            assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 1}}
        else:
            assert not refusing
            assert wire.read() == {"parameters": {"count": 1}}
        sent.close()
        own.settimeout(20)
        assert own.recv(1) == b""  # nobody holds the other end


def test_stopping_hands_out_what_is_queued(serve):
    served = serve(reply_bytes=3_000_000)
    wire, watcher, idle = served.connect(), served.connect(), served.connect()
    watcher.ask("org.example.toy.Watch", more=True)
    wire.call("org.example.toy.Big")
    served.wait(lambda: served.server.queued_bytes)
    served.server.stop()
    assert len(wire.read()["parameters"]["data"]) == 3_000_000
    assert wire.closed() and watcher.closed() and idle.closed()


def test_stopping_answers_what_was_sent(serve):
    """Calls in the buffer, and those that nobody has read yet, on this connection and on others."""
    served = serve(CALLS_PER_TURN=1, STOP_SECONDS=300)
    wire, other = served.connect(), served.connect()
    assert other.ask("org.example.toy.Count") == {"parameters": {"count": 1}}
    call = b'{"method":"org.example.toy.Count"}\0'
    count = served.toy._count

    def stop(*arguments):
        served.toy._count = count
        other.send(call * 100)
        served.server.stop()
        return {"count": 0}

    served.toy._count = stop
    wire.send(call * 101)
    assert wire.read() == {"parameters": {"count": 0}}
    for one in (wire, other):
        for _ in range(100):
            assert "count" in one.read()["parameters"]
        assert one.closed()
        with pytest.raises(BrokenPipeError):  # it knows that this was not read
            one.send(call)


def test_stopping_leaves_a_kept_connection_between_two_calls(serve):
    """The next daemon serves it on: what was read is answered, the rest stays in the socket."""
    served = serve(STOP_SECONDS=300)
    wire = served.connect()
    call = b'{"method":"org.example.toy.Count"}\0'
    assert wire.ask("org.example.toy.Count") == {"parameters": {"count": 1}}
    (connection,) = served.server._connections.values()
    connection.on_closed = lambda _: None
    kept = connection.socket.dup()
    wire.send(call + call[:10])
    assert wire.read() == {"parameters": {"count": 2}}
    served.wait(lambda: connection.buffer)
    served.server.stop()
    wire.send(call[10:])
    assert wire.read() == {"parameters": {"count": 3}}
    served.wait(lambda: connection.closed)
    wire.send(call)
    kept.settimeout(20)
    assert kept.recv(100) == call
    kept.close()


def test_stopping_from_several_threads_and_again(serve):
    for _ in range(20):
        served = serve()
        threads = [threading.Thread(target=served.server.stop) for _ in range(3)]
        served.server.stop()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        served.server.stop()


def test_stopping_does_not_wait_for_a_peer_that_does_not_read(serve):
    served = serve(reply_bytes=3_000_000, STOP_SECONDS=0.05)
    wire = served.connect()
    wire.call("org.example.toy.Big")
    served.wait(lambda: served.server.queued_bytes)
    served.server.stop()
    served.wait(lambda: served.server.connections == 0)
    with pytest.raises((EOFError, ConnectionResetError)):
        wire.read()


def test_timers_and_descriptors_of_the_daemon(served):
    server, ticks, once = served.server, [], []
    own, other = socket.socketpair()
    heard: list[bytes] = []
    ready = threading.Event()

    def add():  # in the loop's thread, as the daemon does
        timer = server.every(0.001, lambda: ticks.append(1))
        server.after(0.001, lambda: once.append(1))
        server.after(0.05, lambda: (server.cancel(timer), ready.set()))
        server.after(0.001, lambda: 1 / 0)

        def hear() -> None:
            heard.append(own.recv(10))
            server.unwatch_fd(own.fileno())

        server.watch_fd(own.fileno(), hear)

    served.toy._count = lambda *_: (add(), {"count": 0})[1]
    wire = served.connect()
    wire.ask("org.example.toy.Count")
    other.send(b"x")
    assert ready.wait(20)
    served.wait(lambda: heard == [b"x"])
    seen = len(ticks)
    assert seen > 1 and once == [1]
    served.wait(lambda: wire.ask("org.example.toy.Echo", {"text": "turn"}))
    time.sleep(0.01)
    assert len(ticks) == seen
    assert [type(fault) for fault in served.faults()] == [ZeroDivisionError]
    own.close()
    other.close()
