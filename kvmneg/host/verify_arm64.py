# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole proof of an arm64 host: under a contract, or under what the host offers and the same as low as it goes.

    prove(kvm)                 the host: what it offers, and what it lets a guest be without
    prove(kvm, bound)          a contract: {word: (value, mask)}, kvmneg.policy.contract
    mark_of(kvm, feature)      whether one feature is trapped where it is hidden

Each table has a VM of its own, for KVM freezes ID registers at the first KVM_RUN. The twin of verify_x86.py.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.host import arm64, kvm_arm64, proof_arm64, software, views_arm64
from kvmneg.host.arm64 import FEATURES
from kvmneg.host.guest_arm64 import MODE_NAMES
from kvmneg.host.instructions_arm64 import CODE, LINUX
from kvmneg.host.proof_arm64 import GIVEN, PSCI_0_2, SVE, Table
from kvmneg.host.sight import Proof
from kvmneg.host.views_arm64 import REVISION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from kvmneg.host.kvm import Kvm
    from kvmneg.host.kvm_arm64 import Probe

    Bound = Mapping[str, tuple[int, int]]

__all__ = ("CODE", "mark_of", "prove")

_MODELS = "arm:vgic-models"
_SVE_OWN = "aa64zfr0-"


def prove(kvm: Kvm, bound: Bound | None = None) -> Proof:
    """Run the guests, on the CPU that this thread may use. Raises KvmFault, NotApplied."""
    probe = kvm_arm64.probe(kvm)
    offer = arm64.decoder().offer(probe)
    offered = offered_table(probe, offer)
    if bound is None:
        return _prove_host(kvm, probe, offered)
    table = contract_table(offered, bound)
    sights = proof_arm64.sights(kvm, table, offered.features)
    shown = {word: sight.shown or 0 for word, sight in sights.items()}
    hidden = [
        feature
        for feature in _of_cpu(offered.values)
        if catalogs.names(words.ARM64).feature(feature).word in bound and not proof_arm64.has(feature, shown)
    ]
    return Proof(
        MODE_NAMES,
        {"contract": {word: sights[word] for word in sorted(sights, key=words.order)}},
        {},
        proof_arm64.instructions(kvm, offered, table, hidden, _of_host()),
        [
            word
            for word, (value, _) in bound.items()
            if value and word.startswith("arm64:") and word not in sights
        ],
    )


def offered_table(probe: Probe, offer: Mapping[str, int]) -> Table:
    """Everything that is read back or seen, as it is offered."""
    values = {word: value for word, value in offer.items() if views_arm64.questions(word)}
    bound = {word: views_arm64.compared(word) for word in values}
    features = probe.vcpu_features & GIVEN
    values[FEATURES] = bound[FEATURES] = features
    return Table(values, bound, features, probe.vgic_models)


def contract_table(offered: Table, bound: Bound) -> Table:
    """The machine under a contract on this host, and what it binds. What is the VMM's stays as KVM has it."""
    rows = {word: row for word, row in bound.items() if views_arm64.questions(word)}
    features, models = offered.features, offered.models
    if FEATURES in bound:
        rows[FEATURES] = bound[FEATURES]
        features = bound[FEATURES][0] & GIVEN
    if _MODELS in bound:
        models &= bound[_MODELS][0]
    if REVISION in rows and not rows[REVISION][0]:
        rows.pop(REVISION)
    return Table(
        {word: value for word, (value, _mask) in rows.items()},
        {word: mask for word, (_value, mask) in rows.items()},
        features,
        models,
    )


def mark_of(kvm: Kvm, feature: str) -> str | None:
    """What becomes of a feature's instruction where it is hidden; None where nothing can show it. Raises KvmFault."""
    probe = kvm_arm64.probe(kvm)
    offered = offered_table(probe, arm64.decoder().offer(probe))
    return _hidden(kvm, probe, offered, only=feature).get(feature)


def _prove_host(kvm: Kvm, probe: Probe, offered: Table) -> Proof:
    emptied = _emptied(kvm, probe, offered, 0)
    sights = {
        "offer": proof_arm64.sights(kvm, offered, offered.features),
        "emptied": proof_arm64.sights(kvm, emptied, offered.features),
    }
    return Proof(MODE_NAMES, sights, {}, _hidden(kvm, probe, offered))


def _emptied(kvm: Kvm, probe: Probe, offered: Table, kept: int) -> Table:
    """As low as KVM takes it, without vCPU features but PSCI and those `kept`."""
    return proof_arm64.lowered(kvm, probe, offered.features & (PSCI_0_2 | kept), offered.models)


def _hidden(kvm: Kvm, probe: Probe, offered: Table, *, only: str = "") -> dict[str, str]:
    """The marks of all instructions that this CPU has and KVM can hide, and of those that KVM hides from all.

    SVE's own are tried on a guest that has SVE.
    """
    has = [feature for feature in _of_cpu(offered.values) if only in ("", feature)]
    found: dict[str, str] = {}
    for kept in (0, SVE):
        rows = [feature for feature in has if feature.startswith(_SVE_OWN) is bool(kept)]
        if not rows or kept & ~offered.features:
            continue
        table = _emptied(kvm, probe, offered, kept)
        hidden = [feature for feature in rows if not proof_arm64.has(feature, table.values)]
        if hidden:
            found.update(proof_arm64.instructions(kvm, offered, table, hidden, _of_host()))
    return found


def _of_cpu(offer: Mapping[str, int]) -> list[str]:
    """The features with an instruction that are offered, or that Linux found on this host."""
    flags = _of_host()
    return [feature for feature in CODE if proof_arm64.has(feature, offer) or feature in flags]


def _of_host() -> Collection[str]:
    """Features with an instruction that Linux lists in /proc/cpuinfo, of every CPU.

    Of those that have more than one place in ID registers (pointer authentication) none: the CPU has it in one.
    """
    flags = set(software.common_flags(one.flags for one in software.cpu_classes()).split())
    places = list(LINUX.values())
    return {feature for feature, flag in LINUX.items() if flag in flags and places.count(flag) == 1}
