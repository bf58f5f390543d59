# SPDX-License-Identifier: LGPL-2.1-or-later
"""Decoding of KVM's raw answers.

data/dump-amd-6.1.json is what Linux 6.1's KVM answered inside QEMU 7.2's emulation of `-cpu max`, recorded in
an emulated host (tests/hosts/raw.py). The values expected here are not taken from the decoder: each says where it is
known from.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kvmneg.features import catalog
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.host import x86
from kvmneg.host.tables import CpuidEntry, Probe, Tsc
from tests.hosts.raw import probe_of

TESTS = Path(__file__).parents[1]
KVM_LETTERS = (0x4B4D564B, 0x564B4D56, 0x4D)  # "KVMKVMKVM\0\0\0", Documentation/virt/kvm/x86/cpuid.rst


@pytest.fixture(scope="module")
def dump() -> Any:
    return json.loads((TESTS / "unit/data/dump-amd-6.1.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def offer(dump: Any) -> dict[str, int]:
    return x86.decoder().offer(probe_of(dump))


def entry(leaf: int, index: int = 0, *registers: int, flags: int = 0) -> CpuidEntry:
    return CpuidEntry(leaf, index, flags, *(*registers, 0, 0, 0, 0)[:4])


def probe(
    supported: list[CpuidEntry],
    *,
    capabilities: dict[str, tuple[int, int]] | None = None,
    hyperv: list[CpuidEntry] | None = None,
    msrs: dict[int, int] | None = None,
    xcomp: int | None = None,
) -> Probe:
    return Probe(capabilities or {}, supported, None, hyperv, msrs or {}, (), xcomp, {})


# What Linux 6.1 offers on QEMU 7.2's `-cpu max`, from the kernel's and QEMU's sources and manuals.
EXPECTED = {
    # QEMU's max reports highest basic leaf 0xd; "AuthenticAMD" in EBX, EDX, ECX (AMD APM vol. 3 E.3.1)
    "cpuid:0x0.0.eax": 0xD,
    "cpuid:0x0.0.ebx": int.from_bytes(b"Auth", "little"),
    "cpuid:0x0.0.edx": int.from_bytes(b"enti", "little"),
    "cpuid:0x0.0.ecx": int.from_bytes(b"cAMD", "little"),
    # family 15, model 107, stepping 1: QEMU target/i386/cpu.c, "max"
    "cpuid:0x1.0.eax": 6 << 16 | 0xF << 8 | 0xB << 4 | 1,
    # CLFLUSH of 64 bytes, in units of 8
    "cpuid:0x1.0.ebx": 64 // 8 << 8,
    # ARAT, which __do_cpuid_func() of arch/x86/kvm/cpuid.c sets on every host
    "cpuid:0x6.0.eax": 1 << 2,
    # 40 physical bits of TCG, 57 linear; 6.1 has no guest-physical bits in EAX[23:16]
    "cpuid:0x80000008.0.eax": 57 << 8 | 40,
    # x87, SSE, AVX and PKRU: what QEMU 7.2's TCG knows
    "cpuid:0xd.0.eax": 0b1000000111,
    # AVX state: 256 bytes behind the legacy area and the header; compact PKRU of 8 bytes
    "cpuid:0xd.2.eax": 256,
    "cpuid:0xd.2.ebx": 512 + 64,
    "cpuid:0xd.9.eax": 8,
    # bits 0-7, 9-14 and 24 without MMU_OP (2): __do_cpuid_func(), case KVM_CPUID_FEATURES
    "cpuid:0x40000001.0.eax": 0b0000_0001_0000_0000_0111_1110_1111_1011,
    "cpuid:0x40000001.0.edx": 0,
    # no leaf 7.1 on this CPU
    "cpuid:0x7.1.eax": 0,
    # KVM_X86_QUIRK_* of 6.1: seven of them
    "kvm:disable-quirks2": 127,
    "kvm:max-vcpu-id": 4096,  # KVM_MAX_VCPU_IDS = 4 * KVM_MAX_VCPUS
    "kvm:max-vcpus": 1024,
    "kvm:mce": 32,  # KVM_MAX_MCE_BANKS
    "kvm:xsave2": 4096,  # no dynamic component: sizeof(struct kvm_xsave)
    "kvm:tsc-control": 0,  # TCG's SVM has no TSC scaling
    # MSR_AMD64_DE_CFG: LFENCE serialises, bit 1
    "msr:0xc0011029": 1 << 1,
}


@pytest.mark.parametrize(("word", "value"), EXPECTED.items())
def test_emulated_amd_host(offer: dict[str, int], word: str, value: int) -> None:
    assert offer[word] == value, f"{offer[word]:#x}"


def test_what_vmms_give_is_normalised(dump: Any, offer: dict[str, int]) -> None:
    """6.1 lists neither hypervisor (31) nor tsc-deadline (24) in leaf 1 ECX, 6.18 both."""
    leaf1 = next(row for row in dump["supported"] if row[0] == "0x1")
    assert int(leaf1[5], 0) & (1 << 31 | 1 << 24) == 0
    assert offer["cpuid:0x1.0.ecx"] == int(leaf1[5], 0) | 1 << 31 | 1 << 24


def test_identity(dump: Any) -> None:
    entries = probe_of(dump).supported
    assert x86.identity(entries) == {"vendor": "AuthenticAMD", "signature": "0x00060fb1"}


def test_every_catalogued_cpuid_word_is_explicit() -> None:
    offer = x86.decoder().offer(probe([entry(0, 0, 1)]))
    known = {word for word in catalog.load("x86_64").words if word.startswith(("cpuid:", "kvm:"))}
    assert known <= offer.keys()
    assert {word for word in known if offer[word]} == {"cpuid:0x0.0.eax", "cpuid:0x1.0.ecx"}


def test_topology_leaves_are_left_out_and_unknown_ones_kept() -> None:
    offer = x86.decoder().offer(
        probe([
            entry(0x4, 0, 0x121, 1, 2, 3, flags=1),
            entry(0xB, 1, 5, 6, 0x201, 7, flags=1),
            entry(0x3F00, 0, 0, 0x55),
        ])
    )  # fmt: skip
    assert not [word for word in offer if word.startswith(("cpuid:0x4.", "cpuid:0xb."))]
    assert offer["cpuid:0x3f00.0.ebx"] == 0x55
    assert "cpuid:0x3f00.0.eax" not in offer


def test_subleaves_keep_their_place() -> None:
    offer = x86.decoder().offer(probe([entry(7, 1, 0x10, flags=1), entry(7, 0, 0, 0x20, flags=1)]))
    assert (offer["cpuid:0x7.1.eax"], offer["cpuid:0x7.0.ebx"], offer["cpuid:0x7.0.eax"]) == (0x10, 0x20, 0)


@pytest.mark.parametrize("apic_id", [0, 1, 0xFE])
def test_the_cpu_that_answered_does_not_show(apic_id: int) -> None:
    """Leaf 1 EBX has the initial APIC id in [31:24] and the CPUs of the package in [23:16] (SDM vol. 2A)."""
    offer = x86.decoder().offer(probe([entry(1, 0, 0xA0671, apic_id << 24 | 2 << 16 | 0x0800)]))
    assert offer["cpuid:0x1.0.ebx"] == 0x0800


class TestKvmLeaf:
    def test_at_its_usual_base(self) -> None:
        table = [entry(0x40000000, 0, 0x40000001, *KVM_LETTERS), entry(0x40000001, 0, 0x1007EFB, 0, 0, 1)]
        offer = x86.decoder().offer(probe(table))
        assert (offer["cpuid:0x40000001.0.eax"], offer["cpuid:0x40000001.0.edx"]) == (0x1007EFB, 1)

    def test_beside_hyperv(self) -> None:
        """Found by its signature; what stands at 0x40000001 is then Hyper-V's, not a KVM feature."""
        microsoft = (0x7263694D, 0x666F736F, 0x76482074)
        table = [
            entry(0x40000000, 0, 0x4000000A, *microsoft),
            entry(0x40000001, 0, 0x31237648),
            entry(0x40000100, 0, 0x40000101, *KVM_LETTERS),
            entry(0x40000101, 0, 0x9, 0, 0, 0),
            entry(0x80000000, 0, 0x80000001),
        ]
        offer = x86.decoder().offer(probe(table))
        assert offer["cpuid:0x40000001.0.eax"] == 0x9
        assert offer["cpuid:0x80000000.0.eax"] == 0x80000001

    def test_without_a_signature_there_are_none(self) -> None:
        table = [entry(0x40000000, 0, 0x40000001, 1, 2, 3), entry(0x40000001, 0, 0xFFFF)]
        assert x86.decoder().offer(probe(table))["cpuid:0x40000001.0.eax"] == 0


