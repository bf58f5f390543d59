# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an admin does to the level: plan, pin, raise, lower, commit, abort, unpin, emergency. Of one host.

Each asks the state machine (kvmneg.policy.fence) first, which refuses with hosts, combos and guests, then writes, then
lets the node serve it. With `dry_run` it ends after the first.
"""

from __future__ import annotations

import json

from kvmneg import limits
from kvmneg.errors import GenerationMismatch, UsageError, WrongState
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules
from kvmneg.features.featureset import FeatureSet, meet
from kvmneg.policy import coverage, fence, guards, pinning, plans
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.level import LOWER, RAISE, Level
from kvmneg.records import NamedTuple
from kvmneg.service import telling
from kvmneg.service.level import levels
from kvmneg.store.interface import FenceRow, ProposalRow
from kvmneg.store.levels import Change

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.policy.plans import Plan
    from kvmneg.service.node import Node
    from kvmneg.store.interface import Audit


class Asked(NamedTuple):
    """How an admin names a level: a source ("host", "platform:NAME", …), a text, or what is to go. One of them."""

    source: str | None = None
    text: str | None = None
    without: tuple[str, ...] = ()


def pin(
    node: Node,
    source: str | None,
    text: str | None,
    expected: int | None,
    audit: Audit,
    *,
    dry_run: bool = False,
) -> FenceRow:
    """Pin a fence from a source ("host", "level:NAME", …) or a text; it must not exceed this host's offer.

    Raises UsageError, BadInput, Blocked (each feature that the host lacks), GuestsAbove, WrongState, HostsMissing,
    GenerationMismatch, StoreError. In a dry run the row is the one that would be.
    """
    node.refresh(fresh=True)
    if (source is None) == (text is None):
        raise UsageError("pin needs either a source or a text")
    given = Fence.parse(text) if text is not None else None
    granted = given.granted if given else pinning.source(source or "", node.report)
    registers = given.registers if given else node.report.registers
    wanted = Fence(pinning.to_pin(granted, node.report), registers=registers)
    _expect(node, expected)
    fence.pin(_level(node), wanted, levels.holdings(node))
    if dry_run:
        who = audit.at, audit.uid, audit.pid, audit.reason
        return FenceRow(node.generation + 1, wanted.digest, wanted.text(), *who)
    row = node.store.pin(wanted.text(), wanted.digest, expected_generation=expected, audit=audit)
    node.moved(_at(wanted, row.generation), row.generation)
    telling.moved("fence-pinned", node, audit)
    return row


def unpin(node: Node, expected: int | None, audit: Audit, *, dry_run: bool = False) -> int:
    """Float at what the host offers now; returns the generation.

    Raises NotPinned, GuestsAbove, HostsMissing, WrongState, GenerationMismatch, StoreError.
    """
    node.refresh(fresh=True)
    _expect(node, expected)
    level = _level(node)
    if node.unreadable:
        guards.require_measured(level)  # whatever it said, an admin gets out of it
    else:
        fence.unpin(level, levels.holdings(node))
    if dry_run:
        return node.generation + 1
    generation = node.store.unpin(expected_generation=expected, audit=audit, floating=level.fence is None)
    node.moved(None, generation)
    if node.last_report is not None and any(member.roll for member in level.members):
        levels.settle(node, node.last_report, roll_changed=True)
    telling.moved("fence-unpinned", node, audit)
    return generation


def plan(node: Node, asked: Asked) -> Plan:
    """What would change for new guests, who blocks, which guests stay above. Of the open proposal if nothing is asked.

    Raises WrongState (nothing is proposed or asked), UsageError, BadInput, Blocked.
    """
    node.refresh(fresh=True)
    level = levels.level(node)
    if asked == Asked():
        if level.proposal is None:
            raise WrongState("nothing is proposed", hint="name a level to plan for", state=level.state)
        return plans.plan(level, level.proposal.fence, levels.holdings(node))
    return plans.plan(level, _named(node, asked, None), levels.holdings(node))


def raise_(
    node: Node, asked: Asked, expected: int | None, audit: Audit, *, dry_run: bool = False
) -> dict[str, Any]:
    """Propose a higher fence; new guests still get the one there is."""
    node.refresh(fresh=True)
    _expect(node, expected)
    level = levels.level(node)
    wanted = _named(node, asked, None)
    step = fence.propose_raise(level, wanted, node.measurements)
    planned = plans.plan(level, wanted, levels.holdings(node))
    if not dry_run:
        deadline = node.wall() + limits.PROPOSAL_SECONDS
        row = _row(node, RAISE, node.generation, audit, planned)._replace(deadline=deadline)
        change = Change(step.action, {**step.detail, **_told(planned)})
        node.store.levels.propose(change, row, expected_generation=expected, audit=audit)
        node.moved(node.fence, node.generation, RAISE)
        telling.moved("fence-proposed", node, audit)
    return _reply(node, planned)


def lower(
    node: Node,
    asked: Asked,
    expected: int | None,
    audit: Audit,
    *,
    urgent: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Propose a lower fence; new guests get it at once. Urgent: by default down to what the host still offers."""
    node.refresh(fresh=True)
    _expect(node, expected)
    level = levels.level(node)
    if urgent and asked == Asked():
        asked = Asked("host")
    wanted = _named(node, asked, level)
    step = fence.propose_lower(level, wanted, node.measurements, urgent=urgent)
    planned = plans.plan(level, wanted, levels.holdings(node))
    if not dry_run:
        open_one = node.store.levels.proposal()
        base = open_one.base if open_one is not None and open_one.kind == LOWER else node.generation
        row = _row(node, LOWER, base, audit, planned)._replace(urgent=urgent)
        change = Change(
            step.action, {**step.detail, **_told(planned)}, ("lower", wanted.digest, wanted.text())
        )
        generation = node.store.levels.propose(change, row, expected_generation=expected, audit=audit)
        node.moved(_at(wanted, generation), generation, LOWER)
        telling.moved("fence-lowered", node, audit, urgent=urgent)
    return _reply(node, planned)


