# SPDX-License-Identifier: LGPL-2.1-or-later
"""Published Firecracker fingerprints: the same CPU under 5.10, 6.1 and 6.18, imported and compared.

What each kernel added and removed is written down by hand, from the fingerprints' own bitmaps and the kernels'
arch/x86/kvm/cpuid.c, and not from what `kvmneg compare` says.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvmneg import cli

KERNELS = ("5.10", "6.1", "6.18")
CPUS = ("AMD_MILAN", "INTEL_CASCADELAKE", "INTEL_ICELAKE")


class Step(NamedTuple):
    """One CPU from one kernel to the next: rows of word, feature, value before and after."""

    cpu: str
    older: str
    newer: str
    rows: tuple[tuple[str, str, int, int], ...]
    # (word, bits) that changed and that nobody published a name for: kept in the report, never offered
    nameless: tuple[tuple[str, int], ...] = ()
    # (word, bits) that changed and mean what they meant
    same: tuple[tuple[str, int], ...] = ()


STEPS = (
    Step(
        "AMD_MILAN",
        "5.10",
        "6.1",
        (
            # Predictive Store Forwarding Disable may be shown
            ("cpuid:0x80000008.0.ebx", "amd-psfd", 0, 1),
            # 5.10 passed leaf 0x8000001F through; 6.1 zeroes it where kvm_amd has no SEV
            ("cpuid:0x8000001f.0.eax", "sme", 1, 0),
            ("cpuid:0x8000001f.0.eax", "sev", 1, 0),
            ("cpuid:0x8000001f.0.eax", "vm-page-flush", 1, 0),
            ("cpuid:0x8000001f.0.eax", "sev-es", 1, 0),
            ("cpuid:0x8000001f.0.eax", "sev-snp", 1, 0),
            ("cpuid:0x8000001f.0.eax", "vmpl", 1, 0),
            ("cpuid:0x8000001f.0.eax", "snp-secure-tsc", 1, 0),
            ("cpuid:0x8000001f.0.eax", "sme-coherent", 1, 0),
            ("cpuid:0x8000001f.0.eax", "sev-64bit-host", 1, 0),
            ("cpuid:0x8000001f.0.eax", "restricted-injection", 1, 0),
            ("cpuid:0x8000001f.0.eax", "alternate-injection", 1, 0),
            ("cpuid:0x8000001f.0.eax", "debug-swap", 1, 0),
            ("cpuid:0x8000001f.0.eax", "prevent-host-ibs", 1, 0),
            ("cpuid:0x8000001f.0.eax", "virt-transparent-encryption", 1, 0),
            ("cpuid:0x8000001f.0.eax", "vmsa-register-protection", 1, 0),
            ("cpuid:0x8000001f.0.ebx", "c-bit-position", 51, 0),
            ("cpuid:0x8000001f.0.ebx", "phys-address-reduction", 5, 0),
            ("cpuid:0x8000001f.0.ebx", "vmpl-count", 4, 0),
            ("cpuid:0x8000001f.0.ecx", "encrypted-guests", 509, 0),
            ("cpuid:0x8000001f.0.edx", "sev-lowest-asid", 510, 0),
            # KVM has no MSR SMM_CTL, and says so
            ("cpuid:0x80000021.0.eax", "no-smm-ctl-msr", 0, 1),
        ),
        # 5.10 passed ECX of leaf 0x80000021 through as it was
        nameless=(("cpuid:0x80000021.0.ecx", 0x6000),),
    ),
    Step(
        "AMD_MILAN",
        "6.1",
        "6.18",
        (
            # CET: shadow stacks, which is all that AMD has of it, with two supervisor XSAVE components
            ("cpuid:0x7.0.ecx", "cet-ss", 0, 1),
            ("cpuid:0xd.1.ecx", "xss-cet-u", 0, 1),
            ("cpuid:0xd.1.ecx", "xss-cet-s", 0, 1),
            ("cpuid:0xd.11.eax", "xsave-cet-u-size", 0, 16),
            ("cpuid:0xd.11.ecx", "xsave-cet-u-flags", 0, 1),
            ("cpuid:0xd.12.eax", "xsave-cet-s-size", 0, 24),
            ("cpuid:0xd.12.ecx", "xsave-cet-s-flags", 0, 1),
            # Intel's IBPB flushes the return predictor too; AMD's does not before IBPB_RET, so this bit is not made up
            ("cpuid:0x7.0.edx", "spec-ctrl", 1, 0),
            # leaf 0x80000022 is known; all its bits are zero here
            ("cpuid:0x80000000.0.eax", "xlevel", 0x8000_0021, 0x8000_0022),
            ("cpuid:0x80000008.0.ebx", "amd-ibrs-same-mode", 0, 1),
            # what came with the mitigations of SRSO and TSA
            ("cpuid:0x80000021.0.eax", "sbpb", 0, 1),
            ("cpuid:0x80000021.0.eax", "ibpb-brtype", 0, 1),
            ("cpuid:0x80000021.0.ecx", "tsa-sq-no", 0, 1),
            ("cpuid:0x80000021.0.ecx", "tsa-l1-no", 0, 1),
        ),
        # the guest-physical width is told; 0 before, which means the same: as wide as the physical one
        same=(("cpuid:0x80000008.0.eax", 48 << 16),),
    ),
    Step("INTEL_CASCADELAKE", "5.10", "6.1", ()),
    Step(
        "INTEL_CASCADELAKE",
        "6.1",
        "6.18",
        (
            # MSR IA32_FLUSH_CMD may be used
            ("cpuid:0x7.0.edx", "flush-l1d", 0, 1),
        ),
        # the guest-physical width is told; 0 before, which means the same: as wide as the physical one
        same=(("cpuid:0x80000008.0.eax", 46 << 16),),
    ),
    Step(
        "INTEL_ICELAKE",
        "5.10",
        "6.1",
        (
            # PEBS for guests on the Ice Lake server, and so the debug store and its 64-bit layout
            ("cpuid:0x1.0.ecx", "dtes64", 0, 1),
            ("cpuid:0x1.0.edx", "ds", 0, 1),
            # leaf 7 subleaf 2 came with the bits of IA32_SPEC_CTRL
            ("cpuid:0x7.0.eax", "level-func7", 1, 2),
            ("cpuid:0x7.2.edx", "intel-psfd", 0, 1),
        ),
    ),
    Step(
        "INTEL_ICELAKE",
        "6.1",
        "6.18",
        (("cpuid:0x7.0.edx", "flush-l1d", 0, 1),),
        same=(("cpuid:0x80000008.0.eax", 46 << 16),),
    ),
)

Capture = pytest.CaptureFixture[str]


def fingerprint(cpu: str, kernel: str) -> Path:
    folder = os.environ.get("KVMNEG_PEER_DATA", "")
    if not folder:
        pytest.skip("KVMNEG_PEER_DATA is not set")
    return Path(folder) / "firecracker" / f"fingerprint_{cpu}_{kernel}host.json.gz"


def imported(capsys: Capture, folder: Path, cpu: str, kernel: str) -> Path:
    """The report file that `kvmneg import` makes of a fingerprint."""
    arguments = ["firecracker-fingerprint", str(fingerprint(cpu, kernel)), "--host", f"{cpu} {kernel}"]
    assert cli.main(["import", *arguments, "--json"]) == 0
    report = folder / f"{cpu}_{kernel}.json"
    report.write_text(capsys.readouterr().out, "utf-8")
    return report


def raw_words(path: Path) -> dict[str, int]:
    """The CPUID bitmaps of a fingerprint, read without this project, outside the hypervisor's leaves."""
    config = json.loads(gzip.decompress(path.read_bytes()))["guest_cpu_config"]
    return {
        f"cpuid:{leaf['leaf']}.{int(leaf['subleaf'], 16)}.{row['register']}": int(row["bitmap"], 2)
        for leaf in config["cpuid_modifiers"]
        for row in leaf["modifiers"]
        if not leaf["leaf"].startswith("0x4000")
    }