class TestCapabilities:
    def decode(self, **answers: tuple[int, int]) -> dict[str, int]:
        return x86.decoder().capabilities({name.replace("_", "-"): pair for name, pair in answers.items()})

    def test_the_vm_binds(self) -> None:
        found = self.decode(xsave2=(4096, 11008), x86_smm=(1, 0), disable_quirks2=(0, 127))
        assert (found["kvm:xsave2"], found["kvm:x86-smm"], found["kvm:disable-quirks2"]) == (11008, 0, 127)

    def test_a_refused_question(self) -> None:
        found = self.decode(xsave2=(4096, -22), x86_smm=(-22, -22))
        assert found["kvm:xsave2"] == 4096
        assert "kvm:x86-smm" not in found

    def test_what_the_catalogue_does_not_know_stays_out(self) -> None:
        """KVM_CAP_IMMEDIATE_EXIT is between KVM and the VMM; no guest sees it."""
        assert "kvm:immediate-exit" not in self.decode(immediate_exit=(1, 1))


@pytest.mark.parametrize(("timer", "bit"), [(1, 1 << 24), (0, 0)])
def test_tsc_deadline_follows_the_capability(timer: int, bit: int) -> None:
    """Whether KVM lists it (from 6.18) or not."""
    for listed in (0, 1 << 24):
        found = probe([entry(1, 0, 0, 0, listed)], capabilities={"tsc-deadline-timer": (timer, timer)})
        assert x86.decoder().offer(found)["cpuid:0x1.0.ecx"] == 1 << 31 | bit


