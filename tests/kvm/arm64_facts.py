# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this arm64 KVM was found to be, for tests that expect what follows from it, and not from its version."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvmneg.host import kvm_arm64

from .arm64_guest import BITMAPS, SVE, sysreg

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.host.kvm import Kvm
    from kvmneg.host.kvm_arm64 import Probe, Trial


ISAR0, ISAR1, PFR0 = sysreg(3, 0, 0, 6, 0), sysreg(3, 0, 0, 6, 1), sysreg(3, 0, 0, 4, 0)
PFR1, DFR0, MMFR0, MMFR1, MMFR2 = (
    sysreg(3, 0, 0, crm, op2) for crm, op2 in ((4, 1), (5, 0), (7, 0), (7, 1), (7, 2))
)
AA64 = (PFR0, PFR1, DFR0, ISAR0, ISAR1, MMFR0, MMFR1, MMFR2)  # ID registers of four bits a field


class Facts(NamedTuple):
    """One probe, by register."""

    probe: Probe
    trials: dict[int, Trial]

    @property
    def bitmaps(self) -> tuple[int, ...]:
        """The hypercall bitmaps that there are."""
        return tuple(register for register in BITMAPS if register in self.trials)

    @property
    def sve(self) -> bool:
        return bool(self.probe.vcpu_features & SVE)

    def capability(self, name: str) -> int:
        """The VM's answer."""
        return self.probe.capabilities.get(name)[1]

    @property
    def lowerable(self) -> list[tuple[int, int]]:
        """(register, shift) of the fields of AA64 that can be lowered: CSV2 and CSV3 before Linux 6.7, if any.

        Without GIC, which KVM says again at the first run, and EL0 and EL1, which must be there.
        """
        fields = (
            (register, shift)
            for register in AA64
            for shift, _ in nibbles(self.trials[register].reset & self.trials[register].settable)
        )
        return [field for field in fields if field not in ((PFR0, 24), (PFR0, 0), (PFR0, 4))]


_cache: list[Facts] = []


def facts(kvm: Kvm) -> Facts:
    """The probe of this KVM, made once."""
    if not _cache:
        probe = kvm_arm64.probe(kvm)
        _cache.append(Facts(probe, {trial.id: trial for trial in probe.trials}))
    return _cache[0]


def nibbles(value: int) -> Iterator[tuple[int, int]]:
    """(shift, value) of each field of four bits that is not zero."""
    for shift in range(0, 64, 4):
        if field := value >> shift & 0xF:
            yield shift, field
