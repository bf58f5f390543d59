# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who holds a feature back, told apart by what was measured: every layer in turn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from strategies import ARCHITECTURE, NAMES

from kvmneg.errors import Blocked
from kvmneg.features import catalog as catalogs
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.host import software
from kvmneg.policy import kernels, negotiation, reasons, roll, vmm
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.leases import Holding
from kvmneg.policy.members import Measured, Member
from kvmneg.policy.request import Request

RECORDED = Path(__file__).resolve().parents[1] / "data/hosts"
PLAIN: dict[str, int] = {"cpuid:0x0.0.eax": 0x20, "cpuid:0x80000000.0.eax": 0x80000021}


def host(
    *silicon: str,
    kernel: str = "6.12.1",
    flags: str | None = None,
    offer: dict[str, int] = PLAIN,
    **combo: Any,
) -> Report:
    """A host whose CPU has these features, and offers none of them."""
    raw: dict[str, int] = {"cpuid:0x0.0.eax": 0x20}
    for name in silicon:
        feature = NAMES.by_name[name]
        raw[feature.word] = raw.get(feature.word, 0) | feature.mask
    identity = {"vendor": "GenuineIntel", **({} if flags is None else {"flags": flags})}
    made = {"kernel": kernel, **combo}
    return Report(
        ARCHITECTURE, measured={"host": "n"}, combo=made, identity=identity, offer=offer, silicon=raw
    )


def stands(name: str, report: Report, **others: Any) -> reasons.Standing:
    return reasons.standing(NAMES.by_name[name], report, **others)


def cause(name: str, report: Report) -> str:
    found = stands(name, report)
    assert found.state == reasons.HELD_BACK and found.because
    return found.cause


def test_silicon() -> None:
    assert cause("avx2", host("fpu")) == "silicon"


def test_without_silicon_nothing_is_known() -> None:
    none = Report(ARCHITECTURE, measured={}, combo={"kernel": "6.12"}, identity={}, offer=PLAIN)
    assert cause("avx2", none) == "unknown"
    assert cause("lass", none) == "unknown"


@pytest.mark.parametrize(
    ("parameter", "value", "feature", "expected"),
    [
        ("kvm_intel.nested", "N", "vmx", "module-parameter"),
        ("kvm_intel.nested", "0", "vmx", "module-parameter"),
        ("kvm_intel.nested", "Y", "vmx", "kvm"),
        ("kvm_intel.nested", "unreadable", "vmx", "kvm"),
        ("kvm_amd.nested", "0", "svm", "module-parameter"),
        ("kvm_amd.nested", "0", "vmx", "kvm"),
        ("kvm.enable_pmu", "N", "pdcm", "module-parameter"),
        ("kvm.enable_pmu", "N", "pmu-version", "module-parameter"),
        ("kvm.enable_pmu", "N", "avx2", "kvm"),
        ("kvm_intel.pt_mode", "0", "intel-pt", "module-parameter"),
        ("kvm_intel.pt_mode", "1", "intel-pt", "kvm"),
    ],
)
def test_module_parameters(parameter: str, value: str, feature: str, expected: str) -> None:
    report = host("vmx", "svm", "pdcm", "pmu-version", "intel-pt", "avx2", modules={parameter: value})
    found = stands(feature, report)
    assert found.cause == expected
    assert (f"{parameter}={value}" in found.because) == (expected == "module-parameter")


def test_a_parameter_takes_nothing_that_the_cpu_lacks() -> None:
    modules = {"kvm_intel.nested": "N", "kvm.enable_pmu": "N"}
    assert cause("vmx", host("fpu", modules=modules)) == "silicon"
    assert cause("pdcm", host("fpu", modules=modules)) == "silicon"


def test_nested_controls_are_held_back_with_their_feature() -> None:
    found = stands("vmx-true-ctls", host("vmx", modules={"kvm_intel.nested": "N"}))
    assert (found.cause, found.because) == ("module-parameter", "kvm_intel.nested=N holds it back")


@pytest.mark.parametrize(
    ("kernel", "feature", "expected"),
    [
        ("5.10.0-35-amd64", "amx-bf16", "kernel"),
        ("5.15.0", "amx-bf16", "kernel"),  # 5.10's table is the nearest
        ("6.1.0-18-amd64", "amx-bf16", "kvm"),
        ("6.1.9", "avx10", "kernel"),  # a leaf that 6.1's KVM zeroes
        ("6.12.9", "avx10", "kvm"),
        ("6.12.9", "lass", "kernel"),
        ("6.12.9", "waitpkg", "kvm"),  # the vendor module's to set, outside of the older tables
        ("4.19.0", "amx-bf16", "kvm"),  # older than every table
        ("", "amx-bf16", "kvm"),
        ("weird", "amx-bf16", "kvm"),
    ],
)
def test_kernels(kernel: str, feature: str, expected: str) -> None:
    found = stands(feature, host(feature, kernel=kernel))
    assert found.cause == expected
    assert ("upstream's table" in found.because) == (expected == "kernel")


