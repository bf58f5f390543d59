# SPDX-License-Identifier: LGPL-2.1-or-later
"""What hosts do to a pool's level: join, be measured, get lost, be drained and removed; and what one may grant. Pure.

No change of a host raises a level. A weaker measurement lowers a level that floats, and breaches a fence: that is
never lowered by itself.
"""

from __future__ import annotations

from kvmneg.errors import Blocked, Breached, HostsMissing, Incompatible, UsageError
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet, meet, meet_all
from kvmneg.policy import guards
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.level import BREACHED, Level, Step, ceiling, deficient
from kvmneg.policy.members import (
    CANDIDATE,
    COUNTING,
    DEFICIENT,
    DRAINING,
    MEMBER,
    REMOVED,
    UNREACHABLE,
    Measured,
    Member,
    counting,
    judged,
    replaced,
)


def member(level: Level, host: str) -> Member:
    """The host of that name. Raises UsageError."""
    for one in level.members:
        if one.host == host:
            return one
    raise UsageError(f"{host!r} is no host of this pool", hint="`kvmneg fence show` lists them")


def candidate(level: Level, host: str) -> Step:
    """A host that may become a member, once it is measured. It bounds nothing. Raises ReadOnly, UsageError."""
    _require_joinable(level, host)
    return Step(
        level._replace(members=replaced(level.members, Member(host))), "host-candidate", {"host": host}
    )


def join(level: Level, host: str, *, partial: bool = False) -> Step:
    """Make a measured candidate a member: the first one sets the level, the others must reach it.

    A weaker one joins a pool that floats, which falls; a pinned one only as `partial`: it is deficient, and runs what
    fits. Raises HostsMissing (not measured), Incompatible, Blocked (what it lacks), ReadOnly, UsageError.
    """
    one = member(level, host)
    guards.require_writable(level)
    if one.state != CANDIDATE:
        raise UsageError(f"{host} is {one.state}, no candidate")
    if one.running is None or not one.fresh:
        raise _missing(one)
    offered = one.running.offered
    others = [other.running.offered for other in counting(level.members) if other.running is not None]
    conflicts = meet_all([offered, *others]).conflicts if _alike(offered, others) else ()
    if conflicts or not _alike(offered, others):
        blockers = [Blocker.of_conflict(conflict, f"host {host}") for conflict in conflicts]
        raise Incompatible(f"{host} is of another kind than this pool", blockers, hint="make a pool for it")
    effective = level.effective
    lacking = one.lacks(effective) if effective is not None and level.fence is not None else ()
    if lacking and not partial:
        hint = "lower the fence to what it has (`kvmneg fence lower`), or let it join as partial"
        raise Blocked(f"{host} offers less than the fence promises", lacking, hint=hint)
    joined = one._replace(state=MEMBER, partial=partial, acknowledged=level.generation)
    return _settled(level, replaced(level.members, joined), "host-join", host)


def _alike(offered: FeatureSet, others: list[FeatureSet]) -> bool:
    return all(other.architecture == offered.architecture for other in others)


def measured(level: Level, host: str, found: Measured, revision: int) -> Step:
    """A host was measured, at a revision of the pool's records. Raises UsageError for a host that was removed."""
    one = member(level, host)
    if one.state == REMOVED:
        raise UsageError(f"{host} was removed", hint="make it a candidate again")
    back = one._replace(
        running=found,
        measured=revision,
        fresh=True,
        fenced_off=False,
        state=MEMBER if one.state == UNREACHABLE else one.state,
    )
    return _settled(level, replaced(level.members, back), "", host)


def stale(level: Level, host: str) -> Step:
    """A host booted, resumed, or changed: what it offered still counts, and nothing is granted there until measured."""
    one = member(level, host)._replace(fresh=False)
    return Step(level._replace(members=replaced(level.members, one)), "")


def lost(level: Level, host: str) -> Step:
    """A host does not answer any more: it still counts."""
    one = member(level, host)
    if one.state not in COUNTING or one.state == UNREACHABLE:
        return Step(level, "")
    gone = one._replace(state=UNREACHABLE, fresh=False)
    return _settled(level, replaced(level.members, gone), "host-lost", host)


def fence_off(level: Level, host: str) -> Step:
    """An unreachable host was proven to run nothing (powered off, say). Raises UsageError for a reachable one."""
    one = member(level, host)
    if one.state != UNREACHABLE:
        raise UsageError(f"{host} is {one.state}, not unreachable", hint="drain it instead")
    off = one._replace(fenced_off=True)
    return Step(level._replace(members=replaced(level.members, off)), "host-fenced-off", {"host": host})


def drain(level: Level, host: str) -> Step:
    """No new guests there; it still counts. Raises UsageError where it is no member, ReadOnly."""
    guards.require_writable(level)
    one = member(level, host)
    if one.state not in (MEMBER, DEFICIENT):
        raise UsageError(f"{host} is {one.state}: only a member is drained")
    return _settled(level, replaced(level.members, one._replace(state=DRAINING)), "host-drain", host)


