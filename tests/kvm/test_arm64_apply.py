# SPDX-License-Identifier: LGPL-2.1-or-later
"""Applying registers to a VM of our own, in the order of a VMM, and what a guest then sees."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.errors import NotApplied
from kvmneg.features.featureset import FeatureSet
from kvmneg.host import measure
from kvmneg.host.apply import Applied
from kvmneg.host.apply_arm64 import (
    Register,
    apply_vcpu,
    apply_vgic,
    apply_vm,
    init_vcpu,
    verify_vcpu,
    verify_vgic,
)
from kvmneg.policy import negotiation
from kvmneg.policy.contract import Contract
from kvmneg.policy.request import Request

from .arm64_facts import AA64, MMFR2, Facts, facts, nibbles
from .arm64_guest import (
    CALLS,
    MIDR,
    PC,
    PMCR,
    PMU_V3,
    PSCI_0_2,
    PSCI_VERSION,
    PTRAUTH,
    STD,
    SVE,
    SVE_VLS,
    VENDOR_HYP,
    VENDOR_HYP_2,
    WORKAROUND_1,
    Vm,
    reads,
    set_attribute,
    x,
)

if TYPE_CHECKING:
    from kvmneg.host.kvm import Kvm

pytestmark = pytest.mark.kvm
EVERY = (1 << 64) - 1
LAST_CACHE = 0x602000000011000D  # CCSIDR of level 7, data or unified, of 14
FULL = PSCI_0_2 | PMU_V3 | SVE | PTRAUTH


@pytest.fixture
def found(kvm: Kvm) -> Facts:
    """What this KVM is."""
    return facts(kvm)


def fault(function: Any, *arguments: Any, **named: int) -> dict[str, Any]:
    """The fields of the NotApplied that it raises."""
    with pytest.raises(NotApplied) as caught:
        function(*arguments, **named)
    return caught.value.fields


def lowered(found: Facts) -> list[Register]:
    """A contract below what this KVM offers: every hypercall hidden, PSCI 1.0, ID fields at a value that it takes."""
    wanted = [
        Register(PSCI_VERSION, 0x10000, EVERY),
        Register(WORKAROUND_1, found.trials[WORKAROUND_1].value, EVERY),
    ]
    wanted += [Register(bitmap, 0, EVERY) for bitmap in found.bitmaps]
    for register in AA64:
        shifts = [shift for one, shift in found.lowerable if one == register]
        value = sum(((found.trials[register].reset >> shift & 0xF) - 1) << shift for shift in shifts)
        if shifts:
            wanted.append(Register(register, value, sum(0xF << shift for shift in shifts)))
    wanted.append(Register(PMCR, 1 << 11, 0x1F << 11))
    if found.sve:
        wanted.append(Register(SVE_VLS, 1, EVERY))
    return wanted


def machine(vm: Vm, features: int, registers: list[Register]) -> Any:
    """A VMM's steps up to the first run."""
    apply_vm(vm.fd, registers)
    vcpu = vm.vcpu(None)
    init_vcpu(vm.fd, vcpu.fd, features, registers)
    vcpu.features = features
    vgic = vm.vgic()
    apply_vcpu(vcpu.fd, registers)
    assert set_attribute(vgic, 4, 0) == 0
    return vcpu


def takes(kvm: Kvm, found: Facts) -> list[Register]:
    """`lowered`, without the steps that a scratch VM refuses."""
    registers = lowered(found)
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(found.probe.vcpu_features & FULL)
        vm.vgic()
        kept = []
        for register in registers:
            value, mask = register.value, register.mask
            if register.id in AA64:
                for shift, _ in nibbles(mask):
                    now = vcpu.get(register.id)
                    if vcpu.set(register.id, now & ~(0xF << shift) | value & 0xF << shift) != 0:
                        value, mask = value & ~(0xF << shift), mask & ~(0xF << shift)
            if mask:
                kept.append(Register(register.id, value, mask))
    return kept


