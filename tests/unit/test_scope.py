# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every yes says what it rests on: also that which fields can be set was looked up, not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from arm64_reports import NEW, OLD, report

from kvmneg import cli
from kvmneg.features.report import Report
from kvmneg.policy.scope import scope, unmeasured

LOOKED_UP = "not measured: which fields can be set on old; it is taken from upstream Linux 6.1"


@pytest.fixture
def imported() -> Report:
    return report("old", OLD, kernel="6.1.172-216.amzn2023.aarch64", settable={})


def test_hosts_of_one_kernel_stand_in_one_line(intel: Report, imported: Report) -> None:
    many = [report(f"n{place}", NEW, kernel="6.18.1", settable={}) for place in range(6)]
    assert unmeasured([intel, imported, report("measured", NEW), *many]) == [
        LOOKED_UP,
        "not measured: which fields can be set on n0, n1, n2, n3 and 2 more; it is taken from upstream Linux 6.18",
    ]
    nameless = Report("arm64", measured={"host": "x"}, combo={}, identity={}, offer=OLD)
    assert "none counts as settable" in unmeasured([nameless])[0]


def test_a_scope_ends_with_what_was_looked_up(imported: Report) -> None:
    for fenced in (False, True):
        assert scope(fenced, "arm64", imported) == [*scope(fenced, "arm64"), LOOKED_UP]
        assert scope(fenced, "arm64", report("new", NEW)) == scope(fenced, "arm64")


@pytest.mark.parametrize("command", ["baseline", "check", "negotiate", "compare"])
def test_each_command_says_so(
    command: str, imported: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(imported.to_json()), "utf-8")
    where = {"baseline": [str(path)], "compare": [str(path), str(path)]}.get(command, ["--report", str(path)])
    assert cli.main([command, *where, "--json"]) == 0
    assert LOOKED_UP in json.loads(capsys.readouterr().out)["scope"]
    assert cli.main([command, *where]) == 0
    assert "upstream Linux 6.1" in " ".join(capsys.readouterr().out.split())
