# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each of Debian's kernels was measured to be: the probe must say the same of it.

Keyed by the kernel's release, for these are records of kernels; what follows from facts is in the other files.
Counts are those of QEMU's `-cpu max`, whose MIDR part is 0x051.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, NamedTuple

import pytest

from .arm64_facts import MMFR2, Facts, facts
from .arm64_guest import MIDR, PSCI_0_2, STD, STD_HYP, VENDOR_HYP, VENDOR_HYP_2, Vm

if TYPE_CHECKING:
    from kvmneg.host.kvm import Kvm

pytestmark = pytest.mark.kvm

_MAX_PART = 0x051
_THREE = {STD: 1, STD_HYP: 1, VENDOR_HYP: 3}
_FOUR = {**_THREE, VENDOR_HYP_2: 3}


class Measured(NamedTuple):
    """One kernel."""

    base: int  # registers of a vCPU with PSCI_0_2
    full: int  # and of one with PMU, SVE, pointer authentication and a vGIC
    psci: int
    bitmaps: dict[int, int]
    masks: bool  # KVM_ARM_GET_REG_WRITABLE_MASKS
    smccc_filter: bool
    revisions: int  # of GICD_IIDR that can be set and read back, bit n: n


_NEWER = Measured(257, 360, 0x10003, _FOUR, True, True, 0b1000)
KERNELS = {
    "5.10": Measured(312, 341, 0x10000, {}, False, False, 0b0100),
    "6.1": Measured(242, 345, 0x10001, _THREE, False, False, 0b1100),
    "6.12": Measured(259, 362, 0x10001, _THREE, True, True, 0b1100),
    "6.16": _NEWER,
    "6.17": _NEWER,
    "6.18": _NEWER,
    "6.19": _NEWER,
    "7.0": _NEWER._replace(revisions=0b1100),
    "7.1": _NEWER._replace(revisions=0b1100),
    "7.2": _NEWER._replace(revisions=0b1100),
    "7.3": _NEWER._replace(full=361, revisions=0b1100),
}


@pytest.fixture
def found(kvm: Kvm) -> Facts:
    return facts(kvm)


@pytest.fixture
def measured(found: Facts) -> Measured:
    """The record of the kernel that runs; skips on one, or on a CPU, that was not measured."""
    version = ".".join(platform.release().split(".")[:2])
    if version not in KERNELS:
        pytest.skip(f"a kernel that was not measured: {platform.release()}")
    if found.trials[MIDR].reset >> 4 & 0xFFF != _MAX_PART:
        pytest.skip("a CPU that was not measured")
    return KERNELS[version]


def test_the_probe(kvm: Kvm, found: Facts, measured: Measured) -> None:
    probe = found.probe
    assert len(probe.register_list) == measured.full
    assert probe.psci_versions[-1] == measured.psci
    assert {register: found.trials[register].value for register in found.bitmaps} == measured.bitmaps
    assert any(trial.writable for trial in probe.trials) == measured.masks
    assert probe.smccc_filter == measured.smccc_filter
    assert probe.vgic_revisions == measured.revisions
    assert probe.vgic_models == 0b110
    assert probe.vcpu_features & 0x7F == 0x7F
    assert probe.init.target == 5  # KVM_ARM_TARGET_GENERIC_V8
    with Vm(kvm.fd) as vm:
        assert len(vm.vcpu(PSCI_0_2).registers()) == measured.base


def test_nested_virtualisation_reads_zero(found: Facts, measured: Measured) -> None:
    """ID_AA64MMFR2_EL1.NV is 0 from Linux 6.16 on, whatever the CPU has."""
    if measured.bitmaps == _FOUR:
        assert found.trials[MMFR2].value >> 24 & 0xF == 0
        assert not found.trials[MMFR2].settable >> 24 & 0xF
