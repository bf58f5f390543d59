# SPDX-License-Identifier: LGPL-2.1-or-later
"""MSRs of KVM's own and of Hyper-V's features, where CPUID hides the feature: is a guest's kernel refused them?

    paravirtual(kvm, entries)    {feature: Standing} of KVM's own MSRs
    enlightened(kvm, entries)    the same of Hyper-V's, where this KVM has any

Each MSR is read with the capability that makes KVM refuse it and without. Where kvm.ignore_msrs is set, KVM answers 0
where it would refuse (kvm_do_msr_access in arch/x86/kvm/x86.c): nothing leaks by that, and it is said. A 0 without the
capability then tells nothing: it may be the MSR's own.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.host import guest_x86 as guest
from kvmneg.host import software
from kvmneg.host.guest_x86 import Question
from kvmneg.host.hyperv_x86 import named
from kvmneg.host.sight import Standing
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvmneg.host.guest_x86 import Answer
    from kvmneg.host.kvm import Kvm, Scratch
    from kvmneg.host.tables import CpuidEntry

# KVM's own MSRs by the feature that announces them (Documentation/virt/kvm/x86/cpuid.rst and msr.rst)
PARAVIRTUAL_MSRS = {
    "kvmclock-old": (0x11, 0x12),
    "kvmclock": (0x4B564D00, 0x4B564D01),
    "kvm-asyncpf": (0x4B564D02,),
    "kvm-steal-time": (0x4B564D03,),
    "kvm-pv-eoi": (0x4B564D04,),
    "kvm-poll-control": (0x4B564D05,),
    "kvm-asyncpf-int": (0x4B564D06, 0x4B564D07),
    "kvm-migration-control": (0x4B564D08,),
}
_HYPERV_STATE = "state:msrs-hyperv"


class _Found(NamedTuple):
    refused: bool
    ignored: bool  # answered with 0 instead


def hyperv_msrs() -> dict[str, tuple[int, ...]]:
    """Hyper-V's MSRs by the feature that announces them, as the catalogue has both."""
    book = catalogs.names(words.X86_64)
    masks = {
        mask: msr
        for msr, (word, mask) in catalogs.load(words.X86_64).state_msrs.items()
        if word == _HYPERV_STATE
    }
    found: dict[str, tuple[int, ...]] = {}
    for state in book.at(_HYPERV_STATE, sum(masks)):
        (feature,) = state.requires
        found[feature] = (*found.get(feature, ()), masks[state.mask])
    return found


def paravirtual(kvm: Kvm, entries: Sequence[CpuidEntry]) -> dict[str, Standing]:
    """How KVM's own MSRs stand for a guest's kernel under this table, by feature. Raises KvmFault."""
    return _standings(kvm, entries, PARAVIRTUAL_MSRS, guest.enforce_pv_cpuid)


def enlightened(kvm: Kvm, entries: Sequence[CpuidEntry]) -> dict[str, Standing]:
    """The same of Hyper-V's. Raises KvmFault."""
    return _standings(kvm, entries, hyperv_msrs(), guest.enforce_hyperv_cpuid)


def _standings(
    kvm: Kvm,
    entries: Sequence[CpuidEntry],
    msrs: Mapping[str, tuple[int, ...]],
    enforce: Callable[[Kvm, Scratch], bool],
) -> dict[str, Standing]:
    book = catalogs.names(words.X86_64)
    shown = {
        word: value
        for entry in entries
        for (word, _, _), value in zip(named(entries)[entry[:2]], entry[3:], strict=True)
    }
    ignoring = software.modules().get("kvm.ignore_msrs") == "Y"
    plain, enforced = (_tried(kvm, entries, msrs, how, ignoring=ignoring) for how in (None, enforce))
    found = {}
    for name in msrs:
        feature = book.feature(name)
        without, within = plain.get(name), enforced.get(name)
        found[name] = Standing(
            bool(shown.get(feature.word, 0) & feature.mask),
            None if without is None or without.ignored else without.refused,
            None if within is None else within.refused,
            within is not None and within.ignored,
        )
    return found


def _tried(
    kvm: Kvm,
    entries: Sequence[CpuidEntry],
    msrs: Mapping[str, tuple[int, ...]],
    enforce: Callable[[Kvm, Scratch], bool] | None,
    *,
    ignoring: bool,
) -> dict[str, _Found]:
    """What came of RDMSR, by feature; without those that a guest could not try."""
    with kvm.scratch() as scratch:
        if kvm.try_cpuid(scratch, entries) is None or (enforce and not enforce(kvm, scratch)):
            return {}
        indices = [index for each in msrs.values() for index in each]
        answers = guest.ask(kvm, scratch, guest.CPL0, [Question(guest.ASK_MSR, index) for index in indices])
    found = {index: judged(answer, ignoring=ignoring) for index, answer in zip(indices, answers, strict=True)}
    each_of = {name: [found[index] for index in each] for name, each in msrs.items()}
    return {
        name: _Found(all(one.refused for one in each if one), any(one.ignored for one in each if one))
        for name, each in each_of.items()
        if None not in each
    }


def judged(answer: Answer, *, ignoring: bool) -> _Found | None:
    """What came of one RDMSR; None where it did not come to it. `ignoring`: kvm.ignore_msrs is set."""
    if answer.outcome == guest.FAULTED:
        return _Found(refused=True, ignored=False)
    if answer.outcome != guest.ANSWERED:
        return None
    ignored = ignoring and answer.wide == 0
    return _Found(refused=ignored, ignored=ignored)
