# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a VMM can tell a guest on arm64, which registers it can leave out, and QEMU's arguments for that."""

from __future__ import annotations

import arm64_reports as hosts
import pytest

from kvmneg.emit import qemu
from kvmneg.errors import Blocked, UsageError, VmmFault
from kvmneg.features.report import Report
from kvmneg.host import qemu_probe
from kvmneg.policy import definitions, negotiation, portable, rollback, vmm, vmm_arm64
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request

TCR2, PIRE0, PIR = 0x6030_0000_0013_C103, 0x6030_0000_0013_C512, 0x6030_0000_0013_C513
LOWERED = {
    "ccsidr-0", "ccsidr-1", "ccsidr-2", "aa64dfr0-debugver", "clidr-ctype3", "clidr-loc", "clidr-icb", "psci-version",
}  # fmt: skip
# what 6.1 does not list (measured on both kernels): VENDOR_HYP_BMAP_2 and CCSIDR3 to 13
NEW_REGISTERS = {"arm64:0x6030000000160003", *(f"arm64:{0x6020_0000_0011_0000 + n:#x}" for n in range(3, 14))}


@pytest.fixture
def way_back() -> Fence:
    fence = rollback.judge(hosts.new(), hosts.old()).fence
    assert fence is not None
    return fence


def sve_host(**rest: int) -> Report:
    """A host with everything that QEMU has a property for: PMU, SVE to 512 bits, pointer authentication."""
    offer = {
        **hosts.NEW,
        hosts.INIT: 0b111_1100,
        hosts.VLS: 0b1011,
        hosts.PFR0: hosts.N1[hosts.PFR0] | 1 << 32,
    }
    offer[hosts.ISAR1] = hosts.N1[hosts.ISAR1] | 1 << 4 | 1 << 24
    return hosts.report("sve", {**offer, **{getattr(hosts, key): value for key, value in rest.items()}})


def contract(report: Report, fence: Fence | None = None, **request: object) -> Contract:
    return negotiation.negotiate(Request(**request), report, fence).contract  # type: ignore[arg-type]


@pytest.mark.parametrize("name", definitions.available("vmms"))
def test_a_host_without_a_fence_is_as_each_vmm_shows_it(name: str) -> None:
    answer = negotiation.negotiate(Request(vmm=name), hosts.new())
    assert negotiation.check(answer.contract, hosts.new("twin"), name) == ()


def test_qemu_sets_no_register_and_says_so_by_field(way_back: Fence) -> None:
    with pytest.raises(Blocked) as no:
        negotiation.negotiate(Request(vmm="qemu-10.2"), hosts.new(), way_back)
    assert {blocker.feature for blocker in no.value.blockers} == LOWERED | NEW_REGISTERS
    assert {blocker.cause for blocker in no.value.blockers} == {"vmm"}
    with pytest.raises(Blocked) as no:
        negotiation.negotiate(Request(vmm="qemu-11.1"), hosts.new(), way_back)
    lowered = {blocker.feature for blocker in no.value.blockers if not blocker.feature.startswith("arm64:")}
    assert lowered == LOWERED - {"psci-version"}
    # sets each field, and restores each register that a guest was saved with
    with pytest.raises(Blocked) as no:
        negotiation.negotiate(Request(vmm="firecracker"), hosts.new(), way_back)
    assert {blocker.feature for blocker in no.value.blockers} == NEW_REGISTERS
    for other in ("generic", None):
        negotiation.negotiate(Request(vmm=other), hosts.new(), way_back)


def test_what_kvm_cannot_be_told_is_kvms_fault_and_told_once() -> None:
    less = Fence(contract(hosts.new("less", ISAR0=0)).granted)
    older = hosts.report("old", hosts.NEW, settable={hosts.PSCI: hosts.EVERY})
    with pytest.raises(Blocked) as no:
        negotiation.negotiate(Request(vmm="qemu"), older, less)
    assert {blocker.cause for blocker in no.value.blockers} == {"kvm"}
    names = [blocker.feature for blocker in no.value.blockers]
    assert len(names) == len(set(names))


def test_firecracker_gives_vcpu_features_to_templates_that_ask_and_takes_guests_that_have_them() -> None:
    report = sve_host()
    granted = contract(report, vmm="firecracker").granted
    assert not granted.field("vcpu-sve") and not granted.field("aa64pfr0-sve")
    assert not granted.field("vcpu-ptrauth-address") and not granted.field("vcpu-pmu-v3")
    assert negotiation.check(contract(report), report, "firecracker") == ()
    assert contract(report, vmm="qemu").granted.field("sve-lengths") == 0b1011


def test_which_registers_are_left_out() -> None:
    """QEMU 11.1 tolerates five; before none may be unknown; Firecracker restores each; others follow the contract."""
    report = hosts.new()
    assert vmm_arm64.leaves_out(vmm.through(report, "generic")) is None
    assert vmm_arm64.leaves_out(vmm.through(report, "firecracker")) == frozenset()
    assert vmm_arm64.leaves_out(vmm.through(report, "qemu-10.2")) == frozenset()
    newest = vmm_arm64.leaves_out(vmm.through(report, "qemu-11.1.3"))
    assert newest == {0x4020_0000_200E_0298, TCR2, PIRE0, PIR, portable.VENDOR_HYP_2}


