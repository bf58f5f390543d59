# SPDX-License-Identifier: LGPL-2.1-or-later
"""What this arm64 KVM was found to be, for tests that expect what follows from it, and not from its version."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, NamedTuple

import pytest

from kvmneg.host import kvm_arm64

from .arm64_guest import BITMAPS, SVE, sysreg

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.host.kvm import Kvm
    from kvmneg.host.kvm_arm64 import Probe, Trial

ON_ARM64 = [
    pytest.mark.kvm,
    pytest.mark.skipif(platform.machine() != "aarch64", reason="these registers are arm64's"),
]

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
