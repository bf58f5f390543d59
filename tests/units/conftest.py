# SPDX-License-Identifier: LGPL-2.1-or-later
"""Containers for tests: one systemd in `make test`, every one with --hosts=all."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.packages.errors import Unreachable
from tests.units import trees
from tests.units.container import SECONDS, Broken, Container, cgroup2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FEW = ("trixie",)
RECORDED = "/usr/lib/python3/dist-packages/kvmneg/data/recorded-host.json"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "suite" in metafunc.fixturenames:
        suites = trees.SUITES if metafunc.config.getoption("hosts") == "all" else FEW
        metafunc.parametrize("suite", suites, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("hosts") == "all":
        return
    left_out = [item for item in items if item.get_closest_marker("every_host")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


class Installed(Container):
    """A container, and what is done with the daemon in it again and again."""

    def drop_in(self, *lines: str, unit: str = "kvmneg.service", name: str = "test") -> None:
        """Change a unit as an administrator does."""
        folder = self.root / f"etc/systemd/system/{unit}.d"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.conf").write_text("\n".join(("[Service]", *lines, "")), "utf-8")
        self.run("systemctl", "daemon-reload")

    def serve_recorded(self) -> None:
        """A recorded host in place of this machine's: the same answers everywhere, with /dev/kvm or without."""
        self.drop_in(
            "ExecStart=", f"ExecStart=/usr/bin/kvmnegd --bus system --report {RECORDED}", name="recorded"
        )

    def enable(self) -> None:
        self.run("systemctl", "enable", "--now", "kvmneg.socket")

    def main_pid(self) -> int:
        """The daemon's number inside, 0 while there is none."""
        return int(self.show("kvmneg.service", "MainPID")["MainPID"])

    def main(self, name: str) -> str:
        """A file of the daemon's in /proc, as the container has it."""
        return self.run("cat", f"/proc/{self.main_pid()}/{name}").stdout

    def resident_kib(self) -> int:
        (line,) = (line for line in self.main("status").splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1])

    def status_text(self) -> str:
        return self.show("kvmneg.service", "StatusText")["StatusText"]

    def wait(self, what: str, condition: Callable[[], object], seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"never: {what}\n{self.journal('kvmneg.service')}"
            time.sleep(0.05)

    def restarted(self, before: int) -> bool:
        """Whether another daemon than that one runs and is ready."""
        shown = self.show("kvmneg.service", "MainPID", "ActiveState")
        return shown["ActiveState"] == "active" and int(shown["MainPID"]) not in (0, before)


def problem() -> str:
    """Why there can be no container here, or ""."""
    if os.geteuid() != 0:
        return "needs root: a container with a systemd of its own"
    try:
        cgroup2()
    except Broken as error:
        return str(error)
    words = ["unshare", "--pid", "--fork", "--mount", "--cgroup", "--uts", "--ipc", "--net", "true"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"this root may make no namespaces: {done.stderr.strip()}" if done.returncode else ""


@pytest.fixture(scope="session")
def containers() -> None:
    why = problem()
    if why:
        pytest.skip(why)


def booted(suite: str, folder: Path, *, kvm: bool = True, bus: str = "") -> Installed:
    try:
        return Installed(suite, folder, kvm=kvm, bus=bus)
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")


@pytest.fixture
def boot(suite: str, containers: None, tmp_path: Path) -> Iterator[Callable[..., Installed]]:
    """boot(kvm=True, bus=""): a container of one test's own, with the project installed and nothing enabled."""
    made: list[Installed] = []

    def make(*, kvm: bool = True, bus: str = "") -> Installed:
        made.append(booted(suite, tmp_path, kvm=kvm, bus=bus))
        return made[-1]

    yield make
    for one in made:
        one.end()


@pytest.fixture(scope="module")
def shared(suite: str, containers: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """One container for the tests of a module, in which a recorded host is served."""
    with booted(suite, tmp_path_factory.mktemp("container")) as one:
        one.serve_recorded()
        one.enable()
        assert isinstance(one, Installed)
        yield one


@pytest.fixture
def served(boot: Callable[..., Installed]) -> Installed:
    """A container of one test's own, in which a recorded host is served."""
    one = boot()
    one.serve_recorded()
    one.enable()
    return one
