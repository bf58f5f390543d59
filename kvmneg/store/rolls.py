# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every combo this host was ever measured under, and those that the admin wants to be able to return to.

A combo has one row and keeps all its reports; the newest of them counts. Rows of combos and reports are never
deleted (the database itself refuses it): only a record made on the old kernel proves that going back is safe.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import LimitExceeded
from kvmneg.records import NamedTuple
from kvmneg.store.audit import append, storable
from kvmneg.store.interface import ReportRow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sqlite3 import Connection
    from typing import Any

    from kvmneg.store.interface import Audit
    from kvmneg.store.transactions import Database

COMBO = "digest, document, report, first_at, last_at"
ROLL = "combo, at, uid, pid, process, reason"


class ComboRow(NamedTuple):
    """One combo: its digest, its JSON without the boot id, its newest report's digest, when it was recorded.

    `document` is None of a combo whose reports were recorded before combos were.
    """

    digest: str
    document: str | None
    report: str
    first_at: str
    last_at: str


class RollRow(NamedTuple):
    """A combo of the roll-back set: who put it there, when and why."""

    combo: str
    at: str
    uid: int
    pid: int
    process: str
    reason: str


def note(connection: Connection, combo: tuple[str, str | None], report: str, at: str, seen: int) -> None:
    """A report of this combo (digest, document) was recorded, and is its newest; in the caller's transaction."""
    digest, document = combo
    connection.execute(
        "INSERT INTO combos (digest, document, report, first_at, last_at, seen) VALUES (?1, ?2, ?3, ?4, ?4, ?5) "
        "ON CONFLICT (digest) DO UPDATE SET report = ?3, last_at = ?4, seen = ?5, "
        "document = COALESCE(document, ?2)",
        (digest, document, report, at, seen),
    )


def drop(connection: Connection, combo: str, generation: int, audit: Audit) -> bool:
    """Take a combo out of the roll-back set, with its audit record, in the caller's transaction."""
    gone = connection.execute("DELETE FROM rolls WHERE combo = ?", (combo,)).rowcount > 0
    if gone:
        append(connection, "rollback-remove", generation, audit, {"combo": combo})
    return gone


class Rolls:
    """The combos and the roll-back set of one database. Every call may raise StoreError."""

    __slots__ = ("_database",)

    def __init__(self, database: Database) -> None:
        self._database = database

    def combos(self, limit: int) -> list[ComboRow]:
        """The combos ever measured, the one recorded last first (by order, not by its time)."""
        with self._database.reading("read the combos") as connection:
            query = f"SELECT {COMBO} FROM combos ORDER BY seen DESC LIMIT ?"
            return [ComboRow(*row) for row in connection.execute(query, (max(0, limit),))]

    def find(self, prefix: str) -> list[ComboRow]:
        """The combos whose digest begins so: one for a whole digest, two at most."""
        with self._database.reading("read the combos") as connection:
            query = f"SELECT {COMBO} FROM combos WHERE substr(digest, 1, ?) = ? LIMIT 2"
            return [ComboRow(*row) for row in connection.execute(query, (len(prefix), prefix))]

    def report(self, combo: str) -> ReportRow | None:
        """The newest report of a combo, or None."""
        rows = self._reports("WHERE combos.digest = ?", combo)
        return rows[0] if rows else None

    def reports(self) -> list[ReportRow]:
        """The newest report of each combo of the roll-back set: their offers bound the ceiling (D of Roll)."""
        return self._reports("JOIN rolls ON rolls.combo = combos.digest ORDER BY combos.seen")

    def _reports(self, which: str, *values: Any) -> list[ReportRow]:
        with self._database.reading("read the reports") as connection:
            query = (
                "SELECT reports.digest, combo_digest, reports.at, body FROM combos "
                f"JOIN reports ON reports.digest = combos.report {which}"
            )
            return [ReportRow(*row) for row in connection.execute(query, values)]

    def before(self, report: str) -> ReportRow | None:
        """The report that was the latest before this one was recorded (again); None for the first."""
        with self._database.reading("read the reports") as connection:
            query = (
                "SELECT digest, combo_digest, at, body FROM reports "
                "WHERE seen < (SELECT seen FROM reports WHERE digest = ?) ORDER BY seen DESC LIMIT 1"
            )
            row = connection.execute(query, (report,)).fetchone()
        return ReportRow(*row) if row else None

    def members(self) -> list[RollRow]:
        """The roll-back set, oldest member first."""
        with self._database.reading("read the roll-back set") as connection:
            query = f"SELECT {ROLL} FROM rolls ORDER BY place"
            return [RollRow(*row) for row in connection.execute(query)]

    def add(self, combo: str, generation: int, audit: Audit) -> bool:
        """Put a recorded combo into the roll-back set, with its audit record; False where it is in it already.

        Raises LimitExceeded (ROLLBACK_COMBOS). `generation` is the fence's, which does not move by it.
        """
        with self._database.changing("change the roll-back set") as connection:
            if connection.execute("SELECT 1 FROM rolls WHERE combo = ?", (combo,)).fetchone():
                return False
            (count,) = connection.execute("SELECT COUNT(*) FROM rolls").fetchone()
            if count >= limits.ROLLBACK_COMBOS:
                raise LimitExceeded("ROLLBACK_COMBOS", limits.ROLLBACK_COMBOS, hint="remove one first")
            row = combo, audit.at, audit.uid, audit.pid, storable(audit.process), storable(audit.reason)
            connection.execute(f"INSERT INTO rolls ({ROLL}) VALUES (?, ?, ?, ?, ?, ?)", row)
            append(connection, "rollback-add", generation, audit, {"combo": combo})
        return True

    def remove(self, combo: str, generation: int, audit: Audit) -> bool:
        """Take a combo out of the roll-back set; False where it is not in it. Its reports stay."""
        with self._database.changing("change the roll-back set") as connection:
            return drop(connection, combo, generation, audit)