def test_a_later_kernel_that_knows_it_is_named() -> None:
    known = kernels.tables()
    assert not known["5.10"].get("cpuid:0x7.0.ebx", {})["hardware"] & 1 << 2
    assert known["6.1"]["cpuid:0x7.0.ebx"]["hardware"] & 1 << 2  # SGX came with 5.13
    assert "KVM of 5.10 does not, that of 6.1 does" in stands("sgx", host("sgx", kernel="5.10.1")).because


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("6.12.107+deb13-amd64", (6, 12, 107)),
        ("5.10", (5, 10)),
        ("6.1-rc3", (6, 1)),
        ("7", (7,)),
        ("", ()),
        ("next", ()),
        ("6..1", (6,)),
        ("9" * 5000, ()),
    ],
)
def test_numbers_of_a_version(version: str, expected: tuple[int, ...]) -> None:
    assert kernels.numbers(version) == expected


def test_tables_are_found_by_version() -> None:
    assert kernels.nearest("6.2") == ("6.1", "6.12")
    assert kernels.nearest("6.12") == ("6.12", "7.2")
    assert kernels.nearest("99.0") == ("7.3", None)
    assert kernels.nearest("4.4") == (None, None)


def test_microcode_or_the_command_line() -> None:
    gone = host("avx2", "avx", flags="fpu avx")
    found = stands("avx2", gone)
    assert found.cause == "microcode" and "microcode" in found.because
    assert stands("avx2", host("avx2", flags="fpu avx avx2")).cause == "kvm"
    assert stands("avx2", host("avx2")).cause == "kvm"  # the flags were not recorded
    named = stands("avx2", host("avx2", flags="fpu", cmdline="ro quiet clearcpuid=avx2"))
    assert named.cause == "microcode" and "clearcpuid=avx2 on its command line" in named.because


def test_flags_that_linux_never_shows_are_no_evidence() -> None:
    assert NAMES.by_name["fsrc"].linux and NAMES.by_name["spec-ctrl"].word == "cpuid:0x7.0.edx"
    for name in ("fsrc", "spec-ctrl", "fdp-excptn-only"):
        assert not kernels.shown(NAMES.by_name[name].word, NAMES.by_name[name].mask)
    assert stands("fsrc", host("fsrc", kernel="7.3", flags="fpu")).cause == "kvm"


def test_kvm_offers_it_without_its_base() -> None:
    avx2 = {**PLAIN, "cpuid:0x7.0.ebx": 1 << 5}
    assert cause("avx2", host("avx2", offer=avx2)) == "dependency"


def test_an_msr_of_kvm() -> None:
    assert cause("rdctl-no", host("fpu")) == "kvm"


def test_offered_told_clear_and_what_nobody_negotiates(intel: Report) -> None:
    assert stands("avx2", intel)[:2] == (reasons.OFFERED, 1)
    assert stands("phys-bits", intel)[:2] == (reasons.OFFERED, intel.offer.field("phys-bits"))
    assert intel.offer_words["cpuid:0x7.0.edx"] & 1 << 10
    assert stands("md-clear", intel).state == reasons.TOLD
    assert (
        not intel.offer_words["cpuid:0x7.0.ebx"] & 1 << 11 and not intel.offer_words.get("msr:0x10a", 0) & 4
    )
    assert stands("rsba", intel).state == reasons.CLEAR
    assert stands("arat", intel).state == stands("ht", intel).state == reasons.UNMERGED


def test_fence_and_policy(intel: Report) -> None:
    lower = {**intel.offer.words, "cpuid:0x7.0.ebx": intel.offer.value("cpuid:0x7.0.ebx") & ~(1 << 18)}
    found = stands("rdseed", intel, fence=Fence(FeatureSet.of(ARCHITECTURE, lower), 7))
    assert (found.state, found.where, found.cause) == (reasons.HELD_BACK, "fence generation 7", "fence")
    assert stands("rdseed", intel).state == reasons.OFFERED
    assert (stands("invtsc", intel).where, stands("invtsc", intel).cause) == ("kvmneg", "policy")


def test_through_a_vmm(intel: Report) -> None:
    seen = vmm.through(intel, "qemu")
    given = stands("kvm-msi-ext-dest-id", intel, seen=seen)
    assert given.state == reasons.OFFERED and "split" in given.because
    taken = stands("cpuid-fault", intel, seen=seen)
    assert (taken.state, taken.cause, taken.where) == (reasons.HELD_BACK, "vmm", "QEMU on node-intel")
    assert stands("avx2", intel, seen=seen) == stands("avx2", intel)
    assert stands("invtsc", intel, seen=seen).cause == "policy"