def test_xsave_components_that_no_permission_gives() -> None:
    table = [entry(0xD, 0, 0x602E7, 0, 0, 1, flags=1)]
    assert x86.decoder().offer(probe(table))["cpuid:0xd.0.eax"] == 0x602E7
    offer = x86.decoder().offer(probe(table, xcomp=0x2E7))
    assert (offer["cpuid:0xd.0.eax"], offer["cpuid:0xd.0.edx"]) == (0x2E7, 0)


def test_feature_msrs_and_hyperv_leaves() -> None:
    offer = x86.decoder().offer(
        probe([], msrs={0x10A: 0x400000000C000069, 0x345: 0}, hyperv=[entry(0x40000003, 0, 0x2AFF)])
    )
    assert (offer["msr:0x10a"], offer["msr:0x345"]) == (0x400000000C000069, 0)
    assert offer["hyperv:0x40000003.0.eax"] == 0x2AFF
    assert "hyperv:0x40000003.0.eax" not in x86.decoder().offer(probe([]))


def test_emulated_features_are_no_offer() -> None:
    """MOVBE (leaf 1 ECX 22), which KVM can emulate on a CPU without it."""
    found = probe([entry(1)])._replace(emulated=[entry(1, 0, 0, 0, 1 << 22)])
    assert not x86.decoder().offer(found)["cpuid:0x1.0.ecx"] & 1 << 22


def test_silicon_has_no_lower_hypervisor() -> None:
    raw = [
        entry(1, 0, 0xA0671, 7 << 24 | 0x800, 3),
        entry(0x40000000, 0, 1, *KVM_LETTERS),
        entry(0x40000001, 0, 9),
    ]
    assert x86.silicon_of([raw]) == {
        "cpuid:0x1.0.eax": 0xA0671,
        "cpuid:0x1.0.ebx": 0x800,
        "cpuid:0x1.0.ecx": 3,
    }


