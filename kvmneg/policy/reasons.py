# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who takes a feature away: silicon, microcode, kernel, module parameter, KVM, VMM, fence, policy, a base. Pure.

A cause is named only where a layer was measured; where none was, it is unknown. What the kernel's KVM could pass on is
read from upstream's tables (kvmneg.policy.kernels), and only when something is missing.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, sanity, words
from kvmneg.features.difference import Blocker
from kvmneg.policy import rates
from kvmneg.policy.contract import binding_mask
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmneg.features.catalog import Feature
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.vmm import Through


def in_order(blockers: Iterable[Blocker]) -> list[Blocker]:
    """Blockers in the order of addresses; those of a whole host or architecture, which have no word, come first."""
    return sorted(
        blockers,
        key=lambda one: (words.order(one.word) if one.word else (-1, 0, 0, ""), one.bit or 0, one.feature),
    )


# Parameters of KVM's modules that hold something back: (parameter, its values that do, what).
# What ends in a dot or begins with msr: is the beginning of words' addresses. Linux arch/x86/kvm: x86.c, vmx/vmx.c,
# vmx/sgx.c, svm/svm.c, svm/sev.c.
_NO = ("N", "0")
_PARAMETERS = (
    ("kvm_intel.nested", _NO, ("vmx", "msr:0x48", "msr:0x49")),
    ("kvm_amd.nested", _NO, ("svm", "cpuid:0x8000000a.")),
    ("kvm.enable_pmu", _NO, ("cpuid:0xa.", "cpuid:0x80000022.", "pdcm", "perfctr-core", "msr:0x345")),
    ("kvm_intel.pt_mode", ("0",), ("intel-pt", "cpuid:0x14.")),
    ("kvm_intel.sgx", _NO, ("sgx", "sgxlc", "cpuid:0x12.")),
    ("kvm_amd.sev", _NO, ("sev", "sev-es", "sev-snp")),
    ("kvm_amd.sev_es", _NO, ("sev-es", "sev-snp")),
    ("kvm_amd.sev_snp", _NO, ("sev-snp",)),
    ("kvm_amd.npt", _NO, ("npt",)),
    ("kvm_amd.lbrv", _NO, ("lbrv",)),
    ("kvm_amd.nrips", _NO, ("nrip-save",)),
    ("kvm_amd.tsc_scaling", _NO, ("tsc-scale",)),
    ("kvm_amd.vls", _NO, ("v-vmsave-vmload",)),
    ("kvm_amd.vgif", _NO, ("vgif",)),
    ("kvm_amd.vnmi", _NO, ("vnmi",)),
)
# Of these no CPU can lack the feature: the module would not have loaded.
_IMPLIES_SILICON = ("kvm_intel.nested", "kvm_amd.nested")

# Rules whose bottom is not 0, and 0 a value like any other.
_ABSENT_IS_A_VALUE = frozenset((rules.SIGNED_MINIMUM, rules.HIGHEST, rules.EQUAL_OR_ONE, rules.EQUAL_OR_TWO))

OFFERED, TOLD, CLEAR, HELD_BACK, UNMERGED = "offered", "told", "clear", "held-back", "not-merged"


class Standing(NamedTuple):
    """How a feature stands on one host.

    `state`: offered; held-back, with who does (`where`, `cause`, `because`); of an or-feature told (the host has it,
    guests are told) or clear; not-merged where nobody grants it: the VMM's own, a constant. `value` is the offer's.
    """

    state: str
    value: int
    where: str
    cause: str
    because: str


def standing(
    feature: Feature, report: Report, fence: Fence | None = None, seen: Through | None = None
) -> Standing:
    """How a feature stands on the host of a report, under a fence, for a VMM (both optional)."""
    host = seen.report if seen is not None else report
    value = feature.of(host.offer.value(feature.word))
    if feature.rule in rules.UNMERGED:
        return Standing(UNMERGED, value, "", "", rules.MEANING[feature.rule])
    change = seen.change(feature) if seen is not None else None
    because = change.because if change is not None and change.what == "given" else ""
    if feature.rule == rules.OR:
        told = given(feature, host.offer, host)
        return Standing(TOLD if told else CLEAR, int(told), "", "", because)
    fenced = fence is None or given(feature, fence.granted, host)
    if given(feature, host.offer, host) and fenced and not feature.withheld:
        return Standing(OFFERED, value, "", "", because)
    why = missing(feature, "", host.offer, host, fence, seen=seen)
    return Standing(HELD_BACK, value, why.missing_on, why.cause, why.because)


