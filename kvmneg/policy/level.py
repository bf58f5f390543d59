# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a pool stands: its fence, its members, what is proposed; and what follows of it: C, E, the state. Pure.

The ceiling C is the meet of what all members offer, reachable or not, and of what the combos offer that the admin
wants to return to. The effective level E bounds each new contract. Pinned, it is the fence F; while lowering, the
lower one at once. Floating, it follows C down by itself, and never up: a level that rose by itself would be a fence
passed without anybody having said so, for whoever boots the old kernel again. So a floating pool remembers E (`floor`),
and to let it rise is an admin's act like any other: to pin, or to unpin, which lets the pool float anew at C. A
generation counts what an admin did to E; what a host did to a floating E is in the audit alone.
"""

from __future__ import annotations

from kvmneg.features.featureset import FeatureSet, fits, meet_all
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.members import Member, counting
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kvmneg.features.difference import Blocker

FLOATING, PINNED, RAISING, LOWERING = "floating", "pinned", "raising", "lowering"
BREACHED, READONLY = "breached", "readonly"
RAISE, LOWER = "raise", "lower"


class Proposal(NamedTuple):
    """A level to be: whether it raises or lowers, the fence, the revision at which it was proposed."""

    kind: str
    fence: Fence
    since: int = 0
    urgent: bool = False


class Level(NamedTuple):
    """Where a pool stands. `fence` is F, None where it floats; `floor` the level of a pool that floats.

    `readonly` says why nothing may change now, "" where it may.
    """

    generation: int = 0
    fence: Fence | None = None
    floor: FeatureSet | None = None
    proposal: Proposal | None = None
    members: tuple[Member, ...] = ()
    readonly: str = ""

    @property
    def effective(self) -> Fence | None:
        """E, None before the first member."""
        if self.proposal is not None and self.proposal.kind == LOWER:
            return self.proposal.fence
        if self.fence is not None:
            return self.fence
        return Fence(self.floor, self.generation) if self.floor is not None else None

    @property
    def state(self) -> str:
        """READONLY before all, then BREACHED: a proposal is kept through both."""
        if self.readonly:
            return READONLY
        if deficient(self):
            return BREACHED
        if self.fence is None:
            return FLOATING
        if self.proposal is None:
            return PINNED
        return RAISING if self.proposal.kind == RAISE else LOWERING


class Step(NamedTuple):
    """What a transition leads to."""

    level: Level
    action: str
    detail: Mapping[str, Any] = {}


def ceiling(level: Level) -> FeatureSet | None:
    """C; None where no host counts. Conflicts in it say that the hosts have no common level."""
    sets = [one.offered for member in counting(level.members) for one in member.combos()]
    return meet_all(sets) if sets else None


def deficient(level: Level) -> list[tuple[Member, tuple[Blocker, ...]]]:
    """The members that offer less than the effective level, with what each lacks."""
    effective = level.effective
    if effective is None:
        return []
    found = [(member, member.lacks(effective)) for member in counting(level.members)]
    return [(member, blockers) for member, blockers in found if blockers]


def held_back(level: Level) -> tuple[Blocker, ...]:
    """What the members of a floating pool offer by now above its level; TSC rates differ by a little at each boot."""
    top = ceiling(level)
    if level.fence is not None or level.floor is None or top is None:
        return ()
    found = fits(top, level.floor, missing_on="the level", cause="fence")
    return tuple(one for one in found if not one.word.startswith("tsc:"))
