# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must hold before a pool's level moves; each guard refuses with the hosts, combos, features or guests. Pure."""

from __future__ import annotations

from kvmneg.errors import Blocked, HostsMissing, NotPinned, ReadOnly, UsageError, WrongState
from kvmneg.features.featureset import fits
from kvmneg.policy.level import RAISE, deficient
from kvmneg.policy.members import counting

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from kvmneg.features.difference import Blocker
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.leases import Holding
    from kvmneg.policy.level import Level
    from kvmneg.policy.members import Member


def require_writable(level: Level) -> None:
    if level.readonly:
        raise ReadOnly(
            f"nothing can be changed now: {level.readonly}", hint="the last committed fence is served"
        )


def require_pinned(level: Level, what: str) -> Fence:
    if level.fence is None:
        raise NotPinned(f"no fence is pinned: there is none to {what}", hint="`kvmneg fence pin` pins one")
    return level.fence


def require_no_proposal(level: Level, what: str) -> None:
    proposal = level.proposal
    if proposal is not None:
        verb = "raise it" if proposal.kind == RAISE else "lower it"
        hint = "commit that first, or abort it"
        raise WrongState(f"cannot {what} the fence: it is proposed to {verb}", hint=hint, state=level.state)


def require_not_breached(level: Level, verb: str) -> None:
    found = deficient(level)
    if found:
        hosts = ", ".join(member.host for member, _ in found)
        hint = "repair or remove that host, or lower the fence"
        message = f"the fence is breached by {hosts}: it cannot be {verb}"
        raise Blocked(message, [one for _, blockers in found for one in blockers], hint=hint)


def require(blockers: Collection[Blocker], message: str, hint: str = "") -> None:
    if blockers:
        raise Blocked(message, tuple(blockers), hint=hint)


def require_within(level: Level, fence: Fence) -> None:
    """F ≤ C, over every member and every combo to return to. Raises Blocked with who lacks what."""
    members = counting(level.members)
    found = [one for member in members for one in member.lacks(fence)]
    require(found, "some host offers less than this fence promises", "pin no more than every host has")
    behind = [one for member in members for _, blockers in member.roll_lacks(fence) for one in blockers]
    require(
        behind, "a combo of the roll-back set offers less than this fence promises", "remove it there first"
    )


def require_measured(level: Level, after: int | None = None) -> None:
    members = counting(level.members)
    if not members:
        raise HostsMissing("no host was measured", hint="`kvmneg host` tells why", hosts=[])
    require_hosts(
        [(one, one.missing(after)) for one in members if one.missing(after)], "wait for it, or remove it"
    )


def require_hosts(absent: list[tuple[Member, str]], hint: str) -> None:
    if absent:
        named = "; ".join(f"{member.host}: {why}" for member, why in absent[:8])
        rows = [{"host": member.host, "state": member.state, "because": why} for member, why in absent]
        raise HostsMissing(f"the word of every host is needed: {named}", hint=hint, hosts=rows)


def require_none_above(holdings: Iterable[Holding], fence: Fence, override: Collection[str]) -> list[str]:
    """Raises GuestsAbove; returns the guests above that were named."""
    from kvmneg.policy import leases  # a plan or a change asks, a start does not

    return leases.require_none_above(holdings, fence.granted, override)


def require_direction(current: Fence, fence: Fence, kind: str) -> None:
    """F' strictly above, or strictly below."""
    if current.granted == fence.granted:
        raise UsageError("this is the fence that is in force already", hint="name another one")
    low, high = (current, fence) if kind == RAISE else (fence, current)
    found = fits(low.granted, high.granted, missing_on="the higher one", cause="fence")
    if found:
        does = "takes away" if kind == RAISE else "adds"
        other = "lower" if kind == RAISE else "raise"
        message = f"this fence {does} too: {', '.join(dict.fromkeys(one.feature for one in found))}"
        raise Blocked(message, found, hint=f"{other} in a step of its own")
