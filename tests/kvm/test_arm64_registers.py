# SPDX-License-Identifier: LGPL-2.1-or-later
"""The register interface of KVM/arm64 as kvmneg relies on it: what each kernel under test really does."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from .arm64_facts import AA64, DFR0, ISAR0, PFR0, Facts, facts, nibbles
from .arm64_guest import (
    BITMAPS,
    CALLS,
    MIDR,
    PMU_V3,
    PSCI_0_2,
    PSCI_VERSION,
    PTRAUTH,
    SVE,
    SVE_VLS,
    U32,
    VENDOR_HYP_2,
    WORKAROUND_1,
    WORKAROUND_2,
    WORKAROUND_3,
    Vm,
    reads,
    tried,
)

if TYPE_CHECKING:
    from kvmneg.host.kvm import Kvm

pytestmark = pytest.mark.kvm
EINVAL, EBUSY, ENOENT, EPERM, ENOEXEC, EIO = (
    errno.EINVAL, errno.EBUSY, errno.ENOENT, errno.EPERM, errno.ENOEXEC, errno.EIO,
)  # fmt: skip
KVM_RUN = 0xAE80
FULL = PSCI_0_2 | PMU_V3 | SVE | PTRAUTH  # as the probe's vCPU, but for POWER_OFF


@pytest.fixture
def found(kvm: Kvm) -> Facts:
    """What this KVM is."""
    return facts(kvm)


def test_nothing_before_init(kvm: Kvm) -> None:
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(None)
        assert vcpu.get(PSCI_VERSION) == -ENOEXEC
        assert vcpu.set(PSCI_VERSION, 0x10000) == ENOEXEC


def test_first_get_is_the_reset_value(kvm: Kvm, found: Facts) -> None:
    """A vCPU of our own making shows what the probe saw first, and the trials left no trace on it."""
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(FULL & found.probe.vcpu_features)
        vm.vgic()
        trials = [trial for trial in found.probe.trials if trial.id != SVE_VLS]
        assert len(trials) > 60
        assert {trial.id: vcpu.get(trial.id) for trial in trials} == {
            trial.id: trial.reset for trial in trials
        }
        assert sorted(vcpu.registers()) == sorted(found.probe.register_list)


class TestBitmaps:
    """Hypercall bitmaps (Linux 5.19; the fourth 6.15)."""

    @pytest.mark.parametrize("register", BITMAPS)
    def test_before_the_first_run(self, kvm: Kvm, found: Facts, register: int) -> None:
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(PSCI_0_2)
            if register not in found.bitmaps:
                assert vcpu.get(register) == -ENOENT
                assert vcpu.set(register, 0) == ENOENT
                return
            limit = found.trials[register].value
            assert vcpu.get(register) == (0 if register == VENDOR_HYP_2 else limit)
            assert vcpu.set(register, limit) == 0
            for bit in range(64):
                assert vcpu.set(register, limit | 1 << bit) == (0 if limit >> bit & 1 else EINVAL), bit
                assert vcpu.get(register) == limit
            for bit in range(limit.bit_length()):
                assert vcpu.set(register, limit & ~(1 << bit)) == 0
                assert vcpu.get(register) == limit & ~(1 << bit)
            assert vcpu.set(register, 0) == 0
            assert vcpu.get(register) == 0
            assert vcpu._one("KVM_SET_ONE_REG", register ^ U32 ^ 0x6030000000000000, bytes(4))[0] == ENOENT

    @pytest.mark.parametrize("register", BITMAPS)
    def test_after_the_first_run(self, kvm: Kvm, found: Facts, register: int) -> None:
        """Frozen; what it has may be written again; an unsupported bit is refused for what it is."""
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(PSCI_0_2)
            vm.load(CALLS)
            assert vcpu.call(0x84000000) == (found.probe.psci_versions[-1], 0, 0, 0)
            if register not in found.bitmaps:
                assert vcpu.set(register, 0) == ENOENT
                return
            now, limit = vcpu.get(register), found.trials[register].value
            assert vcpu.set(register, now) == 0
            assert vcpu.set(register, now ^ 1) == EBUSY
            assert vcpu.set(register, limit | 1 << limit.bit_length()) == EINVAL
            assert vcpu.get(register) == now

    def test_they_are_the_vms(self, kvm: Kvm, found: Facts) -> None:
        """Two vCPUs share them; a vCPU that is made after the first run inherits them and cannot change them."""
        with Vm(kvm.fd) as vm:
            first = vm.vcpu(PSCI_0_2)
            second = vm.vcpu(PSCI_0_2)
            for register in found.bitmaps:
                assert first.set(register, 0) == 0
                assert second.get(register) == 0
            vm.load(CALLS)
            first.call(0x84000000)
            late = vm.vcpu(PSCI_0_2)
            for register in found.bitmaps:
                assert late.get(register) == 0
                assert late.set(register, 0) == 0
                assert late.set(register, 1) == EBUSY

    def test_init_again_keeps_them(self, kvm: Kvm, found: Facts) -> None:
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(PSCI_0_2)
            assert vcpu.set(PSCI_VERSION, 0x2) == 0
            for register in found.bitmaps:
                assert vcpu.set(register, 0) == 0
            assert vcpu.init(PSCI_0_2) == 0
            assert [vcpu.get(register) for register in found.bitmaps] == [0] * len(found.bitmaps)
            assert vcpu.get(PSCI_VERSION) == 0x2


class TestFirmware:
    """PSCI_VERSION and the workarounds."""

    def test_psci_versions(self, kvm: Kvm, found: Facts) -> None:
        versions = found.probe.psci_versions
        assert versions[:2] == (0x2, 0x10000)
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(PSCI_0_2)
            assert vcpu.get(PSCI_VERSION) == versions[-1]
            for version in (0, 0x1, 0x3, 0x1FFFF, 0x20000, versions[-1] + 1):
                assert vcpu.set(PSCI_VERSION, version) == EINVAL, hex(version)
            for version in versions:
                assert vcpu.set(PSCI_VERSION, version) == 0
                assert vcpu.get(PSCI_VERSION) == version

    def test_psci_is_not_frozen(self, kvm: Kvm, found: Facts) -> None:
        """It may be lowered under a running guest, who sees it at once."""
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(PSCI_0_2)
            vm.load(CALLS)
            for version in reversed(found.probe.psci_versions):
                assert vcpu.set(PSCI_VERSION, version) == 0
                assert vcpu.call(0x84000000) == (version, 0, 0, 0)

    def test_psci_without_its_feature(self, kvm: Kvm) -> None:
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(0)
            assert vcpu.set(PSCI_VERSION, 0x1) == 0
            assert vcpu.set(PSCI_VERSION, 0x10000) == EINVAL

    @pytest.mark.parametrize("register", [WORKAROUND_1, WORKAROUND_2, WORKAROUND_3])
    def test_workarounds_are_only_checked(self, kvm: Kvm, register: int) -> None:
        """A write at or below what the host has is taken and changes nothing; above it is refused."""
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(PSCI_0_2)
            before = vcpu.get(register)
            assert before >= 0
            for value in range(before + 1):
                assert vcpu.set(register, value) == 0
                assert vcpu.get(register) == before
            assert vcpu.set(register, 0x8) == EINVAL
            if register != WORKAROUND_2:  # of which the guest's SSBS decides
                assert all(vcpu.set(register, value) == EINVAL for value in range(before + 1, 4))
            assert vcpu.get(register) == before


class TestIdRegisters:
    """ID registers: PFR0.CSV2 and CSV3 in all kernels, most fields from Linux 6.7."""

    def test_lowered_and_raised(self, kvm: Kvm, found: Facts) -> None:
        """Each field: what the probe calls settable is lowered, what it does not is refused, none is raised."""
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(FULL & found.probe.vcpu_features)
            vm.vgic()
            lowered = 0
            for register in AA64:
                trial = found.trials[register]
                for shift, field in nibbles(trial.reset):
                    errors = {vcpu.set(register, trial.reset - (step << shift)) for step in (1, field)}
                    assert vcpu.set(register, trial.reset) == 0
                    if trial.settable >> shift & 0xF:
                        assert 0 in errors, (hex(register), shift)
                        lowered += 1
                    elif not trial.dropped >> shift & 0xF:
                        assert errors == {EINVAL}, (hex(register), shift)
            csv = found.trials[PFR0].reset >> 56
            assert lowered or not csv, "CSV2 and CSV3 can be lowered on every kernel from 5.10"
            for shift, field in nibbles(found.trials[ISAR0].reset):
                if field < 15:
                    assert vcpu.set(ISAR0, found.trials[ISAR0].reset + (1 << shift)) == EINVAL

    def test_the_guest_sees_it_and_it_freezes(self, kvm: Kvm, found: Facts) -> None:
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(FULL & found.probe.vcpu_features)
            vm.vgic()
            for register, shift in found.lowerable:
                field = found.trials[register].reset >> shift & 0xF
                # one step down, or all the way: some fields have a floor, some a safe value only
                assert any(vcpu.set(register, vcpu.get(register) - (n << shift)) == 0 for n in (1, field))
            wanted = [vcpu.get(register) for register in AA64]
            assert bool(found.lowerable) == (wanted != [found.trials[register].reset for register in AA64])
            vm.load(reads(*AA64))
            assert vcpu.run() == wanted
            for register, value in zip(AA64, wanted, strict=True):
                assert vcpu.set(register, value) == 0, "the same value is no change"
                reset = found.trials[register].reset
                if value != reset:
                    frozen = found.trials[register].writable != 0  # before Linux 6.7 CSV2 and CSV3 are not
                    assert vcpu.set(register, reset) == (EBUSY if frozen else 0)

    def test_writes_that_are_dropped(self, kvm: Kvm, found: Facts) -> None:
        """PMUVer 0xf, which old kernels showed for a PMU that KVM does not emulate, becomes no PMU."""
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(FULL & found.probe.vcpu_features)
            vm.vgic()
            reset = found.trials[DFR0].reset
            imp_def = reset | 0xF << 8
            if found.trials[DFR0].settable >> 8 & 0xF:
                assert vcpu.set(DFR0, imp_def) == 0
                assert vcpu.get(DFR0) == reset & ~(0xF << 8)
                assert vcpu.set(DFR0, reset) == 0
            else:
                assert vcpu.set(DFR0, imp_def) == EINVAL
            for register in AA64:
                trial = found.trials[register]
                for shift, _ in nibbles(trial.dropped):
                    rest = trial.reset & ~(0xF << shift)
                    taken = [value for value in range(16) if vcpu.set(register, rest | value << shift) == 0]
                    assert len(taken) > 1, "a value besides the one it has"
                    assert vcpu.get(register) == trial.reset

    def test_implementation_ids(self, kvm: Kvm, found: Facts) -> None:
        """MIDR can be another with capability 239 (Linux 6.15), enabled before the first vCPU."""
        other = found.trials[MIDR].reset ^ 0x00F0
        with Vm(kvm.fd) as vm:
            assert vm.vcpu(PSCI_0_2).set(MIDR, other) == EINVAL
        with Vm(kvm.fd, capability=239) as vm:
            vcpu = vm.vcpu(PSCI_0_2)
            if not found.capability("arm-writable-imp-id-regs"):
                assert vm.capability_error == EINVAL
                assert vcpu.set(MIDR, other) == EINVAL
                assert found.trials[MIDR].settable == 0
                return
            assert vm.capability_error == 0
            assert found.trials[MIDR].settable == 0xFFFF_FFFF
            assert vcpu.set(MIDR, other) == 0
            vm.load(reads(MIDR))
            assert vcpu.run() == [other]
            assert vcpu.set(MIDR, other ^ 0x00F0) == EBUSY
            assert vcpu.set(MIDR, other) == 0

    def test_init_again_keeps_them(self, kvm: Kvm, found: Facts) -> None:
        """And a vCPU that is made after the first run inherits them, where they are the VM's (Linux 6.7)."""
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(PSCI_0_2)
            register, shift = found.lowerable[0] if found.lowerable else (PFR0, 56)
            field = vcpu.get(register) >> shift & 0xF
            assert bool(field) == bool(found.lowerable)
            lowered = vcpu.get(register) - (field << shift)
            assert vcpu.set(register, lowered) == 0
            assert vcpu.init(PSCI_0_2) == 0
            assert vcpu.get(register) == lowered
            vm.load(reads(register))
            # a VM without a vGIC shows none once it ran; with one it would take no more vCPUs
            [seen] = vcpu.run()
            vgic = 0xF << 24 if register == PFR0 else 0
            assert (seen ^ lowered) & ~vgic == 0
            assert (vm.vcpu(PSCI_0_2).get(register) ^ lowered) & ~vgic == 0