def given(feature: Feature, granted: FeatureSet, report: Report) -> bool:
    """Whether a guest with this set has the feature: is told of an or-feature, has a number that is not 0."""
    if feature.rule in rules.UNMERGED:
        return True  # a constant of policy (APIC): every guest gets it
    if feature.rule == rules.OR:
        # its bottom is 1: only what the host has, in a register that the guest sees, was told
        return bool(binding_mask(granted, feature.word) & feature.mask and _measured(feature, report))
    value = feature.of(granted.value(feature.word))
    if feature.rule in _ABSENT_IS_A_VALUE:
        return value != rules.RULES[feature.rule].bottom(feature.width)
    return bool(value)


def shown(architecture: str, word: str, value: int) -> Iterator[Feature]:
    """What people would call the features of a word's value: single bits; on arm64 numbers too, that are not none."""
    names = catalogs.names(architecture)
    if architecture != words.ARM64:
        yield from (feature for feature in names.within(word, value) if feature.width == 1)
        return
    for feature in names.by_place.get(word, ()):
        if feature.rule in rules.RULES and feature.rule != rules.MATCH:
            # 0 is not always none
            none = rules.RULES[feature.rule].bottom(feature.width) if feature.width > 1 else 0
            if feature.of(value) != none:
                yield feature


def missing(
    feature: Feature,
    wanted_by: str,
    granted: FeatureSet,
    report: Report,
    fence: Fence | None,
    *,
    seen: Through | None = None,
) -> Blocker:
    """Why a feature that was asked for is not in `granted`. `report` is as the VMM sees it, where there is one."""
    where = f"host {report.host}"
    taken = seen.took(feature) if seen is not None and not feature.withheld else None
    if taken is not None and seen is not None:
        where, cause, because = seen.missing_on(), "vmm", taken.because
    elif seen is not None and feature.withheld and seen.took(feature):
        where, cause, because = "kvmneg", "policy", feature.withheld
    elif not given(feature, report.offer, report):
        cause, because = _held_back(feature, report)
    elif feature.withheld:
        where, cause, because = "kvmneg", "policy", feature.withheld
    elif fence is not None and not given(feature, fence.granted, report):
        where, cause, because = fence.name, "fence", fence.because
    elif feature.requires:
        cause, because = "dependency", _unmet(feature, granted)
    else:
        what = (
            "the host's and the fence's values of it"
            if fence is not None
            else "what is asked for and what it gives"
        )
        cause, because = "fence" if fence is not None else "policy", f"{what} have nothing in common"
    bit = feature.shift if feature.width == 1 else None
    return Blocker(feature.name, feature.word, bit, wanted_by, where, cause, because)


def unfit(blocker: Blocker, report: Report, wanted_by: str, seen: Through | None = None) -> Blocker:
    """The blocker of a comparison with this host's offer, with who takes the feature away."""
    feature = catalogs.names(report.architecture).by_name.get(blocker.feature)
    cause, because = "silicon", blocker.because
    taken = seen.took(feature) if seen is not None and feature is not None else None
    if taken is not None and seen is not None:
        return blocker._replace(
            wanted_by=wanted_by, missing_on=seen.missing_on(), cause="vmm", because=taken.because
        )
    partly = feature is not None and feature.width > 1 and given(feature, report.offer, report)
    if feature is not None and (
        (feature.is_bit and not partly) or rates.unmeasured(feature.word, report.offer_words)
    ):
        cause, because = _held_back(feature, report)
    elif feature is not None:
        offered = feature.of(report.offer.value(feature.word))
        cause = _layer(feature, report, offered)
    return blocker._replace(wanted_by=wanted_by, cause=cause, because=because)


def under(blockers: Iterable[Blocker], report: Report, running: Report | None) -> tuple[Blocker, ...]:
    """Reasons against a combo of the machine that runs `running` now: what KVM offers there without the CPU.

    Where the report of a combo lacks it, and its silicon too, that KVM is the cause. Of another CPU nothing is said.
    """
    if running is None or report.architecture != running.architecture or not _one_cpu(report, running):
        return tuple(blockers)
    names = catalogs.names(report.architecture).by_name
    kernel, now = (one.combo.get("kernel") or "a kernel that is not known" for one in (report, running))
    because = f"KVM of {kernel} does not offer it, that of {now} does on the same CPU"
    return tuple(
        one._replace(cause="kernel", because=because)
        if one.cause == "silicon"
        and one.feature in names
        and given(names[one.feature], running.offer, running)
        else one
        for one in blockers
    )


def _one_cpu(report: Report, running: Report) -> bool:
    """Whether both were measured on the same kind of CPU, as far as they say."""
    ours, theirs = report.identity, running.identity
    return bool(ours.get("vendor")) and all(
        ours.get(key) == theirs.get(key) for key in ("vendor", "signature")
    )


