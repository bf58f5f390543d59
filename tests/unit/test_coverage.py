# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host of which not every kind of CPU was measured gets no yes, and says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvmneg.cli import main
from kvmneg.errors import Blocked
from kvmneg.features.report import Report
from kvmneg.policy import coverage, negotiation, pinning
from kvmneg.policy.request import Request

WHY = "this process may not run there: its affinity or cpuset leaves them out"
UNVISITED = [{"cpus": "4-7", "kind": {"family": "6", "model": "190"}, "because": WHY}]


def partly(report: Report, rows: Any) -> Report:
    return Report.from_json({**report.to_json(), "combo": {**report.combo, "unvisited": rows}})


def test_a_report_of_all_cpus(intel: Report) -> None:
    for report in (intel, partly(intel, [])):
        assert coverage.unvisited(report) == [] == coverage.blockers(report)
        coverage.require(report)


def test_each_answer_is_no(intel: Report) -> None:
    report = partly(intel, UNVISITED)
    contract = negotiation.negotiate(Request(), intel).contract
    for ask in (
        lambda: negotiation.negotiate(Request(), report),
        lambda: negotiation.check_request(Request(vmm="qemu"), report),
        lambda: negotiation.ceiling(report, None),
        lambda: pinning.to_pin(intel.offer, report),
        lambda: pinning.source("level:x86-64-v1", report),
    ):
        with pytest.raises(Blocked) as caught:
            ask()
        (blocker,) = caught.value.blockers
        assert blocker.missing_on == f"CPUs 4-7 of {intel.host}"
        assert "family 6, model 190" in blocker.because and WHY in blocker.because
        assert "cpuset" in caught.value.hint
    assert [blocker.feature for blocker in negotiation.check(contract, report)] == ["cpus"]
    assert negotiation.check(contract, intel) == ()


@pytest.mark.parametrize("rows", ["4-7", [4], {"cpus": "4"}, 1, [{}], [{"kind": 3}]])
def test_another_machines_report_may_say_it_in_any_way(intel: Report, rows: Any) -> None:
    (blocker,) = coverage.blockers(partly(intel, rows))
    assert blocker.because.isprintable()


def test_it_is_shown(intel: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = partly(intel, UNVISITED).to_json()
    document["measured"]["offline"] = "8-9"
    document["identity"]["kinds"] = [{"cpus": "0-3", "vendor": "GenuineIntel", "signature": "0x000b06a2"}]
    file = tmp_path / "report.json"
    file.write_text(json.dumps(document))
    assert main(["host", "--report", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "UNMEASURED CPUs 4-7 (family 6, model 190): " + WHY in shown
    assert "offline CPUs 8-9, not measured" in shown
    assert "CPUs 0-3 · signature 0x000b06a2" in shown
    assert main(["host", "--report", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["combo"]["unvisited"] == UNVISITED
    assert main(["negotiate", "--report", str(file)]) == 1
    assert "CPUs 4-7" in capsys.readouterr().err
