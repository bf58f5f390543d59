# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's CPU data and InstLatX64 dumps as reports: hand-made samples, and how each may be broken.

Every such error names file and line.
"""

from __future__ import annotations

import pytest

from kvmneg.emit import instlatx64, libvirt_cpudata
from kvmneg.emit.imported import Measured
from kvmneg.errors import BadInput
from kvmneg.features.report import Report

BOX = Measured("box", "node7", "2026-11-21T06:00:00Z")

# -- libvirt

XML_VENDOR = (
    "<cpuid eax_in='0x00000000' ecx_in='0x00' "
    "eax='0x00000007' ebx='0x756e6547' ecx='0x6c65746e' edx='0x49656e69'/>"
)
XML_7 = "<cpuid eax_in='0x00000007' ecx_in='0x00' eax='0x0' ebx='0x0' ecx='0x0' edx='0x20000000'/>"
XML_MSR = "<msr index='0x10a' edx='0x00000001' eax='0x00000008'/>"


def cpudata(*rows: str) -> bytes:
    """One element a line: the first of `rows` stands on line 3."""
    return "\n".join(["<!-- a CPU -->", "<cpudata arch='x86'>", *rows, "</cpudata>", ""]).encode()


def test_libvirts_data_are_raw_silicon() -> None:
    report = libvirt_cpudata.read(cpudata(XML_VENDOR, XML_7, XML_MSR), BOX)
    assert report.measured["source"] == "libvirt-cpudata, raw silicon"
    assert report.identity["vendor"] == "GenuineIntel"
    assert report.offer_words["msr:0x10a"] == 1 << 32 | 8
    assert report.silicon_words["msr:0x10a"] == 1 << 32 | 8
    assert report.offer.field("skip-l1dfl-vmentry") == 1
    assert Report.from_json(report.to_json()).offer == report.offer


@pytest.mark.parametrize(
    ("index", "value", "meant"),
    [
        (0x48D, 0x000000E9, 0xFF_0000_0016),  # QEMU's feature word, as libvirt 11 keeps it: 0x16 is always 1
        (0x48D, 0x000000E9 << 32, 0xFF_0000_0016),  # as libvirt 12 does
        (0x48D, 0x7F_0000_0016, 0x7F_0000_0016),  # the MSR itself
        (0x48E, 0xFBF99E8C, (0xFBF99E8C | 0x0401E172) << 32 | 0x04006172),  # 15 and 16 may be 0
        (0x48B, 0x00137BFF, 0x00137BFF << 32),  # of the secondary ones none is always 1
        (0x48B, 0x00137BFF << 32, 0x00137BFF << 32),
        (0x48C, 0x0D01_0633_0041, 0x0D01_0633_0041),  # no control word
        (0x48F, 0, 0),
    ],
)
def test_vmx_controls_are_read_in_each_of_libvirts_forms(index: int, value: int, meant: int) -> None:
    """The feature words are of libvirt's recorded Cooper Lake."""
    row = f"<msr index='{index:#x}' edx='{value >> 32:#010x}' eax='{value & 0xFFFFFFFF:#010x}'/>"
    report = libvirt_cpudata.read(cpudata(XML_VENDOR, row), BOX)
    assert report.offer_words[f"msr:{index:#x}"] == meant


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (XML_VENDOR, "leaf 0x0 0x0 is there twice"),
        (XML_7.replace("0x20000000", "20000000"), "<cpuid>: '20000000' is not a 32-bit number"),
        (XML_7.replace("0x20000000", "0x120000000"), "is not a 32-bit number"),
        (XML_7.replace(" edx='0x20000000'", ""), "<cpuid> needs the attributes eax_in, ecx_in, eax"),
        (XML_7.replace("/>", " extra='0x1'/>"), "and no other"),
        (XML_MSR.replace(" eax='0x00000008'", ""), "<msr> needs the attributes index, eax, edx"),
        (XML_MSR.replace("0x10a", "-1"), "<msr>: '-1' is not"),
        ("<feature name='avx'/>", "<feature> does not belong there"),
        ("<cpuid>", "<cpuid> needs the attributes"),
        ("words", "text where none belongs"),
        ("<msr", "not XML: "),
        ("&x;", "not XML: undefined entity"),
    ],
)
def test_a_wrong_element_of_libvirts_is_named(row: str, what: str) -> None:
    with pytest.raises(BadInput, match=f"^box:[45]: .*{what}"):  # text is seen at its end
        libvirt_cpudata.read(cpudata(XML_VENDOR, row), BOX)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<cpudata arch='ppc64'/>", "box:1: <cpudata> is not"),
        (b"<cpu arch='x86'/>", "box:1: <cpu> is not"),
        (b"<cpudata arch='x86'/>", "box: no <cpuid> in it"),
        (b"", "box:1: not XML: no element found"),
        (cpudata(XML_VENDOR, XML_MSR, XML_MSR), "box:5: MSR 0x10a is there twice"),
        (cpudata(XML_VENDOR)[:-8], "box:4: not XML: "),
        (b"<?xml version='1.0' encoding='none-such'?><cpudata arch='x86'/>", "box.*: not XML: "),
    ],
)
def test_what_is_no_cpu_data_is_refused(data: bytes, what: str) -> None:
    with pytest.raises(BadInput, match=f"^{what}"):
        libvirt_cpudata.read(data, BOX)


@pytest.mark.parametrize(
    "declaration",
    [
        b"<!DOCTYPE cpudata SYSTEM 'file:///etc/passwd'>",
        b"<!DOCTYPE cpudata [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;'>]>",
    ],
)
def test_a_document_type_is_refused_before_its_entities_mean_anything(declaration: bytes) -> None:
    with pytest.raises(BadInput, match=r"^box:1: has a document type"):
        libvirt_cpudata.read(declaration + cpudata(XML_VENDOR), BOX)


