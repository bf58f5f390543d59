# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's CPUID with Hyper-V's leaves: they have 0x40000000 and on, KVM's own move behind them. Pure.

    beside(entries, hyperv)    both in one table
    named(entries)             (leaf, subleaf) → its registers as contracts address them

As QEMU and libkvmneg place them (csrc/x86-clamp.c), and where Linux looks for KVM's signature: at each 0x100 from
0x40000000 on (Documentation/virt/kvm/x86/cpuid.rst; Hyper-V TLFS 2.4).
"""

from __future__ import annotations

from kvmneg.features import words
from kvmneg.host import enforcement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvmneg.host.enforcement import Registers
    from kvmneg.host.tables import CpuidEntry

    Bound = Mapping[str, tuple[int, int]]

BASE, MOVED = 0x40000000, 0x40000100
INTERFACE = 0x31237648  # "Hv#1", EAX of leaf 0x40000001
SPACE = "hyperv:"


class _Beside(enforcement.Registers):
    """Those of a table that `beside` made."""

    def __missing__(self, key: tuple[int, int]) -> tuple[tuple[str, int, int], ...]:
        leaf, subleaf = key
        if BASE <= leaf < MOVED:
            row = tuple(enforcement.register(word(leaf, subleaf, name)) for name in words.REGISTERS)
        else:
            row = enforcement.registers[leaf - MOVED + BASE if moved(leaf) else leaf, subleaf]
        self[key] = row
        return row


_beside = _Beside()


def word(leaf: int, subleaf: int, register: str) -> str:
    """hyperv:0x40000003.0.eax"""
    return SPACE + words.cpuid_word(leaf, subleaf, register).removeprefix("cpuid:")


def moved(leaf: int) -> bool:
    return MOVED <= leaf < 2 * MOVED - BASE


def named(entries: Iterable[CpuidEntry]) -> Registers:
    """How the registers of a table are addressed: with Hyper-V's leaves in it, or without."""
    return _beside if shown(entries) else enforcement.registers


def shown(entries: Iterable[CpuidEntry]) -> bool:
    """Whether a guest with this table finds Hyper-V."""
    return any(entry[0] == BASE + 1 and entry.eax == INTERFACE for entry in entries)


def wanted(bound: Bound) -> bool:
    """Whether a contract shows its guest Hyper-V: any of its words is granted."""
    return any(value for name, (value, _mask) in bound.items() if name.startswith(SPACE))


def place(name: str, *, both: bool) -> tuple[int, int]:
    """(leaf, subleaf) at which a cpuid: or hyperv: word stands in a table with both hypervisors, or with KVM alone."""
    leaf, subleaf, _ = words.parse_cpuid(name)
    ours = both and BASE <= leaf < MOVED and not name.startswith(SPACE)
    return leaf - BASE + MOVED if ours else leaf, subleaf


def beside(entries: Sequence[CpuidEntry], hyperv: Sequence[CpuidEntry]) -> list[CpuidEntry]:
    """A table with both: KVM's leaves are moved, its highest leaf says so."""
    found = []
    for entry in entries:
        if BASE <= entry[0] < MOVED:
            eax = entry.eax - BASE + MOVED if entry[0] == BASE and entry.eax >= BASE else entry.eax
            entry = entry._replace(function=entry[0] - BASE + MOVED, eax=eax)  # noqa: PLW2901
        found.append(entry)
    return sorted([*found, *hyperv], key=lambda entry: entry[:2])
