# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg in the tests of a shell: the exit statuses that kvmneg(1) tells, and its examples as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmneg.features.report import Report

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "kvmneg/data/recorded-host.json"
PAGE = (ROOT / "man/kvmneg.1.scd").read_text("utf-8")


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with the command kvmneg, and tests to run that say so."""
    scripts = {"kvmneg": f'exec {sys.executable} -P -m kvmneg.cli "$@"'}
    for name in ("test-avx2", "test-migration", "test-eoi"):
        scripts[name] = f"echo ran {name}"
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def shell(script: str, path: str) -> subprocess.CompletedProcess[str]:
    folder = path.partition(":")[0]
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        ["sh", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def example(of: str) -> str:
    """The example of the page with this line in it."""
    (found,) = (
        text for text in re.findall(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE) if of in text
    )
    return str(found)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("check --report {report} --level x86-64-v3", 0),
        ("check --report {report} --require movdir64b", 1),
        ("check --report {report} --level x86-64-v3 --require-enforced", 1),
        ("check --report {report} --level x86-64-v9", 2),
        ("check --report {report} --require avxx2", 2),
        ("check --report {report} --levle x", 2),
        ("host --kvm /nowhere", 3),
        ("check --socket /nowhere --level x86-64-v3", 4),
        ("check --report /nowhere", 5),
        ("check --report {tests}", 5),
    ],
)
@pytest.mark.parametrize("json", ["", "--json"])
def test_exit_status(path: str, arguments: str, status: int, json: str) -> None:
    """Each is the page's, and nothing goes wrong that is not told."""
    command = f"kvmneg {arguments.format(report=RECORDED, tests=__file__)} {json}"
    result = shell(command, path)
    assert result.returncode == status, result.stderr
    assert f"\n*{status}*\n" in PAGE.partition("# EXIT STATUS")[2]
    assert bool(result.stderr if not json else "error" in result.stdout) == (status > 0)
    assert shell(f"{command} >/dev/null 2>&1 && echo ran", path).stdout == ("" if status else "ran\n")


def test_the_example_without_a_daemon(path: str, tmp_path: Path) -> None:
    """Its first command, of a host that can and of one that cannot; measuring is recorded."""
    line = "\n".join(example("./test-avx2").splitlines()[:2])
    poor = Report.loads(RECORDED.read_bytes()).to_json()
    poor["offer"]["cpuid:0x7.0.ebx"] = "0x0"
    (tmp_path / "poor.json").write_bytes(
        Report.from_json(poor).canonical()[:-1] + b',"measured":{"host":"poor"}}'
    )
    for report, output in ((RECORDED, "ran test-avx2\n"), (tmp_path / "poor.json", "")):
        script = line.replace("kvmneg host --json", f"cat {report}")
        assert script != line
        result = shell(script, path)
        assert result.stdout.endswith(output) if output else "ran" not in result.stdout
        assert result.returncode == (0 if output else 1)


@pytest.mark.parametrize(
    ("source", "status", "output"),
    [
        (f"--report {RECORDED}", 0, "ran test-eoi\n"),
        (f"--report {RECORDED} --require movdir64b", 77, ""),
        ("--report /nowhere", 99, ""),
        ("--socket /nowhere", 99, ""),
    ],
)
def test_the_example_that_skips(path: str, source: str, status: int, output: str) -> None:
    script = example("exec ./test-eoi")
    result = shell(script.replace("kvmneg check", f"kvmneg check {source}"), path)
    assert (result.returncode, result.stdout) == (status, output), result.stderr
