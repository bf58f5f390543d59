# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is proposed, and what a pool that floats remembers: the records of the fence's state machine.

One row says where the level stands beside the fence's history: whether the breach is told, what is proposed, and at
which level an unpinned pool floats. At most one proposal is open; what became of the others is in the audit. Each
change is one transaction, with its audit record and, where it moves the effective level, its row of the history.
"""

from __future__ import annotations

from kvmneg.records import NamedTuple
from kvmneg.store import audit as audits
from kvmneg.store import sqlite
from kvmneg.store.audit import storable
from kvmneg.store.interface import ProposalRow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from sqlite3 import Connection
    from typing import Any

    from kvmneg.store.interface import Audit
    from kvmneg.store.transactions import Database

PROPOSAL = "kind, digest, text, base, generation, urgent, at, deadline, uid, pid, process, reason, plan"


class Change(NamedTuple):
    """What one transition writes.

    `action` and `detail` are the audit's. `fence`, where the effective level moves: the step's name in the history,
    digest and text of the fence now in force. `left` are combos that leave the roll-back set.
    """

    action: str
    detail: Mapping[str, Any]
    fence: tuple[str, str, str] | None = None
    left: tuple[str, ...] = ()


def put(connection: Connection, proposal: ProposalRow | None) -> None:
    """Have this proposal open, and no other, in the caller's transaction."""
    connection.execute("DELETE FROM proposals")
    if proposal is not None:
        row = proposal._replace(process=storable(proposal.process), reason=storable(proposal.reason))
        marks = ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO proposals ({PROPOSAL}) VALUES ({marks})", row)
    connection.execute("UPDATE level SET proposal = ?", (proposal.kind if proposal else "",))


class Levels:
    """The proposals of one database. Every call may raise StoreError; nothing has changed then."""

    __slots__ = ("_database",)

    def __init__(self, database: Database) -> None:
        self._database = database

    def proposal(self) -> ProposalRow | None:
        """The open proposal."""
        with self._database.reading("read the proposal") as connection:
            row = connection.execute(f"SELECT {PROPOSAL} FROM proposals").fetchone()
        return ProposalRow(*row) if row else None

    def propose(
        self, change: Change, proposal: ProposalRow, *, expected_generation: int | None, audit: Audit
    ) -> int:
        """Open a proposal, in the place of the one that is open; returns the generation. Raises GenerationMismatch."""
        return self._apply(change, proposal, expected_generation, audit)

    def close(self, change: Change, *, expected_generation: int | None, audit: Audit) -> int:
        """End the open proposal, committed or not; returns the generation. Raises GenerationMismatch."""
        return self._apply(change, None, expected_generation, audit)

    def _apply(self, change: Change, proposal: ProposalRow | None, expected: int | None, audit: Audit) -> int:
        with self._database.changing("store what is proposed for the fence") as connection:
            generation = sqlite.expect(connection, expected)
            if change.fence is not None:
                generation += 1
                step, digest, text = change.fence
                sqlite.append(connection, generation, "pin", (digest, text), audit, step=step)
            put(connection, proposal._replace(generation=generation) if proposal is not None else None)
            for combo in change.left:
                connection.execute("DELETE FROM rolls WHERE combo = ?", (combo,))
            audits.append(connection, change.action, generation, audit, change.detail)
        return generation

    def breached(self, low: bool, detail: Mapping[str, Any], audit: Audit) -> None:
        """Record that the host fell below the fence, or is not below it any more."""
        with self._database.changing("record where the host stands") as connection:
            generation = sqlite.expect(connection, None)
            connection.execute("UPDATE level SET breached = ?", (low,))
            audits.append(connection, "breached" if low else "healed", generation, audit, detail)

    def floats_at(
        self,
        report: str,
        text: str,
        action: str = "",
        *,
        detail: Mapping[str, Any] | None = None,
        audit: Audit | None = None,
    ) -> None:
        """Remember the level of a pool that floats: the report that offers just that ("" for none), and its text.

        With an action it moved, and the audit has it; without, it is the same, offered by another report.
        """
        with self._database.changing("record the level that floats") as connection:
            connection.execute("UPDATE level SET report = ?, text = ?", (report, text))
            if action and audit is not None:
                generation = sqlite.expect(connection, None)
                audits.append(connection, action, generation, audit, detail)
