# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proof guests on this machine's own KVM, whatever kind it is, and on one that lies."""

from __future__ import annotations

import fcntl
import os
import signal
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg.errors import KvmFault
from kvmneg.features import words
from kvmneg.host import enforcement, measure, sight, x86
from kvmneg.host.kvm import Kvm, Scratch, raw_cpuid
from kvmneg.host.tables import CpuidEntry

if measure.ARCHITECTURE == "x86_64":
    from kvmneg.host import guest_x86 as guest
    from kvmneg.host import hidden_x86, verify_x86
    from kvmneg.host import proof_x86 as proof
    from kvmneg.host.guest_x86 import Answer, Question

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.kvm

PVM = Path("/sys/module/kvm_pvm").exists()
OURS = "cpuid:0x40000001.0.eax"
HLT_EXIT = 5  # KVM_EXIT_HLT
SET_VCPU_EVENTS = 0x4040AEA0  # KVM_SET_VCPU_EVENTS


def run(code: str) -> Question:
    return Question(guest.ASK_RUN, code=bytes.fromhex(code))


def ask_on(kvm: Kvm, scratch: Scratch, mode: int) -> list[Answer]:
    return guest.ask(kvm, scratch, mode, [Question(guest.ASK_CPUID, 0)])


def ask(kvm: Kvm, questions: Sequence[Question], mode: int = 1, seconds: float = 10.0) -> list[Answer]:
    """What a guest on a new VM answers, with what KVM supports in its CPUID."""
    with kvm.scratch() as scratch:
        assert kvm.try_cpuid(scratch, kvm.supported_cpuid()) is not None
        return guest.ask(kvm, scratch, mode, questions, seconds=seconds)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_every_mode_answers(kvm: Kvm, mode: int) -> None:
    """One vCPU after the other question, and again: a leaf of KVM's own is the same everywhere."""
    leaf = CpuidEntry(0x40000001, 0, 0, 0x12345678, 0x9ABCDEF0, 3, 4)
    with kvm.scratch() as scratch:
        assert kvm.try_cpuid(scratch, [*kvm.supported_cpuid(), leaf]) is not None
        for _ in range(3):
            (found,) = guest.ask(kvm, scratch, mode, [Question(guest.ASK_CPUID, 0x40000000)])
            assert found.outcome == guest.ANSWERED
            assert b"".join(value.to_bytes(4, "little") for value in found[3:]) == b"KVMKVMKVM\0\0\0"


def test_a_fault_is_an_answer(kvm: Kvm) -> None:
    """#UD and #GP with their vectors, as a kernel and as a program; what comes behind is answered too."""
    last = Question(guest.ASK_CPUID, 0x40000000)
    found = ask(kvm, [run("0f0bc3"), Question(guest.ASK_MSR, 0x10), run("0f0bc3"), last], guest.CPL3)
    assert [one[:2] for one in found] == [(2, 6), (2, 13), (2, 6), (1, 0)]
    found = ask(kvm, [run("0f0bc3"), run("b878563412c3"), last], guest.CPL0)
    assert [one[:2] for one in found] == [(2, 6), (1, 0), (1, 0)]
    assert found[1].eax == 0x12345678


def test_one_that_leaves_is_noted_and_the_rest_answered(kvm: Kvm) -> None:
    found = ask(kvm, [run("f4c3"), run("f4c3"), Question(guest.ASK_CPUID, 0x40000000)])
    assert [one[:2] for one in found] == [(guest.ENDED, HLT_EXIT)] * 2 + [(guest.ANSWERED, 0)]


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_what_an_earlier_guest_left_behind(kvm: Kvm, mode: int) -> None:
    """An exception on its way, as KVM keeps it of a guest that died delivering it, is none of the next one's."""
    with kvm.scratch() as scratch:
        assert kvm.try_cpuid(scratch, kvm.supported_cpuid()) is not None
        assert ask_on(kvm, scratch, mode)[0].outcome == guest.ANSWERED
        injected = struct.pack("=BBBBI", 1, guest.INVALID_OPCODE, 0, 0, 0)  # struct kvm_vcpu_events.exception
        fcntl.ioctl(scratch.vcpu, SET_VCPU_EVENTS, injected.ljust(64, b"\0"))
        assert ask_on(kvm, scratch, mode)[0].outcome == guest.ANSWERED


def test_one_that_loops_is_ended(kvm: Kvm) -> None:
    """A guest that loops never leaves KVM_RUN; what comes behind it stays open."""
    first = Question(guest.ASK_CPUID, 0x40000000)
    began = time.monotonic()
    found = ask(kvm, [first, run("ebfe"), first], seconds=0.2)
    assert time.monotonic() - began >= 0.2
    assert [one[:2] for one in found] == [
        (guest.ANSWERED, 0),
        (guest.ENDED, guest.EXIT_TIME),
        (guest.OPEN, 0),
    ]


