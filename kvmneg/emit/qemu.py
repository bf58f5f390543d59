# SPDX-License-Identifier: LGPL-2.1-or-later
"""A contract as QEMU arguments: an explicit machine type, and `-cpu base,…,enforce=on`. Pure.

`base` is QEMU's only static CPU model: its defaults depend neither on KVM nor on the host, so what is not
named is off. QEMU names a part of what a contract grants; the rest is listed, never dropped in silence.
Source of the property names: the catalogue, and the installed build (QMP device-list-properties of
base-x86_64-cpu). x-force-features, which tells a guest of features that are not there, is never written.
"""

from __future__ import annotations

from kvmneg.emit import qemu_vmx
from kvmneg.errors import Blocked, UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.difference import Blocker
from kvmneg.policy import rates
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmneg.features.catalog import Feature
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.policy.contract import Contract

# Told as family, model, stepping and vendor.
_SIGNATURE = "cpuid:0x1.0.eax"
_VENDOR = ("cpuid:0x0.0.ebx", "cpuid:0x0.0.edx", "cpuid:0x0.0.ecx")
# AMD repeats leaf 1 EDX in 0x80000001 EDX; QEMU writes these copies for the vendors that have them.
_COPIES = "cpuid:0x80000001.0.edx"
_COPYING_VENDORS = ("AuthenticAMD", "HygonGenuine")
# What QEMU works out from the rest: the vendor and signature again, the linear address width (la57), XSAVE
# components and their layout from the features that use them.
_DERIVED = (
    "cpuid:0xd.",
    "cpuid:0x80000000.",
    "cpuid:0x80000001.0.eax",
    "cpuid:0x1.0.ebx",
    _SIGNATURE,
    *_VENDOR,
)
_LA57 = 1 << 16
# What is no CPU property: QEMU asks KVM for capabilities, and for machine-check banks, itself.
_OUTSIDE = ("kvm:", "tap:", "vhost-net:", "state:", "tsc:", "msr:0x179")
# QEMU takes PDCM away in silence unless it gives the guest a PMU of its own choice (target/i386/cpu.c, leaf 1).
_DROPPED = {"pdcm": "without a PMU QEMU takes it away, and its PMU is all of KVM's or none"}

# QEMU takes it with kernel-irqchip=split only (target/i386/kvm/kvm.c, kvm_arch_get_supported_cpuid).
_EXTENDED_MSI = "kvm-msi-ext-dest-id"

UNNAMED = "unnamed"  # QEMU has no name for it, as far as the catalogue knows
UNKNOWN = "unknown"  # this build of QEMU does not know the name
SHARED = "shared"  # QEMU's name stands for more than was granted
OUTSIDE = "outside"  # no CPU property: QEMU asks KVM itself
DERIVED = "derived"  # QEMU works it out from the rest: nothing is lost, and it is not listed
_VMX_KINDS = {qemu_vmx.FOLLOWS: DERIVED, qemu_vmx.KVM: OUTSIDE, qemu_vmx.LOST: UNNAMED}


class LeftOut(NamedTuple):
    """A granted feature that is not in the arguments; `kind` is one of the constants above, but DERIVED."""

    feature: str
    word: str
    bit: int | None
    kind: str
    because: str

    def to_json(self) -> dict[str, object]:
        return dict(zip(self._fields, self, strict=True))


class Emission(NamedTuple):
    """QEMU arguments, ready for execve, and what of the contract they do not carry."""

    machine: str
    cpu: str
    accelerator: str
    left_out: tuple[LeftOut, ...]

    @property
    def arguments(self) -> list[str]:
        # 15-bit APIC ids in MSI addresses are for QEMU's own I/O APIC to read
        split = ",kernel-irqchip=split" if f",{_EXTENDED_MSI}=on" in self.cpu else ""
        return ["-machine", self.machine + split, "-accel", self.accelerator, "-cpu", self.cpu]

    def lost(self) -> tuple[LeftOut, ...]:
        """What the guest was granted and will not see."""
        return tuple(row for row in self.left_out if row.kind in (UNNAMED, UNKNOWN, SHARED))

    def to_json(self) -> dict[str, object]:
        return {
            "arguments": self.arguments,
            "machine": self.machine,
            "accelerator": self.accelerator,
            "cpu": self.cpu,
            "left_out": [row.to_json() for row in self.left_out],
        }


