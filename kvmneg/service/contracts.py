# SPDX-License-Identifier: LGPL-2.1-or-later
"""Granted contracts as files beside the socket, for VMMs that read a file rather than a reply.

contracts/<64 hex digits>, read-only for everyone, one for each contract that a VM holds. They are a view of
the store: made again at start, so a directory that was emptied (a reboot, /run) loses nothing.
"""

from __future__ import annotations

import os

from kvmneg.errors import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class ContractFiles:
    """The directory of contract files, made 0755 where it is missing."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        try:
            os.makedirs(directory, 0o755, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {directory}: {error.strerror}") from None

    def path(self, digest: str) -> str:
        """Where the contract of a digest lies."""
        return os.path.join(self.directory, digest.removeprefix("sha256:"))

    def write(self, digest: str, data: bytes) -> str:
        """Put a contract there, whole or not at all; returns its path."""
        path = self.path(digest)
        if not os.path.exists(path):
            temporary = os.path.join(self.directory, f".{os.path.basename(path)}.{os.getpid()}")
            try:
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o444)
                with open(descriptor, "wb") as file:
                    os.fchmod(descriptor, 0o444)
                    file.write(data)
                os.rename(temporary, path)
            except OSError as error:
                raise StoreError(f"cannot write {path}: {error.strerror}") from None
        return path

    def keep(self, contracts: Iterable[tuple[str, bytes]]) -> None:
        """Make the directory hold exactly these: (digest, bytes) of every contract that is held."""
        wanted = {digest.removeprefix("sha256:"): data for digest, data in contracts}
        for digest, data in wanted.items():
            self.write(digest, data)
        for name in os.listdir(self.directory):
            if name not in wanted:
                try:
                    os.unlink(os.path.join(self.directory, name))
                except OSError as error:
                    raise StoreError(
                        f"cannot remove {name} from {self.directory}: {error.strerror}"
                    ) from None