def test_qemu_11_1_goes_back_where_only_a_hypercall_register_is_new() -> None:
    older = {**hosts.NEW}
    del older[hosts.VENDOR_2]
    old = hosts.report("old", older, kernel="6.12.1")
    judged = {
        name: rollback.judge(hosts.new(), old, name) for name in ("qemu-10.2", "qemu-11.1", "firecracker")
    }
    assert [blocker.word for blocker in judged["qemu-10.2"].blockers] == [hosts.VENDOR_2]
    assert judged["qemu-11.1"].fence is not None
    assert [blocker.cause for blocker in judged["firecracker"].blockers] == ["vmm"]


def test_registers_that_a_guest_cannot_write_are_left_out_at_their_reset_value() -> None:
    """6.12 lists TCR2, PIR and PIRE0 without the features too, 6.13 does not (arch/arm64/kvm/sys_regs.c)."""
    granted = contract(hosts.new()).granted
    assert portable.drop_rule(TCR2, granted).text() == "drop-if 0x0"
    assert {portable.drop_rule(one, granted).text() for one in (PIR, PIRE0)} == {"drop-if 0x1de7ec7edbadc0de"}
    mmfr3 = "arm64:0x603000000013c03b"
    has = contract(
        hosts.report("poe", {**hosts.NEW, mmfr3: 0x101}, settable={**hosts.WRITABLE, mmfr3: 0xF0F0F})
    )
    assert {portable.drop_rule(one, has.granted).rule for one in (TCR2, PIR, PIRE0)} == {"refuse"}


# -- arguments ----------------------------------------------------------------------------------------


def test_the_arguments_name_what_is_off_too() -> None:
    plain = qemu.emit(contract(hosts.new()), "virt-9.0", host=hosts.new().offer)
    assert plain.arguments == [
        "-machine", "virt-9.0,gic-version=3", "-accel", "kvm", "-cpu", "host,pmu=off,pauth=off,sve=off",
    ]  # fmt: skip
    report = sve_host()
    full = qemu.emit(contract(report), "virt-9.0", host=report.offer)
    assert full.cpu == "host,pmu=on,pauth=on,sve=on,sve128=on,sve256=on,sve512=on"
    assert full.lost() == ()


def test_what_has_no_property_is_an_error_with_the_names(way_back: Fence) -> None:
    made = contract(hosts.new(), way_back)
    with pytest.raises(Blocked) as no:
        qemu.emit(made, "virt-9.0", known=frozenset({"pmu", "pauth", "sve"}), host=hosts.new().offer)
    assert {blocker.feature for blocker in no.value.blockers} == LOWERED
    with pytest.raises(Blocked) as no:
        qemu.emit(made, "virt-11.1", known=frozenset({"kvm-psci-version"}), host=hosts.new().offer)
    assert {blocker.feature for blocker in no.value.blockers} == LOWERED - {"psci-version"}
    with pytest.raises(UsageError, match="made for a host"):
        qemu.emit(made, "virt-9.0")
    report = sve_host()
    with pytest.raises(Blocked, match="vcpu-sve"):
        qemu.emit(contract(report), "virt-9.0", known=frozenset({"pmu", "pauth"}), host=report.offer)


def test_psci_alone_is_a_property_of_newer_builds() -> None:
    fence = Fence(contract(hosts.new("less", PSCI=0x1_0001)).granted)
    made = contract(hosts.new(), fence)
    known = frozenset({"pmu", "pauth", "sve", "kvm-psci-version"})
    found = qemu.emit(made, "virt-11.1", known=known, host=hosts.new().offer)
    assert found.cpu == "host,pmu=off,pauth=off,sve=off,kvm-psci-version=1.1"


def test_an_installed_qemu_knows_the_properties() -> None:
    """The names, by the emulated CPU: `-cpu host` is there on arm64 with KVM only."""
    path = qemu_probe.find(qemu_probe.BINARIES["arm64"])
    assert path is not None, "tools/setup.sh installs qemu-system-arm"
    build = qemu_probe.probe(path, "arm64")
    assert {"pmu", "pauth", "sve", *(f"sve{128 * n}" for n in range(1, 17))} <= build.properties
    assert build.machine.startswith("virt-")
    report = sve_host(VLS=0b1111)
    found = qemu.emit(contract(report), build.machine, known=build.properties, host=report.offer)
    # software emulation has one CPU more of the same properties, so QEMU itself says whether they go together
    told = found.cpu.replace("host,", "max,", 1).replace("sve384=on", "sve384=off")
    with pytest.raises(VmmFault):
        qemu_probe.start_paused(
            path, ["-machine", build.machine, "-accel", "tcg", "-cpu", f"{told},sve999=on"]
        )
    arguments = ["-machine", "virt,gic-version=3", "-accel", "tcg", "-cpu", told]
    assert qemu_probe.start_paused(path, arguments) in ("prelaunch", "paused")
