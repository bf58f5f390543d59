# SPDX-License-Identifier: LGPL-2.1-or-later
"""`cpuid -r` as a report: a hand-made sample, and every way in which it may be broken."""

import pytest

from kvmneg import limits
from kvmneg.emit import cpuid_raw
from kvmneg.emit.imported import Measured
from kvmneg.errors import BadInput
from kvmneg.features.report import Report

VENDOR = "   0x00000000 0x00: eax=0x00000001 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n"
AMD = "   0x00000000 0x00: eax=0x00000001 ebx=0x68747541 ecx=0x444d4163 edx=0x69746e65\n"
LEAF1 = "   0x00000001 0x00: eax=0x000a0671 ebx=0x01020800 ecx=0x00000001 edx=0x07000101\n"
KVM = "   {:#010x} 0x00: eax=0x40000101 ebx=0x4b4d564b ecx=0x564b4d56 edx=0x0000004d\n"
KVM_FEATURES = "   {:#010x} 0x00: eax=0x01007efb ebx=0x00000000 ecx=0x00000000 edx=0x00000000\n"
HYPERV = "   0x40000000 0x00: eax=0x40000005 ebx=0x7263694d ecx=0x666f736f edx=0x76482074\n"
HYPERV_FEATURES = "   0x40000003 0x00: eax=0x00000002 ebx=0x00000000 ecx=0x00000000 edx=0x00000000\n"
XEN = "   0x40000000 0x00: eax=0x40000005 ebx=0x566e6558 ecx=0x65584d4d edx=0x4d4d566e\n"
XEN_LEAF = "   0x40000001 0x00: eax=0x00040011 ebx=0x00000000 ecx=0x00000000 edx=0x00000000\n"


def read(text: str) -> Report:
    return cpuid_raw.read(text.encode(), Measured("box.txt", "box", "2026-11-21T06:00:00Z"))


def test_a_sample_becomes_an_ordinary_report() -> None:
    report = read("CPU 0:\n" + VENDOR + LEAF1)
    assert report.offer_words["cpuid:0x1.0.eax"] == 0x000A0671
    assert report.offer_words["cpuid:0x1.0.edx"] == 0x07000101
    assert report.identity == {"vendor": "GenuineIntel", "signature": "0x000a0671", "cpus": 1}
    assert Report.from_json(report.to_json()).offer == report.offer


def test_it_is_marked_as_what_it_is() -> None:
    measured = read("CPU 0:\n" + VENDOR).measured
    assert measured["source"] == "cpuid-raw, raw silicon"
    assert "no KVM" in measured["note"]
    assert measured["host"] == "box"


def test_the_header_of_one_cpu_has_no_number() -> None:
    assert read("CPU:\n" + VENDOR + LEAF1).offer == read("CPU 0:\n" + VENDOR + LEAF1).offer


def test_equal_cpus_are_one() -> None:
    """The APIC id in leaf 1 EBX differs from CPU to CPU and makes no kind of its own."""
    other = LEAF1.replace("ebx=0x01020800", "ebx=0x02020800")
    report = read("CPU 0:\n" + VENDOR + LEAF1 + "CPU 1:\n" + VENDOR + other)
    assert report.offer_words["cpuid:0x1.0.ebx"] == 0x01020800
    assert report.identity["cpus"] == 2


def test_differing_cpus_offer_what_both_have() -> None:
    lesser = LEAF1.replace("edx=0x07000101", "edx=0x07000001")
    report = read("CPU 0:\n" + VENDOR + LEAF1 + "CPU 1:\n" + VENDOR + lesser)
    assert report.offer.field("cx8") == 0
    assert report.offer.field("fpu") == 1


def test_a_leaf_that_one_cpu_lacks_is_not_offered() -> None:
    leaf = "   0x00000007 0x00: eax=0x00000000 ebx=0x00000001 ecx=0x00000000 edx=0x00000000\n"
    report = read("CPU 0:\n" + VENDOR + LEAF1 + leaf + "CPU 1:\n" + VENDOR + LEAF1)
    assert "cpuid:0x7.0.ebx" not in report.offer_words


