# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg import, of every kind: the report on standard output, its worth on standard error, bad input is 5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmneg import cli, limits
from kvmneg.cli.importing import KINDS
from kvmneg.features.report import Report

VENDOR = (("eax", 1), ("ebx", 0x756E6547), ("ecx", 0x6C65746E), ("edx", 0x49656E69))
_MODIFIERS = [{"register": name, "bitmap": f"0b{value:032b}"} for name, value in VENDOR]
_CONFIG = {
    "cpuid_modifiers": [{"leaf": "0x0", "subleaf": "0x0", "modifiers": _MODIFIERS}],
    "msr_modifiers": [],
}
_MODEL = {"name": "base", "props": {"vendor": "GenuineIntel", "level": 1}}
_XML = " ".join(f"{name}='{value:#x}'" for name, value in VENDOR)
# each says: leaf 0 of an Intel CPU with one leaf
SAMPLES = {
    "cpuid-raw": "CPU 0:\n 0x00000000 0x00: " + " ".join(f"{name}={value:#x}" for name, value in VENDOR),
    "firecracker-fingerprint": json.dumps({"guest_cpu_config": _CONFIG}),
    "instlatx64": "CPUID 00000000: " + "-".join(f"{value:08X}" for _, value in VENDOR),
    "libvirt-cpudata": f"<cpudata arch='x86'><cpuid eax_in='0x0' ecx_in='0x0' {_XML}/></cpudata>",
    "qemu-expansion": json.dumps({"return": {"model": _MODEL}}),
}
WORTH = {"firecracker-fingerprint": "KVM-supported", "qemu-expansion": "KVM-supported"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_prints_the_report_and_what_it_is_worth(
    kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "sample"
    file.write_text(SAMPLES[kind], "utf-8")
    assert cli.main(["import", kind, str(file), "--host", "box"]) == 0
    out, err = capsys.readouterr()
    report = Report.loads(out.encode())
    assert report.host == "box"
    assert report.measured["source"] == f"{kind}, {WORTH.get(kind, 'raw silicon')}"
    assert report.offer_words["cpuid:0x0.0.eax"] == 1
    assert report.identity["vendor"] == "GenuineIntel"
    assert report.measured["source"] in err
    assert "do not pin a fence" in err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"", b"\0\xff\xfe", b"[" * 5000, b"\x1f\x8b", b"nonsense\n"])
def test_no_bytes_end_in_anything_but_bad_input(
    kind: str, data: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "sample"
    file.write_bytes(data)
    assert cli.main(["import", kind, str(file), "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"]["file"] == str(file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_file_than_the_limit_is_refused(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "sample"
    file.write_text(SAMPLES[kind], "utf-8")
    monkeypatch.setattr(limits, "REPORT_BYTES", 10)
    assert cli.main(["import", kind, str(file), "--json"]) == 5
    assert "larger than 10 bytes" in json.loads(capsys.readouterr().out)["error"]["message"]
