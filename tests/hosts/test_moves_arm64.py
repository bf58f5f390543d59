# SPDX-License-Identifier: LGPL-2.1-or-later
"""Contracts made on emulated arm64 hosts, judged on others of the same CPU, against what becomes of the guest there.

The twin of test_moves.py. A guest runs under its contract on the host where that was made, and all its registers are
given to a VM of the other host: under the contract, by libkvmneg, and as they are.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from kvmneg.features.report import Report
from kvmneg.policy import negotiation, rollback
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request
from tests.hosts import catalogue, project, recording, start
from tests.hosts.job import Job
from tests.hosts.test_rollback_experiment import MOVING
from tests.packages.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.policy.contract import Contract
    from tests.hosts.catalogue import Host
    from tests.hosts.job import Result
    from tests.hosts.machine import Machine

pytestmark = pytest.mark.hosts
SECONDS = 300.0
KERNELS = ("6.1", "6.12", "newest")
CPUS = ("neoverse-n1", "max")
HOSTS = {cpu: [catalogue.find(f"arm64-{line}", cpu) for line in KERNELS] for cpu in CPUS}
FEW = ("neoverse-n1", "newest", "6.12")
# no kernel lets a field be set in which these two differ, as test_rollback_experiment.py was told by hand
NO_FENCE = {("max", frozenset(("6.1", "6.12"))): {"aa64mmfr1-hcx"}}
# PMCR_EL0.IMP and IDCODE: 6.1 shows the CPU's, and 6.12 makes 0 of what it is given. They are reported and not judged:
# neither kernel lets them be set, so that there would be no way between both
FORGOTTEN = {("6.1", "6.12"): {"0x603000000013dce0"}, ("6.1", "newest"): {"0x603000000013dce0"}}


class Move(NamedTuple):
    """A contract of the host `made` under the fence for it and the kernel `other`, "" for none; judged on `there`."""

    made: Host
    other: str
    there: Host

    @property
    def name(self) -> str:
        return f"{self.made.line}-{self.other or 'unfenced'}"

    @property
    def few(self) -> bool:
        return (self.made.cpu, self.made.line, self.there.line) == FEW and self.other in ("", self.there.line)


def moves() -> Iterator[Move]:
    for hosts in HOSTS.values():
        for there in hosts:
            for made in hosts:
                others = ["", *(host.line for host in hosts if host is not made and not no_fence(made, host))]
                yield from (Move(made, other, there) for other in others)


def no_fence(one: Host, other: Host) -> set[str]:
    """The features for which there is none between two kernels."""
    return NO_FENCE.get((one.cpu, frozenset((one.line, other.line))), set())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "move" in metafunc.fixturenames:
        rows = [
            pytest.param(
                one,
                id=f"{one.made.cpu}-{one.name}-to-{one.there.line}",
                marks=() if one.few else pytest.mark.every_host,
            )
            for one in moves()
        ]
        metafunc.parametrize("move", rows)


@cache
def recorded(host: Host) -> Report:
    return Report.loads(recording.path(host).read_bytes())


def way_back(one: Host, other: Host) -> rollback.Answer:
    old, new = sorted((one, other), key=lambda host: KERNELS.index(host.line))
    return rollback.judge(recorded(new), recorded(old))


@cache
def contract(made: Host, other: str) -> Contract:
    """All that there is under that fence; with none, all that the host has."""
    fence = None
    if other:
        (there,) = (host for host in HOSTS[made.cpu] if host.line == other)
        answer = way_back(made, there)
        assert answer.fence is not None, answer.blockers
        fence = Fence(answer.fence.granted, 1, registers=answer.fence.registers)
    return negotiation.negotiate(Request(maximum=True), recorded(made), fence).contract


def run(machine: Machine, verb: str, more: dict[str, bytes]) -> Result:
    files = {**project.files("arm64"), **more}
    result = machine.run(
        Job(["python3", "-m", "tests.hosts.moved", verb], files, project.ENVIRONMENT, SECONDS)
    )
    assert result.status == 0, result.why()
    return result


def built(host: Host) -> start.Built:
    try:
        return start.Built(host)
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")


@cache
def dumped(made: Host) -> dict[str, bytes]:
    """Each contract of a host, and the registers of a guest that ran there under it."""
    names = {one.name: contract(made, one.other).binary() for one in moves() if one.made is made}
    files = {f"{name}.contract": binary for name, binary in names.items()}
    with start.restored(built(made)) as machine:
        found = run(machine, "dump", files).files
    return {**files, **{f"{name}.dump": found[f"{name}.dump"] for name in names}}


@cache
def moved(made: Host, there: Host) -> tuple[Report, dict[str, Any]]:
    """What the other host offers now, and what becomes there of each guest of the first."""
    files = dumped(made)
    with start.restored(built(there)) as machine:
        found = run(machine, "restore", files).files
    return Report.loads(found["report.json"]), json.loads(found["moved.json"])


def test_a_move(move: Move) -> None:
    """Yes: it applies, the guest goes on, and no register is lost but by rule. No: by what KVM refuses, and no more."""
    if not all(recording.by_this_emulator(host) for host in (move.made, move.there)):
        pytest.skip(
            "a CPU that was not measured: this QEMU makes another one than the recorded contracts are of"
        )
    there, records = moved(move.made, move.there)
    agreed, found = contract(move.made, move.other), records[move.name]
    told = {blocker.word for blocker in negotiation.check(agreed, there)}
    raw = {f"arm64:{register}": error for register, error in found["raw"].items()}
    dropped = {f"arm64:{one.register:#x}" for one in agreed.portable if one.rule.startswith("drop")}
    by_kvm = {word for word, error in raw.items() if error != "ENOENT" or word not in dropped}
    by_kvm |= {word for word, own in found["capabilities"].items() if agreed.granted.value(word) > own}
    assert told == by_kvm, found
    assert set(raw.values()) <= {"EINVAL", "ENOENT"}
    if told:
        assert found["refused"] is None or found["refused"]["word"] in told
        failed = found["moved"]["failed"] if found["moved"] else {}
        assert found["refused"] or failed
        assert {f"arm64:{register}" for register in failed} <= told
    else:
        assert found["refused"] is None
        assert found["moved"]["failed"] == {} and found["moved"]["answer"]
        assert {f"arm64:{register}" for register in found["moved"]["dropped"]} == set(raw)
        forgotten = FORGOTTEN.get((move.made.line, move.there.line), set())
        assert set(found["moved"]["differ"]) - MOVING == forgotten
    # the diagonal, and both ends of the fence's own pair
    if move.made is move.there or move.other == move.there.line:
        assert not told


def test_where_there_is_no_fence() -> None:
    for hosts in HOSTS.values():
        for one, other in combinations(hosts, 2):
            assert {blocker.feature for blocker in way_back(one, other).blockers} == no_fence(one, other)