def test_cpus_of_two_vendors_are_refused() -> None:
    with pytest.raises(BadInput, match="nothing in common"):
        read("CPU 0:\n" + VENDOR + "CPU 1:\n" + AMD)


@pytest.mark.parametrize("base", [0x40000000, 0x40000100, 0x40000F00])
def test_kvms_leaves_are_found_by_their_signature(base: int) -> None:
    report = read("CPU 0:\n" + VENDOR + KVM.format(base) + KVM_FEATURES.format(base + 1))
    assert report.offer_words["cpuid:0x40000001.0.eax"] == 0x01007EFB


def test_hypervs_leaves_beside_kvms_are_words_of_their_own() -> None:
    text = (
        "CPU 0:\n"
        + VENDOR
        + HYPERV
        + HYPERV_FEATURES
        + KVM.format(0x40000100)
        + KVM_FEATURES.format(0x40000101)
    )
    report = read(text)
    assert report.offer_words["hyperv:0x40000003.0.eax"] == 2
    assert report.offer_words["cpuid:0x40000001.0.eax"] == 0x01007EFB
    assert "cpuid:0x40000003.0.eax" not in report.offer_words


def test_another_hypervisors_leaves_are_not_taken_for_kvms() -> None:
    assert not [word for word in read("CPU 0:\n" + VENDOR + XEN + XEN_LEAF).offer_words if "0x4000" in word]


def test_silicon_is_claimed_only_outside_a_guest() -> None:
    assert read("CPU 0:\n" + VENDOR + LEAF1).silicon_words["cpuid:0x1.0.edx"] == 0x07000101
    inside = LEAF1.replace("ecx=0x00000001", "ecx=0x80000001")
    assert read("CPU 0:\n" + VENDOR + inside).silicon_words == {}
    assert read("CPU 0:\n" + VENDOR + inside).measured["source"] == "cpuid-raw, a guest's view"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("CPU 0:\n" + VENDOR + "   0x00000001 0x00: eax=0x1 ebx=0x2 ecx=0x3\n", 3, "no line of `cpuid -r`"),
        ("CPU 0:\n" + VENDOR + LEAF1.replace("ebx=", "exx="), 3, "no line of `cpuid -r`"),
        ("CPU 0:\n" + LEAF1.replace("0x000a0671", "0x1000a0671"), 2, "no line of `cpuid -r`"),
        ("CPU 0:\n" + LEAF1.replace("0x000a0671", "0x-0a0671"), 2, "no line of `cpuid -r`"),
        ("CPU 0:\n" + LEAF1[:40] + "\n", 2, "no line of `cpuid -r`"),
        ("CPU 0:\n" + LEAF1 + "\n" + LEAF1, 4, "is there twice"),
        (LEAF1, 1, "before the first"),
        ("version information (1/eax):\n", 1, "no line of `cpuid -r`"),
    ],
)
def test_a_malformed_line_is_named(text: str, line: int, what: str) -> None:
    with pytest.raises(BadInput, match=f"^box.txt:{line}: .*{what}"):
        read(text)


def test_bytes_that_are_no_text_are_named_by_line() -> None:
    with pytest.raises(BadInput, match=r"^box.txt:2: not text"):
        cpuid_raw.read(b"CPU 0:\n\xff\n", Measured("box.txt"))


@pytest.mark.parametrize(
    ("text", "what"),
    [("", "no CPU"), ("CPU 0:\n", "no CPU"), ("CPU 0:\n" + VENDOR + "CPU 1:\n", "a CPU without a leaf")],
)
def test_an_empty_or_cut_file_is_refused(text: str, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        read(text)


def test_more_leaves_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WORDS", 4)
    with pytest.raises(BadInput, match="more than 4 words"):
        read("CPU 0:\n" + VENDOR + LEAF1)


def test_a_larger_file_than_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPORT_BYTES", 10)
    with pytest.raises(BadInput, match="larger than 10 bytes"):
        read("CPU 0:\n" + VENDOR)
