# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection, and the two ways to use it: to read, and to change all or nothing."""

from __future__ import annotations

from contextlib import contextmanager

from kvmneg.errors import StoreError
from kvmneg.store.faults import is_disk, translated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from sqlite3 import Connection


class Database:
    """The open database of a state directory. Every room of records (fence, grants, reports) shares it.

    Whatever goes wrong inside `reading` and `changing` leaves as StoreError "cannot <doing>: <why>". `fault` is why
    the disk refused the last change, None again once one is on it; `on_fault` is called when that changes.
    """

    __slots__ = ("_directory", "connection", "fault", "on_fault")

    def __init__(self, connection: Connection, directory: str) -> None:
        self.connection = connection
        self._directory = directory
        self.fault: StoreError | None = None
        self.on_fault: Callable[[], None] = lambda: None

    @contextmanager
    def reading(self, doing: str) -> Iterator[Connection]:
        """What is read inside is not a snapshot: nobody else writes, and the daemon has one thread."""
        with translated(self._directory, doing):
            yield self.connection

    @contextmanager
    def changing(self, doing: str) -> Iterator[Connection]:
        """One write transaction: committed and synced at the end, undone by any exception."""
        connection = self.connection
        before = connection.total_changes
        try:
            with translated(self._directory, doing):
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:  # a full disk makes SQLite undo it by itself
                        connection.execute("ROLLBACK")
                    raise
        except StoreError as error:
            if is_disk(error):
                self._note(error)
            raise
        if (
            self.fault is not None and connection.total_changes > before
        ):  # without a change nothing is written
            self._note(None)

    def retry(self) -> None:
        """Write where the disk refused the last change: whether it takes changes again stands in `fault`."""
        if self.fault is None:
            return
        try:
            with translated(self._directory, "write"):
                # a commit of its own, which changes the first page into what it is
                version = self.connection.execute("PRAGMA user_version").fetchone()[0]
                self.connection.execute(f"PRAGMA user_version = {version}")
        except StoreError as error:
            self.fault = error
        else:
            self._note(None)

    def _note(self, fault: StoreError | None) -> None:
        told = (self.fault is None) == (fault is None)
        self.fault = fault
        if not told:
            self.on_fault()
