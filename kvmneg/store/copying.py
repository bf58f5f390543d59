# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of a database goes into its copy (kvmneg.store.copies), and from there into a new one.

It is whatever bounds what new guests get, and what an admin would have to say again: the fence or the level that
floats, what is proposed, the roll-back set with its reports. Leases, history and audit are not in it.
"""

from __future__ import annotations

from kvmneg.store import audit as audits
from kvmneg.store import levels, rolls, sqlite
from kvmneg.store.copies import Copy
from kvmneg.store.interface import ProposalRow, ReportRow
from kvmneg.store.rolls import ComboRow, RollRow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sqlite3 import Connection
    from typing import Any

    from kvmneg.store.interface import Audit, FenceAction

_NOTHING_YET = (0, "", None, "", 0, 0, "")
# of the roll-back set, and of the report (?1) that offers the level that floats
_COMBOS = (
    f"SELECT {rolls.COMBO} FROM combos WHERE digest IN (SELECT combo FROM rolls) "
    "OR digest = (SELECT combo_digest FROM reports WHERE digest = ?1) ORDER BY seen"
)


def state(connection: Connection) -> tuple[Any, ...]:
    """What differs whenever the copy would, without reading all of it."""
    ask = connection.execute
    floating = _floating(connection)
    combos = ask(_COMBOS, (_only_report(floating),)).fetchall()
    return (
        *ask("SELECT MAX(generation) FROM fence_history").fetchone(),
        floating,
        ask("SELECT kind, digest, generation, base, deadline, at FROM proposals").fetchone(),
        ask(f"SELECT {rolls.ROLL} FROM rolls ORDER BY place").fetchall(),
        [(row[0], *row[2:]) for row in combos],
    )


def take(connection: Connection, made_at: str) -> Copy:
    """The copy of what the database says now."""
    ask = connection.execute
    found = ask(f"SELECT {levels.PROPOSAL} FROM proposals").fetchone()
    proposal = _without_guests(ProposalRow(*found)) if found else None
    base = None
    if proposal is not None and proposal.kind == "lower":
        query = "SELECT digest, text FROM fence_history WHERE generation = ?"
        base = ask(query, (proposal.base,)).fetchone()
    floating = _floating(connection)
    report = _only_report(floating)
    combos = [ComboRow(*row) for row in ask(_COMBOS, (report,))]
    wanted = [*(row.report for row in combos), report]
    reports = (
        f"SELECT {sqlite.REPORT} FROM reports WHERE digest IN ({', '.join('?' * len(wanted))}) ORDER BY seen"
    )
    return Copy._make((
        made_at, *(sqlite.newest(connection) or _NOTHING_YET), *floating, proposal, base,
        tuple(RollRow(*row) for row in ask(f"SELECT {rolls.ROLL} FROM rolls ORDER BY place")),
        tuple(combos), tuple(ReportRow(*row) for row in ask(reports, wanted)),
    ))  # fmt: skip


def _floating(connection: Connection) -> tuple[str | None, str | None]:
    """The level that floats, as its row has it; without meaning, and so left out, where a fence is pinned."""
    fence = sqlite.newest(connection)
    if fence is not None and fence[2] is not None:
        return None, None
    report, text = connection.execute("SELECT report, text FROM level").fetchone()
    return report, text


def _only_report(floating: tuple[str | None, str | None]) -> str | None:
    """The report that alone says what the level that floats is."""
    return floating[0] if floating[1] is None else None


def _without_guests(proposal: ProposalRow) -> ProposalRow:
    """Who stood above is not told from a copy: without leases nobody could say who is gone."""
    import json  # only where a level changed

    plan = json.loads(proposal.plan)
    return proposal._replace(plan=json.dumps({**plan, "guests": []} if plan.get("guests") else plan))


def fill(connection: Connection, copy: Copy, generation: int, audit: Audit) -> None:
    """Put a copy into a new database, with `generation` for its fence; while lowering the one above is one below it.

    With generation 0, before the first pin, no history is begun.
    """
    connection.execute("BEGIN IMMEDIATE")
    _fill_rolls(connection, copy)
    connection.execute("UPDATE level SET report = ?, text = ?", (copy.report, copy.level))
    if generation:
        _fill_fence(connection, copy, generation, audit)
        detail = {"digest": copy.digest, "proposal": copy.proposal.kind if copy.proposal else None}
        combos = [row.combo for row in copy.rolls]
        audits.append(connection, "restore", generation, audit, {**detail, "rolls": combos})
    connection.execute("COMMIT")


def _fill_fence(connection: Connection, copy: Copy, generation: int, audit: Audit) -> None:
    proposal, base, step = copy.proposal, generation, None
    if proposal is not None and copy.base is not None:
        base, step = generation - 1, "lower"
        sqlite.append(connection, base, "pin", copy.base, audit)
    action: FenceAction = "unpin" if copy.text is None else "pin"
    sqlite.append(connection, generation, action, (copy.digest, copy.text), audit, step=step)
    if proposal is not None:
        levels.put(connection, proposal._replace(base=base, generation=generation))


def _fill_rolls(connection: Connection, copy: Copy) -> None:
    seen = {row.digest: number for number, row in enumerate(copy.reports, 1)}
    connection.executemany(
        f"INSERT INTO reports ({sqlite.REPORT}, seen) VALUES (?, ?, ?, ?, ?)",
        [(*row, seen[row.digest]) for row in copy.reports],
    )
    connection.executemany(
        f"INSERT INTO combos ({rolls.COMBO}, seen) VALUES (?, ?, ?, ?, ?, ?)",
        [(*row, seen.get(row.report)) for row in copy.combos],
    )
    connection.executemany(f"INSERT INTO rolls ({rolls.ROLL}) VALUES (?, ?, ?, ?, ?, ?)", copy.rolls)
