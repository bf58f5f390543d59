# SPDX-License-Identifier: LGPL-2.1-or-later
"""What KVM on arm64 answered, as words. Pure: answers in, {word: value} out. The twin of x86.py.

    decoder().offer(probe)      what a new guest may be given
    decoder().settable(probe)   bits of registers that user space can change before a guest's first run
    decoder().dropped(probe)    bits of which KVM takes a change and does nothing

The vCPU that was probed has every feature that this host can give. Registers that hold a guest's state are no
words; registers that read zero are words with the value zero, for whether one exists decides what can move.
"""

from __future__ import annotations

from kvmneg.features import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvmneg.host.kvm_arm64 import Probe
    from kvmneg.host.software import CpuClass

ARCHITECTURE = words.ARM64

FEATURES = "arm:vcpu-features"
REGISTERS = "arm64:"
UNTESTED = "untested"  # kvmneg.host.enforcement, which would load more than a measurement needs
# Words of which each kind of core in a mixed host has its own: MIDR_EL1, REVIDR_EL1, AIDR_EL1, PMCR_EL0.
_OF_ONE_CORE = (0x603000000013C000, 0x603000000013C006, 0x603000000013C807, 0x603000000013DCE0)
# The PMU's fields: ID_AA64DFR0_EL1.PMUVer, ID_DFR0_EL1.PerfMon; and KVM_ARM_VCPU_PMU_V3, PMU_V3_STRICT.
_PMU = {
    "arm64:0x603000000013c028": 0xF << 8,
    "arm64:0x603000000013c00a": 0xF << 24,
    FEATURES: 1 << 3 | 1 << 9,
}


class _Words(dict[int, str]):
    """Register id → its word, made when first seen."""

    def __missing__(self, register: int) -> str:
        self[register] = word = f"arm64:{register:#x}"
        return word


class Decoder:
    """Addresses are formatted once: use `decoder()`."""

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words = _Words()

    def capabilities(self, answers: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """Every capability KVM has, as kvm: words. The VM's answer binds, /dev/kvm's where the VM refuses."""
        found = {name: vm if vm >= 0 else system for name, (system, vm) in answers.items()}
        return {f"kvm:{name}": answer for name, answer in found.items() if answer > 0}

    def offer(self, probe: Probe) -> dict[str, int]:
        """All words of one measurement."""
        named = self._words
        found = {named[trial.id]: trial.value for trial in probe.trials}
        found[FEATURES] = probe.vcpu_features
        found["arm:vgic-models"] = probe.vgic_models
        # the highest that is taken and read back, else the one it has
        revisions = probe.vgic_revisions or 1 << (probe.vgic_iidr >> 12 & 0xF)
        found["arm:vgic-revision"] = revisions.bit_length() - 1
        found["arm:smccc-filter"] = int(probe.smccc_filter)
        found["arm:pkvm"] = int(probe.protected_vms)
        found.update(self.capabilities(probe.capabilities.known()))
        return found

    def settable(self, probe: Probe) -> dict[str, int]:
        """Bits that were changed, read back and put back, by word; words without any are left out."""
        return {self._words[trial.id]: trial.settable for trial in probe.trials if trial.settable}

    def untested(self, offer: Mapping[str, int]) -> dict[str, str]:
        """The grades of a measurement: registers were changed and read back, of other words nothing is.

        What KVM takes and does not keep is `dropped`, which no contract asks for.
        """
        return {word: UNTESTED for word in sorted(offer, key=words.order) if not word.startswith(REGISTERS)}

    def dropped(self, probe: Probe) -> dict[str, int]:
        """Bits of which a change was taken without an error and without an effect."""
        return {self._words[trial.id]: trial.dropped for trial in probe.trials if trial.dropped}


_decoders: list[Decoder] = []


def decoder() -> Decoder:
    """The decoder of this process, made once."""
    if not _decoders:
        _decoders.append(Decoder())
    return _decoders[0]


def identity(classes: Sequence[CpuClass]) -> dict[str, str]:
    """MIDR_EL1's fields of the first kind of CPU, as /proc/cpuinfo has them."""
    return dict(classes[0].identity) if classes else {}


def met(offers: Sequence[dict[str, int]]) -> dict[str, int]:
    """One host of several kinds of core: what a guest gets that may run on any of them.

    Identification and PMU belong to one kind of core, and a guest is not bound to one: both are left out. The
    other words are the same on all (KVM shows what all cores have), or what their baseline holds.
    """
    if len(offers) == 1:
        return offers[0]
    shared = [_without_core(offer) for offer in offers]
    first, *others = shared
    if all(other == first for other in others):
        return first
    from kvmneg.features.featureset import FeatureSet, meet_all  # only for mixed CPUs

    common = meet_all(FeatureSet.of(ARCHITECTURE, one) for one in shared)
    return {
        word: value if all(other.get(word) == value for other in others) else common.value(word)
        for word, value in first.items()
        if all(word in other for other in others)
    }


def _without_core(offer: dict[str, int]) -> dict[str, int]:
    """An offer without what only one kind of core has."""
    rest = {word: value & ~_PMU.get(word, 0) for word, value in offer.items()}
    for register in _OF_ONE_CORE:
        rest.pop(f"arm64:{register:#x}", None)
    return rest


def settable_on_all(masks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Bits that can be changed on every kind of core."""
    first, *others = masks
    found = dict(first)
    for other in others:
        found = {word: both for word, bits in found.items() if (both := bits & other.get(word, 0))}
    return found


def dropped_on_any(masks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """Bits that some kind of core drops."""
    found: dict[str, int] = {}
    for one in masks:
        for word, bits in one.items():
            found[word] = found.get(word, 0) | bits
    return found


def on_all(lists: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Register ids that every kind of core has, rising."""
    first, *others = lists
    return tuple(sorted(set(first).intersection(*others)))
