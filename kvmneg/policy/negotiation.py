# SPDX-License-Identifier: LGPL-2.1-or-later
"""request + report + fence → contract, or every reason why not. Pure."""

from __future__ import annotations

from kvmneg.errors import Blocked, Breached, UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet, fits, meet
from kvmneg.policy import coverage, definitions, grade, rates, reasons
from kvmneg.policy.contract import Contract

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from kvmneg.features.catalog import Feature
    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.portable import Entry
    from kvmneg.policy.request import Request
    from kvmneg.policy.vmm import Through

# Words that only a guest which asks for them may see: Hyper-V's leaves change what a Linux guest believes.
_ASKED_FOR = "hyperv:"


class Answer:
    """A contract, and the features asked for as optional (or left out of max) with the reason of each."""

    __slots__ = ("contract", "not_granted")

    def __init__(self, contract: Contract, not_granted: tuple[Blocker, ...]) -> None:
        self.contract = contract
        self.not_granted = not_granted


def ceiling(report: Report, fence: Fence | None, vmm: str | None = None) -> FeatureSet:
    """The most a new guest may get here: the offer (of a VMM: kvmneg.policy.vmm), bounded by the fence.

    Raises Breached, naming each feature, where the host offers less than the fence promises, and Blocked where not
    all kinds of its CPUs were measured (kvmneg.policy.coverage).
    """
    seen = through(report, vmm)
    return _bounded(report, fence, (seen.report if seen else report).offer)


def _bounded(report: Report, fence: Fence | None, offer: FeatureSet) -> FeatureSet:
    """An offer bounded by the fence, which is held against what KVM offers, whatever the VMM.

    Raises Breached, and Blocked where not all of the host was measured.
    """
    coverage.require(report)
    if fence is None:
        return offer
    found = below(report, fence)
    if found:
        raise Breached(
            f"{report.host} no longer offers what {fence.name} promises",
            [reasons.unfit(blocker, report, "the fence") for blocker in found],
            hint="bring back what changed (kernel, microcode, module parameters), or pin a lower fence",
        )
    met = meet(offer, fence.granted)
    if met.architecture == words.ARM64:
        from kvmneg.policy import levelling  # see unreachable

        return levelling.bounded(offer, fence.granted, met)
    from kvmneg.policy import nested  # only where there is a fence

    return nested.movable(met, fence.granted, offer)


def unreachable(granted: FeatureSet, report: Report, wanted_by: str) -> list[Blocker]:
    """arm64: what this host's kernel cannot be told to show as `granted` has it."""
    if granted.architecture != words.ARM64:
        return []
    from kvmneg.policy import levelling  # x86 shows guests whatever it is told

    return levelling.unreachable(granted, report, wanted_by)


def below(report: Report, fence: Fence) -> tuple[Blocker, ...]:
    """What a fence promises and neither the host offers nor a VMM gives there: empty where it is not breached."""
    where = f"host {report.host}"
    raw = report.offer_words
    found = fence.unmet(report.offer, missing_on=where, measured=raw)
    if found:
        from kvmneg.policy import vmm as vmms  # most fences name nothing that only a VMM gives

        found = fence.unmet(vmms.reach(report), missing_on=where, measured=raw)
    if fence.registers:
        from kvmneg.policy import portable  # arm64's only

        found += portable.unlisted(fence.registers, report)
    return found


def through(report: Report, vmm: str | None) -> Through | None:
    """The host as a VMM's guests see it, None where none is named."""
    if vmm is None:
        return None
    from kvmneg.policy import vmm as vmms  # only for requests that name one

    return vmms.through(report, vmm)


def negotiate(request: Request, report: Report, fence: Fence | None = None) -> Answer:
    """The contract for a request on this host under this fence.

    Raises Breached (the host is below its fence), Blocked (required features are missing: all blockers, in
    the order of addresses; or the contract must be enforced and is not), UsageError (an unknown feature, level
    or VMM, a feature that cannot be asked for, or one without what it is built on).
    """
    seen = through(report, request.vmm)
    return _answer(request, report, fence, seen, seen.report if seen else report)