def test_a_contract_reaches_the_guest(kvm: Kvm, found: Facts) -> None:
    """Applied, verified before and after the first run, and seen; what the masks leave out stays KVM's."""
    registers = takes(kvm, found)
    ids = [register for register in registers if register.id in AA64]
    assert ids or not found.lowerable
    features = found.probe.vcpu_features & FULL
    with Vm(kvm.fd) as vm:
        vcpu = machine(vm, features, registers)
        verify_vcpu(vcpu.fd, registers)
        vm.load(reads(*(register.id for register in ids), PMCR))
        *seen, pmcr = vcpu.run()
        for register, value in zip(ids, seen, strict=True):
            assert value & register.mask == register.value, hex(register.id)
            assert value & ~register.mask == found.trials[register.id].reset & ~register.mask, hex(
                register.id
            )
        assert pmcr >> 11 & 0x1F == 1
        verify_vcpu(vcpu.fd, registers)
        apply_vcpu(vcpu.fd, registers)  # nothing differs, so nothing is written: not too late
    with Vm(kvm.fd) as vm:
        vcpu = machine(vm, features, registers)
        vm.load(CALLS)
        assert vcpu.call(0x84000000)[0] == 0x10000
        if found.bitmaps:
            assert vcpu.call(0x8600FF01)[0] == EVERY


def test_too_late(kvm: Kvm, found: Facts) -> None:
    """After the first run a change is an error of its own, and what is as it should be is none."""
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        vm.load(CALLS)
        vcpu.call(0x84000000)
        apply_vcpu(vcpu.fd, [Register(bitmap, vcpu.get(bitmap), EVERY) for bitmap in found.bitmaps])
        if found.bitmaps:
            now = vcpu.get(STD)
            assert fault(apply_vcpu, vcpu.fd, [Register(STD, 0, EVERY)]) == {
                "word": f"arm64:{STD:#x}", "ioctl": "",
                "register": STD, "asked": 0, "mask": EVERY, "got": now, "stage": "firmware", "why": "too late",
                "errno": errno.EBUSY,
            }  # fmt: skip


def test_refused_and_missing(kvm: Kvm, found: Facts) -> None:
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        refused = fault(apply_vcpu, vcpu.fd, [Register(PSCI_VERSION, 0x20000, EVERY)])
        assert (refused["why"], refused["errno"], refused["got"]) == (
            "refused",
            errno.EINVAL,
            found.probe.psci_versions[-1],
        )
        missing = fault(apply_vcpu, vcpu.fd, [Register(STD | 0xFF, 0, EVERY)])
        assert (missing["why"], missing["errno"]) == ("missing", errno.ENOENT)


def test_the_fourth_bitmap_may_be_missing_where_it_is_empty(kvm: Kvm, found: Facts) -> None:
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        apply_vcpu(vcpu.fd, [Register(VENDOR_HYP_2, 0, EVERY)])
        if VENDOR_HYP_2 not in found.bitmaps:
            assert fault(apply_vcpu, vcpu.fd, [Register(VENDOR_HYP_2, 1, EVERY)])["why"] == "missing"
        else:
            apply_vcpu(vcpu.fd, [Register(VENDOR_HYP_2, 1, 1)])
            assert vcpu.get(VENDOR_HYP_2) == 1
            apply_vcpu(vcpu.fd, [Register(VENDOR_HYP_2, 2, 2)])
            assert vcpu.get(VENDOR_HYP_2) == 3, "bits outside the mask stay"


def test_a_cache_may_be_missing(kvm: Kvm, found: Facts) -> None:
    """Before Linux 6.3 KVM has the caches of the host's hierarchy, afterwards the sizes of fourteen."""
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        now = vcpu.get(LAST_CACHE)
        assert (now == -errno.ENOENT) == (LAST_CACHE not in found.trials)
        apply_vcpu(vcpu.fd, [Register(LAST_CACHE, max(now, 2), 0xFFFFFFFF)])


