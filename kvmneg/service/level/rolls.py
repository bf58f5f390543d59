# SPDX-License-Identifier: LGPL-2.1-or-later
"""The combos that this host was measured under, the roll-back set, and whether it may go back to one.

Decisions are kvmneg.policy.roll's; here is what they are made from: the store's records, the fence, and what guests
hold. A stored report says neither when nor where it was measured, so the combo's row tells that.
"""

from __future__ import annotations

import json

from kvmneg import limits
from kvmneg.errors import Blocked, LimitExceeded, StoreError, UsageError
from kvmneg.features import words
from kvmneg.policy import coverage, roll
from kvmneg.policy.combos import Asked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.leases import Holding
    from kvmneg.policy.lowering import Lowering
    from kvmneg.policy.portable import Entry
    from kvmneg.service.node import Node
    from kvmneg.store.interface import Audit, ReportRow
    from kvmneg.store.rolls import ComboRow, RollRow

RUNNING = "running"
_PREFIX, _LEAST_DIGITS = "sha256:", 6
_HEX = frozenset("0123456789abcdef")


class Standing:
    """A member of the roll-back set, and how it stands: the survey's line of it."""

    __slots__ = ("line", "member", "row")

    def __init__(self, member: RollRow, row: ComboRow, line: roll.Line) -> None:
        self.member = member
        self.row = row
        self.line = line


