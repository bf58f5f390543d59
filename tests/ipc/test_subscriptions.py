# SPDX-License-Identifier: LGPL-2.1-or-later
"""Watchers: the state now, then changes; a slow one gets the newest, one that does not read is dropped."""

from __future__ import annotations


def watch(served):
    wire = served.connect()
    assert wire.ask("org.example.toy.Watch", more=True) == {
        "parameters": {"text": "first"},
        "continues": True,
    }
    return wire


def test_every_watcher_is_told(served):
    watchers, other = [watch(served) for _ in range(3)], served.connect()
    for text in ("second", "third"):
        assert other.ask("org.example.toy.Publish", {"text": text}) == {"parameters": {"watchers": 3}}
        for wire in watchers:
            assert wire.read() == {"parameters": {"text": text}, "continues": True}


def test_a_watcher_that_left_is_forgotten(served):
    wire, other = watch(served), served.connect()
    wire.socket.close()
    served.wait(lambda: len(served.toy.watchers) == 0)
    assert other.ask("org.example.toy.Publish", {"text": "x"}) == {"parameters": {"watchers": 0}}
    assert watch(served)


def test_a_watcher_that_ended_its_sending_half_still_watches(served):
    import socket

    wire, other = watch(served), served.connect()
    wire.socket.shutdown(socket.SHUT_WR)
    assert other.ask("org.example.toy.Publish", {"text": "x"}) == {"parameters": {"watchers": 1}}
    assert wire.read()["parameters"] == {"text": "x"}


def test_calls_of_a_watcher_wait(served):
    wire, other = watch(served), served.connect()
    wire.call("org.example.toy.Count")
    assert other.ask("org.example.toy.Publish", {"text": "x"}) == {"parameters": {"watchers": 1}}
    assert wire.read()["parameters"] == {"text": "x"}
    assert served.toy.counted == 0


def test_a_slow_watcher_gets_the_newest(served):
    """At most one message waits for it, whatever is published; the last one always arrives."""
    wire, other = watch(served), served.connect()
    text = "x" * 20_000
    for number in range(200):  # 4 MB: many times what the socket takes
        other.ask("org.example.toy.Publish", {"text": f"{number} {text}"})
    assert 0 < served.server.queued_bytes < 20_200
    seen = []
    while not seen or seen[-1] != 199:
        seen.append(int(wire.read()["parameters"]["text"].split()[0]))
    assert seen == sorted(set(seen))
    assert len(seen) < 100  # most were replaced before they were sent
    other.ask("org.example.toy.Publish", {"text": "after"})
    assert wire.read() == {"parameters": {"text": "after"}, "continues": True}


def test_a_watcher_that_does_not_read_is_dropped_with_an_error(serve):
    served = serve(WATCHER_STALL_SECONDS=0.1)
    wire, reading, other = watch(served), watch(served), served.connect()
    text = "x" * 20_000
    for _ in range(50):
        other.ask("org.example.toy.Publish", {"text": text})
        reading.read()
    served.wait(lambda: len(served.toy.watchers) == 1)
    messages = []
    try:
        while True:
            messages.append(wire.read())
    except (EOFError, ConnectionResetError):
        pass
    assert messages[-1]["error"] == "org.kvmneg.SlowWatcher"
    assert "continues" not in messages[-1]
    assert all(message["parameters"]["text"] == text for message in messages[:-1])
    other.ask("org.example.toy.Publish", {"text": "after"})
    assert reading.read()["parameters"] == {"text": "after"}


def test_a_watcher_with_nothing_to_read_is_not_slow(serve):
    served = serve(WATCHER_STALL_SECONDS=0.02)
    wire, other = watch(served), served.connect()
    looked = []
    drop_stalled = served.toy.watchers._timer.callback
    served.toy.watchers._timer.callback = lambda: (drop_stalled(), looked.append(1))
    served.wait(lambda: len(looked) >= 8)  # four times a limit: it was looked at, and found well, twice over
    assert other.ask("org.example.toy.Publish", {"text": "x"}) == {"parameters": {"watchers": 1}}
    assert wire.read()["parameters"] == {"text": "x"}


def test_the_timer_goes_with_the_last_watcher(served):
    before = len(served.server._timers)
    wire = watch(served)
    assert len(served.server._timers) == before + 2  # this one's, and the first-call timer of its connection
    wire.socket.close()
    served.wait(lambda: len(served.server._timers) == before + 1)
