# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests run once for each combo, behind the answers; what they saw is in the report from then on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmneg.features.report import Report, combo_digest
from kvmneg.host import proof
from kvmneg.service.varlink.loop import Loop
from kvmneg.service.watching import proofs
from kvmneg.service.watching.proofs import Prover

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import Daemon

COMBO = {"kernel": "6.12.1", "boot": "one"}
ROW = {
    "at": "2026-01-01T00:00:00Z by kvmneg 0.1.0",
    "grades": {"cpuid:0x7.0.ebx": "leaks"},
    "instructions": {"avx2": "hidden only"},
}


class FakeNode:
    """Has a combo, and is told to measure again."""

    def __init__(self, combo: dict[str, Any]) -> None:
        self.combo = combo
        self.measured = 0
        self.changed: list[Callable[[], None]] = []

    @property
    def combo_digest(self) -> str:
        return combo_digest(self.combo)

    def measure_again(self) -> None:
        self.measured += 1


def write(cache: Path, combos: dict[str, Any]) -> None:
    cache.write_text(json.dumps({"format": proof.FORMAT, "combos": combos}))


def test_a_proof_counts_for_its_combo_in_any_boot(tmp_path: Path) -> None:
    write(tmp_path / "proofs.json", {combo_digest(COMBO): ROW})
    prover = Prover(str(tmp_path), "/dev/kvm", cast("Any", SimpleNamespace()))
    kept = prover.known({**COMBO, "boot": "another"})
    assert kept is not None and kept.to_json() == ROW
    assert prover.known({**COMBO, "kernel": "6.12.2"}) is None
    parts: dict[str, Any] = {"enforcement": {"cpuid:0x7.0.ebx": "replaced", "kvm:async-pf": "untested"}}
    measured: dict[str, str] = {}
    kept.add_to(parts, measured)
    assert parts["enforcement"] == {"cpuid:0x7.0.ebx": "leaks", "kvm:async-pf": "untested"}
    assert (parts["instructions"], measured) == ({"avx2": "hidden only"}, {"guests": ROW["at"]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "kvmneg.proofs/2", "combos": {}}',
        '{"format": "kvmneg.proofs/1", "combos": []}',
        '{"format": "kvmneg.proofs/1", "combos": {"x": 1}}',
        '{"format": "kvmneg.proofs/1", "combos": {"x": {"at": "", "grades": {"w": "fine"}, "instructions": {}}}}',
        '{"format": "kvmneg.proofs/1", "combos": {"x": {"at": "", "grades": {}, "instructions": {"f": "?"}}}}',
    ],
)
def test_a_damaged_cache_is_empty(tmp_path: Path, text: str) -> None:
    cache = tmp_path / "proofs.json"
    assert proof.known(str(cache)) == {}
    cache.write_text(text)
    assert proof.known(str(cache)) == {}


def test_a_limited_number_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmneg.limits.PROOFS", 3)
    monkeypatch.setattr("kvmneg.limits.PROOF_SECONDS", 0)  # alarm(2) of 0: none in this process
    monkeypatch.setattr(proof, "prove", lambda path: proof.Kept.from_json(ROW))
    cache = str(tmp_path / "proofs.json")
    for digest in "abcdb":
        proof.refresh(cache, "/dev/kvm", digest)
    assert list(proof.known(cache)) == ["c", "d", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["proofs.json"]


def test_a_proof_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """The child ends by SIGALRM, whatever its guests do, and leaves nothing."""
    program = (
        "import sys, time; from kvmneg import limits; from kvmneg.host import proof; limits.PROOF_SECONDS = 1;"
        "proof.prove = lambda path: time.sleep(60); proof.refresh(*sys.argv[1:])"
    )
    command = [sys.executable, "-P", "-c", program, str(tmp_path / "proofs.json"), "/dev/kvm", "digest"]
    assert subprocess.run(command, check=False, timeout=30).returncode == -signal.SIGALRM
    assert not list(tmp_path.iterdir())


def run_until(loop: Loop, done: Callable[[], bool]) -> None:
    """Turns of the loop until something is so, for ten seconds at most."""
    end = time.monotonic() + 10
    while not done() and time.monotonic() < end:
        loop._call_back([fd for fd, _ in loop.epoll.poll(0.02)])
        loop._run_timers()
    assert done()


def test_each_combo_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child for the combo of now; a child that fails leaves it unproven, and is not started again for it."""
    said = tmp_path / "said"
    program = f"import sys; open({str(said)!r}, 'a').write(sys.argv[3] + ' ')"
    monkeypatch.setattr(proofs, "_PROGRAM", program)
    monkeypatch.setattr(proofs, "_LATER_SECONDS", 0.01)
    node = FakeNode(COMBO)
    loop = Loop()
    prover = Prover(str(tmp_path), "/dev/kvm", cast("Any", SimpleNamespace()))
    prover.start(loop, cast("Any", node))

    def told() -> list[str]:
        return said.read_text().split() if said.exists() else []

    run_until(loop, lambda: len(told()) == 1)
    first = node.combo_digest
    node.changed[0]()  # the fence moved, say
    node.combo = {**COMBO, "kernel": "6.12.2"}
    node.changed[0]()
    run_until(loop, lambda: len(told()) == 2)
    end = time.monotonic() + 0.3
    run_until(loop, lambda: time.monotonic() > end)
    assert told() == [first, node.combo_digest]
    assert node.measured == 0


def test_what_a_child_found_is_measured_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = json.dumps({"format": proof.FORMAT, "combos": {combo_digest(COMBO): ROW}})
    monkeypatch.setattr(proofs, "_PROGRAM", f"import sys; open(sys.argv[1], 'w').write({row!r})")
    monkeypatch.setattr(proofs, "_LATER_SECONDS", 0.01)
    node, loop = FakeNode(COMBO), Loop()
    prover = Prover(str(tmp_path), "/dev/kvm", cast("Any", SimpleNamespace()))
    assert prover.known(COMBO) is None
    prover.start(loop, cast("Any", node))
    run_until(loop, lambda: node.measured == 1)
    kept = prover.known(COMBO)
    assert kept is not None and kept.to_json() == ROW


@pytest.mark.kvm
def test_a_daemon_proves_its_host(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Without being waited for; what its guests saw is there at its next start from the first answer on."""
    daemon = make_daemon("--kvm", "/dev/kvm").start()
    for _ in range(600):
        with daemon.client() as client:
            report = Report.from_json(client.call("org.kvmneg.GetHost")["host"])
        if "guests" in report.measured:
            break
        time.sleep(0.1)
    assert "guests" in report.measured
    assert report.instructions
    assert daemon.end() == 0
    daemon.start()
    with daemon.client() as client:
        again = Report.from_json(client.call("org.kvmneg.GetHost")["host"])
    assert again.measured["guests"] == report.measured["guests"]
    assert (again.enforcement, again.instructions) == (report.enforcement, report.instructions)