def test_signals_of_the_caller_are_left_alone(kvm: Kvm) -> None:
    """Its mask is as it was, no signal of ours is left, and its own handlers run meanwhile."""
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: seen.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        (found,) = ask(kvm, [run("ebfe")], seconds=0.3)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found[:2] == (guest.ENDED, guest.EXIT_TIME)
    assert seen == [signal.SIGUSR1]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert not signal.sigpending()


def test_real_mode_passes_over_code(kvm: Kvm) -> None:
    leaf = Question(guest.ASK_CPUID, 0x40000000)
    found = ask(kvm, [leaf, run("c3"), leaf], guest.REAL)
    assert [one.outcome for one in found] == [guest.ANSWERED, guest.OPEN, guest.ANSWERED]


def test_limits(kvm: Kvm) -> None:
    leaf = Question(guest.ASK_CPUID, 0x40000000)
    found = ask(kvm, [leaf] * guest.QUESTIONS)
    assert {one.outcome for one in found} == {guest.ANSWERED}
    with pytest.raises(KvmFault, match="errno 7"):
        ask(kvm, [leaf] * (guest.QUESTIONS + 1))
    for question, mode in ((Question(0), 1), (Question(5), 1), (leaf, 3)):
        with pytest.raises(KvmFault, match="errno 22"):
            ask(kvm, [question], mode)
    assert ask(kvm, []) == []


# -- what is made of the answers --------------------------------------------------------------------------------


def tables(kvm: Kvm) -> tuple[list[CpuidEntry], list[CpuidEntry], dict[int, int]]:
    """The offer, the offer without its bits, the feature MSRs."""
    probe = kvm.probe()
    offer = x86.decoder().offer(probe)
    offered = [enforcement.offered_entry(entry, offer) for entry in probe.supported]
    return offered, verify_x86.emptied_table(offered), probe.feature_msrs


def test_honoured_is_what_every_guest_sees(kvm: Kvm) -> None:
    """Asked here a second time, one leaf a guest, against what was set here."""
    offered, lowered, msrs = tables(kvm)
    honoured = 0
    for table in (offered, lowered):
        found = proof.sights(kvm, proof.Table(table, msrs), offered)
        for entry in [entry for entry in table if entry[0] in (1, 7, 0x80000001, 0x40000001)]:
            for mode in guest.MODES:
                with kvm.scratch() as scratch:
                    assert kvm.try_cpuid(scratch, table) is not None
                    (answer,) = guest.ask(kvm, scratch, mode, [Question(guest.ASK_CPUID, *entry[:2])])
                for (word, compared, _), ours, seen in zip(
                    enforcement.registers[entry[:2]], entry[3:], answer[2:], strict=True
                ):
                    if found[word].grade == "honoured":
                        assert (ours ^ seen) & compared == 0, word
                        honoured += compared != 0
    assert honoured > 10


def test_what_this_kind_of_kvm_keeps(kvm: Kvm) -> None:
    """All of it, but for kvm-pvm: it forces three leaves, and a program sees the host's own XCR0."""
    offered, lowered, msrs = tables(kvm)
    tables_of = (proof.Table(offered, msrs), proof.Table(lowered, {}))  # VMX's MSRs go with VMX
    found = [proof.sights(kvm, table, offered) for table in tables_of]
    grades = {
        (sight.grade, word) for each in found for word, sight in each.items() if sight.grade != "honoured"
    }
    if not PVM:
        assert grades == set()
        return
    assert {grade for grade, _ in grades} <= {"replaced", "leaks"}
    assert {words.parse_cpuid(word)[0] for _, word in grades} == {0x1, 0x7, 0xD}
    assert found[0]["cpuid:0xd.0.eax"].seen[guest.CPL3] != found[0]["cpuid:0xd.0.eax"].seen[guest.CPL0]
    assert ("leaks", "cpuid:0xd.0.eax") in grades


class Liar(Kvm):
    """Says that it took a table, and has given another one to its guests."""

    __slots__ = ("given",)

    def try_cpuid(self, scratch: Scratch, entries: Sequence[CpuidEntry]) -> list[CpuidEntry] | None:
        assert super().try_cpuid(scratch, self.given) is not None
        return list(entries)


@pytest.mark.parametrize(
    ("told", "shown", "grade"), [(0, 8, "leaks"), (8, 0, "replaced"), (8, 8, "honoured")]
)
def test_a_lie_is_found_out(kvm: Kvm, told: int, shown: int, grade: str) -> None:
    """A guest sees a feature of KVM's own that was not set, or does not see one that was."""
    liar = Liar(os.dup(kvm.fd))
    others = [entry for entry in kvm.supported_cpuid() if entry[0] != 0x40000001]

    def table(value: int) -> list[CpuidEntry]:
        return [*others, CpuidEntry(0x40000001, 0, 0, value, 0, 0, 0)]

    with liar:
        liar.given = table(shown)
        found = proof.sights(liar, proof.Table(table(told), {}, {OURS: 0xFF}))
    assert found[OURS].grade == grade
    assert found[OURS].seen == (shown,) * 3