def commit(
    node: Node,
    expected: int | None,
    audit: Audit,
    *,
    consent: tuple[str, ...] = (),
    override: tuple[str, ...] = (),
    digest: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Bring the proposal (of this digest, where one is given) to its end: the host is measured for it anew."""
    _expect(node, expected)
    node.measure()
    coverage.require(node.report)
    level = levels.level(node)
    if digest is not None and level.proposal is not None and level.proposal.fence.digest != digest:
        raise WrongState(
            f"what is proposed is {level.proposal.fence.digest}, not {digest}",
            hint="somebody proposed another fence meanwhile: look at it again",
            state=level.state,
        )
    found = levels.holdings(node)
    step = fence.commit(level, found, consent=consent, override=override)
    after = step.level.fence
    if after is None or level.proposal is None:
        raise AssertionError("what was committed is no fence")
    planned = plans.plan(level, after, found)
    if not dry_run:
        raised = level.proposal.kind == RAISE
        moved = ("raise", after.digest, after.text()) if raised else None
        left = tuple(step.detail.get("left", ()))
        generation = node.store.levels.close(
            Change(step.action, step.detail, moved, left), expected_generation=expected, audit=audit
        )
        node.moved(_at(after, generation), generation)
        telling.moved("fence-raised" if raised else "fence-settled", node, audit)
    return _reply(node, planned)


def abort(
    node: Node,
    expected: int | None,
    audit: Audit,
    *,
    dry_run: bool = False,
    timed_out: bool = False,
) -> dict[str, Any]:
    """Drop the proposal. A level that was lowered goes back up, over a host that was measured for it."""
    _expect(node, expected)
    if node.proposal == LOWER:
        node.measure()
        coverage.require(node.report)
    level = levels.level(node)
    step = fence.abort(level, timed_out=timed_out)
    back = step.level.fence
    if back is None or level.proposal is None:
        raise AssertionError("what was aborted had no fence before it")
    planned = plans.plan(level, back, levels.holdings(node))
    if not dry_run:
        moved = ("lower-abort", back.digest, back.text()) if level.proposal.kind == LOWER else None
        generation = node.store.levels.close(
            Change(step.action, step.detail, moved), expected_generation=expected, audit=audit
        )
        node.moved(_at(back, generation), generation)
        telling.moved("fence-aborted", node, audit)
    return _reply(node, planned)


def expire(node: Node) -> None:
    """Abort a raise that nobody committed in time. Raises StoreError."""
    row = node.store.levels.proposal()
    if row is not None and row.deadline is not None and row.deadline <= node.wall():
        abort(node, None, levels.daemon_audit("nobody committed it in time"), timed_out=True)


def progress(node: Node, uid: int | None = None) -> dict[str, Any]:
    """The open proposal, and what became of the guests that stood above it. "proposal" is None where none is open.

    With a user's guests alone, though all are counted, where one is given.
    """
    row = node.store.levels.proposal()
    if row is None:
        return {"proposal": None, "guests": [], "done": 0, "count": 0}
    proposed = levels.parsed(row)
    listed = json.loads(row.plan)["guests"] if row.kind == LOWER else []
    rows: list[plans.Followed] = []
    if row.kind == LOWER:
        rows = plans.followed(listed, levels.holdings(node), proposed, levels.waived(node))
    shown = [one.to_json() for one in rows if uid in (None, one.guest["uid"])]
    named = ("kind", "digest", "text", "urgent", "at", "uid", "reason")
    return {
        "proposal": {name: getattr(row, name) for name in named} | {"urgent": bool(row.urgent)},
        "guests": shown[: limits.GUESTS_NAMED],
        "done": sum(bool(one.became) for one in rows),
        "count": len(rows),
    }


# -- the parts ----------------------------------------------------------------------------------------


def _expect(node: Node, expected: int | None) -> None:
    """The compare of compare-and-swap before anything is looked at; the store does it again in its transaction."""
    if expected is not None and expected != node.generation:
        message = f"the fence is at generation {node.generation}, not {expected}"
        hint = "somebody changed it meanwhile: look at it again"
        raise GenerationMismatch(message, hint=hint, expected=expected, actual=node.generation)


def _level(node: Node) -> Level:
    """The level; over a stored fence that cannot be read, one without a fence."""
    if node.unreadable:
        return Level(node.generation, members=(levels.member(node),))
    return levels.level(node)


def _at(one: Fence, generation: int) -> Fence:
    return Fence(one.granted, generation, registers=one.registers)


def _named(node: Node, asked: Asked, below: Level | None) -> Fence:
    """The fence that is asked for. With `below` what a source names is cut to the level there is.

    Raises UsageError, BadInput, Blocked, NotPinned.
    """
    given = sum(map(bool, (asked.source, asked.text, asked.without)))
    if given != 1:
        raise UsageError("name the level by a source, a text, or what is to go: one of them")
    if asked.text:
        parsed = Fence.parse(asked.text)
        return Fence(pinning.named(parsed.granted, node.report), registers=parsed.registers)
    registers = node.report.registers
    if asked.without:
        level = levels.level(node)
        effective = level.effective or guards.require_pinned(level, "take anything from")
        return Fence(_without(effective.granted, asked.without), registers=effective.registers)
    granted = pinning.named(pinning.source(asked.source or "", node.report), node.report)
    if below is not None:
        current = below.effective or guards.require_pinned(below, "lower")
        registers = (
            tuple(one for one in registers if one in set(current.registers)) if current.registers else ()
        )
        granted = meet(granted, current.granted)
    return Fence(granted, registers=registers)


def _without(granted: FeatureSet, names: tuple[str, ...]) -> FeatureSet:
    """A set with features at their bottom, and with them what is built on them. Raises UsageError."""
    table, found = catalogs.names(granted.architecture), dict(granted.words)
    for name in names:
        feature = table.feature(name)
        if feature.rule == rules.OR or feature.rule in rules.UNMERGED:
            raise UsageError(f"{name} cannot be taken away", hint=feature.why or rules.MEANING[feature.rule])
        bottom = catalogs.load(granted.architecture).words[feature.word].bottom
        value = found.get(feature.word, bottom)
        found[feature.word] = value & ~feature.mask | bottom & feature.mask
    return FeatureSet.of(granted.architecture, found)


def _row(node: Node, kind: str, base: int, audit: Audit, planned: Plan) -> ProposalRow:
    wanted = planned.fence
    told = planned.to_json()
    stored = {**told, "text": None, "guests": [one.to_json() for one in planned.above]}
    who = audit.at, None, audit.uid, audit.pid, audit.process, audit.reason
    return ProposalRow(
        kind, wanted.digest, wanted.text(), base, node.generation, False, *who, json.dumps(stored)
    )


def _told(planned: Plan) -> dict[str, Any]:
    """What the audit says of a plan."""
    return {
        "gained": planned.gained[: limits.FEATURES_NAMED],
        "lost": planned.lost[: limits.FEATURES_NAMED],
        "guests_above": len(planned.above),
    }


def _reply(node: Node, planned: Plan) -> dict[str, Any]:
    effective = node.fence
    return {
        "generation": node.generation,
        "state": node.state,
        "digest": effective.digest if effective else None,
        "plan": planned.to_json(),
    }
