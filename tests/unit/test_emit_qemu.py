# SPDX-License-Identifier: LGPL-2.1-or-later
"""A contract in QEMU's words: every name, every number, and everything that QEMU cannot say."""

import pytest

from kvmneg.emit import qemu
from kvmneg.errors import Blocked, UsageError
from kvmneg.features import catalog
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.policy.contract import Contract

INTEL = {"cpuid:0x0.0.ebx": 0x756E6547, "cpuid:0x0.0.edx": 0x49656E69, "cpuid:0x0.0.ecx": 0x6C65746E}
AMD = {"cpuid:0x0.0.ebx": 0x68747541, "cpuid:0x0.0.edx": 0x69746E65, "cpuid:0x0.0.ecx": 0x444D4163}
FPU, TSC, MD_CLEAR = 1, 1 << 4, 1 << 10
MACHINE = "pc-q35-7.2"


def contract(values: dict[str, int]) -> Contract:
    return Contract(FeatureSet.of("x86_64", values))


def cpu(values: dict[str, int], known: frozenset[str] | None = None) -> list[str]:
    return qemu.emit(contract(values), MACHINE, known=known).cpu.split(",")


def left_out(values: dict[str, int], known: frozenset[str] | None = None) -> dict[str, str]:
    return {row.feature: row.kind for row in qemu.emit(contract(values), MACHINE, known=known).left_out}


def test_the_model_is_base_and_enforced() -> None:
    parts = cpu({"cpuid:0x1.0.edx": FPU})
    assert parts[0] == "base"
    assert parts[-1] == "enforce=on"
    assert "fpu=on" in parts


def test_features_that_are_not_granted_are_not_named() -> None:
    assert not [part for part in cpu({"cpuid:0x1.0.edx": FPU}) if part.startswith("tsc=")]


def test_nothing_is_forced() -> None:
    everything = {word: (1 << 32) - 1 for word in catalog.load("x86_64").words if word.startswith("cpuid:")}
    assert not [part for part in cpu(everything) if part.startswith("x-")]


def test_the_machine_type_is_explicit() -> None:
    found = qemu.emit(contract({}), MACHINE)
    assert found.arguments[:4] == ["-machine", "pc-q35-7.2", "-accel", "kvm"]


@pytest.mark.parametrize("machine", ["q35", "pc", "microvm", ""])
def test_a_machine_type_without_a_version_is_refused(machine: str) -> None:
    with pytest.raises(UsageError, match="no version"):
        qemu.emit(contract({}), machine)


@pytest.mark.parametrize(
    ("signature", "told"),
    [
        # Intel SDM vol. 2A, CPUID leaf 1: the extended model counts in family 6, the extended family in family 15
        (0x000A0671, ["family=6", "model=167", "stepping=1"]),
        (0x00A00F11, ["family=25", "model=1", "stepping=1"]),
        (0x00000521, ["family=5", "model=2", "stepping=1"]),
    ],
)
def test_the_signature_is_told_as_people_write_it(signature: int, told: list[str]) -> None:
    assert [part for part in cpu({"cpuid:0x1.0.eax": signature}) if "=" in part][:3] == told


def test_the_vendor_is_told() -> None:
    assert "vendor=AuthenticAMD" in cpu(AMD)


def test_a_comma_in_a_vendor_is_doubled() -> None:
    values = {**AMD, "cpuid:0x0.0.ecx": int.from_bytes(b"a,bc", "little")}
    assert "vendor=Authentia,,bc" in qemu.emit(contract(values), MACHINE).cpu


def test_numbers_are_told() -> None:
    parts = cpu(
        {"cpuid:0x0.0.eax": 13, "cpuid:0x80000000.0.eax": 0x80000008, "cpuid:0x80000008.0.eax": 0x302E}
    )
    assert {"level=13", "xlevel=0x80000008", "phys-bits=46"} <= set(parts)


def test_the_constants_of_policy_are_told() -> None:
    assert "apic=on" in cpu({})


def test_a_name_that_the_build_does_not_know_is_left_out_and_listed() -> None:
    values = {"cpuid:0x1.0.edx": FPU | TSC}
    known = frozenset(("fpu", "apic"))
    assert "tsc=on" not in cpu(values, known)
    assert left_out(values, known)["tsc"] == qemu.UNKNOWN


