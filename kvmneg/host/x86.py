# SPDX-License-Identifier: LGPL-2.1-or-later
"""What KVM on x86 answered, decoded to words. Pure: answers in, {word: value} out. The twin of arm64.py.

    decoder().offer(probe)   what a new guest may be given: KVM_GET_SUPPORTED_CPUID and the rest of a probe
    silicon_of([raw, …])     what the CPUID instruction says

Every CPUID word and capability of the catalogue is explicit: a leaf that KVM does not list reads zero for a
guest (api.rst 4.46), so it is zero here. Words that nobody catalogued are kept too, unless they are zero,
so that a report shows what a newer kernel brought. Whole leaves that the catalogue gives to the VMM or to
nobody (caches, topology, brand string) are left out: they differ from CPU to CPU and decide nothing.

KVM_GET_EMULATED_CPUID is left out as well: what it lists (MOVBE, x2APIC, RDPID where the CPU lacks them)
works by slow emulation; a guest that was given it by default would run slowly where it thinks it runs fast.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from kvmneg.host.tables import Capabilities, CpuidEntry, Probe

ARCHITECTURE = words.X86_64

# "KVMKVMKVM\0\0\0" in EBX, ECX, EDX (KVM_SIGNATURE in asm/kvm_para.h; Documentation/virt/kvm/x86/cpuid.rst)
_SIGNATURE = (0x4B4D564B, 0x564B4D56, 0x4D)
_HYPERVISOR = 0x40000000
_HYPERVISOR_END = 0x40010000

# What VMMs give by themselves, and kernels list or not: the answer must not depend on the kernel's habit.
#   word, bit, the capability that decides; "" is always
_GIVEN_BY_VMMS = (
    ("cpuid:0x1.0.ecx", 31, ""),  # hypervisor: every KVM guest is one
    ("cpuid:0x1.0.ecx", 24, "tsc-deadline-timer"),  # KVM emulates it; listed from Linux 6.18
)
# Fields that say which CPU answered: CPUID leaf 1 EBX[31:16], initial APIC id and logical CPUs.
_PER_CPU = {"cpuid:0x1.0.ebx": 0x0000_FFFF}

_VMX = 1 << 5  # of CPUID leaf 1 ECX
_EVERY_32 = (1 << 32) - 1
# MSR_IA32_MCG_CAP, which is no feature MSR
_MCG_CAP = "msr:0x179"
# tsc_tolerance_ppm of Linux arch/x86/kvm/x86.c where nobody set it, and the most that libkvmneg applies
TOLERANCE_PPM = 250

_Row = tuple[str, str, str, str]  # the words of EAX, EBX, ECX, EDX; "" for one that is not kept


class _Rows(dict[tuple[int, int], _Row]):
    """(leaf, subleaf) → the words to keep of it, made when first seen: addresses are formatted once."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind
        self._catalog = catalogs.load(ARCHITECTURE)

    def __missing__(self, key: tuple[int, int]) -> _Row:
        eax, ebx, ecx, edx = (
            self._kept(words.cpuid_word(*key, name, self._kind)) for name in words.REGISTERS
        )
        self[key] = row = eax, ebx, ecx, edx
        return row

    def _kept(self, word: str) -> str:
        known = word in self._catalog.words or self._catalog.leaf_rule(word) is None
        return word if known else ""


