# SPDX-License-Identifier: LGPL-2.1-or-later
"""The node as a pool of one: its level as the state machine sees it, and what a measurement does to it.

Nothing of this is needed on the way to a contract: the node imports it where a level moves, or a host changed.
"""

from __future__ import annotations

import os

from kvmneg import limits
from kvmneg.clock import now
from kvmneg.errors import BadInput, StoreError
from kvmneg.features import words
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy import coverage, leases, pooling
from kvmneg.policy import vmm as vmms
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.leases import Holding
from kvmneg.policy.level import Level, Proposal, ceiling, held_back
from kvmneg.policy.members import MEMBER, Measured, Member
from kvmneg.service import telling
from kvmneg.store.interface import Audit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.features.report import Report
    from kvmneg.service.level.standing import Standing
    from kvmneg.service.node import Node
    from kvmneg.store.interface import LevelRow, ProposalRow, ReportRow


UNSEEN = "unseen"  # the name of guests that the daemon could not look for


def level(node: Standing) -> Level:
    """Where the node stands. Raises StoreError where a stored fence cannot be read."""
    node.store.retry()  # else a disk that has room again would refuse the change that finds it out
    row = node.store.levels.proposal() if node.proposal else None
    fence, proposal = node.fence, None
    if row is not None:
        proposal = Proposal(row.kind, parsed(row), node.proposed_at, row.urgent)
        base = node.store.past_fence(row.base)
        if base is not None:
            fence = Fence.parse(base.text, generation=base.generation, file="the fence to be replaced")
    found = Level(node.generation, fence, None, proposal, (member(node),), node.stale or "")
    if fence is not None:
        return found
    return found._replace(floor=node.floor.granted if node.floor is not None else ceiling(found))


def member(node: Standing) -> Member:
    """This host as the one member; where it cannot be measured, with what it last offered, if that is known."""
    report, fresh = node.last_report, True
    if report is None:
        last, fresh = node.store.latest_report(), False
        report = opened(last) if last is not None else None
    running = measured(report) if report is not None else None
    if report is not None and coverage.unvisited(report):
        fresh = False
    return Member(
        report.host if report is not None else "this host",
        MEMBER,
        running,
        node.measurements,
        fresh,
        roll(node),
        acknowledged=node.generation,
    )


def measured(report: Report) -> Measured:
    """A report as the state machine takes it: what any VMM's guests may be given."""
    if report is not _last_report[0]:
        _last_report[:] = report, _measured(report)
    found: Measured = _last_report[1]
    return found


_last_report: list[Any] = [None, None]  # a host is asked for its own again and again


def _measured(report: Report) -> Measured:
    name = str(report.combo.get("kernel") or report.combo_digest()[:19])
    return Measured(report.combo_digest(), name, vmms.reach(report), report)


def roll(node: Standing) -> tuple[Measured, ...]:
    """The combos that the admin wants to return to."""
    rows = node.store.rolls.reports()
    kept = {row.digest: _rolled.get(row.digest) or _measured(opened(row)) for row in rows}
    _rolled.clear()
    _rolled.update(kept)
    return tuple(kept.values())


_rolled: dict[str, Measured] = {}  # by digest: what was measured does not change


def opened(row: ReportRow) -> Report:
    """A report as it was recorded. Raises StoreError."""
    import zlib

    from kvmneg.features.report import Report

    try:
        return Report.loads(zlib.decompress(row.body), file=f"the recorded report {row.digest}")
    except (zlib.error, BadInput) as error:
        raise StoreError(f"the recorded report {row.digest} cannot be read: {error}") from error


def parsed(row: ProposalRow) -> Fence:
    """The fence that is proposed. Raises StoreError where this build reads it in another way."""
    fence = Fence.parse(row.text, generation=row.generation, file="the proposed fence")
    if fence.digest != row.digest:
        raise StoreError(
            "the proposed fence is not the one that was proposed", hint="abort it, and propose again"
        )
    return fence


def holdings(node: Node) -> list[Holding]:
    """Every guest and every outstanding contract, and the VMs of this machine that nobody negotiated for.

    Of a report that was not measured here, these are none of its guests. What could not be looked for is one more.
    """
    report = node.last_report
    if report is None or report.measured.get("source") != "kvm":
        return node.leases.holdings()
    unknown = [
        Holding(unknown_name(one.process.pid), "", None, leases.UNKNOWN, one.process.uid)
        for one in node.unknown.blocking()
    ]
    unseen = [Holding(UNSEEN, "", None, leases.UNKNOWN, 0)] if node.unknown.missed() else []
    return [*node.leases.holdings(), *unknown, *unseen]


def unjudged(node: Node) -> list[str]:
    """The VMs of this machine that `holdings` leaves out, as lines of a scope."""
    report = node.last_report
    if report is None or report.measured.get("source") != "kvm":
        return [
            "not judged: VMs of this machine that nobody negotiated for; the report was not measured here"
        ]
    found = waived(node)
    named = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    return [f"not judged: VMs that an admin waived: {named}"] if found else []


def waived(node: Node) -> list[str]:
    """The names of the unknown guests that an admin waived."""
    report = node.last_report
    if report is None or report.measured.get("source") != "kvm":
        return []
    return [unknown_name(one.process.pid) for one in node.unknown.all() if one.waived]


def unknown_name(pid: int) -> str:
    """What a VM that nobody negotiated for is called.

    Not by the UUID on its command line, which is any process's to choose: a guest that is passed over has one too.
    """
    return f"pid {pid}"


