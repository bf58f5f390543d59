# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who takes a feature away: silicon, KVM, the fence, policy, or a base that is missing. Pure.

A cause is named only where a layer was measured; where none was, it is unknown.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import rules
from kvmneg.features.difference import Blocker
from kvmneg.policy.contract import binding_mask

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.catalog import Feature
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.fence import Fence


def given(feature: Feature, granted: FeatureSet, report: Report) -> bool:
    """Whether a guest with this set has the feature: is told of an or-feature, has a number that is not 0."""
    if feature.rule in rules.UNMERGED:
        return True  # a constant of policy (APIC): every guest gets it
    if feature.rule == rules.OR:
        # its bottom is 1: only what the host has, in a register that the guest sees, was told
        return bool(binding_mask(granted, feature.word) & feature.mask and _measured(feature, report))
    return bool(feature.of(granted.value(feature.word)))


def missing(
    feature: Feature, wanted_by: str, granted: FeatureSet, report: Report, fence: Fence | None
) -> Blocker:
    """Why a feature that was asked for is not in `granted`."""
    where = f"host {report.host}"
    if not given(feature, report.offer, report):
        cause, because = _held_back(feature, report)
    elif feature.withheld:
        where, cause, because = "kvmneg", "policy", feature.withheld
    elif fence is not None and not given(feature, fence.granted, report):
        where, cause = f"fence generation {fence.generation}", "fence"
        because = "the host offers it, the pinned fence does not name it"
    else:
        cause, because = "dependency", _unmet(feature, granted)
    bit = feature.shift if feature.width == 1 else None
    return Blocker(feature.name, feature.word, bit, wanted_by, where, cause, because)


def unfit(blocker: Blocker, report: Report, wanted_by: str) -> Blocker:
    """The blocker of a comparison with this host's offer, with who takes the feature away."""
    feature = catalogs.names(report.architecture).by_name.get(blocker.feature)
    cause, because = "silicon", blocker.because
    if feature is not None and feature.is_bit:
        cause, because = _held_back(feature, report)
    elif feature is not None:
        offered = feature.of(report.offer.value(feature.word))
        cause = _layer(feature, report, offered)
    return blocker._replace(wanted_by=wanted_by, cause=cause, because=because)


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
    if _measured(feature, report):
        return "dependency", f"KVM offers it without what it is built on: {_unmet(feature, report.offer)}"
    kernel = report.combo.get("kernel", "this kernel")
    if not feature.word.startswith("cpuid:"):
        return "kvm", f"KVM of {kernel} does not offer it"
    if not report.silicon_words:
        return "unknown", "the host does not offer it; its silicon was not measured"
    if feature.of(report.silicon_words.get(feature.word, 0)):
        return "kvm", f"the CPU has it; KVM of {kernel} does not offer it"
    return "silicon", "the CPU does not have it"


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
