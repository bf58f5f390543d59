# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proofs of a host with several kinds of CPU: where guests run, and what of it counts."""

from __future__ import annotations

import errno
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.cli import verify
from kvmneg.cli.output import Screen
from kvmneg.errors import KvmFault
from kvmneg.host import kvm, proof, sight, software
from kvmneg.host.sight import Proof, Sight, Standing
from kvmneg.host.software import CpuClass

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WORD, OTHER = "cpuid:0x7.0.ebx", "hyperv:0x40000003.0.eax"
BIG, LITTLE = {"model": "big"}, {"model": "little"}


def one(grade: str, seen: int | None = 1) -> Sight:
    return Sight(0xFF, 1, 1, (seen, None, None), grade)


def made(tables: dict[str, dict[str, Sight]], standings: Any = (), marks: Any = ()) -> Proof:
    return Proof(("real", "cpl0", "cpl3"), tables, dict(standings), dict(marks))


@pytest.mark.parametrize("first", [0, 1])
def test_the_worst_of_two_kinds_counts(first: int) -> None:
    """Whichever comes first; what one kind has alone counts too."""
    kinds = [
        made(
            {"offer": {WORD: one("honoured"), OTHER: one("leaks")}, "emptied": {WORD: one("untested")}},
            {"kvmclock": Standing(False, True, True)},
            {"aes": "trapped", "avx": "untested"},
        ),
        made(
            {"offer": {WORD: one("replaced", 3), OTHER: one("replaced")}},
            {"kvmclock": Standing(False, None, False)},
            {"aes": "hidden only", "avx": "trapped"},
        ),
    ]
    found = sight.worst([kinds[first], kinds[1 - first]])
    assert found.tables["offer"] == {WORD: one("replaced", 3), OTHER: one("leaks")}
    assert found.tables["emptied"] == {WORD: one("untested")}
    assert found.paravirtual == {"kvmclock": (False, None, False, False)}
    assert found.instructions == {"aes": "hidden only", "avx": "trapped"}
    assert found.grades() == {WORD: "replaced", "cpuid:0x40000001.0.eax": "leaks", OTHER: "leaks"}


def test_one_kind_is_itself() -> None:
    only = made({"offer": {WORD: one("honoured")}})
    assert sight.worst([only]) is only


def test_what_guests_saw_as_it_was_to_be() -> None:
    """In every table, and some guest did see it."""
    more = "hyperv:0x40000004.0.eax"
    found = made(
        {
            "hyperv": {OTHER: one("honoured"), more: one("honoured"), WORD: one("honoured")},
            "hyperv-emptied": {OTHER: one("honoured"), more: one("replaced")},
            "offer": {"hyperv:0x40000005.0.eax": one("honoured", None)},
        }
    )
    assert found.honoured("hyperv:") == [OTHER]


class Opened:
    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[CpuClass], list[Proof]], list[object]]:
    """host(kinds, proofs): each next prove() gives the next of the proofs; the list of what each was asked."""

    def set_up(kinds: list[CpuClass], proofs: list[Proof]) -> list[object]:
        asked: list[object] = []

        class Verifier:
            @staticmethod
            def prove(opened: Opened, bound: object) -> Proof:
                asked.append((opened.path, bound, sorted(os.sched_getaffinity(0))))
                return proofs[len(asked) - 1]

        monkeypatch.setattr(software, "cpu_classes", lambda: kinds)
        monkeypatch.setattr(proof, "verifier", lambda: Verifier)
        monkeypatch.setattr(kvm.Kvm, "open", Opened)
        return asked

    return set_up


def test_guests_run_on_each_kind(host: Callable[..., list[object]]) -> None:
    """Pinned to a CPU of it; here both kinds are of the CPU that this process has for certain."""
    cpu = min(os.sched_getaffinity(0))
    good, bad = made({"contract": {WORD: one("honoured")}}), made({"contract": {WORD: one("replaced")}})
    bound = {WORD: (1, 0xFF)}
    asked = host([CpuClass(BIG, (cpu,)), CpuClass(LITTLE, (cpu, 99999))], [good, bad])
    found = proof.on_each_kind("/dev/some", bound)
    assert asked == [("/dev/some", bound, [cpu])] * 2
    assert found.grades() == {WORD: "replaced"}
    assert (found.kinds, found.unvisited) == ([str(cpu), f"{cpu},99999"], [])
    assert len(os.sched_getaffinity(0)) >= 1