def emit(
    contract: Contract,
    machine: str,
    *,
    known: frozenset[str] | None = None,
    host: FeatureSet | None = None,
    accelerator: str = "kvm",
) -> Emission:
    """The arguments for a contract.

    `machine` is an explicit, versioned machine type ("pc-q35-7.2"): an alias would change CPU bits with the
    next QEMU. `known` are the properties that the build to be started has (None: not asked, every name is
    used). `host` is what this host offers: with enforce=on QEMU refuses a property that the host lacks,
    whatever the bit means, so an or-bit that the guest must be told and the host has not raises Blocked
    with cause "vmm". Raises UsageError for a machine type without a version. arm64: kvmneg.emit.qemu_arm64.
    """
    check_machine(machine)
    if contract.architecture == words.ARM64:
        from kvmneg.emit import qemu_arm64  # its twin

        model = qemu_arm64.cpu(contract, known, host)
        return Emission(f"{escape(machine)},gic-version=3", model, accelerator, ())
    values = contract.words()
    properties, left_out = _properties(values, known)
    if host is not None:
        _refuse_absent(properties, values, host)
    if khz := rates.pinned(contract.granted):  # without it QEMU takes this host's rate, and blocks migration
        properties["tsc-frequency"] = str(khz * 1000)
    cpu = ",".join(
        ["base", *_identity(values), *(f"{name}={value}" for name, value in properties.items()), "enforce=on"]
    )
    return Emission(escape(machine), cpu, accelerator, tuple(left_out))


def check_machine(machine: str) -> None:
    """Raises UsageError for a machine type that names no version (q35, pc): it means another one tomorrow."""
    if not any(character.isdigit() for character in machine.rpartition("-")[2]) or "-" not in machine:
        raise UsageError(
            f"machine type {machine!r} has no version",
            hint="name one like pc-q35-7.2: it decides CPU bits too",
        )


def escape(text: str) -> str:
    """A value inside a comma-separated QEMU option: commas are doubled."""
    return text.replace(",", ",,")


def _identity(values: dict[str, int]) -> list[str]:
    parts = []
    letters = b"".join(values.get(word, 0).to_bytes(4, "little") for word in _VENDOR)
    if any(letters):
        parts.append(f"vendor={escape(letters.decode('latin-1'))}")
    signature = values.get(_SIGNATURE, 0)
    if signature:
        family, model, stepping = family_model_stepping(signature)
        parts += [f"family={family}", f"model={model}", f"stepping={stepping}"]
    return parts


def family_model_stepping(signature: int) -> tuple[int, int, int]:
    """CPUID 1.EAX as people write it (Intel SDM vol. 2A: the extended fields count in families 6 and 15)."""
    family, model = signature >> 8 & 0xF, signature >> 4 & 0xF
    if family in (0x6, 0xF):
        model |= signature >> 12 & 0xF0
    if family == 0xF:
        family += signature >> 20 & 0xFF
    return family, model, signature & 0xF


def _granted(values: dict[str, int]) -> Iterable[Feature]:
    """Every feature that has a value, in the order of addresses."""
    table = catalogs.names(words.X86_64)
    for word, value in values.items():
        yield from table.within(word, value)


def _properties(values: dict[str, int], known: frozenset[str] | None) -> tuple[dict[str, str], list[LeftOut]]:
    """The properties to set, in the order of addresses, and the features that have none."""
    several = _names_of_several()
    granted = {feature.name: feature for feature in _granted(values)}
    reasons = {name: _why_not(feature, values, known, several) for name, feature in granted.items()}
    for name, feature in granted.items():
        base = qemu_vmx.without_base(feature, granted)
        if base and not reasons[name][0]:
            reasons[name] = UNNAMED, f"QEMU has it with {base} only, which is not granted"
    properties: dict[str, str] = {}
    left_out = []
    for name, feature in granted.items():
        kind, because = reasons[name]
        base = "" if kind else _lost_base(feature, granted, reasons)
        if base:
            # enforce=on: QEMU refuses to start with a feature whose base it was not asked for
            kind, because = UNNAMED, f"it is built on {base}, which QEMU is not given"
        number = feature.of(values.get(feature.word, 0))
        if not kind:
            properties[feature.qemu] = (
                "on" if feature.width == 1 else f"{number:#x}" if number >= 1 << 31 else str(number)
            )
        elif kind != DERIVED:
            bit = feature.shift if feature.width == 1 else None
            left_out.append(LeftOut(feature.name, feature.word, bit, kind, because))
    return properties, left_out


