# SPDX-License-Identifier: LGPL-2.1-or-later
"""examples/minivmm.py, the twin by cffi: with a real daemon, as its users run it, it says what minivmm.c says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmneg.client import Client
from kvmneg.features.report import Report
from kvmneg.host.measure import ARCHITECTURE
from kvmneg.policy import grade
from kvmneg.policy.contract import Contract
from tests.examples.test_minivmm import V1, VM, daemon, installed, minivmm

__all__ = ("daemon", "installed", "minivmm")  # fixtures

SCRIPT = Path(__file__).resolve().parents[2] / "examples/minivmm.py"
PYTHON = [sys.executable, str(SCRIPT)]


def done(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def told(output: str) -> list[str]:
    """The lines, with what a guest sees cut to the bits that are bound."""

    def bound(line: re.Match[str]) -> str:
        return f"{line[1]}{line[2]}, the guest sees {int(line[3], 16) & int(line[2], 16):#x}"

    return [
        re.sub(r"^(\S+: .* of )(\w+), the guest sees (\w+)$", bound, line) for line in output.splitlines()
    ]


@pytest.mark.kvm
def test_a_guest_under_its_contract(daemon: str) -> None:
    """What the guest sees is what was promised, but for words that this KVM was measured not to keep to."""
    result = done(*PYTHON, VM, V1, "--socket", daemon, "--anyway")
    with Client(daemon) as client:
        report = Report.from_json(client.get_host()["host"])
        found = client.get_contract(result.stdout.split()[1].rstrip(","))
    assert found["path"] is None, result.stderr  # it said that the VM is gone
    contract = Contract.from_json(found["contract"])
    wrong = set(re.findall(r"^(\S+): promised", result.stdout, re.MULTILINE))
    assert wrong <= set(grade.broken(contract.granted, report))
    assert result.returncode == (1 if wrong else 0), result.stderr
    assert ("minivmm: the vCPU: " in result.stderr) == (contract.grade != "enforced")


@pytest.mark.kvm
@pytest.mark.skipif(ARCHITECTURE != "x86_64", reason="Python has no guest of arm64")
def test_the_twins_say_the_same(minivmm: list[str], daemon: str) -> None:
    """Word by word, whether the contract is in the reply or not. The guests differ in bits that are a guest's own."""
    request = V1[:-1] + ', "digestOnly": true}'
    mine, theirs = (
        done(*command, VM, given, "--socket", daemon, "--anyway")
        for command, given in ((PYTHON, request), (minivmm, V1))
    )
    assert "words looked at by the guest" in theirs.stdout
    assert (told(mine.stdout), mine.returncode) == (told(theirs.stdout), theirs.returncode)


@pytest.mark.kvm
def test_it_stops_where_kvm_does_not_keep_to_the_contract(daemon: str) -> None:
    result = done(*PYTHON, VM, V1, "--socket", daemon)
    with Client(daemon) as client:
        found = client.get_contract(result.stdout.split()[1].rstrip(","))
    enforced = found["contract"]["grade"] == "enforced"
    assert result.returncode == (0 if enforced else 1), result.stderr


@pytest.mark.kvm
def test_a_no(daemon: str) -> None:
    result = done(*PYTHON, VM, '{"request": {"require": ["no-such-feature"]}}', "--socket", daemon)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("minivmm: ")
    assert "no-such-feature" in result.stderr


def test_without_a_daemon_or_a_request(tmp_path: Path) -> None:
    nobody = done(*PYTHON, VM, V1, "--socket", str(tmp_path / "nobody"))
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert "is not reachable" in nobody.stderr
    assert done(*PYTHON, VM).returncode == 2
