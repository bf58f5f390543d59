# SPDX-License-Identifier: LGPL-2.1-or-later
"""The database file: what is in it, how it is made, examined and brought to the present version.

Durability: journal_mode=WAL with synchronous=FULL writes and syncs the log once per commit, before the commit
returns; a commit is in the database whole or not at all after any crash. locking_mode=EXCLUSIVE keeps a
hand-run sqlite3 out while the daemon lives, and the log's index in memory instead of in a mapped file.
"""

from __future__ import annotations

import os
import sqlite3

from kvmneg.errors import StoreError
from kvmneg.store import copies, statedir
from kvmneg.store.faults import is_damage, translated
from kvmneg.store.migrations import MIGRATIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

APPLICATION_ID = 0x6B766D6E  # "kvmn", in the file's header: file(1) and SQLite see whose it is


class Damage(sqlite3.DatabaseError):
    """quick_check found the file broken, or it is not the newest."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def open_database(directory: str) -> sqlite3.Connection:
    """The database of a locked state directory, examined, at the present version, set for durable commits.

    Makes one only where there never was one. StoreError where it is damaged or older than its copy (set aside first;
    field `aside` names it), newer than this program, not kvmneg's, or cannot be read or written.
    """
    path = f"{directory}/{statedir.DATABASE}"
    with translated(directory, f"open {path}"):
        if not os.path.lexists(path):
            _refuse_leftovers(directory)
            create(directory)
        if os.stat(path).st_size == 0:  # SQLite would take it for a new database, and drop its log
            raise _set_aside(directory, "it is empty")
        connection = _connect(path)
        try:
            _examine(connection, path)
            migrate(connection)
            _refuse_older(connection, directory)
        except BaseException as error:
            try:
                if isinstance(error, sqlite3.DatabaseError) and is_damage(error):
                    raise _set_aside(directory, str(error)) from error
                raise
            finally:
                connection.close()  # not before the files have moved: it would fold the log into the damage
    return connection


def _connect(path: str) -> sqlite3.Connection:
    # autocommit: every transaction is begun and ended by name, none by the wrapper's guess
    return sqlite3.connect(path, timeout=1.0, isolation_level=None)


def _configure(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # before the first read: no shared memory is made
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA cell_size_check = ON")  # damage is found where it is read, not followed


def _number(connection: sqlite3.Connection, query: str) -> int:
    return int(connection.execute(query).fetchone()[0])


def create(directory: str, fill: Callable[[sqlite3.Connection], None] | None = None) -> None:
    """Make a whole database beside, then give it its name: a file of that name is never half made.

    `fill` puts the first rows into it. Raises sqlite3.Error, OSError, StoreError.
    """
    path = f"{directory}/{statedir.DATABASE}"
    fresh = f"{path}.new"
    for suffix in ("", "-wal", "-journal"):
        if os.path.lexists(fresh + suffix):
            os.unlink(fresh + suffix)  # a start that was killed
    # made here because SQLite's own would be 0644; its log takes the same mode
    os.close(os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = _connect(fresh)
    try:
        _configure(connection)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        migrate(connection)
        if fill is not None:
            fill(connection)
        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StoreError(f"{directory} is on a file system on which SQLite cannot keep a write-ahead log")
    finally:
        connection.close()
    os.rename(fresh, path)
    statedir.sync_directory(directory)


def _examine(connection: sqlite3.Connection, path: str) -> None:
    """Raise SQLite's error or Damage where the file is broken, StoreError where it is sound but not ours."""
    _configure(connection)
    owner = _number(connection, "PRAGMA application_id")
    if owner != APPLICATION_ID:
        message = f"{path} is not a kvmneg database (application_id {owner:#x})"
        raise StoreError(message, hint="it was left as it is; give kvmneg a directory of its own")
    found = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    if found != "ok":
        raise Damage(found.replace("\n", "; "))


def _refuse_older(connection: sqlite3.Connection, directory: str) -> None:
    """Raise Damage where an old database was put back, or its log is gone: it would give generations out again."""
    generation = _number(connection, "SELECT COALESCE(MAX(generation), 0) FROM fence_history")
    copied = copies.generation(directory)
    if generation < copied:
        raise Damage(
            f"it is of generation {generation}, older than the copy of its fence, which is of {copied}"
        )


def migrate(connection: sqlite3.Connection) -> None:
    """Take each step of the ladder that the database lacks. StoreError if it is newer than the ladder."""
    version = _number(connection, "PRAGMA user_version")
    if version > len(MIGRATIONS):
        message = f"the database has schema version {version}, this kvmneg knows up to {len(MIGRATIONS)}"
        raise StoreError(message, hint="run the newer kvmneg; the database was left as it is")
    for step in range(version, len(MIGRATIONS)):
        try:
            # executescript() begins no transaction of its own
            connection.executescript(
                f"BEGIN IMMEDIATE; {MIGRATIONS[step]}; PRAGMA user_version = {step + 1}; COMMIT;"
            )
        except BaseException:
            connection.rollback()
            raise


def _refuse_leftovers(directory: str) -> None:
    """A missing database with something left of it is a lost one: an empty one would forget the fence."""
    found = statedir.leftovers(directory)
    if found:
        hint = (
            f"restore {statedir.DATABASE} from a copy; or, to begin anew with no fence at generation 0, "
            f"move {', '.join(found)} out of {directory}"
        )
        message = f"{directory} has no {statedir.DATABASE}, but {found[-1]}: its fence would be forgotten"
        raise StoreError(message, hint=hint, aside=found[-1])


def _set_aside(directory: str, damage: str) -> StoreError:
    name = statedir.set_aside(directory)
    hint = (
        f"restore {statedir.DATABASE} from a copy, or recover what can be read with "
        f"'sqlite3 {directory}/{name} .recover'; until then nothing is granted"
    )
    path = f"{directory}/{statedir.DATABASE}"
    return StoreError(f"{path} is damaged ({damage}); it was set aside as {name}", hint=hint, aside=name)