def _measured(feature: Feature, report: Report) -> int:
    return feature.of(report.offer_words.get(feature.word, 0))


def _layer(feature: Feature, report: Report, offered: int) -> str:
    """Whether a value is the CPU's own or what KVM makes of it."""
    silicon = report.silicon_words.get(feature.word)
    if silicon is None:
        return "unknown" if feature.word.startswith("cpuid:") else "kvm"
    return "silicon" if feature.of(silicon) == offered else "kvm"


def _held_back(feature: Feature, report: Report) -> tuple[str, str]:
    """(cause, because) of a feature that the host does not offer."""
    found = _on_the_way(feature, report)
    if found is not None:
        return found
    has = feature.of(report.silicon_words.get(feature.word, 0)) if report.silicon_words else None
    if has == 0 and feature.word.startswith("cpuid:"):
        return "silicon", "the CPU does not have it"
    parameter = _parameter(feature, report, bool(has))
    if parameter:
        return "module-parameter", f"{parameter} holds it back"
    kernel = report.combo.get("kernel", "this kernel")
    if not feature.word.startswith("cpuid:"):
        return "kvm", f"KVM of {kernel} does not offer it"
    if has is None:
        return "unknown", "the host does not offer it; its silicon was not measured"
    return _of_software(feature, report) or ("kvm", f"the CPU has it; KVM of {kernel} does not offer it")


def _on_the_way(feature: Feature, report: Report) -> tuple[str, str] | None:
    """Why the offer does not have what was measured, or has it as what nobody may choose."""
    if rates.unmeasured(feature.word, report.offer_words):
        return "unknown", "this report says nothing about it: an older kvmneg made it, or another tool"
    if _measured(feature, report):
        return _dropped(feature, report)
    if feature.whole and feature.mask >> 32 & report.offer.value(feature.word):
        return "kvm", "must be 1 there: a hypervisor in the guest has no choice"
    return None


def _parameter(feature: Feature, report: Report, has: bool) -> str:
    """The parameter of a KVM module that holds a feature back, as "kvm_intel.nested=N", else ""."""
    modules = report.combo.get("modules")
    if not isinstance(modules, dict):
        return ""
    for name, values, what in _PARAMETERS:
        if modules.get(name) in values and (has or name in _IMPLIES_SILICON):
            places = tuple(text for text in what if text.endswith(".") or text.startswith("msr:"))
            if feature.name in what or (places and feature.word.startswith(places)):
                return f"{name}={modules[name]}"
    return ""


def _of_software(feature: Feature, report: Report) -> tuple[str, str] | None:
    """What the kernel's tables and its flags say of a feature that the CPU has, and KVM does not offer."""
    from kvmneg.policy import kernels  # tables: only when something is missing

    release = str(report.combo.get("kernel") or "")
    table, later = kernels.nearest(release)
    if table is None:
        return None
    if kernels.knows(table, feature.word, feature.mask) is False:
        since = ""
        if later is not None and kernels.knows(later, feature.word, feature.mask):
            since = f", that of {later} does"
        return "kernel", (
            f"the CPU has it; KVM of {release} does not know it (by upstream's table: KVM of {table} does not{since})"
        )
    flags = report.identity.get("flags")
    if not isinstance(flags, str) or not feature.linux or not kernels.shown(feature.word, feature.mask):
        return None
    if feature.linux in flags.split():
        return None
    cleared = [
        word for word in str(report.combo.get("cmdline") or "").split() if word.startswith("clearcpuid=")
    ]
    why = (
        f"{' '.join(cleared)} on its command line" if cleared else "microcode, an erratum or its command line"
    )
    return "microcode", f"the CPU has it, and Linux of this host does not use it: {why}"


def _dropped(feature: Feature, report: Report) -> tuple[str, str]:
    """(cause, because) of a feature that was measured and is not in the canonical offer."""
    for finding in sanity.findings(report):
        if any(word == feature.word and mask & feature.mask for word, mask in finding.dropped):
            return "policy", f"what the report says is impossible: {finding.what}"
    if not feature.requires:
        return "policy", feature.why or "its value says what guests are told without it"
    return "dependency", f"KVM offers it without what it is built on: {_unmet(feature, report.offer)}"


def _unmet(feature: Feature, granted: FeatureSet) -> str:
    """The bases of a feature that are missing from a set, as the catalogue writes them."""
    names = catalogs.names(granted.architecture)
    lacking = []
    for text, (name, least) in zip(feature.requires, feature.bases, strict=True):
        base = names.by_name[name]
        value = base.of(granted.value(base.word))
        if value < least or (value and not least):
            lacking.append(text)
    return "missing: " + ", ".join(lacking or feature.requires)
