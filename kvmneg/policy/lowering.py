# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far a fence has to be lowered so that a combo is not below it: plain data, for a proposal to lower. Pure."""

from __future__ import annotations

from kvmneg.features import words
from kvmneg.features.featureset import meet
from kvmneg.policy import roll, vmm
from kvmneg.policy.fence_text import Fence
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.difference import Blocker
    from kvmneg.features.report import Report


class Lowering(NamedTuple):
    """What a fence has to lose so that a combo is not below it: `take`, by name, and the fence without these.

    `fence` is None where no fence is left below both: `blockers` say why.
    """

    take: tuple[str, ...]
    fence: Fence | None
    blockers: tuple[Blocker, ...]


def lowering(report: Report, fence: Fence) -> Lowering:
    """The highest fence that the host of this report holds too; nothing to take where it holds the present one."""
    blockers = roll.below(report, fence)
    take = tuple(dict.fromkeys(blocker.feature for blocker in blockers))
    if not blockers:
        return Lowering((), fence, ())
    if report.architecture != fence.granted.architecture:
        return Lowering(take, None, blockers)
    low = meet(fence.granted, vmm.reach(report))
    registers = fence.registers
    if report.architecture == words.ARM64:
        from kvmneg.policy import levelling  # x86 shows guests whatever it is told

        low = levelling.level(low, (report,)).granted
        listed = frozenset(report.registers)
        registers = tuple(one for one in registers if one in listed) if listed else ()
    if low.conflicts:
        return Lowering(take, None, blockers)
    lowered = Fence(low, registers=registers)
    left = roll.below(report, lowered)
    return Lowering(take, None if left else lowered, left)