def _answer(
    request: Request, report: Report, fence: Fence | None, seen: Through | None, host: Report
) -> Answer:
    """`host` is the report as it is judged: through a VMM, or with what is accepted as its offer."""
    if seen is not None and request.tsc_khz:
        host = _invariant(host, seen.host)
    top = _bounded(report, fence, host.offer)
    wanted = _Wanted(request, report.architecture)
    granted = _select(wanted, top)
    missing = [feature for feature in wanted.required if not reasons.given(feature, granted, host)]
    blockers = [
        reasons.missing(feature, wanted.by(feature), granted, host, fence, seen=seen) for feature in missing
    ]
    if wanted.least and wanted.lowers:
        from kvmneg.policy import levels_arm64  # x86's levels are of bits

        low = levels_arm64.too_low(wanted.least, granted, missing)
        blockers += [
            one._replace(missing_on=f"host {report.host}", wanted_by=request.describe()) for one in low
        ]
    wanted_by = "the fence" if fence else request.describe(report.architecture)
    blockers += unreachable(granted, report, wanted_by)
    if seen is not None:
        blockers += _refused(granted, seen, wanted_by)
        if seen.arm64:
            from kvmneg.policy import vmm_arm64  # as in through

            blockers += vmm_arm64.unset(granted, seen, wanted_by, blockers)
            if fence and fence.registers:
                blockers += vmm_arm64.stuck(seen, report, fence.registers)
    if request.tsc_khz and (unpinned := rates.refusal(request.tsc_khz, top, host, fence, "the request")):
        blockers.append(unpinned)
    if blockers:
        count = f"{len(blockers)} of the required features" if len(blockers) > 1 else blockers[0].feature
        raise Blocked(f"{count} cannot be given on {report.host}", reasons.in_order(blockers))
    unkept = grade.blockers(granted, report) if request.require_enforced else []
    if unkept:
        raise Blocked(
            f"{report.host} is not known to enforce this contract", unkept, hint="`kvmneg host` tells why"
        )
    absent = [feature for feature in wanted.optional if not reasons.given(feature, granted, host)]
    if wanted.maximum:
        all_of_it = top if seen is None else _bounded(report, fence, report.offer)
        absent = [feature for feature in wanted.withheld if feature.of(all_of_it.value(feature.word))]
    wants = "max" if wanted.maximum else "optional"
    not_granted = [reasons.missing(feature, wants, granted, host, fence, seen=seen) for feature in absent]
    pinned = (fence.generation, fence.digest) if fence else (0, "")
    contract = Contract(granted, pinned, grade.of(granted, report), **carried(granted, report, fence))
    return Answer(contract, tuple(reasons.in_order(not_granted)))


def carried(granted: FeatureSet, report: Report, fence: Fence | None) -> dict[str, Any]:
    """arm64: the words that this host has, and what becomes of each register when the guest moves."""
    if granted.architecture != words.ARM64:
        return {}
    from kvmneg.policy import portable  # as in unreachable

    carried = frozenset(fence.registers if fence and fence.registers else report.registers)
    rules_of = portable.entries(report.registers, carried, granted)
    return {"present": report.offer_words, "portable": rules_of}


def check(contract: Contract, report: Report, vmm: str | None = None) -> tuple[Blocker, ...]:
    """`accepts` of a guest with this contract."""
    return accepts(contract.granted, report, vmm, portable=contract.portable)


def accepts(
    granted: FeatureSet, report: Report, vmm: str | None = None, *, portable: tuple[Entry, ...] = ()
) -> tuple[Blocker, ...]:
    """Why a guest with this set and registers may not come here; empty when it may. Raises UsageError (a VMM)."""
    seen = through(report, vmm)
    there = (seen.report if seen else report).accepting()
    found = fits(granted, there.offer, missing_on=f"host {report.host}")
    if granted.architecture != report.architecture:
        return found  # which says just that
    told = (one for one in found if not rates.carried_unknown(one.word, there.offer_words))
    blockers = [reasons.unfit(blocker, there, "the contract", seen) for blocker in told]
    if seen is not None:
        blockers = reasons.in_order([*blockers, *_refused(granted, seen, "the contract")])
    blockers += unreachable(granted, there, "the contract")
    if portable:
        from kvmneg.policy import portable as registers  # arm64's only

        blockers += registers.unknown(portable, there, seen)
    return (*coverage.blockers(report), *reasons.in_order(blockers))