class Rolls:
    """Those of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._reports: dict[str, Report] = {}  # by digest: what was measured does not change
        self._carried: dict[str, tuple[Entry, ...]] = {}  # by digest of a contract that is held

    # -- records ----------------------------------------------------------------------------------

    def history(self, limit: int) -> list[ComboRow]:
        """The combos ever measured, the one recorded last first."""
        return self._node.store.rolls.combos(limit)

    def combo(self, row: ComboRow) -> Mapping[str, Any]:
        """A row's combo, without its boot id. Raises StoreError."""
        if row.document is None:
            return self._load(row).combo
        try:
            found: Mapping[str, Any] = json.loads(row.document)
        except ValueError as error:
            raise StoreError(f"the record of combo {row.digest} cannot be read: {error}") from error
        return found

    def resolve(self, text: str) -> ComboRow:
        """The combo that is meant: "running", a digest, or the beginning of one. Raises UsageError."""
        if text == RUNNING:
            text = self._node.report.combo_digest()
        digits = text.removeprefix(_PREFIX)
        if len(digits) < _LEAST_DIGITS or set(digits) - _HEX:
            hint = f"{_LEAST_DIGITS} or more of the digits that `kvmneg history` shows, or {RUNNING}"
            raise UsageError(f"{text[:80]!r} names no combo", hint=hint)
        found = self._node.store.rolls.find(_PREFIX + digits)
        if not found:
            raise UsageError(
                f"no combo {text} was ever measured here", hint="`kvmneg history` lists those that were"
            )
        if len(found) > 1:
            raise UsageError(f"{text} is the beginning of several combos", hint="give more of its digits")
        return found[0]

    def report(self, row: ComboRow) -> Report:
        """The newest report of a combo. Raises StoreError."""
        return self._load(row)

    def members(self) -> list[RollRow]:
        return self._node.store.rolls.members()

    def offers(self) -> list[tuple[str, Report]]:
        """(combo, its newest report) of each member of the roll-back set: what bounds the ceiling."""
        return [(member.combo, self._load(self._row(member))) for member in self.members()]

    def _row(self, member: RollRow) -> ComboRow:
        (found,) = self._node.store.rolls.find(member.combo)
        return found

    def _load(self, row: ComboRow) -> Report:
        found = self._reports.get(row.report)
        if found is None:
            stored = self._node.store.rolls.report(row.digest)
            if stored is None:  # a foreign key forbids it
                raise StoreError(f"the report of combo {row.digest} is gone")
            if len(self._reports) > limits.ROLLBACK_COMBOS:
                self._reports.clear()
            here = self._node.last_report
            found = self._reports[row.report] = opened(
                stored, row.last_at, here.host if here else "this host"
            )
        return found

    # -- the roll-back set ------------------------------------------------------------------------

    def add(self, text: str, audit: Audit) -> tuple[ComboRow, bool]:
        """Put a combo into the roll-back set; False where it is there already.

        Raises Blocked where its offer is below the fence, or not all of the host was measured under it; UsageError,
        LimitExceeded, StoreError.
        """
        self._node.refresh(fresh=True)  # what runs is what runs now
        row = self.resolve(text)
        report, fence = self._load(row), self._node.fence
        coverage.require(report)
        blockers = roll.below(report, fence, self._node.last_report)
        if fence is not None and blockers:
            raise Blocked(
                f"{report.host} offers less than fence generation {fence.generation} promises",
                blockers,
                hint="`kvmneg rollback add --plan` prints the fence without these, for `kvmneg fence lower --from`",
            )
        changed = self._node.store.rolls.add(row.digest, self._node.generation, audit)
        self._moved(changed)
        return row, changed

    def remove(self, text: str, audit: Audit) -> tuple[ComboRow, bool]:
        """Take a combo out of the roll-back set; its records stay. Raises UsageError, StoreError."""
        row = self.resolve(text)
        changed = self._node.store.rolls.remove(row.digest, self._node.generation, audit)
        self._moved(changed)
        return row, changed

    def plan(self, text: str) -> tuple[ComboRow, Lowering]:
        """What the fence has to lose so that a combo can be added. Raises UsageError, where none is pinned too."""
        row, fence = self.resolve(text), self._node.fence
        if fence is None:
            raise UsageError("no fence is pinned: there is nothing to lower", hint="add it as it is")
        from kvmneg.policy.lowering import lowering  # for a no only

        return row, lowering(self._load(row), fence)

    def standings(self) -> tuple[list[Standing], tuple[str, ...]]:
        """How each member of the roll-back set stands against fence and guests now, and the scope of that."""
        members = [(member, self._row(member)) for member in self.members()]
        fence, guests = self._node.fence, self.guests()
        reports = [(row.digest, self._load(row)) for _, row in members]
        lines = roll.survey(reports, fence, guests)
        rows = [Standing(*member, line) for member, line in zip(members, lines, strict=True)]
        return rows, roll.scope(
            [report for _, report in reports], fence, self._node.floor, unjudged=guests.unjudged
        )

    def _moved(self, changed: bool) -> None:
        """The ceiling is another one: a level that floats goes with it, and kept replies rest on it."""
        node = self._node
        if not changed:
            return
        if node.last_report is not None and node.fence is None:
            from kvmneg.service.level import levels

            levels.settle(node, node.last_report, roll_changed=True)
        for function in node.changed:
            function()

    # -- may it go back? --------------------------------------------------------------------------

    def check(self, text: str | None, asked: Asked, vmm: str | None, *, predict: bool) -> roll.Answer:
        """The answer for a recorded combo (`text`), or for the one that is asked for by what changes.

        Raises UsageError (both, neither, a combo or VMM that does not exist, a kernel that may be several),
        LimitExceeded, StoreError, NoKvm.
        """
        if (text is None) == (asked == Asked()):
            raise UsageError(
                "either a recorded combo is asked for, or what changes", hint="a kernel, a VMM build"
            )
        if len(asked.others) > limits.ROLLBACK_DIMENSIONS:
            raise LimitExceeded("ROLLBACK_DIMENSIONS", limits.ROLLBACK_DIMENSIONS)
        self._node.refresh(fresh=True)
        running, fence, guests = self._node.report, self._node.fence, self.guests()
        if text is not None:
            return self._judged(self.resolve(text), running, fence, guests, vmm)
        rows = {row.digest: row for row in self.history(limits.COMBOS_SEARCHED)}
        recorded = [
            roll.Recorded(row.digest, self.combo(row), row.first_at, row.last_at) for row in rows.values()
        ]
        found, nearest, differs = roll.find(running.combo, asked, recorded)
        if not found:
            from kvmneg.policy import combos, prediction  # tables, for a no only

            kernel = combos.Search(
                running.combo, asked, [str(one.combo.get("kernel")) for one in recorded]
            ).kernel
            told = prediction.predict(running, asked, kernel, fence, guests) if predict else None
            return roll.refuse(asked, nearest, differs, guests, told)
        answers = [self._judged(rows[one.digest], running, fence, guests, vmm) for one in found]
        # the same release built twice: who asks by its name may boot either
        return next((answer for answer in answers if not answer.allowed), answers[0])

    def _judged(
        self, row: ComboRow, running: Report, fence: Fence | None, guests: roll.Guests, vmm: str | None
    ) -> roll.Answer:
        there = self._load(row)
        answer = roll.judge(
            there, fence, guests, floor=self._node.floor, combo=row.digest, vmm=vmm, running=running
        )
        return answer._replace(changes=roll.changes(running.combo, self.combo(row)))

    def guests(self) -> roll.Guests:
        """All guests of this host, each distinct set once; those that never asked are unknown."""
        from kvmneg.service.level import levels

        holdings = levels.holdings(self._node)
        registers = self._registers(holdings) if self._node.report.architecture == words.ARM64 else {}
        return roll.Guests(holdings, registers=registers, unjudged=levels.unjudged(self._node))

    def _registers(self, holdings: list[Holding]) -> dict[str, tuple[Entry, ...]]:
        """What becomes of each register, by the digest of each contract that is held."""
        from kvmneg.policy.contract import Contract  # of arm64 guests

        kept = self._carried
        self._carried = {
            holding.digest: kept.get(holding.digest, ()) for holding in holdings if holding.digest
        }
        for digest in self._carried.keys() - kept.keys():
            body = self._node.store.leases.contract(digest.removeprefix(_PREFIX)) or b""
            self._carried[digest] = Contract.from_binary(body, file=digest).portable
        return self._carried


def opened(stored: ReportRow, at: str, host: str = "this host") -> Report:
    """A stored report of a host; `at` is when its combo was recorded last. Raises StoreError."""
    from kvmneg.service.level import levels  # which opens them for the ceiling

    report = levels.opened(stored)
    kernel = report.combo.get("kernel") or "a kernel that is not known"
    report.measured = {"host": f"{host} under {kernel}", "at": at, "source": "recorded"}
    return report
