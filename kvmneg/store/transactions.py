# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection, and the two ways to use it: to read, and to change all or nothing."""

from __future__ import annotations

from contextlib import contextmanager

from kvmneg.store.faults import translated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from sqlite3 import Connection


class Database:
    """The open database of a state directory. Every room of records (fence, grants, reports) shares it.

    Whatever goes wrong inside `reading` and `changing` leaves as StoreError "cannot <doing>: <why>".
    """

    __slots__ = ("_directory", "connection")

    def __init__(self, connection: Connection, directory: str) -> None:
        self.connection = connection
        self._directory = directory

    @contextmanager
    def reading(self, doing: str) -> Iterator[Connection]:
        """What is read inside is not a snapshot: nobody else writes, and the daemon has one thread."""
        with translated(self._directory, doing):
            yield self.connection

    @contextmanager
    def changing(self, doing: str) -> Iterator[Connection]:
        """One write transaction: committed and synced at the end, undone by any exception."""
        connection = self.connection
        with translated(self._directory, doing):
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk makes SQLite undo it by itself
                    connection.execute("ROLLBACK")
                raise