def _invariant(host: Report, measured: Report) -> Report:
    """A VMM's view for a guest whose TSC is pinned: with the invariant TSC, where the host has it."""
    from kvmneg.policy import vmm as vmms  # as in through

    return vmms.with_bit(
        host, rates.INVARIANT_WORD, measured.offer_words.get(rates.INVARIANT_WORD, 0) & rates.INVARIANT_BIT
    )


def _refused(granted: FeatureSet, seen: Through, wanted_by: str) -> list[Blocker]:
    from kvmneg.policy import vmm as vmms  # as in through

    return vmms.refused(granted, seen, wanted_by)


def check_request(request: Request, report: Report, fence: Fence | None = None) -> Answer:
    """What `negotiate` would answer to a guest that comes from elsewhere: judged on the accept set.

    Nothing is kept. Raises as `negotiate` does.
    """
    seen = through(report, request.vmm)
    there = report.accepting()
    return _answer(request, there, fence, seen, seen.report.accepting() if seen else there)


class _Wanted:
    """A request resolved to features: required, optional, withheld, and the numbers that come along."""

    def __init__(self, request: Request, architecture: str) -> None:
        self.names = catalogs.names(architecture)
        boot = definitions.Boot(architecture)
        self.request = request
        # arm64: a register is shown as it is but for what is set; a level sets what levels are about, and no more
        whole = architecture == words.ARM64
        self.maximum = request.maximum
        self.everything = request.maximum or whole
        level = None if whole and request.default else request.level
        if request.tsc_khz and architecture != words.X86_64:
            raise UsageError(f"{architecture} has no TSC", hint="leave the rate out")
        self.withheld = [
            feature
            for feature in self.names.by_name.values()
            if feature.withheld and not (request.tsc_khz and feature.name == rates.INVARIANT)
        ]
        self.carry = self._features(boot.carry)
        self.at_most = [
            (self.names.feature(number), most, self.names.feature(unless))
            for number, most, unless in boot.at_most
        ]
        asked = self._features((*request.require, *(request.exact or ())))
        # a request for nothing else is not even asked to start; every other guest must
        needed = self._features(() if request.exact is not None else boot.essential)
        booting, levelled = self._features(boot.require), []
        self.least: dict[str, int] = {}
        if level is not None:
            self.least = definitions.least(level, architecture)
            levelled = self._features(self.least)
            needed += booting
        self._by = dict.fromkeys((feature.name for feature in levelled), request.describe())
        self._by |= dict.fromkeys((feature.name for feature in needed), "every guest")
        self._by |= dict.fromkeys((feature.name for feature in asked), "the request")
        self.required = _distinct([*asked, *needed, *levelled])
        optional = self._features((*request.optional, *(boot.optional if level is not None else ())))
        self.optional = [feature for feature in _distinct(optional) if feature not in self.required]
        self.lowers = whole and (level is not None or request.exact is not None)
        self.asked = {feature.name for feature in (*asked, *self._features(request.optional))}
        for feature in (*self.required, *self.optional):
            _refuse_unaskable(feature, architecture)
        self._refuse_baseless()

    def by(self, feature: Feature) -> str:
        """Who wants a feature, for its blocker."""
        return self._by[feature.name]

    def chosen(self) -> dict[str, int]:
        """The bits and numbers asked for or carried, by word, with the numbers these are built on."""
        masks: dict[str, int] = {}
        queue = [*self.required, *self.optional, *self.carry]
        while queue:
            feature = queue.pop()
            if feature not in self.withheld and not masks.get(feature.word, 0) & feature.mask:
                masks[feature.word] = masks.get(feature.word, 0) | feature.mask
                bases = (self.names.by_name[name] for name, _least in feature.bases)
                queue += (base for base in bases if base.rule not in rules.BITWISE)
        return masks

    def _features(self, names: Iterable[str]) -> list[Feature]:
        return [self.names.feature(name) for name in names]

    def _refuse_baseless(self) -> None:
        """A request for a feature without the one it is built on is a mistake, not a wish for both."""
        asked = {feature.name for feature in (*self.required, *self.optional)}
        lacking: dict[str, str] = {}  # base → the feature that needs it
        queue = [(feature, feature.name) for feature in self.required]  # a feature, and what was asked for
        seen = set(asked)
        while queue:
            feature, wanting = queue.pop(0)
            for name, _least in feature.bases:
                base = self.names.by_name[name]
                everything = self.everything and not base.word.startswith(_ASKED_FOR)
                if name not in seen and not everything:
                    seen.add(name)
                    # a single VMX control comes along with its word, but where a request is all there is
                    named = base.is_bit and not (base.whole and self.request.exact is None)
                    queue.append((base, name if named else wanting))
                    if named:
                        lacking[name] = wanting
        if lacking:
            base_name, feature_name = next(iter(lacking.items()))
            raise UsageError(
                f"{feature_name} is built on {base_name}, which the request leaves out",
                hint=f"require {' '.join(lacking)} too",
                feature=feature_name,
                base=base_name,
            )


