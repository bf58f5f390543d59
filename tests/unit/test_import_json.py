# SPDX-License-Identifier: LGPL-2.1-or-later
"""Firecracker fingerprints and QEMU's expansions (JSON) as reports: hand-made samples, and how each may be broken.

Every such error names file and line.
"""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from kvmneg import limits
from kvmneg.emit import firecracker_fingerprint, qemu_expansion
from kvmneg.emit.imported import Measured
from kvmneg.errors import BadInput
from kvmneg.features import words
from kvmneg.features.report import Report

BOX = Measured("box", "node7", "2026-11-21T06:00:00Z")
INTEL = 0x756E6547, 0x6C65746E, 0x49656E69  # EBX, ECX, EDX of leaf 0
KVM_SIGNATURE = 0x4B4D564B, 0x564B4D56, 0x4D


def lines(document: object) -> bytes:
    """JSON on many lines, so that a wrong line number shows."""
    return json.dumps(document, indent=1).encode()


def line_of(data: bytes, text: str) -> int:
    """The line, from 1, of the only place where a text stands."""
    found = [number for number, line in enumerate(data.decode().splitlines(), 1) if text in line]
    assert len(found) == 1, f"{text!r} stands on {len(found)} lines"
    return found[0]


# -- Firecracker


def modifier(leaf: int, subleaf: int, *registers: int) -> dict[str, Any]:
    """One leaf; registers that are not given are zero."""
    values = dict.fromkeys(words.REGISTERS, 0) | dict(zip(words.REGISTERS, registers, strict=False))
    rows = [{"register": name, "bitmap": f"0b{value:032b}"} for name, value in values.items()]
    return {"leaf": hex(leaf), "subleaf": hex(subleaf), "flags": 0, "modifiers": rows}


def fingerprint(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "kvm_capabilities": [],
        "cpuid_modifiers": [
            modifier(0, 0, 7, *INTEL),
            modifier(1, 0, 0x50657, 0, 1 << 31, 1),
            modifier(7, 0, 0, 0, 0, 1 << 29),
            modifier(0x40000000, 0, 0x40000001, *KVM_SIGNATURE),
            modifier(0x40000001, 0, 0x1000001),
        ],
        "msr_modifiers": [
            {"addr": "0x10a", "bitmap": f"0b{0x6B:064b}"},
            {"addr": "0x11", "bitmap": f"0b{5:064b}"},
        ],
    }
    return {
        "firecracker_version": "1.16.0",
        "kernel_version": "6.1.172",
        "microcode_version": "0x5003901",
        "bios_version": "1.0",
        "bios_revision": "4.15",
        "guest_cpu_config": {**config, **changes},
    }


def test_a_fingerprint_is_what_kvm_supports() -> None:
    report = firecracker_fingerprint.read(lines(fingerprint()), BOX)
    assert report.measured["source"] == "firecracker-fingerprint, KVM-supported"
    assert report.measured["host"] == "node7"
    assert report.identity == {"vendor": "GenuineIntel", "signature": "0x00050657"}
    assert report.combo["kernel"] == "6.1.172"
    assert report.combo["microcode"] == "0x5003901"
    assert report.combo["bios"] == "1.0 4.15"
    assert report.combo["vmms"] == [{"name": "firecracker", "version": "1.16.0"}]
    assert report.silicon_words == {}
    assert report.offer_words["cpuid:0x40000001.0.eax"] == 0x1000001
    assert report.offer.field("rdctl-no") == 1
    assert Report.from_json(report.to_json()).offer == report.offer


def test_msrs_that_are_a_guests_state_are_no_features() -> None:
    found = firecracker_fingerprint.read(lines(fingerprint()), BOX).offer_words
    assert {word for word in found if word.startswith("msr:")} == {"msr:0x10a"}


def test_a_compressed_fingerprint_is_the_same() -> None:
    plain = lines(fingerprint())
    packed = firecracker_fingerprint.read(gzip.compress(plain), BOX)
    assert packed.to_json() == firecracker_fingerprint.read(plain, BOX).to_json()