class TestSve:
    """Lengths of SVE vectors: bit n of SVE_VLS is a length of n + 1 times 128 bits."""

    def test_none(self, kvm: Kvm) -> None:
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(PSCI_0_2)
            assert vcpu.get(SVE_VLS) == -ENOENT
            assert vcpu.set(SVE_VLS, 1) == ENOENT

    def test_before_and_after_finalize(self, kvm: Kvm, found: Facts) -> None:
        with Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(None)
            if not found.sve:
                assert vcpu.init(PSCI_0_2 | SVE) == EINVAL
                return
            assert vcpu.init(PSCI_0_2 | SVE) == 0
            every = vcpu.get(SVE_VLS)
            assert every == found.trials[SVE_VLS].reset
            assert tried(vcpu.fd, KVM_RUN) == EPERM
            with pytest.raises(PermissionError):
                vcpu.registers()
            assert vcpu.set(SVE_VLS, 0) == EINVAL
            assert vcpu.set(SVE_VLS, every | 1 << every.bit_length()) == EINVAL
            longest = every.bit_length() - 1
            if longest:
                assert vcpu.set(SVE_VLS, every & ~1) == EINVAL, "a hole"
                below = every & ~(1 << longest)
                assert vcpu.set(SVE_VLS, below) == 0
                assert vcpu.get(SVE_VLS) == below
                every = below
            assert vcpu.finalize() == 0
            assert vcpu.get(SVE_VLS) == every
            assert vcpu.set(SVE_VLS, every) == EPERM
            assert vcpu.finalize() == EPERM
            assert SVE_VLS in vcpu.registers()


def test_only_the_process_that_made_it(kvm: Kvm) -> None:
    """Nobody but the VMM itself can apply anything: KVM answers EIO to another process."""
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        child = os.fork()
        if child == 0:
            os._exit(vcpu.set(PSCI_VERSION, 0x2) if vcpu.get(PSCI_VERSION) == -EIO else 255)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == EIO
        assert vcpu.set(PSCI_VERSION, 0x2) == 0
