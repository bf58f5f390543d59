# SPDX-License-Identifier: LGPL-2.1-or-later
"""Start-up: the daemon by socket activation to its first reply, and `kvmneg host`, against the interpreter alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bench.figures import Figure, interleaved, seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN = Path(sys.executable).parent
CATALOGUE_ROUNDS = 41  # 2 ms between two runs of 10 ms: a few would say little
CALL = b'{"method":"org.kvmneg.GetHost"}\0'


def interpreter() -> float:
    """The same interpreter's `-c pass`."""
    return seconds(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))


def with_catalogue(architecture: str) -> float:
    """The interpreter, and a catalogue's rules loaded: what every program of kvmneg's begins with."""
    code = f"from kvmneg.features import catalog; catalog.load({architecture!r})"
    return seconds(lambda: subprocess.run([sys.executable, "-P", "-c", code], check=True))


def activated(listener: socket.socket, state: str) -> subprocess.Popen[bytes]:
    """kvmnegd with an inherited socket as descriptor 3, as systemd passes it (sd_listen_fds(3))."""

    def inherit() -> None:
        os.dup2(listener.fileno(), 3)
        os.set_inheritable(3, True)  # where it was 3 already

    return subprocess.Popen(
        ["/bin/sh", "-c", 'LISTEN_PID=$$ exec "$0" --state "$1"', str(BIN / "kvmnegd"), state],
        env={**os.environ, "LISTEN_FDS": "1"},
        close_fds=False,
        preexec_fn=inherit,
    )


def first_reply(state: Path) -> float:
    """From the call that activates the daemon to the last byte of its reply; the state directory exists."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "org.kvmneg")
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
            listener.bind(path)
            listener.listen()
            client.connect(path)
            client.sendall(CALL)
            daemon: list[subprocess.Popen[bytes]] = []

            def reply() -> None:
                daemon.append(activated(listener, str(state)))
                while not client.recv(1 << 20).endswith(b"\0"):
                    pass

            taken = seconds(reply)
            daemon[0].send_signal(signal.SIGTERM)
            daemon[0].wait(10)
    return taken


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """Both by absolute path in the environment they are installed in."""
    for architecture, of_it in (("x86_64", ""), ("arm64", " of arm64")):
        ratio, ours, theirs = interleaved(
            partial(with_catalogue, architecture), interpreter, CATALOGUE_ROUNDS
        )
        detail = f"{ours * 1e3:.1f} ms to {theirs * 1e3:.1f} ms"
        yield Figure(f"what the catalogue{of_it} adds / python -c pass", ratio - 1, 0.3, detail=detail)
    first_reply(state)  # makes the state directory's database
    ratio, ours, theirs = interleaved(lambda: first_reply(state), interpreter)
    detail = f"{ours * 1e3:.0f} ms to {theirs * 1e3:.0f} ms"
    yield Figure("cold start by socket activation to the reply / python -c pass", ratio, 6, detail=detail)

    def host() -> None:
        subprocess.run([BIN / "kvmneg", "host", "--json"], stdout=subprocess.DEVNULL, check=True)

    if subprocess.run([BIN / "kvmneg", "host", "--json"], capture_output=True, check=False).returncode == 3:
        raise LookupError("kvmneg host: no usable KVM")
    ratio, ours, theirs = interleaved(lambda: seconds(host), interpreter)
    detail = f"{ours * 1e3:.0f} ms to {theirs * 1e3:.0f} ms"
    yield Figure("kvmneg host --json / python -c pass", ratio, 5, detail=detail)
