# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pin over a warm socket until it is durable, against one synced SQLite commit of the same text on the same disk."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.figures import Figure, interleaved, seconds
from bench.serving import pinned, wait_for
from kvmneg.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

PINS = 15  # in each round
LEVELS = ("level:x86-64-v1", "level:x86-64-v2")


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """Rounds alternate between the daemon and a bare connection with the same settings."""
    kvmnegd = Path(sys.executable).parent / "kvmnegd"
    report = Path(__file__).parent.parent / "kvmneg/data/recorded-host.json"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "org.kvmneg"
        command = [*pinned(0), kvmnegd, "--socket", path, "--state", state / "pinning", "--report", report]
        daemon = subprocess.Popen(command)
        try:
            wait_for(path)
            with Client(str(path)) as client:
                yield _figure(client, state)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(10)


def _figure(client: Client, state: Path) -> Figure:
    texts = [client.fence_pin("warm", source=level)["text"] for level in LEVELS]
    time.sleep(1)  # the fence's copy is written
    bare = sqlite3.connect(state / "bare.sqlite", isolation_level=None)
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
        bare.execute(f"PRAGMA {pragma}")
    bare.execute("CREATE TABLE fences (generation INTEGER PRIMARY KEY, text TEXT)")

    def pin() -> float:
        return median(seconds(lambda n=n: client.fence_pin("bench", text=texts[n % 2])) for n in range(PINS))

    def commit() -> float:
        return median(
            seconds(lambda n=n: bare.execute("INSERT INTO fences (text) VALUES (?)", (texts[n % 2],)))
            for n in range(PINS)
        )

    ratio, ours, theirs = interleaved(pin, commit)
    bare.close()
    detail = f"{ours * 1e6:.0f} to {theirs * 1e6:.0f} µs, {len(texts[0])} bytes"
    return Figure("pin over a warm socket, durable / synced commit", ratio, 3, detail=detail)
