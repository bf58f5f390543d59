# SPDX-License-Identifier: LGPL-2.1-or-later
"""The arm64 part of reading a Firecracker fingerprint: registers of KVM_GET_ONE_REG. Pure.

A fingerprint lists every register of a vCPU but core registers. Those that the catalogue knows are what KVM offers;
the whole list goes into the report too, as which registers there are decides whether a guest can move. What user
space can set is not in a fingerprint.
"""

from __future__ import annotations

from kvmneg.emit.imported import SUPPORTED
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.report import Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.emit.elements import Element
    from kvmneg.emit.imported import Measured

SOURCE = "firecracker-fingerprint"
NOTE = (
    "what KVM supports for a Firecracker guest: capabilities, what user space can set and vCPU features that "
    "Firecracker does not use are not in it"
)
_PSCI, _MIDR = "arm64:0x6030000000140000", "arm64:0x603000000013c000"
_IMPLEMENTERS = {0x41: "ARM", 0x46: "Fujitsu", 0x48: "HiSilicon", 0x61: "Apple", 0xC0: "Ampere"}
_SIZE = 52  # of a register, in KVM's ids: log2 of its bytes
# KVM_ARM_VCPU_* bits that a field of an ID register tells of; of the PMU it does not before Linux 5.12
_TOLD = (
    ("vcpu-sve", ("aa64pfr0-sve",)),
    ("vcpu-ptrauth-address", ("aa64isar1-apa", "aa64isar1-api", "aa64isar2-apa3")),
    ("vcpu-ptrauth-generic", ("aa64isar1-gpa", "aa64isar1-gpi", "aa64isar2-gpa3")),
)


def report(config: Element, combo: dict[str, Any], measured: Measured) -> Report:
    """The report of an arm64 fingerprint's "guest_cpu_config". Raises BadInput with the element's line."""
    values = _registers(config.member("reg_modifiers"))
    known = catalogs.load(words.ARM64).words
    offer = {}
    for register, value in values.items():
        word = words.register_word(register)
        if word in known:
            offer[word] = value & (1 << 64) - 1  # of SVE_VLS the first of 8: no CPU has longer vectors
    offer["arm:vcpu-features"] = _vcpu_features(offer)
    return Report(
        words.ARM64,
        measured=measured.section(SOURCE, SUPPORTED, NOTE),
        combo=combo,
        identity=_identity(offer),
        offer=offer,
        registers=tuple(sorted(values)),
    )


def _registers(modifiers: Element) -> dict[int, int]:
    found: dict[int, int] = {}
    for modifier in modifiers.items():
        address = modifier.member("addr")
        try:
            register = words.parse_register(address.text())
        except ValueError:
            raise address.wrong(f"{address.text()[:80]!r} is not a register's id") from None
        if register in found:
            raise modifier.wrong(f"register {register:#x} is there twice")
        # Firecracker writes no fewer than 128 bits, whatever the register's size
        value = modifier.member("bitmap").bitmap(max(128, 8 << (register >> _SIZE & 0xF)))
        if value >> (8 << (register >> _SIZE & 0xF)):
            raise modifier.wrong(f"more bits than register {register:#x} has")
        found[register] = value
    if not found:
        raise modifiers.wrong("no register in it")
    return found


def _vcpu_features(offer: dict[str, int]) -> int:
    names = catalogs.names(words.ARM64)
    bits = names.feature("vcpu-psci").mask if offer.get(_PSCI, 0) > 1 else 0
    for name, fields in _TOLD:
        told = (names.feature(field) for field in fields)
        if any(field.of(offer.get(field.word, 0)) for field in told):
            bits |= names.feature(name).mask
    return bits


def _identity(offer: dict[str, int]) -> dict[str, object]:
    """As /proc/cpuinfo names a CPU: implementer, part, variant, revision."""
    midr = offer.get(_MIDR, 0)
    implementer = midr >> 24 & 0xFF
    return {
        "vendor": _IMPLEMENTERS.get(implementer, f"implementer {implementer:#x}"),
        "midr": f"{midr:#010x}",
    }