def test_a_feature_without_a_name_is_listed() -> None:
    values = {"cpuid:0x1.0.ecx": 1 << 11}  # SDBG: Linux has a name for it, QEMU none
    assert left_out(values)["sdbg"] == qemu.UNNAMED


def test_half_of_what_a_name_stands_for_is_not_turned_on() -> None:
    """QEMU's kvmclock is both clocks: with one granted, the other would come along."""
    assert left_out({"cpuid:0x40000001.0.eax": 1 << 3})["kvmclock"] == qemu.SHARED
    assert "kvmclock=on" in cpu({"cpuid:0x40000001.0.eax": 1 << 3 | 1})


VMX = {
    "cpuid:0x1.0.ecx": 1 << 5,
    "cpuid:0x1.0.edx": 1 << 6,  # PAE, which LM is built on
    "cpuid:0x80000001.0.edx": 1 << 29,  # LM
    "msr:0x480": 0x00D8_1000_11E5_7ED0,
    "msr:0x486": 0x8000_0021,  # PE, NE, PG
    "msr:0x488": 0x2000,  # VMXE
    "msr:0x48d": 0x3F << 32 | 0x16,
    "msr:0x48e": 0x8401_E1F2 << 32 | 0x0401_6172,
    "msr:0x48f": 0x0003_6FFF << 32 | 0x0003_6DFB,
    "msr:0x490": 0x0000_13FF << 32 | 0x0000_11FB,
}


def vmx(values: dict[str, int], known: frozenset[str] | None = None) -> set[str]:
    return {part for part in cpu({**VMX, **values}, known) if part.startswith("vmx")}


def test_nested_vmx_is_told_control_by_control() -> None:
    """By hand: 0x48d offers 0, 3 and 5; 0x48e offers 7, 15 and 31; 0x48f offers 2 and 9; 0x490 offers 2 and 9.

    Host address-space size (0x48f, 9) has no property: QEMU gives it to a guest with LM. The revision is KVM's.
    """
    assert vmx({"msr:0x48b": 0x2 << 32, "msr:0x48c": 1 << 14 | 1 << 6}) == {
        "vmx=on", "vmx-ins-outs=on", "vmx-true-ctls=on", "vmx-intr-exit=on", "vmx-nmi-exit=on", "vmx-vnmi=on",
        "vmx-hlt-exit=on", "vmx-cr3-load-noexit=on", "vmx-secondary-ctls=on", "vmx-exit-nosave-debugctl=on",
        "vmx-entry-noload-debugctl=on", "vmx-entry-ia32e-mode=on", "vmx-ept=on", "vmx-page-walk-4=on",
    }  # fmt: skip
    left = left_out({**VMX, "msr:0x48b": 0x2 << 32, "msr:0x48c": 1 << 14 | 1 << 6})
    assert {name for name, kind in left.items() if kind == qemu.OUTSIDE} == {
        "vmx-revision", "vmx-vmcs-size", "vmx-vmcs-memory-type", "vmx-ept-wb",
    }  # fmt: skip
    assert {name for name, kind in left.items() if kind != qemu.OUTSIDE and name.startswith("vmx")} == set()


@pytest.mark.parametrize(
    ("values", "lost"),
    [
        ({"msr:0x48b": 1 << 50}, "vmx-ept-violation-ve"),  # no property
        ({"msr:0x48d": 0x13F << 32 | 0x16}, "vmx-pinbased-controls"),  # control 8 is reserved: no name at all
        (
            {"msr:0x48d": 0x7F << 32 | 0x56},
            "vmx-pinbased-controls",
        ),  # control 6 must be 1: QEMU would make it 0
        ({"msr:0x48b": 1 << 52}, "vmx-xsaves"),  # without XSAVES, QEMU refuses it
        ({"cpuid:0x80000001.0.edx": 0}, "vmx-exit-host-addr-space-size"),
        ({"msr:0x485": 1 << 16 | 1 << 14}, "vmx-cr3-targets"),
        ({"msr:0x486": 0x20}, "vmx-cr0-fixed0"),  # QEMU writes PE, NE, PG
    ],
)
def test_what_qemu_would_write_otherwise_is_listed(values: dict[str, int], lost: str) -> None:
    assert left_out({**VMX, **values})[lost] == qemu.UNNAMED
    assert f"{lost}=on" not in vmx(values)


