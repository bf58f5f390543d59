# SPDX-License-Identifier: LGPL-2.1-or-later
"""Granted contracts as files beside the socket, for VMMs that read a file rather than a reply.

contracts/<64 hex digits>, read-only for everyone, one for each contract that a VM holds. They are a view of
the store: made again at start, so a directory that was emptied (a reboot, /run) loses nothing, and a file that is
not what was granted is replaced. Files of other names are not ours, and stay.
"""

from __future__ import annotations

import os
import stat

from kvmneg.errors import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_HEX = frozenset("0123456789abcdef")
_NEW = ".new"  # of a file that is being written


class ContractFiles:
    """The directory of contract files, made 0755 where it is missing.

    Raises StoreError where it cannot be made, or where somebody else may write to it: what lies there is taken for
    this daemon's word, and what we write there would go where they want it.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        try:
            found = _made(directory)
        except OSError as error:
            raise StoreError(f"cannot make {directory}: {error.strerror}") from None
        if (
            not stat.S_ISDIR(found.st_mode)
            or found.st_uid not in (0, os.geteuid())
            or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        ):
            raise StoreError(
                f"{directory} is not a directory that only this daemon can write to",
                hint="remove it, or put the socket into a directory of its own",
            )

    def path(self, digest: str) -> str:
        """Where the contract of a digest lies."""
        return os.path.join(self.directory, digest.removeprefix("sha256:"))

    def write(self, digest: str, data: bytes) -> str:
        """Put a contract there, whole or not at all; returns its path. Raises StoreError."""
        path = self.path(digest)
        try:
            if not _holds(path, data):
                _replace(path, data)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from None
        return path

    def remove(self, digest: str) -> None:
        """Take a contract away; one that is not there is no error. Raises StoreError."""
        self._unlink(self.path(digest))

    def digests(self) -> list[str]:
        """The 64 digits of each contract that lies there."""
        return [name for name in self._listed() if _is_digest(name)]

    def keep(self, contracts: Iterable[tuple[str, bytes]]) -> None:
        """Make the directory hold exactly these contracts: (digest, bytes) of each. Raises StoreError."""
        wanted = set()
        for digest, data in contracts:
            wanted.add(os.path.basename(self.write(digest, data)))
        for name in self._listed():
            if name not in wanted and _is_digest(name.removesuffix(_NEW)):
                self._unlink(os.path.join(self.directory, name))

    def _listed(self) -> list[str]:
        try:
            return os.listdir(self.directory)
        except OSError as error:
            raise StoreError(f"cannot read {self.directory}: {error.strerror}") from None

    def _unlink(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"cannot remove {path}: {error.strerror}") from None


def _made(directory: str) -> os.stat_result:
    try:
        os.mkdir(directory)
        os.chmod(directory, 0o755)  # whatever the umask: every user's VMM reads there
    except FileExistsError:
        pass
    return os.lstat(directory)  # a link is no directory of ours


def _is_digest(name: str) -> bool:
    return len(name) == 64 and not set(name) - _HEX


def _holds(path: str, data: bytes) -> bool:
    """Whether the file is there as it should be; after a power failure one may be empty."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        return (
            stat.S_ISREG(found.st_mode)
            and stat.S_IMODE(found.st_mode) == 0o444
            and file.read(len(data) + 1) == data
        )


def _replace(path: str, data: bytes) -> None:
    new = path + _NEW
    if os.path.lexists(new):
        os.unlink(new)  # left by a daemon that was killed
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(new, flags, 0o444), "wb") as file:
            os.fchmod(file.fileno(), 0o444)
            file.write(data)
        os.rename(new, path)
    except OSError:
        if os.path.lexists(new):
            os.unlink(new)
        raise
