# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest's registers, from a newer kernel to an older one: what fails without a contract, and what one makes of it.

What must fail was measured by hand on these kernels before this code was there (but for 6.12 to 6.1: what 6.1 refuses
then is what it refuses of 7.2 where both kernels have it); the answers are the kernels'.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from kvmneg.features.report import Report
from kvmneg.policy import negotiation, rollback
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request
from tests.hosts import catalogue, project, start
from tests.hosts.job import Job
from tests.packages.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.hosts.machine import Machine

pytestmark = pytest.mark.hosts
SECONDS = 120.0


def sysreg(crm: int, op2: int, *, op1: int = 0, crn: int = 0) -> str:
    """A register of op0 3, as `hex` writes its id (api.rst 4.68)."""
    return hex(0x6030_0000_0013_0000 | 3 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2)


PSCI = "0x6030000000140000"
BITMAPS = {f"0x603000000016000{n}" for n in range(3)}
VENDOR_HYP_2 = "0x6030000000160003"
DFR0_32, DFR0, ISAR1, ISAR2 = sysreg(1, 2), sysreg(5, 0), sysreg(6, 1), sysreg(6, 2)
MMFR1, MMFR2, CLIDR = sysreg(7, 1), sysreg(7, 2), sysreg(0, 1, op1=1)
PMMIR, OSLSR = sysreg(14, 6, crn=9), "0x603000000013808c"
TIMER = {sysreg(0, 1, op1=3, crn=14), sysreg(2, 1, op1=3, crn=14), sysreg(2, 2, op1=3, crn=14)}
CCSIDR = [f"0x60200000001100{n:02x}" for n in range(14)]
TRANSLATION = {sysreg(0, 3, crn=2), sysreg(2, 2, crn=10), sysreg(2, 3, crn=10)}  # TCR2, PIRE0, PIR


class Journey(NamedTuple):
    """From a newer host to an older one. `refused` (EINVAL) and `unknown` (ENOENT) are without a contract.

    `no_fence` are the fields for which there is no fence, empty where there is one.
    """

    cpu: str
    qemu: str
    newer: str
    older: str
    refused: set[str]
    unknown: set[str]
    no_fence: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        return f"{self.cpu}-{self.newer}-{self.older}"


CACHES = {CLIDR, *CCSIDR[:3]}
MORE_CACHES = set(CCSIDR[3:])
N1 = [
    Journey("neoverse-n1", "", "newest", "6.12", {PSCI}, {VENDOR_HYP_2, PMMIR}),
    Journey(
        *("neoverse-n1", "", "newest", "6.1", {PSCI, DFR0, *CACHES}),
        {VENDOR_HYP_2, PMMIR, *TIMER, *MORE_CACHES},
    ),
    # by what 6.12 lists more than 7.x and than 6.1 (forward, 6.16 does not know TCR2, PIR and PIRE0 either)
    Journey(*("neoverse-n1", "", "6.12", "6.1", {DFR0, *CACHES}), {*TRANSLATION, *TIMER, *MORE_CACHES}),
]
# QEMU 10's `max` has nested virtualisation, QEMU 7.2's has not.
MAX = [
    Journey("max", "10.0", "6.18", "6.12", {PSCI, MMFR2}, {VENDOR_HYP_2}, frozenset({"aa64mmfr2-nv"})),
    Journey(
        *("max", "10.0", "newest", "6.1", {PSCI, DFR0_32, DFR0, ISAR1, ISAR2, MMFR1, MMFR2, *CACHES}),
        *({VENDOR_HYP_2, PMMIR, *TIMER, *MORE_CACHES}, frozenset({"aa64mmfr2-nv"})),
    ),
    Journey(
        *("max", "10.0", "6.12", "6.1", {DFR0_32, DFR0, MMFR1, ISAR1, ISAR2, *CACHES}),
        *({*TRANSLATION, *TIMER, *MORE_CACHES}, frozenset({"aa64mmfr1-hcx"})),
    ),
]
# State that does not stay as it is set: timers count, and Linux 6.12 takes PMU registers that set and clear the same
# bits one after the other, so that none is left (from 6.14 on both are taken as a value). kvmneg says that the values
# of state registers are not judged.
MOVING = {
    *TIMER,
    *(
        sysreg(*place, op1=3, crn=14) for place in ((3, 1), (3, 2))
    ),  # KVM_REG_ARM_TIMER_CTL, KVM_REG_ARM_TIMER_CNT
    *(sysreg(*place, op1=3, crn=9) for place in ((12, 1), (12, 2), (12, 3), (14, 3))),  # PMCNTEN*, PMOVS*
    *(sysreg(14, op2, crn=9) for op2 in (1, 2)),  # PMINTENSET, PMINTENCLR
}
PSCI_1_1 = 0x10001  # of 6.1 and 6.12
FEW = {N1[0].name}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "journey" in metafunc.fixturenames:
        cases = [
            pytest.param(one, id=one.name, marks=() if one.name in FEW else pytest.mark.every_host)
            for one in (*N1, *MAX)
        ]
        metafunc.parametrize("journey", cases, scope="module")


