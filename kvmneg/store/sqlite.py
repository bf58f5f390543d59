# SPDX-License-Identifier: LGPL-2.1-or-later
"""The embedded store: one SQLite database in the state directory of one daemon.

Its calls are those of interface.Store, which documents them; here stands how they are kept true. Each change
is one transaction and one sync of the disk. The connection belongs to the thread that opened the store.
"""

from __future__ import annotations

import os

from kvmneg.errors import GenerationMismatch, KvmnegError, NotPinned, StoreError
from kvmneg.store import audit as audits
from kvmneg.store import statedir
from kvmneg.store.audit import storable
from kvmneg.store.faults import translated
from kvmneg.store.interface import FenceRow, HistoryRow, LevelRow, ReportRow
from kvmneg.store.leases import Leases
from kvmneg.store.schema import open_database
from kvmneg.store.transactions import Database

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from sqlite3 import Connection
    from typing import Any

    from kvmneg.store.interface import Audit, AuditRow, FenceAction, Store
    from kvmneg.store.levels import Levels
    from kvmneg.store.rolls import Rolls
    from kvmneg.store.waivers import Waivers

_FENCE = "generation, digest, text, at, uid, pid, reason"
_HISTORY = "COALESCE(step, action), generation, at, uid, pid, reason, digest, process"
REPORT = "digest, combo_digest, at, body"


