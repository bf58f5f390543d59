# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C libraries and the examples on arm64 hosts, where each has a kvmnegd of its own.

examples/minivmm-move-arm64.c takes a guest that runs to a host of another kernel, and back. What must be in its way
without a fence, and what must be left out under one, is what test_rollback_experiment.py was told by hand.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import pytest

from kvmneg.features.report import Report
from kvmneg.policy import rollback
from tests.hosts import catalogue, programs, project, start
from tests.hosts.job import Job
from tests.hosts.test_rollback_experiment import N1, TRANSLATION, Journey
from tests.packages.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.hosts.job import Result
    from tests.hosts.machine import Machine

pytestmark = pytest.mark.hosts
SECONDS = 300.0
VM = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"
REQUEST = '{"request": {"max": true}}'
MOVE = ["bin/minivmm-move-arm64", VM]
OUT, BACK = "7001", "7002"
STEPS = 5  # at least, of each run
LEAST_WORDS = 30  # of the ID registers of any of these hosts
ARM64 = [host.name for host in catalogue.hosts() if host.architecture == "arm64"]
FEW = N1[0].name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, cases in (
        ("journey", [(one, one.name) for one in N1]),
        ("host", [(one, one) for one in ARM64]),
    ):
        if name in metafunc.fixturenames:
            marks = [() if id_ == FEW else pytest.mark.every_host for _, id_ in cases]
            rows = [
                pytest.param(case, id=id_, marks=mark) for (case, id_), mark in zip(cases, marks, strict=True)
            ]
            metafunc.parametrize(name, rows)


def built(name: str, cpu: str = "") -> start.Built:
    """A host, and the programs for it."""
    try:
        programs.files("arm64")
        return start.Built(catalogue.find(name, cpu))
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")


def run(machine: Machine, *words: str) -> Result:
    """A command there, beside the package and the programs."""
    served = {"served.py": (project.ROOT / "tests/hosts/served.py").read_bytes()}
    files = {**project.package("arm64"), **programs.files("arm64"), **served}
    return machine.run(Job(words, files, {**project.ENVIRONMENT, **programs.ENVIRONMENT}, SECONDS))


def serve(machine: Machine, *commands: list[str], fence: str = "", **wires: dict[str, str]) -> Result:
    """Commands one after the other, beside a kvmnegd; `fence` is pinned before."""
    plan = {"commands": commands, **({"fence": fence} if fence else {}), **wires}
    return run(machine, "python3", "served.py", json.dumps(plan))


class Run(NamedTuple):
    """What a guest said in one of its runs."""

    first: int
    last: int
    words: int
    wrong: int

    @classmethod
    def all(cls, result: Result) -> list[Run]:
        line = r"^steps (\d+) to (\d+): (\d+) words looked at by the guest, (\d+) not as promised$"
        return [cls(*map(int, found)) for found in re.findall(line, result.text, re.MULTILINE)]


class Sides:
    """A host with the newer kernel and one with the older, joined by two wires."""

    def __init__(self, newer: Machine, older: Machine, folder: Path) -> None:
        self.both = newer, older
        for name in ("out", "back"):
            newer.plug(name, folder / name, listens=True)
            older.plug(name, folder / name, listens=False)

    def fence(self) -> str:
        """The widest under which guests of the newer can go to the older, by what both measure now."""
        with ThreadPoolExecutor() as pool:
            command = ("python3", "-m", "kvmneg.cli", "host", "--json")
            results = list(pool.map(lambda one: run(one, *command), self.both))
        newer, older = (Report.loads(result.stdout) for result in results)
        answer = rollback.judge(newer, older)
        assert answer.fence is not None, answer.blockers
        return answer.fence.text()

    def move(self, fence: str = "") -> tuple[Result, Result]:
        """The guest starts on the newer host, goes to the older, and comes back; what was said on either."""
        newer, older = self.both
        away = [*MOVE, "--request", REQUEST, "--send", f"127.0.0.1:{OUT}"]
        with ThreadPoolExecutor() as pool:
            here = pool.submit(
                *(serve, newer, away, [*MOVE, "--receive", BACK]),
                fence=fence,
                listen={OUT: "out"},
                connect={BACK: "back"},
            )
            there = pool.submit(
                *(serve, older, [*MOVE, "--receive", OUT, "--send", f"127.0.0.1:{BACK}"]),
                fence=fence,
                listen={BACK: "back"},
                connect={OUT: "out"},
            )
            return here.result(), there.result()


@pytest.fixture
def sides(journey: Journey, tmp_path: Path) -> Iterator[Sides]:
    with ExitStack() as stack:
        hosts = [built(f"arm64-{line}", journey.cpu) for line in (journey.newer, journey.older)]
        newer, older = (stack.enter_context(start.restored(one)) for one in hosts)
        yield Sides(newer, older, tmp_path)


def test_minivmm(host: str) -> None:
    """The first page, under what this host offers: the guest sees all of it as promised."""
    with start.restored(built(host)) as machine:
        result = serve(machine, ["bin/minivmm", VM, REQUEST])
    assert result.status == 0, result.stderr.decode()
    (told,) = re.findall(
        r"^(\d+) words looked at by the guest, 0 not as promised$", result.text, re.MULTILINE
    )
    assert int(told) >= LEAST_WORDS


def test_there_and_back_under_a_fence(journey: Journey, sides: Sides) -> None:
    """The guest counts on where it was, sees nothing change, and only what the older host lacks is left out."""
    newer, older = sides.move(sides.fence())
    assert (newer.status, older.status) == (0, 0), newer.stderr + older.stderr
    held = [re.findall(r"^holds (sha256:[0-9a-f]{64})$", one.text, re.MULTILINE) for one in (newer, older)]
    assert held == [[held[0][0]] * 2, held[0][:1]]  # everywhere its own contract is what counts
    started, returned = Run.all(newer)
    (away,) = Run.all(older)
    assert started.first == 1
    assert (away.first, returned.first) == (started.last + 1, away.last + 1)
    assert all(one.last - one.first + 1 >= STEPS for one in (started, away, returned))
    assert started.words == away.words == returned.words >= LEAST_WORDS
    assert (started.wrong, away.wrong, returned.wrong) == (0, 0, 0)
    came = [
        re.search(r"^(\d+) registers came, (\d+) left out$", one.text, re.MULTILINE) for one in (older, newer)
    ]
    assert came[0] is not None and came[1] is not None
    assert int(came[0][2]) == len(journey.unknown)
    # those of 6.12 that no other of these kernels lists came to be there, and stay there
    visited = len(TRANSLATION) if journey.older == "6.12" else 0
    assert int(came[1][1]) == int(came[0][1]) - len(journey.unknown) + visited
    assert int(came[1][2]) == visited


@pytest.mark.every_host
def test_without_a_fence_it_is_refused(journey: Journey, sides: Sides) -> None:
    """By the words that the older kernel does not take; and it goes on where it is."""
    newer, older = sides.move()
    assert (newer.status, older.status) == (1, 1), newer.stderr + older.stderr
    said = older.stderr.decode()
    assert "minivmm: org.kvmneg.Blocked: " in said
    told = re.findall(r"^\S+ \((arm64:0x[0-9a-f]+)(?: bit \d+)?\), wanted by ", said, re.MULTILINE)
    assert {f"arm64:{register}" for register in journey.refused} <= set(told)
    assert Run.all(older) == []
    started, stayed = Run.all(newer)
    assert "the other host refuses it, and it goes on here" in newer.text
    assert stayed.first == started.last + 1
    assert (started.wrong, stayed.wrong) == (0, 0)
