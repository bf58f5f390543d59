# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's view and ours in one currency: sets of (word, bit), for every bit that both have a name for.

QEMU names features, and uses two names for two bits each (kvmclock, vmx-invept-single-context): such a name
stands for its first place here, on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kvmneg.errors import VmmFault
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.catalog import Feature, controls
from kvmneg.features.featureset import Blocker, FeatureSet, fits
from kvmneg.host.qemu_probe import Build, Monitor
from kvmneg.policy.vmm import Through, refused

Place = tuple[str, int]

SECONDS = 30.0  # for some 200 expansions, each a few milliseconds
QUIET = ("-S", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "none", "-qmp", "stdio")
# What QEMU gives a guest besides the named bits, worked out from them: XSAVE layout, AMX tile shapes, the
# CLFLUSH line. And what it asks KVM for by itself. A model does not name these, and they are no reason against it.
_WORKED_OUT = ("cpuid:0xd.", "cpuid:0x1d.", "cpuid:0x1e.", "cpuid:0x1.0.ebx", "kvm:")
# Hyper-V's enlightenments are asked for one by one: `host` has none of them, whatever KVM offers.
_OPT_IN = ("hyperv:",)


class Answers(NamedTuple):
    """What one QEMU said: the models it refuses features of, all models' properties, and `host`'s."""

    unavailable: dict[str, frozenset[str]]
    properties: dict[str, dict[str, Any]]


def ask(build: Build, seen: Through) -> Answers:
    """Ask a QEMU on the real KVM, with its newest machine type and started as the offer supposes.

    The machine matters: where the interrupt controllers are decides bits too (kernel-irqchip=split).
    """
    supposed = dict.fromkeys(change.needs for change in seen.changes if change.needs)
    machine = ",".join((build.machine, *supposed))
    with Monitor([build.path, "-machine", machine, "-accel", "kvm", *QUIET], SECONDS) as monitor:
        listed = monitor.ask("query-cpu-definitions")
        unavailable = {row["name"]: frozenset(row.get("unavailable-features", ())) for row in listed}
        properties = {name: _expanded(monitor, name) for name in unavailable}
    return Answers(unavailable, properties)


def _expanded(monitor: Monitor, name: str) -> dict[str, Any]:
    reply = monitor.ask("query-cpu-model-expansion", type="full", model={"name": name})
    found: dict[str, Any] = reply["model"]["props"]
    return found


def named() -> dict[str, list[Feature]]:
    """QEMU's names, each with its features in the order of addresses; most have one."""
    found: dict[str, list[Feature]] = {}
    for feature in catalogs.names(words.X86_64).by_name.values():
        if feature.qemu:
            found.setdefault(feature.qemu, []).append(feature)
    for features in found.values():
        features.sort(key=lambda one: (words.order(one.word), one.shift))
    return found


NAMED = named()


def place(feature: Feature) -> Place:
    """Where a feature stands in a comparison: at the first place that has its QEMU name."""
    first = NAMED[feature.qemu][0]
    return first.word, first.shift


def places(names: Iterable[str]) -> set[Place]:
    """The places of QEMU's names. Raises VmmFault for names that the catalogue lacks: it must not guess."""
    unknown = sorted(set(names) - set(NAMED))
    if unknown:
        raise VmmFault(f"QEMU has names that the catalogue lacks: {', '.join(unknown)}")
    return {place(NAMED[name][0]) for name in names}


def requested(properties: Mapping[str, Any]) -> list[Feature]:
    """The bits that a model asks for."""
    return [
        feature
        for name, value in properties.items()
        if value is True
        for feature in NAMED.get(name, ())
        if feature.width == 1
    ]


def model_set(properties: Mapping[str, Any]) -> FeatureSet:
    """A guest of this model as QEMU would make it: each CPUID word explicit, and what QEMU works out granted."""
    table = catalogs.load(words.X86_64)
    values = {
        word: rule.judged if word.startswith(_WORKED_OUT) else 0
        for word, rule in table.words.items()
        if word.startswith(("cpuid:", "kvm:"))
    }
    for name, value in properties.items():
        for feature in NAMED.get(name, ()):
            asked = int(value) if isinstance(value, int) else 0
            if asked > 0:
                values[feature.word] = values.get(feature.word, 0) | (asked << feature.shift & feature.mask)
    names = catalogs.names(words.X86_64)
    for word, default1 in names.default1.items():
        # as QEMU makes them of the controls that a model has: kvm_msr_entry_add_vmx
        values[word] = controls.value_of(values.get(word, 0) >> controls.HALF, default1)
    return FeatureSet.of(words.X86_64, values)


def blockers(properties: Mapping[str, Any], seen: Through) -> set[Place]:
    """Why a model cannot run here under this QEMU, as bits: what does not fit, and what QEMU refuses besides."""
    guest = model_set(properties)
    table = catalogs.names(words.X86_64)
    asked = requested(properties)
    no = [
        # that a host has a weakness which the guest was not told of is our judgement, and none of QEMU's business
        *(one for one in fits(guest, seen.report.accept) if _rule(one) in (rules.AND, rules.VMX_CONTROLS)),
        *refused(guest, seen, "the model"),
    ]
    found = (table.by_name[one.feature] for one in no)
    return {place(feature) for feature in found if feature in asked}


def _rule(blocker: Blocker) -> str:
    feature = catalogs.names(words.X86_64).by_name.get(blocker.feature)
    return feature.rule if feature else ""


def has(offer: FeatureSet, feature: Feature) -> bool:
    """Whether an offer has a bit set; a word without a value has none, though its rule's bottom be 1."""
    if feature.rule == rules.POLICY:
        constants = catalogs.load(words.X86_64).policy
        return any(word == feature.word and value & feature.mask for word, _, value in constants)
    return bool(feature.of(offer.words.get(feature.word, 0)))


def host_differences(properties: Mapping[str, Any], offer: FeatureSet) -> set[Place]:
    """The bits by which `-cpu host` and our offer differ, of those that both know.

    Left out: topology, and what changes while a guest runs.
    """
    compared = (rules.AND, rules.OR, rules.HINT, rules.POLICY)
    found = set()
    for name, features in NAMED.items():
        if not isinstance(properties.get(name), bool) or features[0].word.startswith(_OPT_IN):
            continue
        if all(one.width == 1 and (one.rule in compared or one.whole) for one in features):
            ours = all(has(offer, one) for one in features)
            if ours != properties[name]:
                found.add(place(features[0]))
    return found


def both_know(properties: Mapping[str, Any]) -> int:
    """How many bits a comparison with `host` compares."""
    return sum(isinstance(properties.get(name), bool) for name in NAMED)