def test_dropped(kvm: Kvm, found: Facts) -> None:
    """A workaround below the host's is taken and not kept: its own result, not a success."""
    has = found.trials[WORKAROUND_1].value
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        apply_vcpu(vcpu.fd, [Register(WORKAROUND_1, has, EVERY)])
        told = fault(apply_vcpu, vcpu.fd, [Register(WORKAROUND_1, has - 1 if has else 1, EVERY)])
        expected = ("dropped", has, errno.EBADE) if has else ("refused", 0, errno.EINVAL)
        assert (told["why"], told["got"], told["errno"]) == expected


def test_differs(kvm: Kvm, found: Facts) -> None:
    """verify writes nothing."""
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        differs = fault(verify_vcpu, vcpu.fd, [Register(PSCI_VERSION, 0x2, EVERY)])
        assert (differs["why"], differs["stage"]) == ("differs", "verify")
        assert vcpu.get(PSCI_VERSION) == found.probe.psci_versions[-1]


def test_order_is_the_librarys(kvm: Kvm, found: Facts) -> None:
    """Whatever the order given: the first failure is of the stage that comes first."""
    both = [Register(PSCI_VERSION, 0x20000, EVERY), Register(MMFR2, 0xF << 24, 0xF << 24)]
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        assert fault(apply_vcpu, vcpu.fd, both)["stage"] == "id"


def test_sve_lengths(kvm: Kvm, found: Facts) -> None:
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(None)
        if not found.sve:
            assert fault(init_vcpu, vm.fd, vcpu.fd, PSCI_0_2 | SVE, [])["stage"] == "init"
            return
        init_vcpu(vm.fd, vcpu.fd, PSCI_0_2 | SVE, [Register(SVE_VLS, 1, EVERY)])
        assert vcpu.get(SVE_VLS) == 1
        apply_vcpu(vcpu.fd, [Register(SVE_VLS, 1, EVERY)])
        assert fault(apply_vcpu, vcpu.fd, [Register(SVE_VLS, 3, EVERY)])["why"] == "differs"
        # the same bytes again, as at a guest's reset: the vCPU is final already, and as asked
        init_vcpu(vm.fd, vcpu.fd, PSCI_0_2 | SVE, [Register(SVE_VLS, 1, EVERY)])
        late = fault(init_vcpu, vm.fd, vcpu.fd, PSCI_0_2 | SVE, [Register(SVE_VLS, 3, EVERY)])
        assert (late["why"], late["errno"]) == ("too late", errno.EPERM)


def test_implementation_ids(kvm: Kvm, found: Facts) -> None:
    """Another MIDR where KVM can; its own everywhere."""
    own = found.trials[MIDR].value
    with Vm(kvm.fd) as vm:
        machine(vm, PSCI_0_2, [Register(MIDR, own, EVERY)])
    with Vm(kvm.fd) as vm:
        other = [Register(MIDR, own ^ 0xF0, EVERY)]
        if found.trials[MIDR].settable:
            vcpu = machine(vm, PSCI_0_2, other)
            vm.load(reads(MIDR))
            assert vcpu.run() == [own ^ 0xF0]
        else:
            assert fault(machine, vm, PSCI_0_2, other)["why"] == "refused"


def test_vgic_revision(kvm: Kvm, found: Facts) -> None:
    """Each revision that the probe found is taken; one that KVM takes and drops is told."""
    with Vm(kvm.fd) as vm:
        vm.vcpu(PSCI_0_2)
        vgic = vm.vgic()
        assert set_attribute(vgic, 4, 0) == 0
        for revision in range(16):
            if found.probe.vgic_revisions >> revision & 1:
                apply_vgic(vgic, revision)
                verify_vgic(vgic, revision)
                differs = fault(verify_vgic, vgic, revision ^ 1)
                assert (differs["word"], differs["stage"], differs["why"]) == (
                    "arm:vgic-revision",
                    "verify",
                    "differs",
                )
                assert (differs["asked"], differs["mask"], differs["got"]) == (revision ^ 1, 0xF, revision)
            else:
                told = fault(apply_vgic, vgic, revision)
                dropped = found.probe.vgic_revisions_dropped >> revision & 1
                assert told["why"] == ("dropped" if dropped else "refused"), revision
                assert (told["word"], told["asked"], told["mask"]) == ("arm:vgic-revision", revision, 0xF)


