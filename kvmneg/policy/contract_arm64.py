# SPDX-License-Identifier: LGPL-2.1-or-later
"""The arm64 sections of a contract's binary form: registers, portable state, initialisation flags. Pure.

kvmneg.policy.contract has the layout. Registers stand in the order in which a VMM sets them: vector lengths (before
KVM_ARM_VCPU_FINALIZE), ID registers (CTR_EL0 and CLIDR_EL1 first: cache sizes are judged by them), PMCR_EL0, the
workarounds (which depend on ID_AA64PFR1_EL1), the PSCI version, hypercall bitmaps. Initialisation flags repeat the
bits of arm:vcpu-features, so that a VMM need not look for a capability.
"""

from __future__ import annotations

import struct

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.policy import portable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from kvmneg.features.featureset import FeatureSet
    from kvmneg.policy.portable import Entry

REGISTER = struct.Struct("<QQQ")
PORTABLE = struct.Struct("<IIQQ")
FLAG = struct.Struct("<I")
INIT = "arm:vcpu-features"
_PREFIX = "arm64:"
_A_REGISTER = 1  # the kind of portable state that there is
_CTR, _CLIDR, _PMCR = 0x6030_0000_0013_D801, 0x6030_0000_0013_C801, 0x6030_0000_0013_DCE0
_PSCI = 0x6030_0000_0014_0000
# coprocessor of a register's id (KVM_REG_ARM_COPROC_MASK) → when it is set
_STAGES = {0x15: 0, 0x13: 1, 0x11: 1, 0x14: 3, 0x16: 5}
_LAST = 6


def place(register: int) -> tuple[int, int, int]:
    """Sort key of a register in the order of application."""
    if register == _PMCR:
        return 2, 0, register
    if register == _PSCI:
        return 4, 0, register
    first = (_CTR, _CLIDR).index(register) if register in (_CTR, _CLIDR) else 2
    return _STAGES.get(register >> 16 & 0xFFF, _LAST), first, register


def registers(bound: Mapping[str, tuple[int, int]]) -> list[bytes]:
    """The register section."""
    rows = [
        (int(word[len(_PREFIX) :], 16), *pair) for word, pair in bound.items() if word.startswith(_PREFIX)
    ]
    return [REGISTER.pack(*row) for row in sorted(rows, key=lambda row: place(row[0]))]


def decode_registers(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(word, value, mask) of each entry. Raises ValueError on what is never written."""
    before: tuple[int, int, int] | None = None
    for register, value, mask in REGISTER.iter_unpack(data):
        here = place(register)
        if not mask or (before is not None and before >= here):
            raise ValueError("a register is not at its place, or binds nothing")
        before = here
        yield words.register_word(register), value, mask


def flags(bound: Mapping[str, tuple[int, int]]) -> list[bytes]:
    """The initialisation flags: the numbers of the KVM_ARM_VCPU_* bits to give to KVM_ARM_VCPU_INIT."""
    value = bound.get(INIT, (0, 0))[0]
    return [FLAG.pack(number) for number in range(value.bit_length()) if value >> number & 1]


def portable_section(entries: tuple[Entry, ...]) -> list[bytes]:
    """The portable state."""
    return [
        PORTABLE.pack(_A_REGISTER, 1 + portable.RULES.index(entry.rule), entry.register, entry.value)
        for entry in sorted(entries)
    ]


def decode_portable(data: bytes) -> tuple[Entry, ...]:
    """The portable state back. Raises ValueError on what is never written."""
    found = []
    before = -1
    for kind, rule, register, value in PORTABLE.iter_unpack(data):
        if kind != _A_REGISTER or not 0 < rule <= len(portable.RULES) or register <= before:
            raise ValueError("an entry of the portable state is not one that this version writes")
        name = portable.RULES[rule - 1]
        if value and name != portable.DROP_IF:
            raise ValueError("an entry of the portable state has a value without use")
        before = register
        found.append(portable.Entry(register, name, value))
    return tuple(found)


def portable_of_json(document: object, most: int) -> tuple[Entry, ...]:
    """The portable state of a JSON contract. Raises ValueError."""
    if document is None:
        return ()
    if not isinstance(document, dict) or len(document) > most:
        raise ValueError(f"portable is no object of up to {most} registers")
    return tuple(sorted(portable.Entry.parse(word, text) for word, text in document.items()))


def to_json(granted: FeatureSet, entries: tuple[Entry, ...]) -> dict[str, Any]:
    """What a JSON contract has besides: the vCPU features to initialize with, by name, and the portable state."""
    if granted.architecture != words.ARM64:
        return {}
    given = catalogs.names(words.ARM64).at(INIT, granted.value(INIT))
    return {
        "init": [feature.name.removeprefix("vcpu-") for feature in given],
        **({"portable": {one.word(): one.text() for one in entries}} if entries else {}),
    }