def _lost_base(feature: Feature, granted: dict[str, Feature], reasons: dict[str, tuple[str, str]]) -> str:
    """The name of a granted feature that this one is built on, at whatever distance, and that is lost."""
    waiting = [name for name, _least in feature.bases]
    seen = set()
    while waiting:
        name = waiting.pop()
        if name in granted and name not in seen:
            seen.add(name)
            if reasons[name][0] in (UNNAMED, UNKNOWN, SHARED):
                return name
            waiting += [base for base, _least in granted[name].bases]
    return ""


def _names_of_several() -> dict[str, list[Feature]]:
    """QEMU's names that stand for more than one feature (kvmclock is two bits)."""
    found: dict[str, list[Feature]] = {}
    for feature in catalogs.names(words.X86_64).by_name.values():
        if feature.qemu:
            found.setdefault(feature.qemu, []).append(feature)
    return {name: features for name, features in found.items() if len(features) > 1}


def _why_not(
    feature: Feature, values: dict[str, int], known: frozenset[str] | None, several: dict[str, list[Feature]]
) -> tuple[str, str]:
    """(kind, because) of a feature that gets no argument of its own, ("", "") of one that does."""
    if feature.word.startswith(_OUTSIDE):
        return OUTSIDE, "QEMU asks KVM for it itself"
    if not feature.qemu:
        kind, because = qemu_vmx.treated(feature, values, known) or (
            qemu_vmx.LOST,
            "QEMU has no property for it",
        )
        return (DERIVED, "") if _follows(feature, values) else (_VMX_KINDS[kind], because)
    if feature.name in _DROPPED:
        return UNNAMED, _DROPPED[feature.name]
    if known is not None and feature.qemu not in known:
        return UNKNOWN, f"this QEMU does not know {feature.qemu}"
    missing = [
        other.name for other in several.get(feature.qemu, ()) if not other.of(values.get(other.word, 0))
    ]
    if missing:
        return SHARED, f"{feature.qemu} would also turn on {', '.join(missing)}, which is not granted"
    return "", ""


def _follows(feature: Feature, values: dict[str, int]) -> bool:
    if feature.word == _COPIES:
        letters = b"".join(values.get(word, 0).to_bytes(4, "little") for word in _VENDOR).decode("latin-1")
        return letters in _COPYING_VENDORS
    if feature.name == "linear-bits":  # 57 with la57, 48 else (QEMU target/i386/cpu.c, leaf 0x80000008)
        return feature.of(values.get(feature.word, 0)) == (
            57 if values.get("cpuid:0x7.0.ecx", 0) & _LA57 else 48
        )
    return feature.word.startswith(_DERIVED)


def _refuse_absent(properties: dict[str, str], values: dict[str, int], host: FeatureSet) -> None:
    """Raise Blocked for every property that QEMU would refuse on this host."""
    blockers = []
    for feature in _granted(values):
        bit = feature.rule in rules.BITWISE or feature.is_bit
        if feature.qemu not in properties or feature.width > 1 or not bit:
            continue
        bottom_is_set = feature.rule == rules.OR and feature.word not in host.words
        if bottom_is_set or not feature.of(host.value(feature.word)):
            because = f"QEMU with enforce=on refuses {feature.qemu}, which this host does not have"
            blockers.append(
                Blocker(
                    feature.name,
                    feature.word,
                    feature.shift,
                    "the contract",
                    "QEMU on this host",
                    "vmm",
                    because,
                )
            )
    if blockers:
        raise Blocked(f"QEMU would refuse {len(blockers)} of the contract's features on this host", blockers)
