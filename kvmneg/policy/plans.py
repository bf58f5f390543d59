# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a move of the fence would do, and which guests an urgent lowering has to deal with, in which order. Pure."""

from __future__ import annotations

from kvmneg import limits
from kvmneg.features.featureset import fits
from kvmneg.policy import leases
from kvmneg.policy.level import LOWER, RAISE
from kvmneg.policy.members import counting
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from typing import Any

    from kvmneg.features.difference import Blocker
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.leases import Above, Holding
    from kvmneg.policy.level import Level

NONE, MIXED = "none", "mixed"

# The order of an urgent lowering. Contracts that nobody started yet first: their VMM asks again, and nothing is lost.
# Then those that run with what is to go, and those nobody knows anything of, which may. A suspended or saved guest
# runs nothing now, but comes back with all it had.
_URGENCY = (leases.BEGUN, leases.RUNNING, leases.UNKNOWN, leases.SUSPENDED, leases.SAVED)

GONE, REBOOTED, WAIVED, WAITING = "gone", "cold-booted", "waived", ""


class Plan(NamedTuple):
    """What a fence would change.

    `kind`: raise, lower, mixed, none. `gained` and `lost` are features of new guests, `blockers` what hosts lack of it,
    `left` the combos that could not be returned to, `missing` hosts without a word to be had, `above` the guests that
    hold more and would stay above.
    """

    kind: str
    fence: Fence
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    blockers: tuple[Blocker, ...]
    left: tuple[tuple[str, str], ...]
    missing: tuple[tuple[str, str], ...]
    above: tuple[Above, ...]

    def to_json(self, uid: int | None = None) -> dict[str, Any]:
        """As the type Change of org.kvmneg.Fence; of guests those of one user, where one is given. All are counted."""
        shown = [one.to_json() for one in self.above if uid in (None, one.holding.uid)]
        return {
            "kind": self.kind,
            "digest": self.fence.digest,
            "text": self.fence.text(),
            "gained": list(self.gained),
            "lost": list(self.lost),
            "blockers": [blocker.to_varlink() for blocker in self.blockers],
            "left": [{"combo": combo, "name": name} for combo, name in self.left],
            "missing": [{"host": host, "because": because} for host, because in self.missing],
            "guests": shown[: limits.GUESTS_NAMED],
            "guestCount": len(self.above),
        }


def plan(level: Level, fence: Fence, holdings: Iterable[Holding]) -> Plan:
    """What would change if the effective level became this fence."""
    effective = level.effective
    gained: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    if effective is not None:
        gained = _names(fits(fence.granted, effective.granted))
        lost = _names(fits(effective.granted, fence.granted))
    kind = MIXED if gained and lost else RAISE if gained else LOWER if lost else NONE
    members = counting(level.members)
    return Plan(
        kind,
        fence,
        gained,
        lost,
        tuple(one for member in members for one in member.lacks(fence)),
        tuple((one.combo, one.name) for member in members for one, _ in member.roll_lacks(fence)),
        tuple((member.host, member.missing()) for member in members if member.missing()),
        tuple(in_order(leases.above(holdings, fence.granted))),
    )


def _names(blockers: Iterable[Blocker]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.feature for one in blockers))


def in_order(found: Iterable[Above]) -> list[Above]:
    """The guests above a level in the order in which to deal with them; of one kind those first that hold most."""
    return sorted(found, key=lambda one: (_urgency(one.holding.state), -len(one.blockers), one.holding.vm))


def _urgency(state: str) -> int:
    return _URGENCY.index(state) if state in _URGENCY else _URGENCY.index(leases.UNKNOWN)


class Followed(NamedTuple):
    """One guest of a lowering, and what became of it.

    Gone, cold-booted (it holds no more than the level), waived (it runs on, by an admin's word), or "".
    """

    guest: dict[str, Any]
    became: str

    def to_json(self) -> dict[str, Any]:
        return {**self.guest, "became": self.became or None}


def followed(
    listed: Sequence[dict[str, Any]],
    holdings: Sequence[Holding],
    fence: Fence,
    waived: Collection[str] = (),
) -> list[Followed]:
    """What became of the guests that a lowering listed, in its order; behind them those above that came to light since.

    `listed` are Above.to_json() of the guests that stood above when it was proposed, `waived` the names of those that
    still run, and stand in the way no more.
    """
    # of one UUID several users may have a VM
    now = {(holding.vm, holding.uid) for holding in holdings}
    high = {(one.holding.vm, one.holding.uid): one for one in leases.above(holdings, fence.granted)}
    rows = []
    for guest in listed:
        key = guest["vm"], guest["uid"]
        became = WAITING if key in high else REBOOTED if key in now else GONE
        became = WAIVED if became == GONE and guest["vm"] in waived else became
        rows.append(Followed(guest, became))
    known = {(guest["vm"], guest["uid"]) for guest in listed}
    late = in_order(one for key, one in high.items() if key not in known)
    return [*rows, *(Followed(one.to_json(), WAITING) for one in late)]