def test_a_vcpu_that_is_plugged_in_later(kvm: Kvm, found: Facts) -> None:
    """The same registers again, after the first run of another vCPU."""
    registers = [
        Register(PSCI_VERSION, 0x10000, EVERY),
        *(Register(bitmap, 0, EVERY) for bitmap in found.bitmaps),
    ]
    with Vm(kvm.fd) as vm:
        first = vm.vcpu(None)
        init_vcpu(vm.fd, first.fd, PSCI_0_2, registers)
        apply_vcpu(first.fd, registers)
        vm.load(CALLS)
        first.call(0x84000000)
        late = vm.vcpu(None)
        init_vcpu(vm.fd, late.fd, PSCI_0_2, registers)
        apply_vcpu(late.fd, registers)


def test_another_process(kvm: Kvm) -> None:
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        child = os.fork()
        if child == 0:
            try:
                apply_vcpu(vcpu.fd, [Register(VENDOR_HYP, 0, EVERY)])
            except NotApplied as error:
                os._exit(error.fields["errno"] if error.fields["why"] == "failed" else 254)
            os._exit(255)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EIO


def test_a_contract_of_this_host_by_the_names_of_both_architectures(kvm: Kvm) -> None:
    """What the host offers, negotiated, read by libkvmneg, applied, seen after the first run; not a contract of x86."""
    contract = negotiation.negotiate(Request(maximum=True), measure.measure(), None).contract
    held = Applied.of(contract.binary())
    assert held.info()["vcpu_features"] == contract.granted.value("arm:vcpu-features")
    with Vm(kvm.fd) as vm:
        held.vm(vm.fd)
        assert fault(held.vm, vm.fd, x2apic_api=1)["errno"] == errno.EINVAL
        vcpu = vm.vcpu(None)
        held.vcpu_init(vm.fd, vcpu.fd)
        vcpu.features = held.info()["vcpu_features"]
        vgic = vm.vgic()
        held.vcpu(vcpu.fd)
        assert set_attribute(vgic, 4, 0) == 0
        held.vgic(vgic)
        verify_vgic(vgic, contract.granted.value("arm:vgic-revision"))
        held.verify(vcpu.fd)
        vm.load(reads(MMFR2))
        (seen,) = vcpu.run()
        bound = {word: (value, mask) for word, value, mask in held.words()}
        value, mask = bound.get(f"arm64:{MMFR2:#x}", (0, 0))
        assert seen & mask == value
        held.verify(vcpu.fd)
        held.verify_vgic(vgic)
        held.vcpu(vcpu.fd)
        held.vm(vm.fd)
        held.vgic(vgic)


def test_a_word_that_differs_is_named(kvm: Kvm, found: Facts) -> None:
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        told = fault(verify_vcpu, vcpu.fd, [Register(PSCI_VERSION, 0x2, EVERY)])
        assert told["word"] == f"arm64:{PSCI_VERSION:#x}"


def granting(**words: int) -> Applied:
    """libkvmneg's reading of a contract of these words alone, by their names with _ for : and -."""
    named = {name.replace("_", ":", 1).replace("_", "-"): value for name, value in words.items()}
    return Applied.of(Contract(FeatureSet.of("arm64", named)).binary())


