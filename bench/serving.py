# SPDX-License-Identifier: LGPL-2.1-or-later
"""A warm Negotiate against a C epoll server that answers the same call with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from bench.figures import ROUNDS, Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

CALL = b'{"method":"org.kvmneg.Negotiate","parameters":{"request":{"level":"x86-64-v1"}}}\0'
SECONDS = 1.0


class Load(NamedTuple):
    """What one run of the load generator saw of one server."""

    calls_per_second: float
    p50_us: float
    cpu_us_per_call: float


def wait_for(path: Path) -> None:
    """Until somebody listens."""
    for _ in range(500):
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
                return
            except OSError:
                time.sleep(0.02)
    raise TimeoutError(path)


@contextmanager
def running(listening: Path, *command: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server on the first CPU, from when it listens."""
    server = subprocess.Popen([*pinned(0), *command], stdout=subprocess.DEVNULL)
    try:
        wait_for(listening)
        yield server
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(10)


def kvmnegd(listening: Path, state: Path) -> list[str | Path]:
    """The daemon's command: this host's KVM measured, or a recorded one where there is none."""
    report = Path(__file__).parent.parent / "kvmneg/data/recorded-host.json"
    measured = [] if os.access("/dev/kvm", os.R_OK | os.W_OK) else ["--report", report]
    return [Path(sys.executable).parent / "kvmnegd", "--socket", listening, "--state", state, *measured]


def reply_of(path: Path, call: bytes) -> bytes:
    """The reply to a call, with its NUL."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(call)
        data = b""
        while not data.endswith(b"\0"):
            data += client.recv(1 << 20)
    return data


def cpu_seconds(pid: int) -> float:
    """Time on a processor, to the nanosecond (/proc/PID/schedstat; both servers have one thread)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def pinned(cpu: int) -> list[str]:
    """The beginning of a command that runs on one CPU: server and load must not share one by chance."""
    cpus = sorted(os.sched_getaffinity(0))
    return ["taskset", "-c", str(cpus[cpu % len(cpus)])]


def load(programs: Path, path: Path, server: subprocess.Popen[bytes], clients: int) -> Load:
    """One run: saturating clients, each with one call outstanding."""
    before = cpu_seconds(server.pid)
    command = [
        *pinned(1),
        programs / "load",
        "-s",
        path,
        "-f",
        programs / "call",
        "-c",
        str(clients),
        "-d",
        str(SECONDS),
    ]
    seen = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    spent = cpu_seconds(server.pid) - before
    # the generator's warm-up, a tenth of the time, costs the server too and is not in `calls`
    calls = seen["calls"] * SECONDS / seen["seconds"]
    return Load(seen["calls"] / seen["seconds"], seen["p50_us"], spent / calls * 1e6)


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError("no VmRSS")


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """Both servers run throughout; rounds alternate between them."""
    with tempfile.TemporaryDirectory() as folder:
        ours_at, theirs_at = Path(folder) / "org.kvmneg", Path(folder) / "echo"
        with running(ours_at, *kvmnegd(ours_at, state)) as daemon:
            time.sleep(1)  # its child looks for VMM builds
            yield Figure("idle daemon, resident", resident_mib(daemon.pid), 32, "MiB")
            reply = reply_of(ours_at, CALL)
            (programs / "reply").write_bytes(reply)
            (programs / "call").write_bytes(CALL)
            with running(theirs_at, programs / "echo_server", theirs_at, programs / "reply") as echo:
                yield from _ratios(programs, (ours_at, daemon), (theirs_at, echo), len(reply))


def _ratios(
    programs: Path,
    ours: tuple[Path, subprocess.Popen[bytes]],
    theirs: tuple[Path, subprocess.Popen[bytes]],
    size: int,
) -> Iterator[Figure]:
    one = [(load(programs, *ours, 1), load(programs, *theirs, 1)) for _ in range(ROUNDS)]
    detail = f"{median(a.p50_us for a, _ in one):.0f} µs to {median(b.p50_us for _, b in one):.0f} µs, {size} bytes"
    ratio = median(a.p50_us / b.p50_us for a, b in one)
    yield Figure("warm Negotiate, one client, p50 / C echo", ratio, 1.5, detail=detail)
    many = [(load(programs, *ours, 32), load(programs, *theirs, 32)) for _ in range(ROUNDS)]
    ratio = median(a.calls_per_second / b.calls_per_second for a, b in many)
    ours_served = median(a.calls_per_second for a, _ in many)
    detail = f"{ours_served:.0f} to {median(b.calls_per_second for _, b in many):.0f} calls/s"
    yield Figure("warm Negotiate, 32 clients, throughput / C echo", ratio, 0.35, detail=detail, at_least=True)
    ratio = median(a.cpu_us_per_call / b.cpu_us_per_call for a, b in many)
    detail = f"{median(a.cpu_us_per_call for a, _ in many):.1f} to {median(b.cpu_us_per_call for _, b in many):.1f} µs"
    yield Figure("warm Negotiate, 32 clients, CPU per call / C echo", ratio, 2.5, detail=detail)
