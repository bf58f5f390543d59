# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a VMM in C waits for: negotiate, open, apply, against an echo of the same bytes and the bare ioctls.

Both begin with a connection of their own, as a VMM that starts a guest does. `Begin` is left out on both sides: it
waits for a disk, and nothing else of it is long.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench import applying, serving
from bench.figures import ROUNDS, Figure
from kvmneg.host import measure

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUEST = '{"request":{"max":true},"digestOnly":true}'
PARTS = ("negotiate", "open", "apply")


def json_c() -> list[str]:
    """What the compiler has to be told for json-c; nothing where it is not installed."""
    command = ["pkg-config", "--cflags", "--libs", "json-c"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """One: the median of several runs, each with ours and theirs in turn."""
    if measure.ARCHITECTURE != "x86_64":
        raise LookupError("the ioctls that this is compared with are x86's")
    if not (programs / "negotiating").exists():
        raise LookupError("libjson-c-dev is not installed")
    (programs / "contract").write_bytes(applying.contract())
    call = f'{{"method":"org.kvmneg.Negotiate","parameters":{REQUEST}}}\0'.encode()
    with tempfile.TemporaryDirectory() as folder:
        ours_at, theirs_at = Path(folder) / "org.kvmneg", Path(folder) / "echo"
        with serving.running(ours_at, *serving.kvmnegd(ours_at, state)):
            time.sleep(1)  # its child looks for VMM builds
            reply = serving.reply_of(ours_at, call)
            (programs / "reply").write_bytes(reply)
            with serving.running(theirs_at, programs / "echo_server", theirs_at, programs / "reply"):
                runs = [_run(programs, ours_at, theirs_at) for _ in range(ROUNDS)]
    parts = [median(run[place] for run in runs) / 1e3 for place in range(2, 7)]
    spent = ", ".join(f"{name} {time_:.0f}" for name, time_ in zip(PARTS, parts, strict=False))
    detail = f"{spent} µs to echo {parts[3]:.0f}, ioctls {parts[4]:.0f} µs; {len(reply)} bytes"
    ratio = median(run[0] / run[1] for run in runs)
    yield Figure("negotiate, open, apply from C / echo, bare ioctls", ratio, 1.5, detail=detail)


def _run(programs: Path, ours_at: Path, theirs_at: Path) -> list[int]:
    """Nanoseconds: ours, theirs, negotiate, open, apply, echo, ioctls."""
    rounds = applying.ROUNDS_IN_C
    command = [programs / "negotiating", ours_at, theirs_at, REQUEST, programs / "contract", rounds]
    done = subprocess.run([*serving.pinned(1), *command], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        raise LookupError(done.stderr.strip())
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [int(word) for word in done.stdout.split()]
