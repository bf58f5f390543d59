# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notification and socket activation, with a socket of ours in systemd's place; and without systemd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from kvmneg.errors import UsageError
from kvmneg.service import systemd


@pytest.fixture(autouse=True)
def no_systemd(monkeypatch):
    for name in (
        "NOTIFY_SOCKET",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
    ):
        monkeypatch.delenv(name, raising=False)


def test_without_systemd_nothing_happens_and_nothing_is_imported():
    program = (
        "import sys; from kvmneg.service import systemd as s;"
        "assert not any((s.ready('x'), s.status('x'), s.stopping(), s.watchdog()));"
        "assert s.inherited() == s.Inherited() and s.watchdog_seconds() is None;"
        "assert 'systemd' not in sys.modules and 'systemd.daemon' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-P", "-c", program], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_what_is_notified(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        for notify, expected in (
            (lambda: systemd.ready("generation 7"), b"READY=1\nSTATUS=generation 7"),
            (lambda: systemd.status("two\nREADY=1"), b"STATUS=two READY=1"),
            (systemd.watchdog, b"WATCHDOG=1"),
            (systemd.stopping, b"STOPPING=1"),
        ):
            assert notify()
            assert manager.recv(1000).rstrip(b"\n") == expected


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("10000000", None, 5.0),
        ("10000000", "own", 5.0),
        ("10000000", "1", None),
        ("0", None, None),
        ("", None, None),
        ("x", None, None),
    ],
)
def test_watchdog_seconds(monkeypatch, usec, pid, seconds):
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    assert systemd.watchdog_seconds() == seconds


# Moves the descriptors it was given to 3, 4, …, where systemd puts them, and answers one call on the listener.
ACTIVATED = """
import fcntl, os, sys
held = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 100) for fd in sys.argv[1:]]
for number, fd in enumerate(held):
    os.dup2(fd, 3 + number)
os.environ["LISTEN_PID"] = str(os.getpid())
from kvmneg.service import systemd
listener = systemd.inherited().listener
assert "LISTEN_FDS" not in os.environ
assert not os.get_inheritable(listener.fileno())
print(listener.fileno(), flush=True)
connection, _ = listener.accept()
connection.sendall(connection.recv(100))
"""


def activate(descriptors: list[socket.socket], names: str | None) -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "LISTEN_FDS": str(len(descriptors))}
    if names is not None:
        environment["LISTEN_FDNAMES"] = names
    numbers = [descriptor.fileno() for descriptor in descriptors]
    return subprocess.Popen(
        [sys.executable, "-P", "-c", ACTIVATED, *map(str, numbers)],
        env=environment, pass_fds=numbers, text=True, stdout=-1, stderr=-1,
    )  # fmt: skip


@pytest.fixture
def listener(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        yield listener


def talk(path: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(path)
        client.send(b"hello")
        return client.recv(100)


@pytest.mark.parametrize("names", [None, "kvmnegd.socket", "varlink"])
def test_one_inherited_listener_has_any_name(listener, names):
    with activate([listener], names) as process:
        assert talk(listener.getsockname()) == b"hello"
        assert process.stdout and process.stdout.read() == "3\n"
    assert process.returncode == 0
    assert os.path.exists(listener.getsockname())  # it is systemd's, and stays


def test_of_several_the_one_named_varlink(listener):
    other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with other, activate([other, listener], "other:varlink") as process:
        assert talk(listener.getsockname()) == b"hello"
        assert process.stdout and process.stdout.read() == "4\n"
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("kind", "names", "error"),
    [
        ("datagram", None, "not a listening Unix stream socket"),
        ("not listening", None, "not a listening Unix stream socket"),
        ("two", "one:other", "0 of them named varlink"),
        ("two", "varlink:varlink", "2 of them named varlink"),
    ],
)
def test_what_cannot_be_served(listener, kind, names, error):
    other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM)
    with other, activate([other, listener] if kind == "two" else [other], names) as process:
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert UsageError.__name__ in stderr and error in stderr


def test_descriptors_meant_for_another_process(listener, monkeypatch):
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert systemd.inherited() == systemd.Inherited()
