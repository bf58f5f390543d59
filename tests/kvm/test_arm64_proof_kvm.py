# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proof guests on the real KVM: what they do, and what they see against guests made by other means (arm64_guest)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from kvmneg._libkvmneg import ffi, lib

from kvmneg.errors import KvmFault, NotApplied
from kvmneg.host import guest_arm64 as guest
from kvmneg.host import proof_arm64, views_arm64
from kvmneg.host.guest_arm64 import Machine
from kvmneg.host.proof_arm64 import GIVEN
from kvmneg.host.views_arm64 import (
    ANSWERED,
    ENDED,
    EXIT_TIME,
    FAULTED,
    HVC,
    MODES,
    OPEN,
    RET,
    Question,
    mrs,
    questions,
    view,
)

from .arm64_facts import AA64, Facts, facts
from .arm64_guest import (
    BITMAPS,
    EXIT_SYSTEM_EVENT,
    MIDR,
    PMCR,
    PSCI_0_2,
    PSCI_VERSION,
    SVE_VLS,
    Vm,
    reads,
    sysreg,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.host.kvm import Kvm

pytestmark = pytest.mark.kvm
EL1, EL0 = MODES
CTR, CURRENT_EL = sysreg(3, 3, 0, 0, 1), sysreg(3, 0, 4, 2, 2)
ADD = 0x8B010000  # X0, X0, X1
LOOP = 0x14000000  # B to itself
LDR = 0xF9400000  # X0, [X0]
SYSTEM_OFF = 0x84000008


@pytest.fixture
def found(kvm: Kvm) -> Facts:
    """What this KVM is."""
    return facts(kvm)


@pytest.fixture
def machine(kvm: Kvm, found: Facts) -> Iterator[Machine]:
    with Machine(kvm, found.probe.vcpu_features & GIVEN, found.probe.vgic_models, {}) as one:
        yield one


def word(register: int) -> str:
    return f"arm64:{register:#x}"


def test_numbers_are_the_libraries() -> None:
    """views_arm64 is imported where there is no arm64."""
    outcomes = [getattr(lib, f"KVMNEG_OUTCOME_{name}") for name in ("OPEN", "ANSWERED", "FAULTED", "ENDED")]
    assert outcomes == [OPEN, ANSWERED, FAULTED, ENDED]
    assert (lib.KVMNEG_MODE_EL1, lib.KVMNEG_MODE_EL0) == MODES
    assert (lib.KVMNEG_EXIT_TIME, lib.KVMNEG_QUESTION_CODE) == (EXIT_TIME, views_arm64.CODE_WORDS)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_guest_does(kvm: Kvm, machine: Machine, mode: int) -> None:
    """In both modes and in either order of them; one that faults keeps none of the others from being answered."""
    asked = [
        Question((ADD, RET), (40, 2), 4),
        Question((mrs(CURRENT_EL), RET)),
        Question((0, RET)),  # UDF
        Question((mrs(CTR), RET)),
        Question((LDR, RET), (0x5000_0000,)),  # no memory, and no syndrome that KVM could not make an exit of
    ]
    for _ in range(2):
        answers = guest.ask(kvm, machine, mode, asked)
        assert (answers[0].outcome, answers[0].x) == (ANSWERED, (42, 2, 0, 0))
        if mode == EL1:
            assert (answers[1].outcome, answers[1].x[0]) == (ANSWERED, 1 << 2)
        else:
            assert answers[1].exception in (views_arm64.UNDEFINED, 0x18)
        assert (answers[2].outcome, answers[2].exception) == (FAULTED, views_arm64.UNDEFINED)
        assert answers[3].outcome == ANSWERED and answers[3].x[0] & 1 << 31
        assert (answers[4].outcome, answers[4].detail) == (ENDED, 6)  # KVM_EXIT_MMIO, of a read


def test_no_questions(kvm: Kvm, machine: Machine) -> None:
    assert guest.ask(kvm, machine, EL1, []) == []


def test_more_questions_than_a_guest_has_room_for(kvm: Kvm, machine: Machine) -> None:
    many = guest.QUESTIONS + 2
    answers = guest.ask(kvm, machine, EL1, [Question((ADD, RET), (n, 1)) for n in range(many)])
    assert [answer.x[0] for answer in answers] == list(range(1, many + 1))


def test_a_guest_that_never_ends(kvm: Kvm, machine: Machine) -> None:
    """Is ended; what comes behind it stays open, and the vCPU is of use again."""
    begun = time.monotonic()
    asked = [Question((ADD, RET), (1, 1)), Question((LOOP,)), Question((ADD, RET), (1, 1))]
    answers = guest.ask(kvm, machine, EL1, asked, seconds=0.3)
    assert time.monotonic() - begun < 60
    assert [answer.outcome for answer in answers] == [ANSWERED, ENDED, OPEN]
    assert answers[1].detail == EXIT_TIME
    assert guest.ask(kvm, machine, EL0, asked[:1])[0].x[0] == 2


def test_a_guest_that_turns_itself_off(kvm: Kvm, machine: Machine) -> None:
    """KVM has paused the vCPU then: what comes behind it stays open, in the time that it had."""
    asked = [Question((HVC, RET), (SYSTEM_OFF,)), Question((ADD, RET), (1, 1)), Question((ADD, RET), (1, 1))]
    answers = guest.ask(kvm, machine, EL1, asked, seconds=0.3)
    assert (answers[0].outcome, answers[0].detail) == (ENDED, EXIT_SYSTEM_EVENT)
    assert answers[2].outcome in (OPEN, ANSWERED)


def test_sees_what_other_guests_see(kvm: Kvm, found: Facts, machine: Machine) -> None:
    """ID registers, PMCR_EL0 and CTR_EL0, against MRS by a guest that fcntl made; calls against its HVC."""
    registers = [*AA64, MIDR, CTR]
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(found.probe.vcpu_features & GIVEN)
        vm.vgic()
        vm.load(reads(*registers))
        oracle = vcpu.run()
    asked = [question for register in registers for question in questions(word(register))]
    answers = guest.ask(kvm, machine, EL1, asked)
    assert [answer.x[0] for answer in answers] == oracle
    for register in (PSCI_VERSION, *(set(found.bitmaps) - {BITMAPS[3]})):
        seen = view(word(register), guest.ask(kvm, machine, EL1, questions(word(register))))
        assert seen == machine.get(word(register)), hex(register)
    if found.sve:
        seen = view(word(SVE_VLS), guest.ask(kvm, machine, EL1, questions(word(SVE_VLS))))
        assert seen == machine.get(word(SVE_VLS))


def test_sees_fewer_lengths(kvm: Kvm, found: Facts) -> None:
    if not found.sve:
        return
    features = found.probe.vcpu_features & GIVEN
    lengths = found.trials[SVE_VLS].value
    fewer = lengths & -lengths
    with Machine(kvm, features, found.probe.vgic_models, {word(SVE_VLS): fewer}) as machine:
        assert view(word(SVE_VLS), guest.ask(kvm, machine, EL1, questions(word(SVE_VLS)))) == fewer
    with pytest.raises(NotApplied) as caught:
        Machine(kvm, features, found.probe.vgic_models, {word(SVE_VLS): 1 << 40})
    assert caught.value.fields["word"] == word(SVE_VLS)


def test_counters_at_both_levels(kvm: Kvm, found: Facts, machine: Machine) -> None:
    if PMCR not in found.trials:
        return
    for mode in MODES:
        seen = view(word(PMCR), guest.ask(kvm, machine, mode, questions(word(PMCR), mode)))
        assert seen is not None and seen >> 11 & 0x1F == found.trials[PMCR].value >> 11 & 0x1F


def test_features_that_kvm_does_not_take(kvm: Kvm, found: Facts) -> None:
    with pytest.raises(NotApplied) as caught:
        Machine(kvm, PSCI_0_2 | 1 << 31, found.probe.vgic_models, {})
    assert caught.value.fields["word"] == "arm:vcpu-features"


def test_memory_in_its_way(kvm: Kvm, found: Facts) -> None:
    """A VM that has memory where the guest's is to be: an error, and the VM keeps its own."""
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        vm.load(reads(MIDR))
        asked = ffi.new("struct kvmneg_questions *", {"count": 1, "entries": 1})
        asked.entries[0].answers = 1
        asked.entries[0].code[0] = RET
        answers = ffi.new("struct kvmneg_questions **")
        with pytest.raises(KvmFault) as caught:
            kvm._call(lib.kvmneg_ask_guest, kvm.fd, vm.fd, vcpu.fd, EL1, 1000, asked, answers)
        assert caught.value.fields["ioctl"] == "KVM_SET_USER_MEMORY_REGION"
        assert vcpu.run() == [found.trials[MIDR].value]


def test_without_a_vgic_or_pmu(kvm: Kvm, found: Facts) -> None:
    """A vCPU with PSCI alone runs; what it has no register for is refused to be set and is not seen."""
    with Machine(kvm, PSCI_0_2, 0, {}) as machine:
        assert machine.set_revision(1) is None
        assert guest.ask(kvm, machine, EL1, [Question((ADD, RET), (1, 1))])[0].x[0] == 2
        assert not machine.set(word(PSCI_VERSION), 0x20000)


def test_revisions(kvm: Kvm, found: Facts) -> None:
    """One that KVM takes and drops is told as what it is then, one that it refuses as none."""
    if not found.probe.vgic_models:
        pytest.skip("another kind of KVM: it has no vGIC")
    for revision in range(16):
        with Machine(kvm, PSCI_0_2, found.probe.vgic_models, {}) as machine:
            told = machine.set_revision(revision)
        if found.probe.vgic_revisions >> revision & 1:
            assert told == revision
        elif found.probe.vgic_revisions_dropped >> revision & 1:
            assert told == found.probe.vgic_iidr >> 12 & 0xF != revision
        else:
            assert told is None


def test_instructions_that_came_through() -> None:
    def answer(outcome: int, exception: int = 0) -> views_arm64.Answer:
        return views_arm64.Answer(outcome, exception << 26 | 1 << 25, (0,) * 4)

    came = proof_arm64._came_through
    assert came(answer(ANSWERED)) is True
    assert came(answer(FAULTED)) is False
    assert came(answer(FAULTED, 0x25)) is True  # an alignment fault: it is there
    assert came(answer(FAULTED, 0x19)) is None  # SVE is there and off
    assert came(answer(OPEN)) is None and came(answer(ENDED)) is None