class Decoder:
    """The catalogue, arranged by what KVM answers. Use `decoder()`: making one is a pass over all words."""

    __slots__ = (
        "_capabilities", "_carried", "_cpuid", "_hyperv", "_hyperv_zero", "_names", "_state_capabilities",
        "_zero",
    )  # fmt: skip

    def __init__(self) -> None:
        known = catalogs.load(ARCHITECTURE).words
        self._cpuid = _Rows("cpuid")
        self._hyperv = _Rows("hyperv")
        self._zero = {word: 0 for word in known if word.startswith("cpuid:")}
        self._hyperv_zero = {word: 0 for word in known if word.startswith("hyperv:")}
        self._capabilities = tuple(word for word in known if word.startswith("kvm:"))
        self._names = tuple(word[4:] for word in self._capabilities)
        self._state_capabilities = catalogs.load(ARCHITECTURE).state_capabilities
        # one KVM lists the same at each measurement
        self._carried: dict[tuple[int, ...], dict[str, int]] = {}

    def cpuid(self, entries: Sequence[CpuidEntry]) -> dict[str, int]:
        """cpuid: words of a KVM_GET_SUPPORTED_CPUID table, the paravirtual leaf as based at 0x40000000."""
        found = self._zero.copy()
        _fill(found, self._cpuid, _based(entries))
        for word, mask in _PER_CPU.items():
            found[word] &= mask
        return found

    def hyperv(self, entries: Sequence[CpuidEntry]) -> dict[str, int]:
        """hyperv: words of a KVM_GET_SUPPORTED_HV_CPUID table."""
        found = self._hyperv_zero.copy()
        _fill(found, self._hyperv, entries)
        return found

    def capabilities(self, answers: Capabilities | dict[str, tuple[int, int]]) -> dict[str, int]:
        """kvm: words that the catalogue has. The VM's answer binds, /dev/kvm's where the VM refuses."""
        if isinstance(answers, dict):
            both = (answers.get(name, (0, 0)) for name in self._names)
            binding: Iterable[int] = [vm if vm >= 0 else system for system, vm in both]
        else:
            binding = answers.binding(self._names)
        found = dict(zip(self._capabilities, binding, strict=True))
        if min(binding) < 0:
            found = {word: answer for word, answer in found.items() if answer >= 0}
        return found

    def state(self, indices: tuple[int, ...]) -> dict[str, int]:
        """state: words of KVM_GET_MSR_INDEX_LIST. An MSR that nobody catalogued is a word of its own."""
        found = self._carried.get(indices)
        if found is None:
            classes = catalogs.load(ARCHITECTURE).state_msrs
            found = dict.fromkeys((word for word, _ in classes.values()), 0)
            for index in indices:
                word, bit = classes.get(index) or (f"state:msr-{index:#x}", 1)
                found[word] = found.get(word, 0) | bit
            self._carried = {indices: found}
        return found

    def _add_state(self, found: dict[str, int], probe: Probe) -> None:
        """What a guest carries, by the capabilities that are in `found` already."""
        if probe.state_msrs is not None:
            found.update(self.state(probe.state_msrs))
        found["state:vcpu"] = 0
        for word, bit, capability, mask in self._state_capabilities:
            if found.get(capability, 0) & mask:
                found[word] |= bit
        # one size for the format of the module that is loaded; which that is, the guest's CPUID tells
        vmx = found["cpuid:0x1.0.ecx"] & _VMX
        found["state:nested"] = found.get("kvm:nested-state", 0) << (0 if vmx else 32)

    def offer(self, probe: Probe, tolerance_ppm: int = TOLERANCE_PPM) -> dict[str, int]:
        """All words of one measurement; `tolerance_ppm` is the parameter tsc_tolerance_ppm of KVM's module."""
        found = self.cpuid(probe.supported)
        if probe.hyperv is not None:
            found.update(self.hyperv(probe.hyperv))
        for index, value in probe.feature_msrs.items():
            found[_msr_word(index)] = value
        found.update(self.capabilities(probe.capabilities))
        if probe.mce_cap is not None:
            found[_MCG_CAP] = probe.mce_cap | found.get("kvm:mce", 0) & 0xFF
        if probe.tsc is not None:
            found["tsc:khz"] = tsc_rates(*probe.tsc, tolerance_ppm)
        self._add_state(found, probe)
        if probe.xcomp_guest_supp is not None:
            # XCR0 bits that arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM) would not give are no offer
            found["cpuid:0xd.0.eax"] &= probe.xcomp_guest_supp
            found["cpuid:0xd.0.edx"] &= probe.xcomp_guest_supp >> 32
        for word, bit, capability in _GIVEN_BY_VMMS:
            given = not capability or found.get(f"kvm:{capability}", 0) != 0
            found[word] = found[word] | 1 << bit if given else found[word] & ~(1 << bit)
        return found

    def silicon(self, raw: Sequence[CpuidEntry]) -> dict[str, int]:
        """cpuid: words that are not zero on the CPU itself, without a lower hypervisor's leaves."""
        found: dict[str, int] = {}
        own = (entry for entry in raw if not _HYPERVISOR <= entry[0] < _HYPERVISOR_END)
        _fill(found, self._cpuid, own)
        for word, mask in _PER_CPU.items():
            if word in found:
                found[word] &= mask
        return found