def _refuse_unaskable(feature: Feature, architecture: str) -> None:
    """What no host grants cannot be asked for: saying yes would promise what nobody keeps."""
    if feature.rule == rules.POLICY:
        constants = catalogs.load(architecture).policy
        unset = not any(
            word == feature.word and mask & value & feature.mask for word, mask, value in constants
        )
    else:
        unset = feature.rule in rules.UNMERGED
    if feature.word == rates.WORD or feature.word.startswith("state:"):
        how = (
            "a TSC rate is asked for by its number"
            if feature.word == rates.WORD
            else "state is what features bring"
        )
        raise UsageError(
            f"{feature.name} cannot be asked for: {how}", hint="leave it out", feature=feature.name
        )
    if unset:
        raise UsageError(
            f"{feature.name} cannot be asked for: {rules.MEANING[feature.rule]}",
            hint=feature.why or "leave it out",
            feature=feature.name,
        )


def _distinct(features: Iterable[Feature]) -> list[Feature]:
    return list({feature.name: feature for feature in features}.values())


def _keep_named_controls(wanted: _Wanted, values: dict[str, int]) -> None:
    """Of VMX control words, which come whole, only the controls that were asked for."""
    from kvmneg.features.catalog import controls  # few guests have nested VMX

    chosen = {feature.name for feature in wanted.required}
    for word, named in wanted.names.controls.items():
        keep = sum(1 << control.number for control in named if control.name in chosen)
        values[word] = controls.only(values[word], keep, wanted.names.default1[word])


def _select(wanted: _Wanted, top: FeatureSet) -> FeatureSet:
    """The part of the ceiling that a request gets, canonical."""
    chosen = wanted.chosen()
    withheld: dict[str, int] = {}
    for feature in wanted.withheld:
        withheld[feature.word] = withheld.get(feature.word, 0) | feature.mask
    enlightened = any(word.startswith(_ASKED_FOR) for word in chosen)
    values: dict[str, int] = {}
    for word, rule in catalogs.load(top.architecture).words.items():
        if wanted.everything and not word.startswith(_ASKED_FOR):
            given = rule.judged & ~withheld.get(word, 0)
        else:
            # Or-bits bound the guest's risk: it is told, whatever it asked for. Numbers and copies that are
            # built on a feature come with it: closing drops them again where it is not granted.
            given = chosen.get(word, 0) | rule.or_mask | rule.follow
        if enlightened and word.startswith(_ASKED_FOR):
            given |= (
                rule.judged & ~rule.bits_mask
            )  # Hyper-V's versions and limits come with any of its features
        values[word] = top.value(word) & given
        for field in rule.fields:
            if not given >> field.shift & field.mask:
                values[word] |= field.bottom << field.shift
    if wanted.lowers:
        from kvmneg.policy import levels_arm64  # x86 grants by name

        values = levels_arm64.lowered(values, wanted.least, wanted.asked)
    elif wanted.request.exact is not None:
        _keep_named_controls(wanted, values)
    if rates.WORD in values:  # one rate, and only for who asked for it: an interval would promise all of it
        khz = wanted.request.tsc_khz or 0
        values[rates.WORD] = rates.exactly(khz) if rates.gives(top.value(rates.WORD), khz) else 0
    for number, most, feature in wanted.at_most:
        if not feature.of(values[feature.word]) and number.of(values[number.word]) > most:
            values[number.word] = values[number.word] & ~number.mask | most << number.shift
    return FeatureSet.of(top.architecture, values)