# -- InstLatX64

DUMP = """\
------[ CPUID Registers / Logical CPU #0 ]------
CPUID Manufacturer       GenuineIntel
CPUID 00000000: 0000000D-756E6547-6C65746E-49656E69
CPUID 00000001: 000506E3-00100800-7FFAFBBF-BFEBFBFF
CPUID 00000007: 00000000-029C6FBB-00000000-00000000 [SL 00]
CPUID 0000000D: 0000001F-00000440-00000440-00000000 [SL 00]
CPUID 0000000D: 0000000F-000003C0-00000100-00000000 [SL 01]
CPUID 0000000D: 00000100-00000240-00000000-00000000 [SL 02]
CPUID 0000000D: 00000008-00000A80-00000000-00000000 [SL 0A]
MSR 0000001B: 0000-0000-FEE0-0900
"""


def test_a_dump_is_raw_silicon() -> None:
    report = instlatx64.read(DUMP.encode("latin-1"), BOX)
    assert report.measured["source"] == "instlatx64, raw silicon"
    assert report.identity == {"vendor": "GenuineIntel", "signature": "0x000506e3", "cpus": 1}
    assert report.offer_words["cpuid:0x7.0.ebx"] == 0x029C6FBB
    assert report.offer_words["cpuid:0xd.10.ebx"] == 0xA80, "subleaves are hexadecimal"
    assert report.silicon_words == report.offer_words


def test_prose_around_it_may_be_anything_and_lines_may_end_as_on_windows() -> None:
    text = "Intel\xae Core\x99 \xb5code\n" + DUMP
    plain = instlatx64.read(DUMP.encode("latin-1"), BOX)
    assert instlatx64.read(text.replace("\n", "\r\n").encode("latin-1"), BOX).offer == plain.offer


def test_leaf_0_begins_the_next_cpu() -> None:
    other = DUMP.replace("029C6FBB", "029C6FBA")
    report = instlatx64.read((DUMP + other).encode(), BOX)
    assert report.identity["cpus"] == 2
    assert report.offer.field("fsgsbase") == 0
    assert report.offer.field("bmi1") == 1


def test_repeated_leaves_without_a_subleaf_count_up_and_xsave_goes_by_components() -> None:
    """XCR0 0x207 and XSS 0x100: the components listed are 2, 8 and 9."""
    text = """\
CPUID 00000000: 0000000D-756E6547-6C65746E-49656E69
CPUID 00000004: 00000001-00000000-00000000-00000000
CPUID 00000004: 00000002-00000000-00000000-00000000
CPUID 0000000D: 00000207-00000440-00000440-00000000
CPUID 0000000D: 0000000F-000003C0-00000100-00000000
CPUID 0000000D: 00000100-00000240-00000000-00000000
CPUID 0000000D: 00000080-00000000-00000001-00000000
CPUID 0000000D: 00000008-00000A80-00000000-00000000
"""
    found = instlatx64.read(text.encode(), BOX).offer_words
    assert (found["cpuid:0x4.0.eax"], found["cpuid:0x4.1.eax"]) == (1, 2)
    assert found["cpuid:0xd.2.ebx"] == 0x240
    assert found["cpuid:0xd.8.eax"] == 0x80
    assert found["cpuid:0xd.9.ebx"] == 0xA80
    more = text + "CPUID 0000000D: 00000040-00000400-00000000-00000000\n"
    with pytest.raises(BadInput, match=r"^box:9: an XSAVE component that neither XCR0 nor XSS has"):
        instlatx64.read(more.encode(), BOX)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("CPUID 00000007: 00000000-029C6FBB-00000000 [SL 00]", "no line of CPUID registers"),
        ("CPUID 00000007: 00000000-029C6FBB-00000000-0000000 [SL 00]", "no line of CPUID registers"),
        ("CPUID 00000007: 00000000-029C6FBG-00000000-00000000", "no line of CPUID registers"),
        ("CPUID 0000007: 00000000-029C6FBB-00000000-00000000", "no line of CPUID registers"),
        ("CPUID 00000007 00000000-029C6FBB-00000000-00000000", "no line of CPUID registers"),
        ("CPUID X0000007: 00000000-029C6FBB-00000000-00000000", "no line of CPUID registers"),
        ("CPUID 00000007: 00000000-029C6FBB-00000000-00000000 [SL]", "no line of CPUID registers"),
        ("CPUID 00000007: 00000000-029C6FBB-00000000-00000000 [SL 0G]", "no line of CPUID registers"),
        ("CPUID 00000007:", "no line of CPUID registers"),
        ("CPUID 000", "no line of CPUID registers"),
        ("CPUID 00000007: 00000000-029C6FBB-00000000-00000000 [SL 00]", "leaf 0x7 0x0 is there twice"),
    ],
)
def test_a_malformed_register_line_is_named(row: str, what: str) -> None:
    data = DUMP if "twice" in what else DUMP.partition("CPUID 00000007")[0]
    number = data.count("\n") + 1
    with pytest.raises(BadInput, match=f"^box:{number}: .*{what}"):
        instlatx64.read((data + row + "\n").encode(), BOX)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "box: no line of CPUID registers in it"),
        ("CPUID Manufacturer GenuineIntel\n", "box: no line of CPUID registers in it"),
        ("\nCPUID 00000001: 00000000-00000000-00000000-00000000\n", "box:2: a leaf before leaf 0"),
    ],
)
def test_what_is_no_dump_is_refused(text: str, what: str) -> None:
    with pytest.raises(BadInput, match=f"^{what}"):
        instlatx64.read(text.encode(), BOX)