def test_vmx_whose_controls_qemu_cannot_write_is_left_out() -> None:
    assert vmx({"msr:0x48d": 0x7F << 32 | 0x56}) == set()


def test_controls_that_the_build_does_not_know_are_listed() -> None:
    values = {**VMX, "msr:0x48b": 1 << 58, "cpuid:0x7.0.ecx": 1 << 5}  # user wait and pause; WAITPKG
    assert "vmx-enable-user-wait-pause=on" in cpu(values)
    known = frozenset(("vmx", "lm", "waitpkg"))
    assert left_out(values, known)["vmx-enable-user-wait-pause"] == qemu.UNKNOWN


def test_what_is_built_on_something_left_out_is_left_out_too(intel: Report) -> None:
    """QEMU refuses a feature whose base was not asked for: "This feature depends on other features that were
    not requested" (QEMU target/i386/cpu.c, feature_dependencies), and with enforce=on it does not start."""
    granted = intel.offer.words
    lost = {row.feature: row for row in qemu.emit(contract(dict(granted)), MACHINE).lost()}
    # IA32_PERF_CAPABILITIES is there with PDCM only, which QEMU takes away from a guest without a PMU
    assert {"pdcm", "full-width-write"} <= set(lost)
    assert not {"pdcm=on", "full-width-write=on"} & set(cpu(dict(granted)))


def test_capabilities_are_qemus_own_business() -> None:
    assert left_out({"kvm:irqchip": 1})["cap-irqchip"] == qemu.OUTSIDE


def test_amd_copies_follow_by_themselves_on_amd_only() -> None:
    values = {"cpuid:0x1.0.edx": FPU, "cpuid:0x80000001.0.edx": FPU}
    assert "fpu-copy" not in left_out({**AMD, **values})
    assert left_out({**INTEL, **values})["fpu-copy"] == qemu.UNNAMED


def test_57_linear_bits_without_la57_are_not_what_qemu_gives() -> None:
    assert left_out({"cpuid:0x80000008.0.eax": 57 << 8})["linear-bits"] == qemu.UNNAMED
    assert "linear-bits" not in left_out({"cpuid:0x80000008.0.eax": 48 << 8})


def test_lost_is_what_the_guest_will_not_see() -> None:
    found = qemu.emit(contract({"cpuid:0x1.0.ecx": 1 << 11, "kvm:irqchip": 1}), MACHINE)
    assert {row.feature for row in found.lost()} >= {"sdbg"}
    assert "cap-irqchip" not in {row.feature for row in found.lost()}


def test_an_or_feature_that_this_host_lacks_blocks_by_the_vmm() -> None:
    """The guest must be told of MD_CLEAR, and QEMU refuses to tell it where the host has none."""
    granted = contract({"cpuid:0x7.0.edx": MD_CLEAR})
    host = FeatureSet.of("x86_64", {"cpuid:0x7.0.edx": 0})
    with pytest.raises(Blocked) as caught:
        qemu.emit(granted, MACHINE, host=host)
    assert [
        (blocker.feature, blocker.cause) for blocker in caught.value.blockers if blocker.feature == "md-clear"
    ] == [("md-clear", "vmm")]


def test_what_the_host_has_does_not_block() -> None:
    host = FeatureSet.of("x86_64", {"cpuid:0x7.0.edx": MD_CLEAR, "cpuid:0x7.0.ebx": 0})
    known = frozenset(("md-clear",))
    found = qemu.emit(contract({"cpuid:0x7.0.edx": MD_CLEAR}), MACHINE, host=host, known=known)
    assert "md-clear=on" in found.cpu


def test_each_granted_feature_is_emitted_listed_or_derived() -> None:
    """Nothing is dropped in silence: of a contract with every bit, each feature is somewhere."""
    values = {word: (1 << 31) - 1 for word in catalog.load("x86_64").words if word.startswith("cpuid:0x7.")}
    granted = contract(values)
    found = qemu.emit(granted, MACHINE)
    told = {part.partition("=")[0] for part in found.cpu.split(",")}
    listed = {row.feature for row in found.left_out}
    names = catalog.names("x86_64")
    for word in granted.granted.words:
        for feature in names.at(word, granted.granted.value(word)):
            assert feature.qemu in told or feature.name in listed