class Side:
    """One host of the two: its report, and jobs of tests.hosts.carried."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._files = project.files("arm64")
        self.report = self._report()

    def _report(self) -> Report:
        """As the host itself makes it, now."""
        words = ["python3", "-m", "kvmneg.cli", "host", "--json"]
        result = self._machine.run(Job(words, self._files, project.ENVIRONMENT, SECONDS))
        assert result.status == 0, result.stderr.decode()
        return Report.loads(result.stdout)

    def run(self, verb: str, contract: bytes | None, dumped: dict[str, Any] | None = None) -> dict[str, Any]:
        """tests.hosts.carried there, under the contract; what it wrote."""
        files = dict(self._files)
        if contract is not None:
            files["contract.bin"] = contract
        if dumped is not None:
            files["dump.json"] = json.dumps(dumped).encode()
        job = Job(["python3", "-m", "tests.hosts.carried", verb], files, project.ENVIRONMENT, SECONDS)
        result = self._machine.run(job)
        assert result.status == 0, result.stderr.decode()
        (written,) = result.files.values()
        found: dict[str, Any] = json.loads(written)
        return found


@pytest.fixture(scope="module")
def sides(journey: Journey) -> Iterator[tuple[Side, Side]]:
    """The newer host and the older one, side by side."""
    with ExitStack() as stack:
        try:
            built = [
                start.Built(catalogue.find(f"arm64-{line}", journey.cpu, journey.qemu))
                for line in (journey.newer, journey.older)
            ]
        except Unreachable as error:
            pytest.skip(f"the mirror is not reachable: {error}")
        newer, older = (Side(stack.enter_context(start.restored(one))) for one in built)
        yield newer, older


def by_error(restored: dict[str, Any], name: str) -> set[str]:
    return {register for register, error in restored["failed"].items() if error == name}


def test_without_a_contract(journey: Journey, sides: tuple[Side, Side]) -> None:
    """The registers that were measured fail, and no other; on the same kernel none does."""
    newer, older = sides
    dumped = newer.run("dump", None)
    again = newer.run("restore", None, dumped)
    assert again["failed"] == {}
    assert again["answer"] == dumped["answer"]
    restored = older.run("restore", None, dumped)
    assert by_error(restored, "EINVAL") == journey.refused
    assert by_error(restored, "ENOENT") == journey.unknown
    assert set(restored["failed"].values()) == {"EINVAL", "ENOENT"}


def test_under_a_fence(journey: Journey, sides: tuple[Side, Side]) -> None:
    """No register fails, only what its rule lets go is dropped, all others read back, and the guest goes on."""
    newer, older = sides
    answer = rollback.judge(newer.report, older.report)
    if journey.no_fence:
        assert answer.fence is None
        told = {blocker.feature for blocker in answer.blockers}
        assert told == journey.no_fence
        return
    assert answer.blockers == ()
    assert answer.fence is not None
    fence = Fence(answer.fence.granted, 1, registers=answer.fence.registers)
    contract = negotiation.negotiate(Request(maximum=True), newer.report, fence).contract
    assert negotiation.check(contract, older.report) == ()
    dumped = newer.run("dump", contract.binary())
    restored = older.run("restore", contract.binary(), dumped)
    assert restored["failed"] == {}
    assert set(restored["dropped"]) == journey.unknown
    assert set(restored["dropped"]) <= {hex(one.register) for one in answer.dropped}
    assert restored["answer"] == dumped["answer"] == [PSCI_1_1, 0, 0, 0]
    assert set(restored["differ"]) <= MOVING