def daemon_audit(reason: str) -> Audit:
    """The daemon's own hand."""
    return Audit(os.geteuid(), os.getpid(), now(), reason, "kvmnegd")


# -- what a measurement does --------------------------------------------------------------------------


def settle(node: Standing, report: Report, *, roll_changed: bool = False) -> None:
    """Let the level follow a measurement: a fence is breached or whole again, a level that floats falls.

    What is recorded so already is not recorded again.

    `roll_changed`: it is the roll-back set that changed, which bounds a level that floats too.
    Raises StoreError where that cannot be recorded; what new guests may have is right all the same.
    """
    if node.fence is not None:
        _judge(node, report)
    else:
        _float(node, report, roll_changed)


def _judge(node: Standing, report: Report) -> None:
    low = node.below
    if bool(low) == node.store.level().breached:
        return
    names = list(dict.fromkeys(one.feature for one in low))
    detail = {
        "host": report.host,
        "combo": report.combo_digest(),
        "features": names[: limits.FEATURES_NAMED],
        "count": len(names),
    }
    telling.breached(report.host, report.combo_digest(), node.generation, names)
    node.breach_told = bool(low)
    node.store.levels.breached(bool(low), detail, daemon_audit("a measurement"))


def _float(node: Standing, report: Report, roll_changed: bool) -> None:
    """E stays where it was, or falls to what the host offers now; where the host offers just E, nothing is bounded.

    It is a level of what KVM offers. What VMMs give by themselves floats with them: a build whose version is looked up
    only after the start would else take from the level what it gives, for good.
    """
    row = node.store.level()
    before = _remembered(node, row)
    if before is None or (row.report == report.digest() and not roll_changed):
        node.floats(None)
        return
    running = _of_kvm(report)
    back = [one.report for one in roll(node) if one.report is not None]
    carried = _carried(report, back)
    host = Member(report.host, MEMBER, running, fresh=True, roll=tuple(map(_of_kvm, back)))
    step = pooling.measured(Level(node.generation, floor=before, members=(host,)), report.host, running, 1)
    found, action = step.level.floor or before, step.action
    if report.architecture == words.ARM64:
        found, action = _shown(_common(found, report, back), report, action)
        action = "" if found == before and action == "level-fell" else action
    same = not carried and not held_back(step.level._replace(floor=found, members=(host._replace(roll=()),)))
    bound = Fence(_with_given(found, report), node.generation, registers=carried, floating=True)
    node.floats(None if same else bound)
    if action or same or row.report == report.digest():  # which would stand for a level that nothing bounds
        digest = report.digest() if same else ""
        told: dict[str, Any] = {**step.detail, "before": before.digest(), "digest": found.digest()}
        audit = daemon_audit("a measurement")
        node.store.levels.floats_at(digest, Fence(found).text(), action, detail=told, audit=audit)


def _carried(report: Report, back: list[Report]) -> tuple[int, ...]:
    """arm64: what a new guest may carry to every combo of the roll-back set; empty where that is all it has here."""
    if report.architecture != words.ARM64 or not back:
        return ()
    from kvmneg.policy import portable  # x86 lists no registers

    found = portable.common([report, *back])
    return () if found == tuple(sorted(report.registers)) else found


def _of_kvm(report: Report) -> Measured:
    """What KVM offers, whatever the VMM."""
    return Measured(report.combo_digest(), report.host, report.offer)


def _with_given(level: FeatureSet, report: Report) -> FeatureSet:
    """A level of what KVM offers, with what the VMMs of this host give by themselves."""
    found = dict(level.words)
    for word, value in vmms.reach(report).words.items():
        given = value & ~report.offer.value(word)
        if given:
            found[word] = level.value(word) | given
    return FeatureSet.of(level.architecture, found)


def _remembered(node: Standing, row: LevelRow) -> FeatureSet | None:
    """The level that floats, None where none is recorded yet: it is what the host offers.

    Raises StoreError, with the generation, where this build cannot read it: as of a fence, nothing is granted then.
    """
    if row.text is not None:
        try:
            return Fence.parse(row.text, file="the level that floats").granted
        except BadInput as error:
            hint = "pin a fence, or unpin to float at what this host offers"
            raise StoreError(
                f"the level of this host cannot be read: {error}", hint=hint, generation=node.generation
            ) from error
    recorded = node.store.report(row.report) if row.report else None
    return opened(recorded).offer if recorded is not None else None


def _common(level: FeatureSet, report: Report, back: list[Report]) -> FeatureSet:
    """arm64: what this kernel and those to return to can be told to show, of a level; where there is no such, itself.

    Their meet has values that some of them show to no guest.
    """
    from kvmneg.policy import levelling

    levelled = levelling.level(level, (report, *back)) if back else None
    return level if levelled is None or levelled.conflicts else levelled.granted


def _shown(level: FeatureSet, report: Report, action: str) -> tuple[FeatureSet, str]:
    """arm64: a level that floats has what this kernel cannot hide. No guest could be told anything else."""
    from kvmneg.features import catalog as catalogs
    from kvmneg.policy import levelling

    stuck = levelling.unreachable(level, report, "the level")
    if not stuck:
        return level, action
    names, found = catalogs.names(words.ARM64).by_name, dict(level.words)
    for blocker in stuck:
        feature = names[blocker.feature]
        own = report.offer.value(feature.word) & feature.mask
        found[feature.word] = found.get(feature.word, level.value(feature.word)) & ~feature.mask | own
    risen = FeatureSet.of(words.ARM64, found)
    if levelling.unreachable(risen, report, "the level"):
        risen = report.offer
    return risen, "level-shown"
