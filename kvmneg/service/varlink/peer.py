# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who is at the other end of a Unix socket: what the kernel recorded when it connected (unix(7), socket(7)).

Nothing here can be said falsely by the peer, and nothing changes over a connection's life.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

# asm-generic/socket.h; Python's socket module has none of these. The same on x86-64 and arm64.
SO_PEERGROUPS = 59
SO_PEERPIDFD = 77  # Linux 6.5
SO_PASSRIGHTS = 83  # Linux 6.16

_UCRED = struct.Struct("3i")  # pid_t, uid_t, gid_t of struct ucred; uid and gid are unsigned
_GROUPS_AT_ONCE = 256  # Python's getsockopt takes buffers of up to 1024 bytes
_NGROUPS_MAX = 65536  # linux/limits.h


class Peer:
    """The process that connected. Made when a connection is accepted; groups and pidfd are read when asked for."""

    __slots__ = ("_groups", "_socket", "gid", "permitted", "pid", "uid")

    def __init__(self, connection: socket.socket) -> None:
        """Raises OSError where the socket is not a connected Unix socket."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        self.pid, uid, gid = _UCRED.unpack(credentials)
        self.uid, self.gid = uid & 0xFFFFFFFF, gid & 0xFFFFFFFF
        self.permitted: tuple[str, ...] = ()  # polkit's actions, for the call at hand
        self._socket = connection
        self._groups: frozenset[int] | None = None

    @property
    def groups(self) -> frozenset[int]:
        """All groups of the peer: its effective one and the supplementary ones (SO_PEERGROUPS)."""
        if self._groups is None:
            self._groups = frozenset((self.gid, *_peer_groups(self._socket)))
        return self._groups

    def pidfd(self) -> int:
        """A new descriptor for the peer's process (SO_PEERPIDFD); the caller closes it.

        Raises ProcessLookupError where the process is gone. Before Linux 6.5 it is opened by number, which may be
        another process's by now: whoever relies on it then compares what it finds there with `uid`.
        """
        try:
            return self._socket.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                return os.pidfd_open(self.pid)
            # ESRCH, or EINVAL before Linux 6.16: it ended and was waited for
            raise ProcessLookupError(errno.ESRCH, "the peer has ended") from None


def _peer_groups(connection: socket.socket) -> tuple[int, ...]:
    try:
        groups = connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 4 * _GROUPS_AT_ONCE)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        groups = _many_groups(connection.fileno())
    return struct.unpack(f"{len(groups) // 4}I", groups)


def _many_groups(fd: int) -> bytes:
    """SO_PEERGROUPS with room for every group Linux allows: more than Python's getsockopt can take."""
    import ctypes  # for the one peer in thousands that has more than 256 groups

    buffer = ctypes.create_string_buffer(4 * _NGROUPS_MAX)
    size = ctypes.c_uint32(len(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(fd, socket.SOL_SOCKET, SO_PEERGROUPS, buffer, ctypes.byref(size)) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return buffer.raw[: size.value]


def refuse_descriptors(listener: socket.socket) -> bool:
    """Have the kernel refuse SCM_RIGHTS on every connection to come; false where it cannot (before Linux 6.16).

    There plain recv(2) closes descriptors that were sent, but until then they lie in the queue.
    """
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True
