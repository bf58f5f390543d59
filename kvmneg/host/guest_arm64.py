# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proof guests on arm64: a VM as a VMM makes it, and what a guest on it sees (kvmneg_ask_guest of csrc/kvmneg.h).

A guest does one thing after the other, as a kernel or as a user's program, and leaves; it is ended after
limits.GUEST_SECONDS if it does not.
"""

from __future__ import annotations

from struct import Struct

from kvmneg import limits
from kvmneg._libkvmneg import ffi, lib
from kvmneg.errors import KvmFault, NotApplied
from kvmneg.host import apply_arm64
from kvmneg.host.apply import call
from kvmneg.host.apply_arm64 import Register
from kvmneg.host.views_arm64 import CODE_WORDS, MODE_NAMES, MODES, Answer, register_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from kvmneg.host.kvm import Kvm
    from kvmneg.host.views_arm64 import Question

__all__ = ("MODES", "MODE_NAMES", "QUESTIONS", "Machine", "ask")

_QUESTION = Struct(f"=4Q44xI{CODE_WORDS}I")  # struct kvmneg_question: argument, …, answers, code
_ANSWER = Struct(f"=32x4QQI{4 + 4 * CODE_WORDS}x")  # the same: answer, detail, outcome
_REFUSED = (1, 2, 6, 16, 19, 22, 25, 95)  # EPERM, ENOENT, ENXIO, EBUSY, ENODEV, EINVAL, ENOTTY, EOPNOTSUPP
QUESTIONS = lib.KVMNEG_QUESTIONS_MAX


class Machine:
    """A VM with a vCPU that can run. A context manager.

    `registers` are given to it before the vCPU is complete, as far as KVM wants that (vector lengths, identification).
    Raises NotApplied, with the word that KVM does not take, and KvmFault.
    """

    __slots__ = ("_kvm", "_machine", "features")

    def __init__(self, kvm: Kvm, features: int, models: int, registers: Mapping[str, int]) -> None:
        rows = [Register(register_of(word), value, (1 << 64) - 1) for word, value in registers.items()]
        self._kvm = kvm
        self._machine = ffi.new("struct kvmneg_machine *", (-1, -1, -1))
        self.features = features
        array = apply_arm64._array(rows)
        call(lib.kvmneg_create_machine, kvm.fd, features, models, *array, self._machine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._machine[0] = lib.kvmneg_machine_close(self._machine[0])

    @property
    def vm(self) -> int:
        return int(self._machine.vm_fd)

    @property
    def vcpu(self) -> int:
        return int(self._machine.vcpu_fd)

    def get(self, word: str) -> int | None:
        """What KVM reads back; None where it has no such register."""
        value = ffi.new("uint64_t *")
        try:
            self._kvm._call(lib.kvmneg_get_register, self.vcpu, register_of(word), value)
        except KvmFault as error:
            if error.fields["errno"] in _REFUSED:
                return None
            raise
        return int(value[0])

    def set(self, word: str, value: int) -> bool:
        """Whether KVM takes the value, which is not to say that it keeps it."""
        try:
            self._kvm._call(lib.kvmneg_set_register, self.vcpu, register_of(word), value)
        except KvmFault as error:
            if error.fields["errno"] in _REFUSED:
                return False
            raise
        return True

    def set_revision(self, revision: int) -> int | None:
        """GICD_IIDR.Revision; what it is then, None where there is no vGIC or KVM does not take it."""
        if self._machine.vgic_fd < 0:
            return None
        try:
            apply_arm64.apply_vgic(self._machine.vgic_fd, revision)
        except NotApplied as error:
            return int(error.fields["got"]) if error.fields["why"] == "dropped" else None
        return revision


def ask(
    kvm: Kvm,
    machine: Machine,
    mode: int,
    questions: Sequence[Question],
    *,
    seconds: float | None = None,
) -> list[Answer]:
    """What a guest answers, one answer for each question. Raises KvmFault.

    From then on KVM keeps the machine's ID registers as they are.
    """
    found: list[Answer] = []
    seconds = limits.GUEST_SECONDS if seconds is None else seconds
    for first in range(0, len(questions), QUESTIONS):
        found += _ask(kvm, machine, mode, questions[first : first + QUESTIONS], seconds)
    return found


def _ask(
    kvm: Kvm, machine: Machine, mode: int, questions: Sequence[Question], seconds: float
) -> list[Answer]:
    asked = ffi.new("struct kvmneg_questions *", {"count": len(questions), "entries": len(questions)})
    rows = b"".join(map(_packed, questions))
    ffi.buffer(asked.entries, len(rows))[:] = rows
    found = ffi.new("struct kvmneg_questions **")
    milliseconds = max(1, int(seconds * 1000))
    kvm._call(lib.kvmneg_ask_guest, kvm.fd, machine.vm, machine.vcpu, mode, milliseconds, asked, found)
    try:
        answers = _ANSWER.iter_unpack(ffi.buffer(found[0].entries, len(rows)))
        return [Answer(outcome, detail, tuple(x)) for *x, detail, outcome in answers]
    finally:
        lib.kvmneg_free(found[0])


def _packed(question: Question) -> bytes:
    arguments = (*question.arguments, 0, 0, 0, 0)[:4]
    code = (*question.code, *(0,) * CODE_WORDS)[:CODE_WORDS]
    return _QUESTION.pack(*arguments, question.answers, *code)
