# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hosts of a pool, as its level sees them. Pure.

    candidate → member → unreachable / deficient / draining → removed

A host counts from the day it joined to the day somebody removes it, reachable or not: what it last offered bounds the
level. One that lost its lease is unreachable and still counts; only an explicit remove takes it out. A host that fell
below the level is deficient, by itself and back again. One that joined as `partial` never bounds the level: it runs
what fits it.
"""

from __future__ import annotations

from kvmneg.features import words
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence

CANDIDATE, MEMBER, UNREACHABLE = "candidate", "member", "unreachable"
DEFICIENT, DRAINING, REMOVED = "deficient", "draining", "removed"
COUNTING = frozenset((MEMBER, UNREACHABLE, DEFICIENT, DRAINING))


class Measured(NamedTuple):
    """What one combo offers: the combo's digest, a name for people, its set D, its report where there is one.

    With a report a fence is held against it as negotiation does (VMMs, TSC rates, arm64's registers), without one
    against the set alone.
    """

    combo: str
    name: str
    offered: FeatureSet
    report: Report | None = None

    def lacks(self, level: Fence, where: str) -> tuple[Blocker, ...]:
        """What the level promises and this combo does not offer."""
        if self.report is None:
            return tuple(
                one._replace(wanted_by="the fence") for one in level.unmet(self.offered, missing_on=where)
            )
        from kvmneg.policy import negotiation, reasons

        found = [
            reasons.unfit(one, self.report, "the fence")._replace(missing_on=where)
            for one in negotiation.below(self.report, level)
        ]
        if level.granted.architecture == words.ARM64:
            from kvmneg.policy import levelling  # x86 shows guests whatever it is told

            found += levelling.unreachable(level.granted, self.report, "the fence")
        return tuple(found)


class Member(NamedTuple):
    """One host.

    `running` is the combo it was last measured under (None: never), `measured` the revision of the pool's records at
    which that was, `fresh` whether it was since its last boot; `roll` the combos it must be able to return to.
    `acknowledged` is the generation that it said it serves, `fenced_off` whether an unreachable one was proven to run
    nothing.
    """

    host: str
    state: str = CANDIDATE
    running: Measured | None = None
    measured: int = 0
    fresh: bool = False
    roll: tuple[Measured, ...] = ()
    partial: bool = False
    acknowledged: int = 0
    fenced_off: bool = False

    @property
    def counts(self) -> bool:
        """Whether it bounds the level."""
        return self.state in COUNTING and not self.partial

    def combos(self) -> Iterator[Measured]:
        """The running combo, if it was measured, and those it must be able to return to."""
        if self.running is not None:
            yield self.running
        yield from self.roll

    def lacks(self, level: Fence) -> tuple[Blocker, ...]:
        """What the level promises and the running combo does not offer; all of it where that was never measured."""
        if self.running is None:
            because = f"host {self.host} was never measured"
            return (Blocker("host", "", None, "the fence", f"host {self.host}", "unknown", because),)
        return self.running.lacks(level, f"host {self.host}")

    def roll_lacks(self, level: Fence) -> list[tuple[Measured, tuple[Blocker, ...]]]:
        """The combos to return to that the level would leave behind, and what each lacks."""
        found = [(one, one.lacks(level, f"host {self.host} under {one.name}")) for one in self.roll]
        return [(one, self._told(one, blockers)) for one, blockers in found if blockers]

    def _told(self, combo: Measured, blockers: tuple[Blocker, ...]) -> tuple[Blocker, ...]:
        running = self.running.report if self.running is not None else None
        if combo.report is None or running is None:
            return blockers
        from kvmneg.policy import reasons  # for a no only

        return reasons.under(blockers, combo.report, running)

    def missing(self, after: int | None = None) -> str:
        """Why its word is not to be had now, "" where it is: unreachable, stale, or not measured after a revision."""
        if self.state == UNREACHABLE:
            return "it cannot be reached"
        if self.running is None:
            return "it was never measured"
        if not self.fresh:
            return "it was not measured since it last started"
        if after is not None and self.measured <= after:
            return "it was not measured since the proposal"
        return ""


def replaced(members: tuple[Member, ...], member: Member) -> tuple[Member, ...]:
    """The members with one of them in its new form, at its place; a new host at the end."""
    if any(one.host == member.host for one in members):
        return tuple(member if one.host == member.host else one for one in members)
    return (*members, member)


def judged(members: Iterable[Member], effective: Fence | None) -> tuple[Member, ...]:
    """The members in their states under a level: those below it are deficient, the others not any more."""
    rows = []
    for member in members:
        state = member.state
        if effective is not None and state in (MEMBER, DEFICIENT):
            state = DEFICIENT if member.lacks(effective) else MEMBER
        rows.append(member if state == member.state else member._replace(state=state))
    return tuple(rows)


def counting(members: Iterable[Member]) -> list[Member]:
    """Those that bound the level."""
    return [member for member in members if member.counts]