def broken(path: tuple[str | int, ...], value: object) -> dict[str, Any]:
    """A fingerprint with one element of its configuration replaced."""
    document = fingerprint()
    place: Any = document["guest_cpu_config"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return document


CPUID = "cpuid_modifiers"


@pytest.mark.parametrize(
    ("path", "value", "shown", "what"),
    [
        ((CPUID, 1, "leaf"), "BAD", "BAD", r"\[1\].leaf: 'BAD' is not a 32-bit number"),
        ((CPUID, 1, "leaf"), "0x123456789", "0x123456789", "is not a 32-bit number"),
        ((CPUID, 1, "subleaf"), 77, "77", "77 is not a string"),
        ((CPUID, 2, "modifiers", 1, "bitmap"), "0b2", '"0b2"', r"\[2\].modifiers\[1\].bitmap: .*32 bits"),
        (
            (CPUID, 2, "modifiers", 3, "bitmap"),
            "0b0x1",
            '"0b0x1"',
            "'0b0x1' is not a bitmap of 32 bits\n  a template",
        ),
        ((CPUID, 2, "modifiers", 3, "bitmap"), "0b" + "1" * 33, "1" * 33, "not a bitmap of 32 bits"),
        ((CPUID, 1, "modifiers"), "none", '"none"', "an array is expected"),
        ((CPUID, 3), "odd", '"odd"', r"cpuid_modifiers\[3\]: a JSON object is expected"),
        (("msr_modifiers", 1, "addr"), "17", '"17"', r"msr_modifiers\[1\].addr: '17'"),
        (("msr_modifiers", 0, "bitmap"), "0b" + "1" * 65, "1" * 65, "not a bitmap of 64 bits"),
    ],
)
def test_a_wrong_element_of_a_fingerprint_is_named(
    path: tuple[str | int, ...], value: object, shown: str, what: str
) -> None:
    data = lines(broken(path, value))
    with pytest.raises(
        BadInput, match=f"^box:{line_of(data, shown)}: .*{what.replace('an array', 'a JSON array')}"
    ):
        firecracker_fingerprint.read(data, BOX)


def test_a_leaf_or_msr_that_is_there_twice_is_named() -> None:
    twice = fingerprint(cpuid_modifiers=[modifier(0, 0, 7, *INTEL), modifier(0, 0)])
    with pytest.raises(
        BadInput, match=r"^box:\d+: guest_cpu_config.cpuid_modifiers\[1\]: leaf 0x0 0x0 is there"
    ):
        firecracker_fingerprint.read(lines(twice), BOX)
    row = {"addr": "0x10a", "bitmap": "0b1"}
    with pytest.raises(BadInput, match=r"msr_modifiers\[1\]: msr:0x10a is there twice"):
        firecracker_fingerprint.read(lines(fingerprint(msr_modifiers=[row, row])), BOX)


def test_a_register_that_is_missing_is_named() -> None:
    leaf = modifier(0, 0)
    del leaf["modifiers"][2]
    with pytest.raises(BadInput, match=r"cpuid_modifiers\[0\]: not the registers eax, ebx, ecx, edx"):
        firecracker_fingerprint.read(lines(fingerprint(cpuid_modifiers=[leaf])), BOX)


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({}, "no fingerprint"),
        ([], "a JSON object is expected"),
        ({"guest_cpu_config": {"cpuid_modifiers": [], "msr_modifiers": []}}, "no leaf in it"),
        ({"guest_cpu_config": {"msr_modifiers": []}}, "has no 'cpuid_modifiers'"),
        ({"guest_cpu_config": {"reg_modifiers": []}}, "no register in it"),
    ],
)
def test_what_is_no_fingerprint_is_refused(document: object, what: str) -> None:
    with pytest.raises(BadInput, match=f"^box:[1-9]: .*{what}"):
        firecracker_fingerprint.read(lines(document), BOX)