def test_a_number_that_differs_is_no_leak(kvm: Kvm) -> None:
    liar = Liar(os.dup(kvm.fd))
    leaf = CpuidEntry(0x80000008, 0, 0, 0x3028, 0, 0, 0)
    others = [entry for entry in kvm.supported_cpuid() if entry[0] != leaf[0]]
    with liar:
        liar.given = [*others, leaf._replace(eax=0x302F)]
        found = proof.sights(liar, proof.Table([*others, leaf], {}))
    assert found["cpuid:0x80000008.0.eax"].grade == "replaced"


def test_a_guest_without_time_honours_nothing(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that loops when it was asked for one leaf: what it sees of the others nobody knows."""
    ours = (sight._OPEN, sight._ENDED, sight._EXIT_TIME)
    assert ours == (guest.OPEN, guest.ENDED, guest.EXIT_TIME)
    real = guest.ask

    def ask_late(
        kvm: Kvm, scratch: Scratch, mode: int, questions: Sequence[Question], *, xcr0: int
    ) -> list[Answer]:
        if mode != guest.CPL3:
            return real(kvm, scratch, mode, questions, xcr0=xcr0)
        return real(kvm, scratch, mode, [questions[0], run("ebfe"), *questions[2:]], xcr0=xcr0, seconds=0.1)

    offered, _, msrs = tables(kvm)
    before = proof.sights(kvm, proof.Table(offered, msrs), offered)
    monkeypatch.setattr(guest, "ask", ask_late)
    after = proof.sights(kvm, proof.Table(offered, msrs), offered)
    seen = {word for word, _, _ in enforcement.registers[offered[0][:2]]}
    missed = {word for word, one in before.items() if one.bound and word.startswith("cpuid:")} - seen
    untested = {word for word, one in after.items() if one.grade == "untested"}
    kept = {
        word
        for word in missed
        if not any(((view or 0) ^ before[word].value) & before[word].bound for view in after[word].seen[:2])
    }
    assert untested == kept
    assert {word for word, one in after.items() if one.late} == untested


def test_a_refused_leaf_does_not_spoil_the_rest(kvm: Kvm) -> None:
    """Linear addresses of 3 bits: KVM takes 48, 57 or none (kvm_check_cpuid in arch/x86/kvm/cpuid.c)."""
    good = kvm.supported_cpuid()
    bad = [entry._replace(eax=0x0328) if entry[0] == 0x80000008 else entry for entry in good]
    found = proof.sights(kvm, proof.Table(bad, {}), good)
    assert found["cpuid:0x80000008.0.eax"].grade == "refused"
    assert found["cpuid:0x80000001.0.edx"].grade == "honoured"


def test_msrs_of_hidden_features(kvm: Kvm) -> None:
    """Linux 5.10 and later refuse them when they are told to; without, kvmclock's answers to anyone."""
    offered, lowered, _ = tables(kvm)
    shown, hidden = hidden_x86.paravirtual(kvm, offered), hidden_x86.paravirtual(kvm, lowered)
    assert set(shown) == set(hidden) == set(hidden_x86.PARAVIRTUAL_MSRS)
    assert not any(one.shown for one in hidden.values())
    assert shown["kvmclock"] == (True, False, False, False)
    assert hidden["kvmclock"] == (False, False, True, False)
    assert {one.refused_enforced for one in hidden.values()} == {True}


def test_instructions_of_hidden_features(kvm: Kvm) -> None:
    """No hardware traps POPCNT, SSE 4.2 or AES: hiding them hides their bit. What no CPU has is not judged."""
    offered, _, _ = tables(kvm)
    has = next(entry for entry in raw_cpuid(min(os.sched_getaffinity(0))) if entry[0] == 1).ecx
    hidden = [
        entry._replace(ecx=entry.ecx & ~(1 << 23 | 1 << 20 | 1 << 25)) if entry[0] == 1 else entry
        for entry in offered
    ]
    marks = proof.instructions(kvm, offered, hidden, ["popcnt", "sse4.2", "aes", "tbm"])
    for feature, bit in (("popcnt", 23), ("sse4.2", 20), ("aes", 25)):
        if has >> bit & 1:
            assert marks[feature] == "hidden only"
    assert set(marks.values()) <= {"hidden only", "trapped", "untested"}


def test_a_guest_without_long_mode(kvm: Kvm) -> None:
    """From Linux 7 on none gets into it; what could not be asked there stays open, and real mode answers."""
    table = [
        entry._replace(edx=entry.edx & ~(1 << 29)) if entry[0] == 0x80000001 else entry
        for entry in kvm.supported_cpuid()
    ]
    found = proof.sights(kvm, proof.Table(table, {}), table)
    real, *long = found["cpuid:0x40000000.0.ebx"].seen
    assert real == 0x4B4D564B
    assert set(long) <= {None, real}
    assert found["cpuid:0x80000001.0.edx"].grade == "honoured"
