# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real kvmnegd on a private socket and state directory, serving the recorded report: the same everywhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg.client import Client
from kvmneg.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECORDED = Path(__file__).parents[2] / "kvmneg/data/recorded-host.json"


class Daemon:
    """One kvmnegd that can be started, ended in any way, and started again on the same state."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.socket = str(folder / "run" / "org.kvmneg")
        self.state = str(folder / "state")
        self.contracts = folder / "run" / "contracts"
        self.options = options or ("--report", str(RECORDED))
        self.errors = folder / "stderr"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *wrapped: str) -> list[str]:
        program = [
            sys.executable,
            "-P",
            "-m",
            "kvmneg.service.daemon",
            "--socket",
            self.socket,
            "--state",
            self.state,
        ]
        return [*wrapped, *program, *self.options]

    def start(self, *wrapped: str) -> Daemon:
        with self.errors.open("ab") as errors:
            self.process = subprocess.Popen(self.command(*wrapped), stderr=errors, env=os.environ)
        for _ in range(500):
            assert self.process.poll() is None, self.errors.read_text()
            try:
                with self.client() as client:
                    client.call("org.varlink.service.GetInfo")
                return self
            except Unreachable:
                time.sleep(0.02)
        raise TimeoutError(self.errors.read_text())

    def client(self) -> Client:
        return Client(self.socket, timeout=20)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """A daemon that is not started yet; ended with the test."""
    made: list[Daemon] = []

    def make(*options: str) -> Daemon:
        made.append(Daemon(tmp_path, *options))
        return made[-1]

    yield make
    for daemon in made:
        if daemon.process is not None:
            daemon.end(signal.SIGKILL)


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon that runs."""
    return make_daemon().start()
