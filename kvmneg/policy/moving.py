# SPDX-License-Identifier: LGPL-2.1-or-later
"""May a guest move to another host? By its contract and that host's report and level. Pure.

The vendor, what the host accepts (bits that a guest has to be told of count the other way round), what the VMM
accepts, and on arm64 the registers that the guest carries decide. That the guest has more than what the target's new
guests get is no obstacle but a warning: there it is an island, and may go on only to hosts that have as much.
"""

from __future__ import annotations

from kvmneg.features import words
from kvmneg.policy import leases, negotiation
from kvmneg.policy.scope import unmeasured
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.features.difference import Blocker
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.portable import Entry

_JUDGED = "judged: the guest's contract against what {there} accepts"
_BY = ", and against what {vmm} there accepts"
_NO_VMM = "not judged: any VMM's own refusals; none was named"
_ELSE = (
    "not judged: machine types and device state of the VMM builds on both sides, ROM sizes, vhost-user and vDPA back "
    "ends, VFIO, live nested guests, whether that report is still true"
)
_STATE = "not judged: classes of state that the report of {there} does not name"


class Move(NamedTuple):
    """`blockers` are all reasons why not; `above` is what the guest has beyond the target's level, a warning."""

    blockers: tuple[Blocker, ...]
    above: tuple[Blocker, ...]
    level: str
    scope: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        return not self.blockers

    def to_json(self) -> dict[str, Any]:
        """{"allowed", "blockers", "island": {"level", "above": [feature, …]} or null, "scope"}."""
        names = list(dict.fromkeys(blocker.feature for blocker in self.above))
        return {
            "allowed": self.allowed,
            "blockers": [blocker.to_json() for blocker in self.blockers],
            "island": {"level": self.level, "above": names} if names else None,
            "scope": list(self.scope),
        }


def judge(
    granted: FeatureSet,
    there: Report,
    fence: Fence | None = None,
    vmm: str | None = None,
    *,
    portable: tuple[Entry, ...] = (),
) -> Move:
    """Whether a guest may move to the host of a report, whose pool is pinned at `fence`, None: floats at its offer.

    `granted` is what the guest holds, `portable` what its contract says of registers (arm64). Raises UsageError for a
    VMM without a definition.
    """
    blockers = negotiation.accepts(granted, there, vmm, portable=portable)
    level = f"fence generation {fence.generation}" if fence else f"what {there.host} offers to new guests"
    top = fence.granted if fence else there.offer
    mixed = granted.architecture != there.architecture
    above = () if mixed else leases.exceeding(granted, top, level)
    return Move(blockers, above, level, _scope(there, vmm))


def comes_back(
    granted: FeatureSet, here: Report, *, portable: tuple[Entry, ...] = (), vmm: str | None = None
) -> tuple[Blocker, ...]:
    """Why a saved guest may not be restored here, with what it holds; where no VMM is named, by any.

    What VMMs give by themselves is in a guest's set, and no KVM offers it: one that accepts all of it is enough.
    """
    from kvmneg.policy import definitions

    blockers = negotiation.accepts(granted, here, vmm, portable=portable)
    if vmm is None and blockers:
        for one in definitions.available("vmms"):
            if not negotiation.accepts(granted, here, one, portable=portable):
                return ()
    return blockers


def _scope(there: Report, vmm: str | None) -> tuple[str, ...]:
    judged = _JUDGED.format(there=there.host) + (_BY.format(vmm=vmm) if vmm else "")
    lines = [judged, *([] if vmm else [_NO_VMM]), *unmeasured((there,))]
    if there.architecture == words.ARM64 and not there.registers:
        lines.append(f"not judged: which registers the guest carries, as {there.host} lists none")
    if there.architecture == words.X86_64:
        lines.append(_STATE.format(there=there.host))
    return (*lines, _ELSE)
