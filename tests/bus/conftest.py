# SPDX-License-Identifier: LGPL-2.1-or-later
"""A private bus, a kvmnegd on it, and a stand-in for polkit. Whoever runs the tests is its admin, unless it is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sdbus import sd_bus_internals as sd_bus

from kvmneg.client import Client
from tests.daemon.conftest import RECORDED, Daemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
TIMEOUT = 20.0  # for anything that has to happen; a test that waits for it to pass has failed

CONFIGURATION = """\
<busconfig>
  <type>system</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
  </policy>
</busconfig>
"""


def until(what: Callable[[], Any]) -> Any:
    """Wait for something to be so; what it is."""
    deadline = time.monotonic() + TIMEOUT
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


class Bus:
    """A dbus-daemon that can go away and come back."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bus"
        self.address = f"unix:path={self.path}"
        self.configuration = folder / "bus.conf"
        self.configuration.write_text(CONFIGURATION.format(path=self.path))
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Bus:
        command = [
            "dbus-daemon",
            f"--config-file={self.configuration}",
            "--nofork",
            "--nopidfile",
            "--print-address=1",
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("unix:")
        return self

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate(timeout=TIMEOUT)
            self.path.unlink(missing_ok=True)
            self.process = None

    def busctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["busctl", f"--address={self.address}", *words],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def has(self, name: str) -> bool:
        # not `busctl status`, which looks for the owner's cgroup too
        driver = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
        return self.busctl("call", *driver, "NameHasOwner", "s", name).stdout == "b true\n"


class Refused(Exception):
    """An error of D-Bus: its name and its text."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}")
        self.name, self.text = name, text


class Wire:
    """One connection to the bus that calls, and sees errors by their names."""

    def __init__(self) -> None:
        self.bus = sd_bus.sd_bus_open_system()

    def message(self, interface: str, method: str, signature: str = "", *values: Any) -> sd_bus.SdBusMessage:
        message = self.bus.new_method_call_message("org.kvmneg1", "/org/kvmneg1", interface, method)
        if signature:
            message.append_data(signature, *values)
        return message

    def call(self, interface: str, method: str, signature: str = "", *values: Any) -> Any:
        try:
            return self.bus.call(self.message(interface, method, signature, *values)).get_contents()
        except Exception as error:
            raise refusal(error) from None


def refusal(error: BaseException) -> Refused:
    """sdbus's exception as what it is on the bus."""
    if isinstance(error, sd_bus.SdBusUnmappedMessageError):
        return Refused(*error.args)
    name = getattr(error, "dbus_error_name", None)
    assert name, repr(error)
    return Refused(name, str(error))


class Served(Daemon):
    """A kvmnegd on the bus, with code of a test's before it starts."""

    def __init__(self, folder: Path, bus: Bus, before: str, *options: str) -> None:
        super().__init__(folder, *(options or ("--report", str(RECORDED))), "--bus", bus.address)
        self.bus = bus
        self.before = before

    def command(self, *wrapped: str) -> list[str]:
        program = f"{self.before}\nfrom kvmneg.service.daemon import main\nraise SystemExit(main())\n"
        serve = [sys.executable, "-P", "-c", program, "--socket", self.socket, "--state", self.state]
        return [*wrapped, *serve, *self.options]

    def children(self) -> list[int]:
        """Those that serve D-Bus."""
        assert self.process is not None
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in found if b"kvmneg.service.bus.dbus" in _command(pid)]


def _command(pid: str) -> bytes:
    """A process's command line, b"" of one that has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    """A bus that runs."""
    made = Bus(tmp_path)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", made.address)
    try:
        yield made.start()
    finally:
        made.end()


@pytest.fixture
def make_served(bus: Bus, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """make_served(before, *options) → a kvmnegd that runs and, unless wait=False, has its name; ended with the test."""
    made: list[Served] = []

    def make(before: str = "", *options: str, wait: bool = True) -> Served:
        made.append(Served(tmp_path, bus, before, *options))
        made[-1].start()
        if wait:
            until(lambda: bus.has("org.kvmneg1"))
        return made[-1]

    yield make
    for daemon in made:
        daemon.end(9)


@pytest.fixture
def served(make_served: Callable[..., Served]) -> Served:
    """A kvmnegd on the bus, whose admin is whoever runs the tests."""
    return make_served()


# Whoever runs the tests is root, or the daemon's user, and both are admins.
NO_ADMINS = "from kvmneg.service import authorization\nauthorization.is_admin = lambda peer: False"


class Polkit:
    """The stand-in: what it is to answer, and what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.rules, self.log = folder / "rules.json", folder / "polkit.log"
        self.say()
        self.log.touch()

    def say(self, **answers: str) -> None:
        """Of actions by the last part of their names."""
        written = self.rules.with_suffix(".new")
        written.write_text(json.dumps({f"org.kvmneg1.{name}": answer for name, answer in answers.items()}))
        written.rename(self.rules)

    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def polkit(bus: Bus, tmp_path: Path) -> Iterator[Polkit]:
    """A polkit on the bus that says no."""
    made = Polkit(tmp_path)
    command = [sys.executable, str(HERE / "fake_polkit.py"), str(made.rules), str(made.log)]
    with subprocess.Popen(command, env=os.environ) as process:
        try:
            until(lambda: bus.has("org.freedesktop.PolicyKit1"))
            yield made
        finally:
            process.kill()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with served.client() as connected:
        yield connected
