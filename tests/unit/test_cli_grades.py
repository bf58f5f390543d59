# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the commands say of grades, and --require-enforced, on report files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmneg import cli
from kvmneg.features.report import Report

TRIED = {"kvm:max-vcpus": "untested"}
REPLACED = {**TRIED, "cpuid:0x7.0.ebx": "replaced", "msr:0x10a": "refused"}

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def report(amd: Report, tmp_path: Path) -> dict[str, str]:
    """Files of one host: never tried, kept to everything, replaced something."""
    files = {"unverified": {}, "enforced": TRIED, "partial": REPLACED}
    for name, enforcement in files.items():
        document = {**amd.to_json(), "enforcement": enforcement}
        (tmp_path / name).write_text(json.dumps(document))
    return {name: str(tmp_path / name) for name in files}


def run(capsys: Capture, *words: str) -> tuple[int, str]:
    status = cli.main(words)
    return status, capsys.readouterr().out


@pytest.mark.parametrize("grade", ["unverified", "enforced", "partial"])
def test_the_grade_is_told(capsys: Capture, report: dict[str, str], grade: str) -> None:
    for command in ("negotiate", "check"):
        status, out = run(capsys, command, "--report", report[grade])
        assert status == 0
        assert f"  grade       {grade}: " in out, command
    _, out = run(capsys, "negotiate", "--report", report[grade], "--json")
    assert json.loads(out)["contract"]["grade"] == grade
    _, out = run(capsys, "check", "--report", report[grade], "--json")
    assert json.loads(out)["grade"] == grade


def test_host(capsys: Capture, report: dict[str, str]) -> None:
    _, out = run(capsys, "host", "--report", report["partial"])
    assert "KVM does not keep to: 2 words\n  replaced    cpuid:0x7.0.ebx\n" in out
    assert "\n  refused     msr:0x10a\n" in out
    _, out = run(capsys, "host", "--report", report["enforced"])
    assert "KVM keeps to every word\n" in out
    _, out = run(capsys, "host", "--report", report["unverified"])
    assert "keep" not in out


@pytest.mark.parametrize("command", ["negotiate", "check"])
def test_require_enforced(capsys: Capture, report: dict[str, str], command: str) -> None:
    assert run(capsys, command, "--report", report["enforced"], "--require-enforced")[0] == 0
    status, out = run(capsys, command, "--report", report["partial"], "--require-enforced", "--json")
    rows = [(row["word"], row["cause"]) for row in json.loads(out)["blockers"]]
    assert (status, rows) == (1, [("cpuid:0x7.0.ebx", "kvm")])
    status, out = run(capsys, command, "--report", report["unverified"], "--require-enforced", "--json")
    assert (status, [row["cause"] for row in json.loads(out)["blockers"]]) == (1, ["unknown"])


def test_a_contract_from_elsewhere(capsys: Capture, report: dict[str, str], tmp_path: Path) -> None:
    """Judged is the host it comes to, not the one that graded it."""
    _, out = run(capsys, "negotiate", "--report", report["enforced"], "--json")
    contract = tmp_path / "contract.json"
    contract.write_text(json.dumps(json.loads(out)["contract"]))
    words = ["check", "--contract", str(contract), "--report"]
    assert run(capsys, *words, report["enforced"], "--require-enforced")[0] == 0
    status, out = run(capsys, *words, report["partial"], "--json")
    assert (status, json.loads(out)["grade"]) == (0, "partial")
    assert run(capsys, *words, report["partial"], "--require-enforced")[0] == 1