def test_a_damaged_or_huge_compressed_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(lines(fingerprint()))
    with pytest.raises(BadInput, match=r"^box: not gzip: cut short"):
        firecracker_fingerprint.read(packed[:-20], BOX)
    with pytest.raises(BadInput, match=r"^box: not gzip"):
        firecracker_fingerprint.read(packed[:12] + bytes(20), BOX)
    monkeypatch.setattr(limits, "REPORT_BYTES", 1000)
    with pytest.raises(BadInput, match="larger than 1000 bytes"):
        firecracker_fingerprint.read(gzip.compress(bytes(1 << 20)), BOX)


# -- QEMU


def expansion(**properties: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "vendor": "GenuineIntel", "family": 6, "model": 85, "stepping": 7, "level": 13, "xlevel": 0x80000008,
        "xsave": True, "sse2": True, "fxsr": True, "fpu": True, "sse": True, "mmx": True, "avx": True, "avx2": True,
        "lm": True, "pku": False, "kvmclock": True, "phys-bits": 0, "hv-spinlocks": -1,
        "hv-no-nonarch-coresharing": "off", "memory": "/machine",
    }  # fmt: skip
    named = {name.replace("_", "-"): value for name, value in properties.items()}
    return {"return": {"model": {"name": "base", "props": given | named}}, "id": "libvirt-1"}


def test_qemus_properties_become_bits() -> None:
    report = qemu_expansion.read(lines(expansion()), BOX)
    assert report.measured["source"] == "qemu-expansion, KVM-supported"
    assert "QEMU base offers" in report.measured["note"]
    assert report.identity == {"vendor": "GenuineIntel", "signature": "0x00050657"}
    assert report.offer.field("avx2") == 1
    assert report.offer.field("pku") == 0
    assert report.offer_words["cpuid:0x7.0.ecx"] == 0, "what QEMU says no to is known to be off"
    assert report.offer_words["cpuid:0x80000000.0.eax"] == 0x80000008
    assert report.silicon_words == {}
    assert Report.from_json(report.to_json()).offer == report.offer


def test_vmx_controls_become_their_msrs() -> None:
    """The default1 class of MSR 0x48e is 0x0401e172, of 0x48f 0x36dff (Intel SDM vol. 3D A.3.2, A.4)."""
    names = ("vmx", "lm", "vmx-ept", "vmx-hlt-exit", "vmx-cr3-load-noexit", "vmx-exit-ack-intr")
    properties = {**dict.fromkeys(names, True), "vmx-vpid": False, "vmx-vnmi": False}
    data = lines({"return": {"model": {"name": "host", "props": properties}}})
    found = qemu_expansion.read(data, BOX).offer_words
    assert found["msr:0x48b"] == 1 << 33
    # control 15 is of the class: what it may be is 1, and now it need not be
    assert found["msr:0x48e"] == (0x0401E172 | 1 << 7) << 32 | 0x0401E172 & ~(1 << 15)
    # control 9, host address-space size, comes with LM
    assert found["msr:0x48f"] == (0x36DFF | 1 << 15 | 1 << 9) << 32 | 0x36DFF
    assert "msr:0x48d" not in found and "msr:0x490" not in found


def test_a_name_of_two_bits_sets_both() -> None:
    assert qemu_expansion.read(lines(expansion()), BOX).offer_words["cpuid:0x40000001.0.eax"] == 0b1001
    assert (
        qemu_expansion.read(lines(expansion(kvmclock=False)), BOX).offer_words["cpuid:0x40000001.0.eax"] == 0
    )


@pytest.mark.parametrize(
    ("vendor", "pkru", "zmm"),
    [("GenuineIntel", 0xA80, 0x680), ("AuthenticAMD", 0x980, 0x580), ("HygonGenuine", 0x980, 0x580)],
)
def test_xsave_components_follow_from_features_in_the_vendors_layout(
    vendor: str, pkru: int, zmm: int
) -> None:
    report = qemu_expansion.read(lines(expansion(vendor=vendor, pku=True, avx512f=True)), BOX)
    assert report.offer_words["cpuid:0xd.0.eax"] == 0x2E7
    assert report.offer_words["cpuid:0xd.9.ebx"] == pkru
    assert report.offer_words["cpuid:0xd.7.ebx"] == zmm
    assert report.offer.field("pku") == 1
    assert report.offer.field("avx512f") == 1