def remove(level: Level, host: str) -> Step:
    """Take a host out: it bounds nothing any more, and nothing rises for it. Raises UsageError, ReadOnly."""
    guards.require_writable(level)
    gone = member(level, host)._replace(state=REMOVED, roll=(), partial=False)
    return _settled(level, replaced(level.members, gone), "host-remove", host)


def acknowledge(level: Level, host: str, generation: int) -> Step:
    """A host says that it serves a generation; it takes none back."""
    one = member(level, host)
    said = one._replace(acknowledged=max(one.acknowledged, min(generation, level.generation)))
    return Step(level._replace(members=replaced(level.members, said)), "")


def roll_add(level: Level, host: str, combo: Measured) -> Step:
    """A combo that the host shall be able to return to. Raises Blocked where it is below the fence, ReadOnly."""
    guards.require_writable(level)
    one = member(level, host)
    lacking = combo.lacks(level.fence, f"host {host} under {combo.name}") if level.fence is not None else ()
    if lacking:
        hint = "lower the fence to what that combo has first: `kvmneg fence lower`"
        raise Blocked(f"{combo.name} offers less than the fence promises", lacking, hint=hint)
    if any(known.combo == combo.combo for known in one.roll):
        return Step(level, "")
    more = one._replace(roll=(*one.roll, combo))
    return _settled(level, replaced(level.members, more), "roll-add", host, combo=combo.combo)


def roll_remove(level: Level, host: str, combo: str) -> Step:
    """The host need not return to a combo any more; nothing rises for it. Raises UsageError, ReadOnly."""
    guards.require_writable(level)
    one = member(level, host)
    kept = tuple(known for known in one.roll if known.combo != combo)
    if kept == one.roll:
        raise UsageError(f"{combo} is not in the roll-back set of {host}")
    less = one._replace(roll=kept)
    return _settled(level, replaced(level.members, less), "roll-remove", host, combo=combo)


def grants(level: Level, host: str) -> FeatureSet:
    """The most that a new contract on a host may have now: E, bounded by what the host offers.

    Raises HostsMissing (not a member that is measured), Breached.
    """
    one = member(level, host)
    effective = level.effective
    if one.state not in (MEMBER, DEFICIENT) or one.running is None or not one.fresh or effective is None:
        raise _missing(one)
    low = deficient(level)
    if low and not one.partial:
        hosts = ", ".join(lacking.host for lacking, _ in low)
        blockers = [blocker for _, found in low for blocker in found]
        hint = "repair or remove what changed, or lower the fence"
        raise Breached(f"{hosts} no longer offers what the fence promises", blockers, hint=hint)
    return meet(one.running.offered, effective.granted)


def _missing(one: Member) -> HostsMissing:
    why = one.missing() or f"it is {one.state}"
    row = {"host": one.host, "state": one.state, "because": why}
    return HostsMissing(f"{one.host} grants nothing now: {why}", hosts=[row])


def _require_joinable(level: Level, host: str) -> None:
    guards.require_writable(level)
    if any(one.host == host and one.state in COUNTING for one in level.members):
        raise UsageError(f"{host} is a member already")


def _settled(level: Level, members: tuple[Member, ...], action: str, host: str, **detail: str) -> Step:
    """The level over changed members: a floating one falls, hosts are deficient or not any more.

    Where the caller names no action, what came of it is the action.
    """
    after = _fallen(level._replace(members=members))
    after = after._replace(members=judged(after.members, after.effective))
    told: dict[str, str | None] = {"host": host, **detail}
    if after.floor != level.floor and after.floor is not None:
        told |= {"before": level.floor.digest() if level.floor else None, "digest": after.floor.digest()}
        action = action or "level-fell"
    was, now = level.state, after.state
    if (was == BREACHED) != (now == BREACHED):
        told["state"] = now
        action = action or ("breached" if now == BREACHED else "healed")
    states = {one.host: one.state for one in level.members}
    changed = [one for one in after.members if states.get(one.host) != one.state]
    if changed:
        told["host_state"] = ", ".join(f"{one.host} {one.state}" for one in changed)
        action = action or f"host-{changed[0].state}"
    return Step(after, action, told)


def _fallen(level: Level) -> Level:
    """A level that floats, not above any member; the first member sets it."""
    top = ceiling(level)
    if level.fence is not None or top is None:
        return level
    if level.floor is None:
        return level._replace(floor=top)
    floor = Fence(level.floor)
    members = counting(level.members)
    if any(one.lacks(floor) or one.roll_lacks(floor) for one in members):
        met = meet(level.floor, top)
        # a host that became another one (its vendor) has no level in common with what was: it is deficient
        return level if met.conflicts else level._replace(floor=met)
    return level