def test_every_parameter_names_something() -> None:
    for parameter, values, what in reasons._PARAMETERS:
        assert parameter.startswith("kvm") and values
        for text in what:
            words = [word for word in NAMES.by_place if word.startswith(text)]
            assert text in NAMES.by_name or words, text


def test_no_table_is_read_before_something_is_missing() -> None:
    """A start pays for no table: json and the kernels' masks come with the first blocker."""
    code = "import sys, kvmneg.policy.negotiation; print('kvmneg.policy.kernels' in sys.modules)"
    told = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_flags_are_those_that_all_cpus_of_a_kind_have(tmp_path: Path) -> None:
    block = "processor\t: {0}\nvendor_id\t: GenuineIntel\nmodel\t\t: 1\nflags\t\t: fpu {1}\n"
    (tmp_path / "cpuinfo").write_text("\n".join((block.format(0, "vme avx"), block.format(1, "avx sse2"))))
    (one,) = software.cpu_classes(software.Roots(proc=str(tmp_path)))
    assert (one.flags, one.cpus) == ("fpu avx", (0, 1))
    assert software.common_flags(("b a c", "c b", "b")) == "b"


def test_a_set_of_which_a_host_offers_a_part() -> None:
    """Both values are told: there is nothing that it is built on."""
    old, new = (Report.loads((RECORDED / f"amd-{line}.max.json").read_bytes()) for line in ("6.1", "6.12"))
    with pytest.raises(Blocked) as caught:
        negotiation.negotiate(Request(maximum=True), old, Fence(new.offer, 3))
    (found,) = (one for one in caught.value.blockers if one.feature == "cap-disable-quirks2")
    assert (found.cause, found.missing_on) == ("kvm", "host amd-6.1")
    values = [hex(one.offer.value("kvm:disable-quirks2")) for one in (new, old)]
    assert found.because.startswith(f"{values[0]} is needed, host amd-6.1 has {values[1]} ")


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: str(path.stem))
def test_what_is_missing_is_named(path: Path) -> None:
    """Of no feature of any recorded host, alone or under the fence of another, a reason ends before it began."""
    report = Report.loads(path.read_bytes())
    names = catalogs.names(report.architecture).by_name
    for feature in names.values():
        assert not reasons.standing(feature, report).because.endswith(": ")
        blocker = reasons.missing(
            feature, "the request", FeatureSet.of(report.architecture, {}), report, None
        )
        assert not blocker.because.endswith(": ") and blocker.because


def test_host_and_fence_without_a_common_value() -> None:
    """Neither hides it, and nothing is left of it."""
    feature = NAMES.by_name["cap-disable-quirks2"]
    report = host(offer={**PLAIN, "kvm:disable-quirks2": 0x3})
    fence = Fence(FeatureSet.of(ARCHITECTURE, {"kvm:disable-quirks2": 0xC}), 7)
    blocker = reasons.missing(feature, "the request", FeatureSet.of(ARCHITECTURE, {}), report, fence)
    assert (blocker.cause, blocker.because) == (
        "fence",
        "the host's and the fence's values of it have nothing in common",
    )


def test_what_another_kernel_offers_on_the_same_cpu_is_not_the_cpus() -> None:
    """KVM of 6.12 does flushbyasid in software: that 6.1 lacks it, as the CPU does, is that kernel's."""
    old, new = (Report.loads((RECORDED / f"amd-{line}.max.json").read_bytes()) for line in ("6.1", "6.12"))
    elsewhere = Report.loads((RECORDED / "intel-6.12.tigerlake.json").read_bytes())
    fence = Fence(new.offer, 3)

    def causes(running: Report | None) -> dict[str, tuple[str, str]]:
        return {one.feature: (one.cause, one.because) for one in roll.below(old, fence, running)}

    alone = causes(None)
    assert alone["flushbyasid"][0] == "silicon"
    assert causes(elsewhere) == alone
    told = causes(new)
    kernels_of = [str(one.combo["kernel"]) for one in (old, new)]
    because = f"KVM of {kernels_of[0]} does not offer it, that of {kernels_of[1]} does on the same CPU"
    assert told.pop("flushbyasid") == ("kernel", because)
    del alone["flushbyasid"]
    assert told == alone

    held = Holding("vm", "sha256:1", new.offer, "running", 0)
    answer = roll.judge(old, fence, roll.Guests([held]), running=new)
    for blockers in (answer.blockers, answer.guests[0].blockers):
        assert {one.cause for one in blockers if one.feature == "flushbyasid"} == {"kernel"}
    combos = [Measured(one.combo_digest(), str(one.combo["kernel"]), one.offer, one) for one in (old, new)]
    ((_, lacking),) = Member("h", running=combos[1], roll=(combos[0],)).roll_lacks(fence)
    assert {one.cause for one in lacking if one.feature == "flushbyasid"} == {"kernel"}
