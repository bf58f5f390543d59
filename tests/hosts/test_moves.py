# SPDX-License-Identifier: LGPL-2.1-or-later
"""Contracts made on emulated x86 hosts, judged on others of the same CPU, against what applying them there really does.

A contract is made on a host as it was recorded (tests/data/hosts), with no fence, and under the fence that
`kvmneg rollback` computes for it and each other kernel. The other host is running: it measures itself, and what
becomes of the contract is told by its KVM (tests.hosts.applied).
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from kvmneg.features import catalog
from kvmneg.features.report import Report
from kvmneg.policy import negotiation, rates, rollback
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request
from tests.hosts import catalogue, project, recording, start
from tests.hosts.job import Job
from tests.packages.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.policy.contract import Contract
    from tests.hosts.catalogue import Host

pytestmark = pytest.mark.hosts
SECONDS = {"qemu": 120, "bochs": 300}
TELLING = 20  # before that, for what hangs to be told from inside
KERNELS = ("6.1", "6.12", "newest")
KINDS = {
    "amd": [catalogue.find(f"amd-{line}") for line in KERNELS],
    # Bochs' smallest CPU: a boot takes one minute to three
    "intel": [catalogue.find(f"intel-{line}", "corei7_sandy_bridge_2600k") for line in ("6.1", "6.12")],
}
FEW = "amd-6.12"
BIT_BY_BIT = ("kvm:disable-quirks2", "kvm:x2apic-api", "kvm:xen-hvm", "kvm:vm-types")
# What the judge refuses and KVM takes: older kernels take MSR_PLATFORM_INFO of user space and do not list it among the
# feature MSRs, so that no report says that they do; CPUID faulting goes with it, and the state of both.
UNLISTED = {"msr:0xce", "state:msrs"}
STRICTER = {("newest", "6.1"): UNLISTED, ("newest", "6.12"): UNLISTED}


class Move(NamedTuple):
    """A contract of the host `made` under the fence for it and the kernel `other`, "" for none; judged on `there`."""

    made: Host
    other: str
    there: Host

    @property
    def name(self) -> str:
        return f"{self.made.name}.{self.other or 'unfenced'}"


def moves() -> Iterator[Move]:
    for hosts in KINDS.values():
        for there in hosts:
            for made in hosts:
                others = ["", *(host.line for host in hosts if host is not made)]
                yield from (Move(made, other, there) for other in others)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "move" in metafunc.fixturenames:
        rows = [
            pytest.param(
                one,
                id=f"{one.name}-to-{one.there.name}",
                marks=() if one.there.name == FEW else pytest.mark.every_host,
            )
            for one in moves()
        ]
        metafunc.parametrize("move", rows)


@cache
def recorded(host: Host) -> Report:
    return Report.loads(recording.path(host).read_bytes())


@cache
def contract(made: Host, other: str) -> Contract:
    """All that there is under that fence; with none, all that the host has."""
    fence = None
    if other:
        (there,) = (host for host in KINDS[made.name.partition("-")[0]] if host.line == other)
        old, new = sorted((made, there), key=lambda host: KERNELS.index(host.line))
        answer = rollback.judge(recorded(new), recorded(old))
        assert answer.fence is not None, answer.blockers
        fence = Fence(answer.fence.granted, 1)
    return negotiation.negotiate(Request(maximum=True), recorded(made), fence).contract


@cache
def given(there: Host) -> tuple[Report, dict[str, Any]]:
    """One job on the host: what it offers now, and what became of each contract that is judged on it."""
    contracts = {
        f"{one.name}.contract": contract(one.made, one.other).binary()
        for one in moves()
        if one.there is there
    }
    files = {**project.files("amd64"), **contracts}
    seconds = SECONDS[there.emulator]
    words = ["python3", "-m", "tests.hosts.applied", str(seconds - TELLING)]
    job = Job(words, files, project.ENVIRONMENT, seconds)
    try:
        result = start.run(there, job)
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")
    assert result.status == 0, result.why()
    return Report.loads(result.files["report.json"]), json.loads(result.files["applied.json"])


def refused(agreed: Contract, found: dict[str, Any]) -> set[str]:
    """The words that KVM lacks, refuses, or shows otherwise, by its own ioctls."""
    lacking = {
        word
        for word, own in found["capabilities"].items()
        if (agreed.granted.value(word) & ~own if word in BIT_BY_BIT else agreed.granted.value(word) > own)
    }
    rules = catalog.load(agreed.granted.architecture)
    lacking |= {
        word
        for index, (word, bit) in rules.state_msrs.items()
        if agreed.granted.value(word) & bit & ~rules.words[word].hint_mask and index not in found["state"]
    }
    return {*lacking, *found["given"]["absent"], *found["given"]["changed"], *found["given"]["refused"]}


def test_a_move(move: Move) -> None:
    """Yes: it applies, is read back, and guests that look see it. No: by the words that KVM refuses, and no others."""
    there, records = given(move.there)
    if recording.unlike(move.there, there).keys() - {rates.WORD}:  # which each boot measures anew
        pytest.skip(
            "a CPU that was not measured: this QEMU makes another one than the recorded contracts are of"
        )
    agreed, found = contract(move.made, move.other), records[move.name]
    told = {blocker.word for blocker in negotiation.check(agreed, there)}
    by_kvm = refused(agreed, found)
    stricter = STRICTER.get((move.made.line, move.there.line), set()) if not move.other else set()
    assert told - by_kvm == stricter, found
    assert by_kvm <= told, found
    if told:
        assert found["failed"] is not None and found["failed"]["word"] in told
        assert found["failed"]["why"] in ("refused", "missing", "dropped", "differs")
    else:
        assert found["failed"] is None and found["broken"] == {}
    # the diagonal, and both ends of the fence's own pair
    if move.made is move.there or move.other == move.there.line:
        assert not told


@pytest.mark.every_host
@pytest.mark.parametrize("host", KINDS["intel"], ids=[host.name for host in KINDS["intel"]])
def test_what_intel_hosts_are_recorded_as(host: Host) -> None:
    """Beside those of test_inside.py; here, where such a host is booted anyway."""
    there, _ = given(host)
    assert recording.unlike(host, there) == {}


def test_each_way_is_closed_by_a_kernel_that_has_less() -> None:
    """Without a fence there is no way back to any older kernel; a table of all where one is."""
    table = {
        f"{one.name} to {one.there.name}": bool(
            negotiation.check(contract(one.made, ""), recorded(one.there))
        )
        for one in moves()
        if not one.other
    }
    older = {
        f"{one.name} to {one.there.name}": KERNELS.index(one.made.line) > KERNELS.index(one.there.line)
        for one in moves()
        if not one.other
    }
    assert table == older