def named_bits(differences: list[dict[str, Any]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in differences:
        high, _, low = str(row.get("bits", row.get("bit"))).partition(":")
        low = low or high
        found[row["word"]] = found.get(row["word"], 0) | (2 << int(high)) - (1 << int(low))
    return found


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.cpu} {step.older} to {step.newer}")
def test_compare_names_exactly_what_a_kernel_changed(step: Step, capsys: Capture, tmp_path: Path) -> None:
    a, b = (imported(capsys, tmp_path, step.cpu, kernel) for kernel in (step.older, step.newer))
    status = cli.main(["compare", str(a), str(b), "--json"])
    document = json.loads(capsys.readouterr().out)
    rows = [
        (row["word"], row["feature"], int(row["a"], 16), int(row["b"], 16)) for row in document["differences"]
    ]
    assert sorted(rows) == sorted(step.rows)
    assert status == (1 if step.rows else 0)

    older, newer = (raw_words(fingerprint(step.cpu, kernel)) for kernel in (step.older, step.newer))
    named = named_bits(document["differences"])
    unnamed = {
        word: bits
        for word in {*older, *newer}
        if (bits := (older.get(word, 0) ^ newer.get(word, 0)) & ~named.get(word, 0))
    }
    assert unnamed == dict(step.nameless) | dict(step.same)
    told = {row["word"]: int(row["bits"], 16) for row in document["unnamed"]}
    assert told == dict(step.nameless)
    cli.main(["compare", str(a), str(b)])
    text = capsys.readouterr().out
    for word, bits in step.nameless:
        assert f"{word} bits {bits:#x}: not named" in text


# What Milan and Intel's two cannot share by XSAVE layout: offset 0x980 of PKRU on AMD, 0xA80 on Intel. Milan has no
# AVX-512, so that is Milan's to hold back. AVX lies at 0x240 on all.
PKRU = {"pku", "xcr0-pkru", "xsave-pkru-size", "xsave-pkru-offset"}


@pytest.mark.parametrize("cpu", ["INTEL_CASCADELAKE", "INTEL_ICELAKE"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_amd_and_intel_share_no_protection_keys_and_no_baseline(
    cpu: str, kernel: str, capsys: Capture, tmp_path: Path
) -> None:
    files = [str(imported(capsys, tmp_path, one, kernel)) for one in ("AMD_MILAN", cpu)]
    assert cli.main(["baseline", *files]) == 1
    told = capsys.readouterr().err
    assert f"AuthenticAMD on AMD_MILAN {kernel}, GenuineIntel on {cpu} {kernel}" in told
    assert cli.main(["baseline", "--ignore-vendor", "--json", *files]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["study"] and document["fence"] is None
    words = {word: int(text, 16) for word, text in document["words"].items()}
    assert words["cpuid:0xd.0.eax"] == 0x7 and words["cpuid:0xd.2.ebx"] == 0x240
    assert not words["cpuid:0x7.0.ebx"] & (1 << 16) and words["cpuid:0x7.0.ebx"] & 1 << 5  # AVX-512 F, AVX2
    assert not words.get("cpuid:0x7.0.ecx", 0) & 1 << 3  # PKU
    rows = {row["feature"]: row for row in document["held_back"]}
    layout = f"XSAVE layout differs: pkru offset 0x980 on AMD_MILAN {kernel}, 0xa80 on {cpu} {kernel}"
    assert {name for name, row in rows.items() if row["because"]} == PKRU
    assert {rows[name]["because"] for name in PKRU} == {layout}
    assert rows["avx512f"]["held_back_by"] == [f"AMD_MILAN {kernel}"]


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fingerprint_is_marked_and_keeps_what_it_was_taken_under(
    cpu: str, kernel: str, capsys: Capture, tmp_path: Path
) -> None:
    document = json.loads(imported(capsys, tmp_path, cpu, kernel).read_text("utf-8"))
    assert document["measured"]["source"] == "firecracker-fingerprint, KVM-supported"
    assert document["combo"]["kernel"].startswith(f"{kernel}.")
    assert document["combo"]["microcode"].startswith("0x")
    assert "silicon" not in document
    assert document["identity"]["vendor"] == ("AuthenticAMD" if cpu.startswith("AMD") else "GenuineIntel")
    assert "cpuid:0x40000001.0.eax" in document["offer"]
