# SPDX-License-Identifier: LGPL-2.1-or-later
"""Peer credentials, against what this process knows of itself and of a child."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvmneg.service.varlink.peer import SO_PASSRIGHTS, Peer, refuse_descriptors

# Connects after it took the groups it was given, says so, and waits.
CHILD = """
import os, socket, sys
groups = [int(text) for text in sys.argv[2].split(",") if text]
if groups:
    os.setgroups(groups)
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.recv(1)
"""


@pytest.fixture
def accepted(tmp_path):
    """accepted(groups): (process, our end) of a child that connected with these supplementary groups."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    started = []

    def start(groups: list[int]) -> tuple[subprocess.Popen[bytes], socket.socket]:
        arguments = [str(tmp_path / "socket"), ",".join(map(str, groups))]
        process = subprocess.Popen([sys.executable, "-P", "-c", CHILD, *arguments])
        connection, _ = listener.accept()
        started.append((process, connection))
        return process, connection

    yield start
    for process, connection in started:
        connection.close()
        process.wait(20)
    listener.close()


def test_who_this_process_is():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        peer = Peer(ours)
        assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.geteuid(), os.getegid())
        assert peer.groups == {os.getegid(), *os.getgroups()}


def test_who_a_child_is(accepted):
    process, connection = accepted([])
    peer = Peer(connection)
    assert (peer.pid, peer.uid) == (process.pid, os.geteuid())
    pidfd = peer.pidfd()
    try:
        assert f"Pid:\t{process.pid}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
        assert not os.get_inheritable(pidfd)
        assert not select.select([pidfd], [], [], 0)[0]  # it runs
        connection.send(b"x")
        assert select.select([pidfd], [], [], 20)[0]  # it ended
    finally:
        os.close(pidfd)


def test_a_peer_that_ended(accepted):
    process, connection = accepted([])
    peer = Peer(connection)
    connection.send(b"x")
    process.wait(20)
    try:
        pidfd = peer.pidfd()  # some kernels keep the pid for the socket
    except ProcessLookupError:
        return
    assert select.select([pidfd], [], [], 0)[0]  # it is of one that ended
    os.close(pidfd)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to set groups")
@pytest.mark.parametrize("count", [1, 256, 257, 5000])
def test_all_groups_however_many(accepted, count):
    groups = list(range(100_000, 100_000 + count))
    _, connection = accepted(groups)
    assert Peer(connection).groups == {os.getegid(), *groups}


def test_a_kernel_without_peer_pidfd():
    """Before Linux 6.5 the process is opened by its number."""
    import errno

    class Old:
        def getsockopt(self, level, option, size=None):
            if option == socket.SO_PEERCRED:
                return os.getpid().to_bytes(4, "little") + bytes(8)
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")

        def fileno(self):
            return -1

    pidfd = Peer(Old()).pidfd()
    try:
        assert f"Pid:\t{os.getpid()}\n" in Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    finally:
        os.close(pidfd)


def test_refusing_descriptors_is_inherited_by_connections(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        possible = refuse_descriptors(listener)
        client.connect(str(tmp_path / "socket"))
        connection, _ = listener.accept()
        with connection:
            if possible:
                assert connection.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS) == 0
            else:  # before Linux 6.16
                with pytest.raises(OSError, match="Protocol not available"):
                    connection.getsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS)
