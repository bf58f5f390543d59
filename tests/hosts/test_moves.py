# SPDX-License-Identifier: LGPL-2.1-or-later
"""A contract made on one emulated AMD host, judged on the others, against what KVM there makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvmneg.features.report import Report
from kvmneg.policy import negotiation
from kvmneg.policy.request import Request
from tests.hosts import catalogue, project, start
from tests.hosts.job import Job, Result
from tests.packages.errors import Unreachable

pytestmark = [pytest.mark.hosts, pytest.mark.every_host]
LINES = ("6.1", "6.12", "newest")
SECONDS = 120.0
# Older kernels take MSR_PLATFORM_INFO and do not list it among the feature MSRs: kvmneg cannot see that they do.
UNLISTED = {"msr:0xce"}


def run(line: str, argv: list[str], more: dict[str, bytes]) -> Result:
    files = {**project.files("amd64"), **more}
    try:
        built = start.Built(catalogue.find(f"amd-{line}"))
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")
    with start.restored(built) as machine:
        result = machine.run(Job(argv, files, project.ENVIRONMENT, SECONDS))
    assert result.status == 0, result.stderr.decode()
    return result


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """Each host's own, now."""
    command = ["python3", "-m", "kvmneg.cli", "host", "--json"]
    return {line: Report.loads(run(line, command, {}).stdout) for line in LINES}


@pytest.fixture(scope="module")
def given(reports: dict[str, Report]) -> dict[str, dict[str, Any]]:
    """Host → where a contract was made → what KVM made of it there: all that a host has, with nothing left out."""
    files = {
        f"{line}.contract": negotiation.negotiate(Request(maximum=True), report).contract.binary()
        for line, report in reports.items()
    }
    return {
        line: json.loads(run(line, ["python3", "-m", "tests.hosts.given"], files).files["given.json"])
        for line in LINES
    }


@pytest.mark.parametrize("made", LINES)
@pytest.mark.parametrize("there", LINES)
def test_a_move(made: str, there: str, reports: dict[str, Report], given: dict[str, dict[str, Any]]) -> None:
    """Each word that KVM lacks or refuses is among the reasons why not, and no other CPUID or MSR word is."""
    contract = negotiation.negotiate(Request(maximum=True), reports[made]).contract
    blockers = negotiation.check(contract, reports[there])
    told = {one.word for one in blockers if one.word.startswith(("cpuid:", "msr:"))}
    found = given[there][made]
    refused = {*found["absent"], *found["refused"]}
    assert refused <= told
    assert told <= {*refused, *UNLISTED}
    assert found["changed"] == {}  # KVM shows a guest what it is given, kept or not
    if made == there:
        assert blockers == ()
