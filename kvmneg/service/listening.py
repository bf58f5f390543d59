# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket that a daemon listens on: its own one under a path, or one that it inherits."""

from __future__ import annotations

import os
import socket
import stat

from kvmneg import limits
from kvmneg.errors import StoreError, UsageError


def listener(path: str) -> socket.socket:
    """A socket that listens on `path`. Raises UsageError, StoreError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    temporary = f"{path}.{os.getpid()}"
    try:
        _clear(path)
        _make_folder(os.path.dirname(path))
        listener.bind(temporary)
        # every user's VMM may ask; who may pin is judged by the peer's credentials
        os.chmod(temporary, 0o666)
        listener.listen(limits.CONNECTIONS)
        os.rename(temporary, path)  # whoever sees the path can connect to it
    except OSError as error:
        listener.close()
        unlink(temporary)
        raise UsageError(
            f"cannot serve on {path}: {error.strerror or error}", hint="name another socket with --socket"
        ) from None
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: str) -> None:
    """Remove a socket that nobody listens on any more; leave anything else alone. Raises StoreError, OSError."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise UsageError(f"{path} exists and is no socket", hint="name another socket with --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a daemon whose backlog is full is there all the same
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # left behind by a daemon that was killed
            return
        except BlockingIOError:
            pass
    raise StoreError(
        f"another kvmnegd serves on {path}", hint="stop it, or name another socket with --socket"
    )


def _make_folder(folder: str) -> None:
    """Make the socket's folder where it is missing, open to every user whatever the umask. Raises OSError."""
    if not os.path.isdir(folder):
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o755)


def identity(path: str) -> tuple[int, int] | None:
    """Which file a path is; None where there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def path_of(listener: socket.socket) -> str:
    """The path of an inherited socket, beside which the contracts lie. Raises UsageError."""
    path = listener.getsockname()
    if not isinstance(path, str) or not path.startswith("/"):
        raise UsageError(
            "the inherited socket has no absolute path", hint="the socket unit needs ListenStream=/…"
        )
    return path


def unlink(path: str) -> None:
    """Remove a path, if it is there."""
    try:
        os.unlink(path)
    except OSError:
        pass  # gone, or never made: why it could not be made is told already
