# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an arm64 guest sees of what was set: hypercalls, PSCI, the PMU. Calls by HVC (SMCCC, Arm DEN 0028)."""

from __future__ import annotations

from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING

import pytest

from .arm64_facts import Facts, facts
from .arm64_guest import (
    CALLS,
    EXIT_SYSTEM_EVENT,
    PMCR,
    PMU_V3,
    PSCI_0_2,
    PSCI_VERSION,
    STD,
    STD_HYP,
    VENDOR_HYP,
    Stopped,
    Vm,
    reads,
    set_attribute,
)

if TYPE_CHECKING:
    from kvmneg.host.kvm import Kvm

pytestmark = pytest.mark.kvm

NOT_SUPPORTED = (1 << 64) - 1
ARCH_FEATURES, PSCI_FEATURES = 0x80000001, 0x8400000A
TRNG_VERSION, TRNG_FEATURES, TRNG_UUID, TRNG_RND = 0x84000050, 0x84000051, 0x84000052, 0xC4000053
PV_TIME_FEATURES = 0xC5000020
VENDOR_UID, VENDOR_FEATURES, VENDOR_PTP = 0x8600FF01, 0x86000000, 0x86000001
SYSTEM_RESET2, SYSTEM_OFF2 = 0xC4000012, 0xC4000015
PSCI_CALLS = {
    SYSTEM_RESET2: (0x10001, 2),
    SYSTEM_OFF2: (0x10003, 1),
}  # since, KVM_SYSTEM_EVENT_RESET, _SHUTDOWN
KVM_UID = (0xB66FB428, 0xE911C52E, 0x564BCAA9, 0x743A004D)  # linux/arm-smccc.h

# bitmap, bit, the calls that it stands for
HIDDEN = (
    (STD, 0, [(TRNG_VERSION,), (TRNG_FEATURES, TRNG_RND), (TRNG_UUID,), (TRNG_RND, 64)]),
    (STD_HYP, 0, [(ARCH_FEATURES, PV_TIME_FEATURES)]),
    (VENDOR_HYP, 0, [(VENDOR_UID,), (VENDOR_FEATURES,)]),
    (VENDOR_HYP, 1, [(VENDOR_PTP,)]),
)


@pytest.fixture
def found(kvm: Kvm) -> Facts:
    """What this KVM is."""
    return facts(kvm)


@pytest.mark.parametrize(("bitmap", "bit", "calls"), HIDDEN)
def test_a_cleared_bit_hides_its_calls(
    kvm: Kvm, found: Facts, bitmap: int, bit: int, calls: list[tuple[int, ...]]
) -> None:
    """Where there are bitmaps; Linux 5.10 has these calls or not, and no way to hide them."""
    if bitmap not in found.bitmaps:
        assert not found.bitmaps
        return
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        vm.load(CALLS)
        assert all(vcpu.call(*call)[0] != NOT_SUPPORTED for call in calls)
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        assert vcpu.set(bitmap, vcpu.get(bitmap) & ~(1 << bit)) == 0
        vm.load(CALLS)
        assert {vcpu.call(*call)[0] for call in calls} == {NOT_SUPPORTED}


def test_a_cleared_bit_hides_nothing_else(kvm: Kvm, found: Facts) -> None:
    """PTP goes from the vendor's features and the other bit stays."""
    if not found.bitmaps:
        return
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        vm.load(CALLS)
        assert vcpu.call(VENDOR_UID) == KVM_UID
        assert vcpu.call(VENDOR_FEATURES)[0] == 0b11
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        assert vcpu.set(VENDOR_HYP, 0b01) == 0
        vm.load(CALLS)
        assert vcpu.call(VENDOR_UID) == KVM_UID
        assert vcpu.call(VENDOR_FEATURES)[0] == 0b01


def test_feature_queries_do_not_cross_families(kvm: Kvm) -> None:
    """Each family answers for its own calls: nothing is learned of one from another's query."""
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        vm.load(CALLS)
        for query, others in (
            (ARCH_FEATURES, (0x84000000, TRNG_VERSION, VENDOR_UID)),
            (PSCI_FEATURES, (TRNG_VERSION, PV_TIME_FEATURES, VENDOR_UID, ARCH_FEATURES)),
            (TRNG_FEATURES, (0x84000000, ARCH_FEATURES, VENDOR_UID)),
        ):
            for other in others:
                assert vcpu.call(query, other)[0] == NOT_SUPPORTED, (hex(query), hex(other))


@pytest.mark.parametrize("version", [0x2, 0x10000, 0x10001, 0x10002, 0x10003])
@pytest.mark.parametrize("call", [SYSTEM_RESET2, SYSTEM_OFF2])
def test_psci(kvm: Kvm, found: Facts, version: int, call: int) -> None:
    """PSCI (Arm DEN 0022) 1.0 brought PSCI_FEATURES, 1.1 SYSTEM_RESET2, 1.3 SYSTEM_OFF2."""
    since, event = PSCI_CALLS[call]
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        if version not in found.probe.psci_versions:
            assert vcpu.set(PSCI_VERSION, version) != 0
            return
        assert vcpu.set(PSCI_VERSION, version) == 0
        vm.load(CALLS)
        assert vcpu.call(0x84000000)[0] == version
        assert (vcpu.call(PSCI_FEATURES, 0x84000000)[0] == NOT_SUPPORTED) == (version < 0x10000)
        assert (vcpu.call(PSCI_FEATURES, call)[0] == NOT_SUPPORTED) == (version < since)
        answer = vcpu.call(call, 0, 0)
        if version < since:
            assert isinstance(answer, tuple)
            assert answer[0] == NOT_SUPPORTED
        else:
            assert answer == Stopped(EXIT_SYSTEM_EVENT, event)


def pmu_type() -> int:
    """The number of the host's PMU among perf's."""
    [file] = Path("/sys/bus/event_source/devices").glob("armv8_pmuv3*/type")
    return int(file.read_text("ascii"))


def test_event_counters(kvm: Kvm, found: Facts) -> None:
    """PMCR_EL0.N is the number of counters; from Linux 6.7 no more than the host's, and SET_PMU puts it back."""
    limited = found.capability("arm-supported-reg-mask-ranges") != 0
    most = found.trials[PMCR].reset >> 11 & 0x1F
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2 | PMU_V3)
        vm.vgic()

        def counters() -> int:
            return vcpu.get(PMCR) >> 11 & 0x1F

        def write(number: int) -> int:
            return vcpu.set(PMCR, vcpu.get(PMCR) & ~(0x1F << 11) | number << 11)

        assert counters() == most > 1
        if limited:
            assert write(most + 1) == 0, "ignored, not refused"
            assert counters() == most
        assert write(1) == 0
        assert counters() == 1
        if found.probe.pmu_attributes & 1 << 3:  # KVM_ARM_VCPU_PMU_V3_SET_PMU
            assert set_attribute(vcpu.fd, 0, 3, pack("i", pmu_type())) == 0
            assert counters() == (most if limited else 1)
            assert write(1) == 0
        vm.load(reads(PMCR))
        [seen] = vcpu.run()
        assert seen >> 11 & 0x1F == 1
