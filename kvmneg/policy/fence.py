# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a pool's level may move: the state machine of its fence. Pure, of any number of hosts.

    floating ──pin──▶ pinned ──propose──▶ raising ──commit──▶ pinned         any ──▶ breached, readonly
                        └────propose──▶ lowering ──finish──▶ pinned

A Level (kvmneg.policy.level) is a value. Each function here takes one and returns a Step: the level afterwards, the
action for the audit ("" where nothing changed that anybody sees) and its details; or it raises the refusal, which names
hosts, combos, guests. What hosts do is kvmneg.policy.pooling's.
"""

from __future__ import annotations

from kvmneg.errors import NotPinned, WrongState
from kvmneg.features.featureset import within
from kvmneg.policy import guards
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.level import LOWER, RAISE, Level, Proposal, Step, ceiling, held_back
from kvmneg.policy.members import UNREACHABLE, counting, judged

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from typing import Any

    from kvmneg.policy.leases import Holding


def pin(level: Level, fence: Fence, holdings: Iterable[Holding] = ()) -> Step:
    """Pin F where F ≤ C and every member is measured. In the place of another only what raise or lower would allow.

    Raises Blocked (who lacks what), HostsMissing, GuestsAbove (in the place of a fence that promised more), WrongState
    (a proposal is open), ReadOnly.
    """
    guards.require_writable(level)
    guards.require_no_proposal(level, "pin")
    guards.require_measured(level)
    guards.require_within(level, fence)
    if level.fence is not None and not within(level.fence.granted, fence.granted):
        guards.require_none_above(holdings, fence, ())
    after = _at(level, fence)
    return Step(after, "pin", _moved(level, after))


def unpin(level: Level, holdings: Iterable[Holding] = ()) -> Step:
    """Float at the ceiling as it is now, from a fence or from a lower level that floats.

    Raises NotPinned where the pool floats there already, GuestsAbove (the ceiling is below the fence, and below
    them), HostsMissing, WrongState, ReadOnly.
    """
    guards.require_writable(level)
    guards.require_no_proposal(level, "unpin")
    top = ceiling(level)
    if level.fence is None and (level.floor is None or not held_back(level)):
        raise NotPinned("no fence is pinned")
    guards.require_measured(level)
    generation = level.generation + 1
    if top is not None and level.fence is not None and level.fence.unmet(top):
        guards.require_none_above(holdings, Fence(top, generation), ())
    after = _judged(level._replace(generation=generation, fence=None, floor=top))
    return Step(after, "unpin", _moved(level, after))


def propose_raise(level: Level, fence: Fence, revision: int) -> Step:
    """Announce F' > F; new guests still get F. Raises NotPinned, WrongState, Blocked (F' takes away), ReadOnly."""
    guards.require_writable(level)
    current = guards.require_pinned(level, "raise")
    guards.require_no_proposal(level, "raise")
    guards.require_not_breached(level, "raised")
    guards.require_direction(current, fence, RAISE)
    after = level._replace(proposal=Proposal(RAISE, fence, revision))
    return Step(after, "raise-propose", {"digest": current.digest, "proposed": fence.digest})


def propose_lower(level: Level, fence: Fence, revision: int, *, urgent: bool = False) -> Step:
    """Announce F' < F; new guests get F' at once. Lowering again while lowering is allowed; urgent, while raising too.

    Raises NotPinned, WrongState, Blocked (F' adds; or some host has not even F'), ReadOnly.
    """
    guards.require_writable(level)
    current = guards.require_pinned(level, "lower")
    if level.proposal is not None and level.proposal.kind == RAISE and not urgent:
        guards.require_no_proposal(level, "lower")
    guards.require_direction(level.effective or current, fence, LOWER)
    guards.require_within(level, fence)
    generation = level.generation + 1
    lower = Fence(fence.granted, generation, registers=fence.registers)
    after = level._replace(generation=generation, proposal=Proposal(LOWER, lower, revision, urgent))
    after = _judged(after)
    dropped = level.proposal.fence.digest if level.proposal is not None else None
    detail = {**_moved(level, after), "urgent": urgent, "replaces": dropped}
    return Step(after, "lower-propose", detail)


def commit(
    level: Level,
    holdings: Iterable[Holding] = (),
    *,
    consent: Collection[str] = (),
    override: Collection[str] = (),
) -> Step:
    """Bring a proposal to its end.

    Raising: every member reachable and measured after the proposal, F' ≤ C, and each combo to return to that F' leaves
    behind named in `consent`: it leaves the roll-back set. Lowering: each member serves F', an unreachable one is
    proven fenced off, and no guest and no outstanding contract is above F' that `override` does not name.

    Raises WrongState (nothing is proposed, or breached), HostsMissing, Blocked, GuestsAbove, ReadOnly.
    """
    guards.require_writable(level)
    proposal = level.proposal
    if proposal is None:
        raise WrongState(
            "nothing is proposed", hint="`kvmneg fence raise` or `lower` proposes", state=level.state
        )
    if proposal.kind == RAISE:
        return _commit_raise(level, proposal, frozenset(consent))
    return _finish_lower(level, proposal, holdings, override)


def _commit_raise(level: Level, proposal: Proposal, consent: frozenset[str]) -> Step:
    guards.require_not_breached(level, "raised")
    guards.require_measured(level, proposal.since)
    lacking = [one for member in counting(level.members) for one in member.lacks(proposal.fence)]
    guards.require(lacking, "not every host offers what the raised fence promises")
    left: list[str] = []
    members = []
    for member in level.members:
        behind = (
            {one.combo: blockers for one, blockers in member.roll_lacks(proposal.fence)}
            if member.counts
            else {}
        )
        unnamed = [one for combo, blockers in behind.items() if combo not in consent for one in blockers]
        guards.require(
            unnamed,
            f"{member.host} could not return to a combo that it shall be able to return to",
            "name each combo that may leave the roll-back set, or remove it there",
        )
        left += behind
        members.append(member._replace(roll=tuple(one for one in member.roll if one.combo not in behind)))
    after = _at(level._replace(members=tuple(members)), proposal.fence)
    return Step(after, "raise-commit", {**_moved(level, after), "left": sorted(left)})


def _finish_lower(
    level: Level, proposal: Proposal, holdings: Iterable[Holding], override: Collection[str]
) -> Step:
    guards.require_within(level, proposal.fence)
    absent = []
    for member in counting(level.members):
        if member.state == UNREACHABLE and not member.fenced_off:
            absent.append((member, "it cannot be reached, and may still run guests above the new level"))
        elif member.acknowledged < level.generation and not member.fenced_off:
            absent.append((member, f"it has not said that it serves generation {level.generation}"))
    guards.require_hosts(absent, "fence it off and say so, or remove it")
    passed = guards.require_none_above(holdings, proposal.fence, override)
    after = level._replace(fence=proposal.fence, proposal=None)
    return Step(after, "lower-finish", {"digest": proposal.fence.digest, "overridden": passed})


def abort(level: Level, *, timed_out: bool = False) -> Step:
    """Drop a proposal. Of a raise nothing changes; of a lowering E goes back up, so every guard of a pin holds.

    Raises WrongState, Blocked, HostsMissing, ReadOnly.
    """
    guards.require_writable(level)
    proposal, current = level.proposal, level.fence
    if proposal is None or current is None:
        raise WrongState("nothing is proposed", state=level.state)
    if proposal.kind == RAISE:
        action = "raise-timeout" if timed_out else "raise-abort"
        return Step(level._replace(proposal=None), action, {"proposed": proposal.fence.digest})
    guards.require_measured(level)
    guards.require_within(level, current)
    after = _at(level, current)
    return Step(after, "lower-abort", _moved(level, after))


def freeze(level: Level, why: str) -> Step:
    """Nothing may change any more (no quorum, no space): the last committed fence is served, marked stale."""
    return Step(level._replace(readonly=why), "" if level.readonly else "readonly", {"because": why})


def thaw(level: Level) -> Step:
    """Changes may be made again."""
    return Step(level._replace(readonly=""), "writable" if level.readonly else "")


def _at(level: Level, fence: Fence) -> Level:
    """Pinned at a fence, one generation on."""
    generation = level.generation + 1
    pinned = Fence(fence.granted, generation, registers=fence.registers)
    return _judged(level._replace(generation=generation, fence=pinned, floor=None, proposal=None))


def _judged(level: Level) -> Level:
    return level._replace(members=judged(level.members, level.effective))


def _moved(before: Level, after: Level) -> dict[str, Any]:
    ends = before.effective, after.effective
    return dict(zip(("before", "digest"), (end.digest if end else None for end in ends), strict=True))
