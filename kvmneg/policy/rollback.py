# SPDX-License-Identifier: LGPL-2.1-or-later
"""Going back from a new kernel to an old one: under which fence is it safe, and what stands in the way? Pure.

    judge(new, old)   the widest fence under which a guest started on the new one can go on on the old one, or the
                      fields for which there is none; and what would block a guest started without a fence

Two reports of one host under two kernels are a pool of two: the widest fence is what both offer and can be told to
show. A guest that was started without it saw all that the new one offers.
"""

from __future__ import annotations

from kvmneg.errors import UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet, fits, meet
from kvmneg.policy import coverage, negotiation, pool, portable, rates, reasons
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.kernels import numbers
from kvmneg.policy.scope import unmeasured
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.features.report import Report
    from kvmneg.policy.portable import Entry

# who wants what stands in the way, for people
_FENCED, _UNFENCED = "the way back", "a guest without the fence"

_TIMES = "not judged: whether both reports are of the same machine and firmware, and still true"
_ELSE = (
    "not judged: machine types and device state of the VMM builds on both sides, ROM sizes, vhost-user and vDPA "
    "back ends, VFIO, guests that run nested guests"
)
_X86 = (
    "judged: what the reports offer, feature by feature, and the classes of state that both name",
    "not judged: state that one of the reports does not name, XSAVE components that an older kernel saves besides the "
    "guest's",
)
_ARM64 = (
    "judged: ID and firmware registers, hypercalls, vCPU features, capabilities, what both kernels let be set"
)


class Answer(NamedTuple):
    """`fence` is None where none exists: then `blockers` say why, else they are empty.

    `unfenced` are the reasons why a guest that was started without a fence could not go back, `dropped` the registers
    that a VMM leaves out under the fence, with the rule of each.
    """

    fence: Fence | None
    blockers: tuple[Blocker, ...]
    unfenced: tuple[Blocker, ...]
    dropped: tuple[Entry, ...]
    scope: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """{"possible", "fence": text or null, "digest", "blockers", "without_fence", "dropped", "scope"}."""
        return {
            "possible": self.fence is not None,
            "fence": self.fence.text() if self.fence else None,
            "digest": self.fence.digest if self.fence else None,
            "blockers": [blocker.to_json() for blocker in self.blockers],
            "without_fence": [blocker.to_json() for blocker in self.unfenced],
            "dropped": {one.word(): one.text() for one in self.dropped},
            "scope": list(self.scope),
        }


def judge(new: Report, old: Report, vmm: str | None = None) -> Answer:
    """Whether guests can go back from `new` to `old`. `vmm` names what runs them, None: one that follows contracts.

    Raises UsageError where the reports are of different architectures.
    """
    if new.architecture != old.architecture:
        raise UsageError(f"{new.host} is {new.architecture}, {old.host} is {old.architecture}")
    met = meet(new.offer, old.accept)
    blockers = [*coverage.blockers(new), *coverage.blockers(old)]
    if met.conflicts:
        blockers += pool.conflicting(met.conflicts, (new, old))
    unasked = _unasked(new.offer)
    measured = old.accepting().offer_words
    unfenced = [
        blocker
        for blocker in fits(unasked, old.accept, missing_on=f"host {old.host}")
        if not rates.carried_unknown(blocker.word, measured)
    ]
    dropped: tuple[Entry, ...] = ()
    granted = met
    if new.architecture == words.ARM64:
        from kvmneg.policy import levelling  # x86 shows guests whatever it is told

        levelled = levelling.level(met, (new, old))
        granted = levelled.granted
        blockers += [one.blocker() for one in levelled.conflicts]
        unfenced += levelling.unreachable(unasked, old, _UNFENCED)
        rules = _rules(new, old, granted)
        dropped = tuple(one for one in rules if one.rule in (portable.DROP_IF, portable.DROP_IF_TIMER_OFF))
        seen = negotiation.through(new, vmm)
        if seen is not None:
            from kvmneg.policy import vmm_arm64  # as above

            blockers += vmm_arm64.unset(granted, seen, _FENCED)
        blockers += portable.unknown(rules, old, seen)
        unfenced += portable.unknown([_without(one) for one in rules], old, seen)
    blockers = [blocker._replace(wanted_by=_FENCED) for blocker in blockers]
    unfenced = [blocker._replace(wanted_by=_UNFENCED) for blocker in unfenced]
    fence = None if blockers else Fence(granted, registers=portable.common((new, old)))
    return Answer(
        fence, tuple(reasons.in_order(blockers)), tuple(reasons.in_order(unfenced)), dropped, _scope(new, old)
    )


def forward(new: Report, old: Report) -> bool:
    """Whether `old` has the newer kernel of both: then the answer is about the way forward."""
    ours, theirs = (numbers(str(report.combo.get("kernel") or "")) for report in (new, old))
    return bool(ours and theirs) and ours < theirs


def _unasked(offer: FeatureSet) -> FeatureSet:
    """What a guest gets that asks for nothing by name."""
    values = dict(offer.words)
    values.pop(rates.WORD, None)  # nobody pinned a rate
    for feature in catalogs.names(offer.architecture).by_name.values():
        if feature.withheld and feature.word in values:
            values[feature.word] &= ~feature.mask
    return FeatureSet.of(offer.architecture, values)


def _rules(new: Report, old: Report, granted: FeatureSet) -> tuple[Entry, ...]:
    return portable.entries(new.registers, frozenset(portable.common((new, old))), granted)


def _without(entry: Entry) -> Entry:
    """The rule of a register for a guest that nobody made a contract for: nothing says what may be dropped."""
    return portable.Entry(entry.register, portable.REFUSE, 0)


def _scope(new: Report, old: Report) -> tuple[str, ...]:
    if new.architecture != words.ARM64:
        return (*_X86, _TIMES, _ELSE)
    lines = [_ARM64, *unmeasured((new, old))]
    unlisted = [report.host for report in (new, old) if not report.registers]
    if unlisted:
        lines.append(f"not judged: which registers a guest carries, as {' and '.join(unlisted)} lists none")
    else:
        lines.append("judged: which registers both list, by KVM's id")
    return (*lines, "not judged: values of state registers", _TIMES, _ELSE)