def tsc_rates(khz: int, max_khz: int, tolerance_ppm: int) -> int:
    """The rates in kHz that a guest can be given: the lowest, and above bit 32 the highest; 0 where none is known.

    A host that scales gives every rate from 1 kHz up to `max_khz`. One that does not gives its own, and takes as
    its own what lies within the tolerance (kvm_set_tsc_khz in arch/x86/kvm/x86.c, and its rounding). Higher rates
    it takes too, and then moves the guest's clock in jumps: no rate to promise.
    """
    if not khz:
        return 0
    if max_khz:
        return max_khz << 32 | 1
    low, high = (khz * (1_000_000 + ppm) // 1_000_000 for ppm in (-tolerance_ppm, tolerance_ppm))
    return min(high, _EVERY_32) << 32 | max(low, 1)


def tolerance_ppm(combo: Mapping[str, Any]) -> int:
    """tsc_tolerance_ppm as the combo has it, TOLERANCE_PPM at most, and where nobody can read it.

    A wider one is not offered: libkvmneg, in a VMM that sees no /sys, cannot know of it, and without it a rate that
    far off is one for which KVM lets the guest's clock jump.
    """
    text = combo.get("modules", {}).get("kvm.tsc_tolerance_ppm", "")
    return min(int(text), TOLERANCE_PPM) if text.isdecimal() and len(text) < 8 else TOLERANCE_PPM


def _fill(found: dict[str, int], rows: _Rows, entries: Iterable[CpuidEntry]) -> None:
    """Put the registers that are not zero into `found`. Most entries of most tables are all zero."""
    for leaf, subleaf, _, eax, ebx, ecx, edx in entries:
        if eax or ebx or ecx or edx:
            row = rows[leaf, subleaf]
            if eax and row[0]:
                found[row[0]] = eax
            if ebx and row[1]:
                found[row[1]] = ebx
            if ecx and row[2]:
                found[row[2]] = ecx
            if edx and row[3]:
                found[row[3]] = edx


def _based(entries: Sequence[CpuidEntry]) -> Iterable[CpuidEntry]:
    """The entries with KVM's own leaves moved to 0x40000000, and other hypervisors' leaves left out."""
    ours = [entry for entry in entries if _HYPERVISOR <= entry[0] < _HYPERVISOR_END]
    base = next((entry[0] for entry in ours if entry[4:7] == _SIGNATURE and not entry[0] & 0xFF), 0)
    if base == _HYPERVISOR and all(entry[0] - base < 0x100 for entry in ours):
        return entries  # every kernel so far
    moved = [
        entry._replace(function=entry[0] - base + _HYPERVISOR)
        for entry in ours
        if 0 <= entry[0] - base < 0x100
    ]
    others = [entry for entry in entries if not _HYPERVISOR <= entry[0] < _HYPERVISOR_END]
    return others + (moved if base else [])


_msr_words: dict[int, str] = {}


def _msr_word(index: int) -> str:
    word = _msr_words.get(index)
    if word is None:
        word = _msr_words[index] = words.msr_word(index)
    return word


_decoders: list[Decoder] = []


def decoder() -> Decoder:
    """The decoder of this process, made once."""
    if not _decoders:
        _decoders.append(Decoder())
    return _decoders[0]


def identity(entries: Iterable[CpuidEntry]) -> dict[str, str]:
    """Vendor (leaf 0: EBX, EDX, ECX as letters) and signature (leaf 1 EAX) of what KVM shows to guests."""
    found = {}
    for entry in entries:
        if entry[0] == 0:
            letters = b"".join(register.to_bytes(4, "little") for register in (entry[4], entry[6], entry[5]))
            found["vendor"] = letters.decode("ascii", "replace")
        elif entry[0] == 1:
            found["signature"] = f"{entry[3]:#010x}"
    return found


def met(classes: Sequence[dict[str, int]]) -> dict[str, int]:
    """One host of several kinds of CPU: a word that all agree on as it is, else what their baseline holds.

    Canonical only where they differ; a word that only some of them have is at its rule's bottom.
    """
    if len(classes) == 1:
        return classes[0]
    from kvmneg.features.featureset import FeatureSet, meet_all  # only for mixed CPUs

    common = meet_all(FeatureSet.of(ARCHITECTURE, one) for one in classes)
    first, *others = classes
    every = {word: None for one in classes for word in one}
    alike = {word for word in first if all(other.get(word) == first[word] for other in others)}
    for lead, rest in catalogs.load(ARCHITECTURE).groups:
        if not alike.issuperset(every.keys() & {lead, *rest}):
            alike -= {lead, *rest}  # one value together
    return {word: first[word] if word in alike else common.value(word) for word in every}


def silicon_of(classes: Sequence[Sequence[CpuidEntry]]) -> dict[str, int]:
    """What every CPU class has, bit by bit: silicon explains why a bit is missing, it grants nothing."""
    first, *others = [decoder().silicon(raw) for raw in classes]
    for other in others:
        first = {word: both for word in first if (both := first[word] & other.get(word, 0))}
    return first
