# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs inside a container as root: idle connections of several users, and active ones that call at a steady pace.

    crowd.py IDLE ACTIVE SECONDS CALLS_PER_SECOND

Prints, for each twelfth of the time, {"calls", "p50", "p99"} (milliseconds) as one JSON list; calls is all that were
answered.
"""

import json
import os
import selectors
import socket
import sys
import time

SOCKET = "/run/kvmneg/org.kvmneg"
CALL = b'{"method":"org.kvmneg.GetHost"}\0'
USER = 2000
SHARE = 200  # connections of one user
PARTS = 12


def connected(count: int) -> list[socket.socket]:
    made = []
    for _ in range(count):
        one = socket.socket(socket.AF_UNIX)
        one.connect(SOCKET)
        one.sendall(CALL)
        while not one.recv(1 << 20).endswith(b"\0"):
            pass
        made.append(one)
    return made


def idle(number: int, count: int) -> int:
    """A child of a user of its own that holds connections until it is killed; its pid, when it has them."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.setuid(USER + number)
        held = connected(count)
        os.write(writer, b"x")
        while held:
            time.sleep(3600)
    os.close(writer)
    assert os.read(reader, 1) == b"x", "the idle ones were refused"
    return pid


def drive(active: list[socket.socket], seconds: float, rate: float) -> list[tuple[float, float]]:
    """(when, how long) of each answer; the calls are spread evenly over the connections."""
    took: list[tuple[float, float]] = []
    selector = selectors.DefaultSelector()
    sent: dict[socket.socket, float] = {}
    for one in active:
        selector.register(one, selectors.EVENT_READ)
    start = now = time.monotonic()
    calls = 0
    while now < start + seconds or sent:
        due = start + calls / rate
        if now >= due and now < start + seconds:
            one = active[calls % len(active)]
            calls += 1
            if one not in sent:
                one.sendall(CALL)
                sent[one] = time.monotonic()
        for key, _ in selector.select(max(0.0, min(due - now, 0.1))):
            one = key.fileobj
            assert isinstance(one, socket.socket)
            if one.recv(1 << 20).endswith(b"\0"):
                now = time.monotonic()
                took.append((now - start, now - sent.pop(one)))
        now = time.monotonic()
    return took


def main() -> None:
    idles, actives, seconds, rate = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
    children = [
        idle(number, min(SHARE, idles - first)) for number, first in enumerate(range(0, idles, SHARE))
    ]
    print("ready", flush=True)
    took = drive(connected(actives), seconds, rate)
    parts = []
    for part in range(PARTS):
        times = sorted(long for when, long in took if int(when * PARTS / seconds) == part)
        at = {"p50": times[len(times) // 2] * 1000, "p99": times[len(times) * 99 // 100] * 1000}
        parts.append({"calls": len(times), **at})
    print(json.dumps(parts), flush=True)
    for pid in children:
        os.kill(pid, 9)


main()