def test_a_contracts_vgic(kvm: Kvm, found: Facts) -> None:
    """The revision that a contract binds is given and read back; one without leaves the vGIC alone."""
    now = found.probe.vgic_iidr >> 12 & 0xF
    revisions = [number for number in range(16) if found.probe.vgic_revisions >> number & 1]
    with Vm(kvm.fd) as vm:
        vm.vcpu(PSCI_0_2)
        vgic = vm.vgic()
        assert set_attribute(vgic, 4, 0) == 0
        for revision in revisions:
            contract = granting(arm_vgic_revision=revision)
            contract.vgic(vgic)
            contract.verify_vgic(vgic)
            verify_vgic(vgic, revision)
        last = revisions[-1] if revisions else now
        assert fault(granting(arm_vgic_revision=15).vgic, vgic)["asked"] == 15
        differs = fault(granting(arm_vgic_revision=15).verify_vgic, vgic)
        assert (differs["word"], differs["got"]) == ("arm:vgic-revision", last)
        nothing = Applied.of(Contract(FeatureSet.of("arm64", {}), present={}).binary())
        nothing.vgic(vgic)
        nothing.verify_vgic(vgic)
        verify_vgic(vgic, last)
    for verb in ("vgic", "verify_vgic"):
        x86 = Applied.of(Contract(FeatureSet.of("x86_64", {})).binary())
        assert fault(getattr(x86, verb), -1)["errno"] == errno.ENOEXEC


def test_a_contracts_capabilities(kvm: Kvm, found: Facts) -> None:
    """What KVM has to have is asked for before there is a vCPU: a number by its size, a flag by its bits."""
    most = found.capability("max-vcpus")
    with Vm(kvm.fd) as vm:
        granting(kvm_max_vcpus=most, kvm_arm_psci_0_2=1, kvm_mp_state=0).vm(vm.fd)
        granting(kvm_max_vcpus=1).vm(vm.fd)
        assert fault(granting(kvm_max_vcpus=most + 1).vm, vm.fd) == {
            "word": "kvm:max-vcpus", "register": 0, "asked": most + 1, "mask": 0xFFFFFFFF, "got": most,
            "stage": "check", "why": "missing", "ioctl": "", "errno": errno.EBADE,
        }  # fmt: skip
        if not found.capability("arm-el1-32bit"):
            told = fault(granting(kvm_arm_el1_32bit=1).vm, vm.fd)
            assert (told["word"], told["got"]) == ("kvm:arm-el1-32bit", 0)
        else:
            granting(kvm_arm_el1_32bit=1).vm(vm.fd)


def test_features_of_any_number_are_asked_for(kvm: Kvm) -> None:
    """KVM_ARM_VCPU_INIT has room for 224 of them, a contract for 64: none is lost on the way to KVM's no."""
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(None)
        for number in (31, 32, 40, 63):
            told = fault(init_vcpu, vm.fd, vcpu.fd, PSCI_0_2 | 1 << number, [])
            assert (told["word"], told["asked"], told["errno"]) == (
                "arm:vcpu-features",
                PSCI_0_2 | 1 << number,
                errno.ENOENT,
            )
        init_vcpu(vm.fd, vcpu.fd, PSCI_0_2, [])


def test_a_second_init_is_a_reset(kvm: Kvm, found: Facts) -> None:
    """As the header says: a guest's registers go, what the contract gave stays."""
    registers = [Register(PSCI_VERSION, 0x10000, EVERY), *(Register(one, 0, EVERY) for one in found.bitmaps)]
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(None)
        init_vcpu(vm.fd, vcpu.fd, PSCI_0_2, registers)
        apply_vcpu(vcpu.fd, registers)
        vm.load(CALLS)
        assert vcpu.set(x(7), 0x1234) == 0
        vcpu.call(0x84000000)
        assert vcpu.get(x(7)) == 0x1234
        vcpu.complete()  # else the first KVM_RUN after the reset ends the last store, and passes over an instruction
        init_vcpu(vm.fd, vcpu.fd, PSCI_0_2, registers)
        assert (vcpu.get(x(7)), vcpu.get(PC)) == (0, 0)
        verify_vcpu(vcpu.fd, registers)
        vcpu.start()
        assert vcpu.call(0x84000000)[0] == 0x10000
