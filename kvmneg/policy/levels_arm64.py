# SPDX-License-Identifier: LGPL-2.1-or-later
"""arm64: what a level or an exact request makes of a host's registers. Pure.

A register is shown whole, as KVM has it but for what is set. So a request for a level sets the fields that levels are
about to the level's values: those that some level names, the instruction sets, and the vCPU features that go with them
(kvmneg/policy/definitions/boot/arm64.toml, `decided`). What describes the machine stays as the host has it. Whether
KVM lets a field be set is kvmneg.policy.levelling's to judge, on the set that comes out.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.difference import Blocker
from kvmneg.policy import definitions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from kvmneg.features.catalog import Feature
    from kvmneg.features.featureset import FeatureSet

_SWITCHES = "arm:vcpu-features"


def decided() -> tuple[Feature, ...]:
    """The fields that a level decides, in the order of addresses."""
    names = catalogs.names(words.ARM64)
    named = {
        name for level in definitions.levels(words.ARM64) for name in definitions.level(level, words.ARM64)
    }
    inside = definitions.Boot(words.ARM64).decided
    found = {
        feature.name: feature
        for feature in names.by_name.values()
        if feature.name in named or (feature.word in inside and feature.rule in (rules.MINIMUM, rules.AND))
    }
    # fields of a feature that is switched off go by themselves, and those that no level names have no value to set
    return tuple(
        feature
        for feature in found.values()
        if feature.word == _SWITCHES or not _switched(feature, names.by_name)
    )


def lowered(values: Mapping[str, int], least: Mapping[str, int], asked: Collection[str]) -> dict[str, int]:
    """Words with each decided field at its level's value, what was asked for by name at the host's."""
    found = dict(values)
    for feature in decided():
        value = found.get(feature.word, 0)
        most = least.get(feature.name, 0)
        if feature.rule == rules.PREFIX and most:
            continue  # lengths: a level asks for some, not which
        if feature.name not in asked and feature.word in found and feature.of(value) > most:
            found[feature.word] = value & ~feature.mask | most << feature.shift
    return found


def too_low(least: Mapping[str, int], granted: FeatureSet, missing: Iterable[Feature]) -> list[Blocker]:
    """The numbers of a level that are there, and lower than it asks for; `missing` are those that are not there."""
    names, absent = catalogs.names(words.ARM64), {feature.name for feature in missing}
    found = []
    for name, wanted in least.items():
        feature = names.by_name[name]
        value = feature.of(granted.value(feature.word))
        if name not in absent and value < wanted and feature.width > 1:
            because = f"{wanted:#x} is needed, {value:#x} is what there is"
            found.append(Blocker(name, feature.word, None, "", "", "silicon", because))
    return found


def _switched(feature: Feature, names: Mapping[str, Feature]) -> bool:
    """Whether a field is the CPU's where a vCPU feature is on, and nothing where it is off."""
    return any(names[base].word == _SWITCHES for base, _least in feature.bases) and not feature.settable