class TestMixedCpus:
    def test_silicon_is_what_all_have(self) -> None:
        first, second = [entry(7, 0, 0, 0b0110, flags=1)], [entry(7, 0, 0, 0b0011, 1, flags=1)]
        assert x86.silicon_of([first, second]) == {"cpuid:0x7.0.ebx": 0b0010}

    def test_offer_is_their_baseline(self) -> None:
        """BMI1 (7.0 EBX 3) on both, ERMS (9) on one, family 0xf stepping 1 and 2: the lower signature."""
        decoder = x86.decoder()
        big = decoder.offer(probe([entry(1, 0, 0xF12), entry(7, 0, 0, 1 << 3 | 1 << 9, flags=1)]))
        little = decoder.offer(probe([entry(1, 0, 0xF11), entry(7, 0, 0, 1 << 3, flags=1)]))
        host = x86.met([big, little])
        assert host["cpuid:0x7.0.ebx"] & (1 << 3 | 1 << 9) == 1 << 3
        assert host["cpuid:0x1.0.eax"] == 0xF11
        assert FeatureSet.of("x86_64", host) == FeatureSet.of("x86_64", x86.met([little, big]))

    def test_alike_cpus_keep_what_was_measured(self) -> None:
        one = x86.decoder().offer(probe([entry(0x3F00, 0, 0x55)]))
        assert x86.met([one, dict(one)]) == one


def test_a_host_of_two_kinds_has_no_processor_trace_where_their_trace_differs() -> None:
    """A subleaf that one kind has not: what both have alike is no trace of either."""
    both = {"cpuid:0x7.0.ebx": 1 << 25, "cpuid:0x14.0.ebx": 1, "cpuid:0x14.0.ecx": 1}
    one, other = both | {"cpuid:0x14.0.eax": 0}, both | {"cpuid:0x14.0.eax": 1}
    host = x86.met([one, other])
    assert (host["cpuid:0x14.0.eax"], host["cpuid:0x14.0.ebx"], host["cpuid:0x14.0.ecx"]) == (0, 0, 0)
    assert FeatureSet.of("x86_64", host).field("intel-pt") == 0
    assert FeatureSet.of("x86_64", x86.met([one, dict(one)])).field("intel-pt") == 1


# -- state and the TSC -----------------------------------------------------------------------------------------


def test_a_host_that_cannot_scale_gives_its_own_rate_within_the_tolerance() -> None:
    """arch/x86/kvm/x86.c, adjust_tsc_khz(): rate * (1000000 + ppm) / 1000000, rounded down; 250 ppm if nobody says."""
    assert x86.tsc_rates(2_400_001, 0, 250) == 2_400_601 << 32 | 2_399_400
    assert x86.tsc_rates(2_400_001, 0, 0) == 2_400_001 << 32 | 2_400_001
    assert x86.tsc_rates(2_400_001, 0, 5_000_000) == 14_400_006 << 32 | 1
    assert x86.tsc_rates(2_400_000, 0x7FFF_FFFE, 250) == 0x7FFF_FFFE_0000_0001  # it scales to any rate
    assert x86.tsc_rates(0, 0, 250) == 0  # calibration failed


def test_the_tolerance_is_the_modules_parameter() -> None:
    assert x86.tolerance_ppm({"modules": {"kvm.tsc_tolerance_ppm": "100"}}) == 100
    assert x86.tolerance_ppm({"modules": {"kvm.tsc_tolerance_ppm": "0"}}) == 0
    for modules in ({}, {"kvm.tsc_tolerance_ppm": "unreadable"}, {"kvm.tsc_tolerance_ppm": "9" * 40}):
        assert x86.tolerance_ppm({"modules": modules}) == 250
    assert x86.tolerance_ppm({}) == 250