class SqliteStore:
    """The store of `directory`, which is made (0700) where it is missing and is this process's until close().

    `verify` computes the digest of a fence's text; given, no fence whose text and digest disagree goes in or
    comes out. StoreError where the directory is another's (field pid), or its database is damaged, newer or
    not readable (schema.open_database).
    `lock` is that of a directory the caller has locked already; it is this store's once it is open. `database` is what
    to take in the place of the directory's (kvmneg.store.recovered).
    """

    __slots__ = ("_copied", "_database", "_directory", "_lock", "_verify", "leases")
    recovered = False  # see kvmneg.store.recovered

    def __init__(
        self,
        directory: str,
        *,
        verify: Callable[[str], str] | None = None,
        lock: int | None = None,
        database: Database | None = None,
    ) -> None:
        self._directory = directory
        self._verify = verify
        self._copied: tuple[Any, ...] | None = None
        statedir.prepare(directory)
        self._lock = statedir.lock(directory) if lock is None else lock
        try:
            self._database = database or Database(open_database(directory), directory)
        except BaseException:
            if lock is None:
                os.close(self._lock)
            raise
        self.leases = Leases(self._database)

    def __enter__(self) -> SqliteStore:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database, then let another process have the directory. Twice is once."""
        descriptor, self._lock = self._lock, -1
        if descriptor < 0:
            return
        try:
            with translated(self._directory, "close the store"):
                self._database.connection.close()  # moves the log into the database
        finally:
            os.close(descriptor)

    @property
    def fault(self) -> StoreError | None:
        return self._database.fault

    def on_fault(self, function: Callable[[], None]) -> None:
        self._database.on_fault = function

    def retry(self) -> None:
        self._database.retry()

    def copy_out(self, at: str) -> bool:
        from kvmneg.store import copies, copying  # a moment after a change, never before the first call

        with self._reading("read what is to be copied") as connection:
            state = copying.state(connection)
            if self._copied == state:
                return False
            copy = copying.take(connection, at)
        copies.write(self._directory, copy)
        self._copied = state
        return True

    def _reading(self, doing: str) -> AbstractContextManager[Connection]:
        return self._database.reading(doing)

    def _changing(self, doing: str) -> AbstractContextManager[Connection]:
        return self._database.changing(doing)

    # The fence

    def generation(self) -> int:
        with self._reading("read the fence's generation") as connection:
            return _generation(connection)

    def fence(self) -> FenceRow | None:
        with self._reading("read the fence") as connection:
            row = newest(connection)
        return self._checked(row)

    def past_fence(self, generation: int) -> FenceRow | None:
        with self._reading("read the fence's history") as connection:
            query = f"SELECT {_FENCE} FROM fence_history WHERE generation = ?"
            row = connection.execute(query, (generation,)).fetchone()
        return self._checked(row)

    def _checked(self, row: tuple[Any, ...] | None) -> FenceRow | None:
        if row is None or row[2] is None:  # nothing pinned yet, or an unpin, which has no text
            return None
        fence = FenceRow._make(row)
        if self._verify is not None:
            self._check(self._verify, fence)
        return fence

    def _check(self, verify: Callable[[str], str], fence: FenceRow) -> None:
        """Whoever edits the database by hand, or a disk that decays, does not move the fence unseen."""
        hint = (
            "run the kvmneg that pinned it, or compare it with your copy of that fence and pin the right one"
        )
        message = f"the stored fence of generation {fence.generation} is not the one that was pinned"
        try:
            actual = verify(fence.text)
        except (KvmnegError, ValueError) as error:
            raise StoreError(f"{message}: {error}", hint=hint, generation=fence.generation) from error
        if actual != fence.digest:
            message = f"{message}: its digest is {actual}, not {fence.digest}"
            raise StoreError(message, hint=hint, generation=fence.generation)

    def pin(self, text: str, digest: str, *, expected_generation: int | None, audit: Audit) -> FenceRow:
        if self._verify is not None and self._verify(text) != digest:
            raise ValueError(
                f"{digest} is not the digest of the fence to pin"
            )  # a bug above, not a fault here
        with self._changing("pin the fence") as connection:
            generation = expect(connection, expected_generation) + 1
            append(connection, generation, "pin", (digest, text), audit)
            audits.append(connection, "pin", generation, audit, {"digest": digest})
            _close_proposal(connection)
        reason = storable(audit.reason)
        return FenceRow(generation, digest, text, audit.at, audit.uid, audit.pid, reason)

    def unpin(self, *, expected_generation: int | None, audit: Audit, floating: bool = False) -> int:
        with self._changing("unpin the fence") as connection:
            generation = expect(connection, expected_generation) + 1
            row = newest(connection)
            if not floating and (row is None or row[2] is None):
                raise NotPinned("no fence is pinned")
            digest = row[1] if row else ""
            append(connection, generation, "unpin", (digest, None), audit)
            audits.append(connection, "unpin", generation, audit, {"digest": digest})
            _close_proposal(connection)
            # it floats anew, at what the host offers now
            connection.execute(
                "UPDATE level SET text = NULL, report = (SELECT digest FROM reports ORDER BY seen DESC LIMIT 1)"
            )
        return generation

    def history(self, limit: int) -> list[HistoryRow]:
        with self._reading("read the fence's history") as connection:
            query = f"SELECT {_HISTORY} FROM fence_history ORDER BY generation DESC LIMIT ?"
            return [HistoryRow(*row) for row in connection.execute(query, (max(0, limit),))]

    def audit(self, limit: int, *, before: int | None = None) -> list[AuditRow]:
        with self._reading("read the audit") as connection:
            return audits.rows(connection, limit, before=before)

    def level(self) -> LevelRow:
        with self._reading("read where the level stands") as connection:
            breached, *rest = connection.execute(
                "SELECT breached, proposal, report, text FROM level"
            ).fetchone()
        return LevelRow(bool(breached), *rest)

    @property
    def levels(self) -> Levels:
        from kvmneg.store.levels import Levels  # where a level moves: a start does without it

        return Levels(self._database)

    def waivers(self, boot: str) -> Waivers:
        """The unknown guests of this boot that an admin waived."""
        from kvmneg.store.waivers import Waivers  # where somebody asks for unknown guests

        return Waivers(self._database, boot)

    # Reports

    def record_report(
        self, digest: str, combo_digest: str, at: str, body: bytes, combo: str | None = None
    ) -> bool:
        """The latest report again writes nothing: `digest` must not cover the time of measuring."""
        with self._changing("record the report") as connection:
            query = "SELECT digest, seen FROM reports ORDER BY seen DESC LIMIT 1"
            last_digest, seen = connection.execute(query).fetchone() or (None, 0)
            if last_digest == digest:
                return False
            from kvmneg.store.rolls import note  # most starts have nothing to record

            connection.execute(
                "INSERT INTO reports (digest, combo_digest, at, body, seen) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (digest) DO UPDATE SET seen = excluded.seen",
                (digest, combo_digest, at, body, seen + 1),
            )
            # the first host of all: what it offers is the level that floats
            connection.execute("UPDATE level SET report = ? WHERE report IS NULL", (digest,))
            note(connection, (combo_digest, combo), digest, at, seen + 1)
        return True

    @property
    def rolls(self) -> Rolls:
        from kvmneg.store.rolls import Rolls  # of an admin's day

        return Rolls(self._database)

    def latest_report(self) -> ReportRow | None:
        with self._reading("read the reports") as connection:
            row = connection.execute(f"SELECT {REPORT} FROM reports ORDER BY seen DESC LIMIT 1").fetchone()
        return ReportRow(*row) if row else None

    def report(self, digest: str) -> ReportRow | None:
        with self._reading("read the reports") as connection:
            row = connection.execute(f"SELECT {REPORT} FROM reports WHERE digest = ?", (digest,)).fetchone()
        return ReportRow(*row) if row else None


def newest(connection: Connection) -> tuple[Any, ...] | None:
    """The newest row of the history, pin or unpin: columns of _FENCE."""
    query = f"SELECT {_FENCE} FROM fence_history ORDER BY generation DESC LIMIT 1"
    row: tuple[Any, ...] | None = connection.execute(query).fetchone()
    return row


def _generation(connection: Connection) -> int:
    row = connection.execute("SELECT COALESCE(MAX(generation), 0) FROM fence_history").fetchone()
    return int(row[0])


def expect(connection: Connection, expected: int | None) -> int:
    """The generation, if it is the expected one: the compare of compare-and-swap, inside the transaction."""
    actual = _generation(connection)
    if expected is not None and expected != actual:
        message = f"the fence is at generation {actual}, not {expected}"
        hint = "somebody changed it meanwhile: look at it again"
        raise GenerationMismatch(message, hint=hint, expected=expected, actual=actual)
    return actual


def _close_proposal(connection: Connection) -> None:
    """What was proposed was about another fence. Whether that is allowed is decided above."""
    # most often there is none: without a condition SQLite would write the page of an empty table too
    connection.execute("DELETE FROM proposals WHERE TRUE")
    connection.execute("UPDATE level SET proposal = '', breached = 0 WHERE proposal <> '' OR breached <> 0")


def append(
    connection: Connection,
    generation: int,
    action: FenceAction,
    fence: tuple[str, str | None],
    audit: Audit,
    *,
    step: str | None = None,
) -> None:
    """Write the next row of the history; `fence` is its digest and text, `step` what a pin was part of."""
    who = (audit.uid, audit.pid, storable(audit.process), storable(audit.reason))
    connection.execute(
        "INSERT INTO fence_history (generation, action, digest, text, at, uid, pid, process, reason, step) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (generation, action, *fence, audit.at, *who, step),
    )


if TYPE_CHECKING:

    def _meets(store: SqliteStore) -> Store:
        return store
