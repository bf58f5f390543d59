# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real kvmnegd on a private socket and state directory, serving the recorded report: the same everywhere.

And, for what only changes inside a daemon, a node over a host whose words a test changes.
"""

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
from kvmneg.features.report import Report
from kvmneg.policy.fence_text import Fence
from kvmneg.service.leases.contracts import ContractFiles
from kvmneg.service.node import Node
from kvmneg.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kvmneg.errors import NoKvm

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


class Host:
    """A measurer of a recorded host whose report a test changes; `moved` is what its volatile inputs would say."""

    def __init__(self, path: Path = RECORDED) -> None:
        self.document: dict[str, Any] = Report.loads(path.read_bytes()).to_json()
        self.moved = False
        self.error: NoKvm | None = None
        self.measured = 0

    def measure(self) -> Report:
        self.measured += 1
        self.moved = False
        if self.error:
            raise self.error
        return Report.from_json(self.document)

    def changed(self, *, fresh: bool = False) -> bool:
        return self.moved

    def change(self, section: str, key: str, value: Any) -> None:
        """Another value in the next measurement."""
        self.put(section, {**self.document.get(section, {}), key: value})

    def put(self, section: str, values: dict[str, Any]) -> None:
        """Another section in the next measurement."""
        self.document = {**self.document, section: values}
        self.moved = True

    def lose(self, word: str, bits: int) -> None:
        """Take bits from the offer, as a reloaded module or late microcode does."""
        self.change("offer", word, f"{int(self.document['offer'][word], 16) & ~bits:#010x}")


@pytest.fixture
def make_host() -> type[Host]:
    """make_host(path) → a host as recorded in that file."""
    return Host


@pytest.fixture
def host() -> Host:
    """The recorded host that the project ships."""
    return Host()


@pytest.fixture
def trouble() -> list[str]:
    """What the node told beside its answers."""
    return []


@pytest.fixture
def node(host: Host, tmp_path: Path, trouble: list[str]) -> Iterator[Node]:
    """A node over `host`, with a store of its own."""
    with SqliteStore(str(tmp_path / "state"), verify=lambda text: Fence.parse(text).digest) as store:
        yield Node(store, host, ContractFiles(str(tmp_path / "contracts")), trouble.append)
