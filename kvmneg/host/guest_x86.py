# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proof guests on x86: what a guest on a scratch vCPU sees (kvmneg_ask_guest of csrc/kvmneg.h).

The part of kvmneg.host.kvm that a measurement has no use for. A guest does one thing after the other, in real mode, as
a kernel or as a user's program, and leaves; it is ended after limits.GUEST_SECONDS if it does not.
"""

from __future__ import annotations

from itertools import starmap
from struct import Struct

from kvmneg import limits
from kvmneg._libkvmneg import ffi, lib
from kvmneg.errors import KvmFault
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kvmneg.host.kvm import Kvm, Scratch

_EINVAL = 22
_QUESTION = Struct("=3I24x28s")  # struct kvmneg_question: kind, index, subleaf, …, code
_ANSWER = Struct("=12x6I28x")  # the same: outcome, detail, answer

REAL, CPL0, CPL3 = MODES = (lib.KVMNEG_MODE_REAL, lib.KVMNEG_MODE_CPL0, lib.KVMNEG_MODE_CPL3)
MODE_NAMES = ("real", "cpl0", "cpl3")  # of MODES, which count from 0
ASK_CPUID, ASK_MSR, ASK_XCR, ASK_RUN = (
    lib.KVMNEG_ASK_CPUID,
    lib.KVMNEG_ASK_MSR,
    lib.KVMNEG_ASK_XCR,
    lib.KVMNEG_ASK_RUN,
)
OPEN, ANSWERED, FAULTED, ENDED = (
    lib.KVMNEG_OUTCOME_OPEN,
    lib.KVMNEG_OUTCOME_ANSWERED,
    lib.KVMNEG_OUTCOME_FAULTED,
    lib.KVMNEG_OUTCOME_ENDED,
)
EXIT_TIME = lib.KVMNEG_EXIT_TIME
INVALID_OPCODE, PROTECTION = 6, 13  # vectors of #UD and #GP
QUESTIONS = lib.KVMNEG_QUESTIONS_MAX
CODE_BYTES = 28


class Question(NamedTuple):
    """One thing that the guest does: kind is one of ASK_*, number the leaf, MSR or XCR, code ends with RET."""

    kind: int
    number: int = 0
    subleaf: int = 0
    code: bytes = b""


class Answer(NamedTuple):
    """What came of it: OPEN, ANSWERED, FAULTED (detail: vector) or ENDED (detail: KVM_EXIT_* or EXIT_TIME)."""

    outcome: int
    detail: int
    eax: int
    ebx: int
    ecx: int
    edx: int

    @property
    def wide(self) -> int:
        """The 64 bits of an MSR or XCR."""
        return self.edx << 32 | self.eax


def ask(
    kvm: Kvm,
    scratch: Scratch,
    mode: int,
    questions: Sequence[Question],
    *,
    xcr0: int = 0,
    seconds: float | None = None,
) -> list[Answer]:
    """What a guest answers, one answer for each question; `xcr0` is what it is to have there, 0 for what it has.

    All are open where KVM lets no guest be in that mode: long mode of a guest that is not shown it, from Linux 7 on.
    From then on KVM keeps the vCPU's CPUID as it is (Linux 5.16 and later). Raises KvmFault.
    """
    given = {"count": len(questions), "xcr0": xcr0, "entries": len(questions)}
    asked = ffi.new("struct kvmneg_questions *", given)
    rows = b"".join(starmap(_QUESTION.pack, questions))
    ffi.buffer(asked.entries, len(rows))[:] = rows
    found = ffi.new("struct kvmneg_questions **")
    milliseconds = max(1, int((limits.GUEST_SECONDS if seconds is None else seconds) * 1000))
    try:
        kvm._call(lib.kvmneg_ask_guest, kvm.fd, scratch.vm, scratch.vcpu, mode, milliseconds, asked, found)
    except KvmFault as error:
        if error.fields["ioctl"] == "KVM_SET_SREGS" and error.fields["errno"] == _EINVAL:
            return [Answer(OPEN, 0, 0, 0, 0, 0)] * len(questions)
        raise
    try:
        return list(starmap(Answer, _ANSWER.iter_unpack(ffi.buffer(found[0].entries, len(rows)))))
    finally:
        lib.kvmneg_free(found[0])


def enforce_pv_cpuid(kvm: Kvm, scratch: Scratch) -> bool:
    """Have KVM refuse its own MSRs of features that CPUID hides; whether this KVM can (Linux 5.10 and later)."""
    return _enforce(kvm, lib.kvmneg_enforce_pv_cpuid, scratch)


def enforce_hyperv_cpuid(kvm: Kvm, scratch: Scratch) -> bool:
    """The same of Hyper-V's MSRs (Linux 5.14 and later)."""
    return _enforce(kvm, lib.kvmneg_enforce_hyperv_cpuid, scratch)


def _enforce(kvm: Kvm, function: Any, scratch: Scratch) -> bool:
    try:
        kvm._call(function, scratch.vcpu)
    except KvmFault as error:
        if error.fields["errno"] == _EINVAL:
            return False
        raise
    return True
