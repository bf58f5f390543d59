# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors over a restart, with a service manager of ours: what it is told to keep it hands to the next daemon."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECORDED = Path(__file__).parents[2] / "kvmneg/data/recorded-host.json"
VM, OTHER_VM = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11", "9b2f0d6b-1c9e-4c1e-8a57-3e4c2f6a9d3b"
SECONDS = 30.0

# Puts the descriptors that it was given to 3, 4, … as a service manager does, and becomes the daemon.
START = """
import fcntl, os, sys
held = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 200) for fd in os.environ.pop("GIVEN").split(",")]
for number, fd in enumerate(held):
    os.dup2(fd, 3 + number)
os.environ["LISTEN_PID"] = str(os.getpid())
from kvmneg.service.daemon import main
sys.exit(main())
"""


class Manager:
    """A socket unit and the service behind it: NOTIFY_SOCKET, LISTEN_FDS, and a descriptor store."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "org.kvmneg")
        self.store: dict[str, int] = {}
        self.told: list[str] = []
        self._state = str(folder / "state")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(16)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "notify"))
        self._notify.settimeout(SECONDS)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        named = [("varlink", self._listener.fileno()), *self.store.items()]
        numbers = [fd for _, fd in named]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "NOTIFY_SOCKET": self._notify.getsockname(),
            "LISTEN_FDS": str(len(named)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in named),
            "GIVEN": ",".join(map(str, numbers)),
        }
        command = [sys.executable, "-P", "-c", START, "--state", self._state, "--report", str(RECORDED)]
        self._process = subprocess.Popen(command, env=environment, pass_fds=numbers)
        self.hear("READY=1")

    def hear(self, word: str) -> str:
        """Take messages until one has that word; the message."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            data, passed, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(64))
            message = data.decode()
            self.told.append(message)
            values = dict(line.partition("=")[::2] for line in message.splitlines())
            for _, _, content in passed:
                fds = array.array("i", content)
                assert values["FDSTORE"] == "1" and values["FDPOLL"] == "0" and len(fds) == 1
                self.store[values["FDNAME"]] = fds[0]
            if values.get("FDSTOREREMOVE") == "1":
                os.close(self.store.pop(values["FDNAME"]))
            if word in message:
                return message
        raise TimeoutError(f"never {word}: {self.told}")

    def end(self, number: int = signal.SIGKILL) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(SECONDS)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.end()
        for fd in self.store.values():
            os.close(fd)
        self._listener.close()
        self._notify.close()

    def client(self) -> Client:
        return Client(self.path, timeout=SECONDS)

    def guests(self) -> list[str]:
        with self.client() as client:
            return sorted(one["vm"] for one in client.guests_list()["guests"])

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, "never"
            time.sleep(0.02)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    one = Manager(tmp_path)
    yield one
    one.close()


def begin(client: Client, vm: str = VM) -> None:
    client.begin(client.negotiate({"level": "x86-64-v2"})["digest"], vm, hold=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_held_connection_is_served_on(manager: Manager, number: int) -> None:
    manager.start()
    with manager.client() as vmm:
        begin(vmm)
        assert "FDNAME=held-" in manager.hear("FDSTORE=1")
        begin(vmm, OTHER_VM)
        for _ in range(2):  # and over one more
            manager.end(number)
            manager.start()
            assert vmm.get_info()["product"] == "kvmnegd"  # the connection that it had
            assert manager.guests() == sorted((VM, OTHER_VM))
            assert len(manager.store) == 1
    manager.hear("FDSTOREREMOVE=1")
    manager.until(lambda: manager.guests() == [])
    assert manager.store == {}


def test_one_that_closes_meanwhile_lets_go(manager: Manager) -> None:
    manager.start()
    with manager.client() as vmm, manager.client() as other:
        begin(vmm)
        manager.hear("FDSTORE=1")
        other.get_info()  # the same process has another connection, which holds nothing
        manager.end()
        vmm.close()
        manager.start()
        assert any("FDSTOREREMOVE=1" in told for told in manager.told) and manager.store == {}
        assert manager.guests() == []


def test_a_stored_connection_whose_lease_has_ended_is_closed(manager: Manager, tmp_path: Path) -> None:
    """Ended by a word while the store still had it, just before the daemon was killed."""
    manager.start()
    with manager.client() as vmm:
        begin(vmm)
        manager.hear("FDSTORE=1")
        vmm.end(VM)
        manager.end()
        manager.start()
        assert any("FDSTOREREMOVE=1" in told for told in manager.told) and manager.store == {}


def test_a_reload_is_followed(manager: Manager) -> None:
    """RELOADING=1 with the time it began, then READY=1 again (sd_notify(3))."""
    manager.start()
    before = time.monotonic_ns() // 1000
    assert manager._process is not None
    manager._process.send_signal(signal.SIGHUP)
    message = manager.hear("RELOADING=1")
    values = dict(line.partition("=")[::2] for line in message.splitlines())
    assert before <= int(values["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert "STATUS=floating" in manager.hear("READY=1")