def test_without_xsave_there_is_no_component() -> None:
    found = qemu_expansion.read(lines(expansion(xsave=False)), BOX)
    assert not [word for word in found.offer_words if word.startswith("cpuid:0xd.0.")]
    assert found.offer.field("avx") == 0


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("avx", 1, "1 is neither true nor false"),
        ("avx", "yes", "'yes' is neither true nor false"),
        ("avx", None, "None is neither true nor false"),
        ("level", "13", "'13' is not a number of 32 bits"),
        ("level", True, "True is not a number of 32 bits"),
        ("level", 1 << 32, "is not a number of 32 bits"),
        ("phys_bits", 256, "256 has more than 8 bits"),
        ("family", 1.5, "1.5 is not a number"),
        ("vendor", "Intel", "a vendor has 12 letters"),
        ("vendor", 5, "5 is not a string"),
    ],
)
def test_a_property_of_another_type_is_named(name: str, value: object, what: str) -> None:
    data = lines(expansion(**{name: value}))
    line = line_of(data, f'"{name.replace("_", "-")}":')
    with pytest.raises(BadInput, match=f"^box:{line}: return.model.props.{name.replace('_', '-')}: .*{what}"):
        qemu_expansion.read(data, BOX)


@pytest.mark.parametrize(
    ("document", "what"),
    [
        ({"error": {"class": "GenericError", "desc": "no"}}, "QEMU answered with an error"),
        ({"return": []}, "a JSON object is expected"),
        ({"return": {}}, "no reply to query-cpu-model-expansion"),
        ({"return": {"model": {"props": {}}}}, "has no 'name'"),
        ({"return": {"model": {"name": "base"}}}, "has no 'props'"),
        ({"return": {"model": {"name": "base", "props": {}}}}, "the model has no property"),
    ],
)
def test_another_reply_is_refused(document: object, what: str) -> None:
    with pytest.raises(BadInput, match=f"^box:[1-9]: .*{what}"):
        qemu_expansion.read(lines(document), BOX)


# -- firecracker, arm64 ------------------------------------------------------------------------------


def _register(register: str, bits: str = "1") -> dict[str, str]:
    return {"addr": register, "bitmap": f"0b{bits.zfill(128)}"}


def _arm64(*rows: dict[str, str]) -> bytes:
    return lines({"kernel_version": "6.1.176", "guest_cpu_config": {"reg_modifiers": list(rows)}})


def test_a_fingerprint_of_arm64_lists_registers() -> None:
    report = firecracker_fingerprint.read(
        _arm64(
            _register("0x6030000000140000", f"{0x1_0001:b}"),
            _register("0x603000000013c020", f"{0x1_0000_0011:b}"),
            _register("0x603000000013c080"),  # SCTLR_EL1, a guest's state
            _register("0x60200000001000d4"),
        ),
        BOX,
    )
    assert report.architecture == words.ARM64
    assert report.offer_words == {
        "arm64:0x6030000000140000": 0x1_0001, "arm64:0x603000000013c020": 0x1_0000_0011, "arm:vcpu-features": 0b10100,
    }  # fmt: skip
    assert report.registers == (
        0x6020_0000_0010_00D4, 0x6030_0000_0013_C020, 0x6030_0000_0013_C080, 0x6030_0000_0014_0000,
    )  # fmt: skip
    assert report.combo["kernel"] == "6.1.176" and report.settable_words == {}


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([_register("6030000000140000")], "is not a register's id"),
        ([_register("0x1000000000000000000")], "is not a register's id"),
        ([_register("0x6030000000140000"), _register("0x6030000000140000")], "is there twice"),
        ([_register("0x6030000000140000", "1" * 65)], "more bits than register"),
        ([{"addr": "0x6030000000140000", "bitmap": "0b1x"}], "a template"),
        ([{"addr": "0x6030000000140000"}], "has no 'bitmap'"),
    ],
)
def test_what_is_no_register_is_refused(rows: list[dict[str, str]], what: str) -> None:
    with pytest.raises(BadInput) as error:
        firecracker_fingerprint.read(_arm64(*rows), BOX)
    assert what in str(error.value)