def test_no_rate_is_offered_that_libkvmneg_would_not_apply() -> None:
    """A wider tolerance of the module is known to the daemon, and not to the library in the VMM."""
    source = (TESTS.parent / "csrc/x86-apply.c").read_text("utf-8")
    (limit,) = re.findall(r"#define TSC_TOLERANCE_PPM (\d+)", source)
    for parameter in ("251", "1000", "1000000"):
        assert x86.tolerance_ppm({"modules": {"kvm.tsc_tolerance_ppm": parameter}}) == int(limit)


def test_the_tsc_of_a_probe() -> None:
    found = probe([])._replace(tsc=Tsc(2_600_000, 0))
    assert x86.decoder().offer(found, 1000)["tsc:khz"] == 2_602_600 << 32 | 2_597_400
    assert "tsc:khz" not in x86.decoder().offer(probe([]))  # not measured is not "no rate"


def test_state_msrs_are_bits_of_the_catalogue() -> None:
    names = catalog.names("x86_64")
    found = x86.decoder().offer(probe([])._replace(state_msrs=(0x174, 0x4B564D01, 0x40000080, 0xC1, 0xDEAD)))
    listed = ("state-sysenter-cs", "state-kvm-system-time-new", "state-hv-scontrol", "state-perfctr0")
    bits = {word: value for word, value in found.items() if word.startswith("state:msrs") and value}
    assert bits == {names.by_name[name].word: names.by_name[name].mask for name in listed}
    assert found["state:msrs-vmx"] == 0  # measured, and not there


def test_an_msr_that_nobody_catalogued_is_kept_and_never_offered() -> None:
    found = x86.decoder().offer(probe([])._replace(state_msrs=(0x174, 0xDEAD)))
    assert found["state:msr-0xdead"] == 1
    report = Report("x86_64", measured={}, combo={}, identity={}, offer=found)
    assert report.unclassified()["state:msr-0xdead"] == 1
    assert "state:msr-0xdead" not in report.offer.words
    again = Report.loads(json.dumps(report.to_json()).encode())
    assert again.offer_words == report.offer_words


def test_a_list_that_was_not_measured_says_nothing() -> None:
    assert not [word for word in x86.decoder().offer(probe([])) if word.startswith("state:msrs")]


@pytest.mark.parametrize(
    ("capability", "answer", "classes"),
    [
        ("vcpu-events", 1, {"state-vcpu-events"}),
        ("adjust-clock", 2, {"state-clock"}),  # KVM_CLOCK_TSC_STABLE alone, as on Linux 5.10
        ("adjust-clock", 0xE, {"state-clock", "state-clock-realtime", "state-clock-host-tsc"}),
        ("xsave2", 4096, {"state-xsave2"}),
        ("x86-triple-fault-event", 1, {"state-triple-fault"}),
    ],
)
def test_state_that_a_capability_tells_about(capability: str, answer: int, classes: set[str]) -> None:
    value = x86.decoder().offer(probe([], capabilities={capability: (answer, answer)}))["state:vcpu"]
    assert {feature.name for feature in catalog.names("x86_64").at("state:vcpu", value)} == classes


@pytest.mark.parametrize(("leaf1", "place"), [(1 << 5, 0), (0, 32)])
def test_the_nested_format_is_the_vendors(leaf1: int, place: int) -> None:
    """sizeof(struct kvm_nested_state) and two VMCS12 pages, or one VMCB: one of them, by what the CPU has."""
    found = probe([entry(1, 0, 0, 0, leaf1)], capabilities={"nested-state": (0x2080, 0x2080)})
    assert x86.decoder().offer(found)["state:nested"] == 0x2080 << place


def test_machine_checks_are_the_bits_with_the_number_of_banks() -> None:
    found = probe([], capabilities={"mce": (32, 32)})._replace(mce_cap=0x1000100)
    assert x86.decoder().offer(found)["msr:0x179"] == 0x1000120
    assert "msr:0x179" not in x86.decoder().offer(probe([], capabilities={"mce": (32, 32)}))


def test_capabilities_of_a_vm_that_refuses_are_the_systems() -> None:
    answers = {"mce": (32, -22), "max-vcpus": (-22, -22)}
    found = x86.decoder().capabilities(answers)
    assert found["kvm:mce"] == 32
    assert "kvm:max-vcpus" not in found