def test_a_kind_that_may_not_be_visited_is_named(
    host: Callable[..., list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    cpu = min(os.sched_getaffinity(0))
    kinds = [CpuClass(BIG, (cpu,)), CpuClass(LITTLE, (99998, 99999))]
    asked = host(kinds, [made({"offer": {WORD: one("honoured")}})])
    found = proof.on_each_kind("/dev/some")
    assert len(asked) == 1
    assert found.kinds == [str(cpu)]
    (missed,) = found.unvisited
    assert (missed["cpus"], missed["kind"]) == ("99998-99999", LITTLE)
    document = verify.to_json(found)
    assert (document["kinds"], document["unvisited"]) == ([str(cpu)], [missed])
    verify._show(Screen(), found, [], everything=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"untested: CPUs 99998-99999 (model little): {missed['because']}" in shown


def test_what_guests_saw_goes_into_the_report(host: Callable[..., list[object]]) -> None:
    """A word that only guests can tell of is untested until one did; a measurement's own grade stays."""
    cpu = min(os.sched_getaffinity(0))
    host([CpuClass(BIG, (cpu,))], [made({"hyperv": {OTHER: one("honoured")}, "offer": {WORD: one("leaks")}})])
    kept = proof.Kept.from_json(proof.prove("/dev/some").to_json())
    assert kept is not None
    parts: dict[str, Any] = {"enforcement": {OTHER: "untested", WORD: "replaced", "kvm:hyperv": "untested"}}
    measured: dict[str, str] = {}
    kept.add_to(parts, measured)
    assert parts["enforcement"] == {WORD: "leaks", "kvm:hyperv": "untested"}
    assert proof.Kept.from_json({**kept.to_json(), "seen": [1]}) is None
    assert proof.Kept.from_json({**kept.to_json(), "seen": "hyperv:"}) is None


OPEN, ANSWERED, FAULTED, ENDED = range(4)
HLT, TIME = 5, 0x7FFF0001  # KVM_EXIT_HLT, KVMNEG_EXIT_TIME


@pytest.mark.parametrize(
    ("outcomes", "missed"),
    [
        ((), {}),
        (((OPEN, 0), (OPEN, 0)), {}),  # there is no such mode for this guest
        (((ENDED, TIME), (OPEN, 0)), {"a": True, "b": True, "c": True}),
        (((ANSWERED, 0), (FAULTED, 6), (ENDED, HLT), (ANSWERED, 0)), {"d": False}),
        (((FAULTED, 13), (ENDED, HLT), (ENDED, TIME), (OPEN, 0)), {"c": True, "d": True, "e": True}),
    ],
)
def test_what_guests_did_not_come_to(outcomes: tuple[tuple[int, int], ...], missed: dict[str, bool]) -> None:
    found = sight.Missed()
    found.add((["a", "b"], ["c"], ["d"], ["e"])[: len(outcomes)], outcomes)
    assert found == missed


def test_missed_is_not_honoured() -> None:
    missed = sight.Missed({WORD: True, OTHER: False})
    honoured = one("honoured")
    assert missed.judge(WORD, honoured) == honoured._replace(grade="untested", late=True)
    assert missed.judge(OTHER, honoured) == honoured._replace(grade="untested")
    for word, sight_ in ((WORD, one("leaks")), ("msr:0x10a", honoured), (WORD, honoured._replace(bound=0))):
        assert missed.judge(word, sight_) == sight_


def test_a_proof_that_had_too_little_time_is_not_kept(
    host: Callable[..., list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may tell; a guest that leaves by a question does so each time."""
    monkeypatch.setattr(signal, "alarm", lambda _seconds: 0)
    cpu = min(os.sched_getaffinity(0))
    late, left = (one("untested")._replace(late=how) for how in (True, False))
    cache = tmp_path / "proofs.json"
    host([CpuClass(BIG, (cpu,))], [made({"offer": {WORD: late}})])
    with pytest.raises(KvmFault) as caught:
        proof.refresh(str(cache), "/dev/some", "sha256:1")
    assert (caught.value.fields["ioctl"], caught.value.fields["errno"]) == ("KVM_RUN", errno.ETIME)
    assert not cache.exists()
    host([CpuClass(BIG, (cpu,))], [made({"offer": {WORD: left}})])
    assert proof.refresh(str(cache), "/dev/some", "sha256:1").grades == {WORD: "untested"}


def test_what_nobody_saw_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for grade, told in (
        ("honoured", ""),
        ("untested", ", but for 1 word that some guest did not come to see"),
    ):
        verify._show(Screen(), made({"offer": {WORD: one(grade)}}), [], everything=False)
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.startswith(f"kept: guests see what they are to see{told} ")


@pytest.mark.parametrize(
    ("allowed", "tried", "has", "found"),
    [
        ((True, True), (False, False), False, "trapped"),
        ((True, True), (False, True), False, "hidden only"),
        ((None, None), (True, None), False, "hidden only"),
        ((True, True), (False, None), False, "untested"),  # nobody looked at what a program can do
        ((True, None), (False, None), False, "trapped"),  # a kernel's instruction
        ((False, False), (False, False), False, "untested"),
        ((False, False), (False, False), True, "trapped"),  # KVM offers it to nobody
        ((True, True), (None, None), True, "untested"),
    ],
)
def test_mark(
    allowed: tuple[bool | None, ...], tried: tuple[bool | None, ...], has: bool, found: str
) -> None:
    assert sight.mark(allowed, tried, has=has) == found
