# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests see on this x86 KVM of what they are to see: proof guests on a scratch VM for each table.

    sights(kvm, table, base)          {word: Sight}: promised, set, read back, seen in each mode, and the grade
    instructions(kvm, offered, hidden, features)   {feature: "trapped", "hidden only" or "untested"}

A word is honoured where KVM reads it back and every guest that could ask saw it as it was set; bits that KVM owns
(OSXSAVE) or that are the VMM's (topology) are not compared. A guest asks in real mode and in long mode as a kernel and
as a user's program, for a KVM that does not intercept CPUID in one of them shows the CPU's own there.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.host import enforcement, hyperv_x86
from kvmneg.host import guest_x86 as guest
from kvmneg.host.enforcement import LEAKS, REFUSED, REPLACED, UNTESTED
from kvmneg.host.guest_x86 import Question
from kvmneg.host.sight import HONOURED, Missed, Sight, mark
from kvmneg.host.tables import MsrShown
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvmneg.host.enforcement import Registers
    from kvmneg.host.guest_x86 import Answer
    from kvmneg.host.kvm import Kvm, Scratch
    from kvmneg.host.tables import CpuidEntry

_XCR0 = "cpuid:0xd.0.eax"
_XTILE = 3 << 17  # AMX: permission to have it is the process's to ask for
_EVERY_32, _EVERY_64 = (1 << 32) - 1, (1 << 64) - 1


class Table(NamedTuple):
    """What a guest is to see. `bound`: word → the bits that were promised; None: by the words' rules."""

    entries: list[CpuidEntry]
    msrs: Mapping[int, int]
    bound: Mapping[str, int] | None = None


def sights(kvm: Kvm, table: Table, base: Sequence[CpuidEntry] = ()) -> dict[str, Sight]:
    """Every CPUID register and MSR of a table as guests see it. `base` is a table KVM takes. Raises KvmFault."""
    named = hyperv_x86.named(table.entries)
    with kvm.scratch() as scratch:
        trial = enforcement.Trial(kvm, scratch, named)
        taken = trial.cpuid(table.entries, list(base))
        read_back = kvm.try_cpuid(scratch, taken) or []
        msrs = _given(kvm, scratch, table.msrs)
        asked = [*taken, *read_back]  # KVM may have added a leaf
        missed = Missed()
        seen = [
            _seen(kvm, scratch, mode, asked, named, xcr0=xcr0_of(taken), msrs=table.msrs, missed=missed)
            for mode in guest.MODES
        ]
    refused = {word for word, grade in trial.found.items() if grade == REFUSED}
    refused.update(words.msr_word(index) for index, found in msrs.items() if found.unset)
    shown: dict[str, int | None] = {**dict.fromkeys(_by_word(taken, named), 0), **_by_word(read_back, named)}
    shown.update(
        (words.msr_word(index), None if found.unread else found.value) for index, found in msrs.items()
    )
    wanted = {**dict.fromkeys(shown, 0), **_by_word(table.entries, named)}
    wanted.update((words.msr_word(index), value) for index, value in table.msrs.items())
    found = {
        word: _sight(table, word, value, word in refused, [shown.get(word), *(one.get(word) for one in seen)])
        for word, value in wanted.items()
    }
    return {word: missed.judge(word, sight) for word, sight in found.items()}


def _given(kvm: Kvm, scratch: Scratch, values: Mapping[int, int]) -> dict[int, MsrShown]:
    """What the vCPU has of the MSRs; MCG_CAP has an ioctl of its own (KVM_X86_SETUP_MCE)."""
    mce = words.parse_msr(enforcement.MCG_CAP)
    found = kvm.try_msrs(scratch, {index: value for index, value in values.items() if index != mce})
    if mce in values:
        shown = kvm.try_mce(scratch, values[mce])
        found[mce] = MsrShown(shown or 0, unread=False, unset=shown is None)
    return found


def _by_word(entries: Iterable[CpuidEntry], named: Registers) -> dict[str, int]:
    return {
        word: value
        for entry in entries
        for (word, _, _), value in zip(named[entry[:2]], entry[3:], strict=True)
    }


def _sight(table: Table, word: str, value: int, refused: bool, views: Sequence[int | None]) -> Sight:
    """`views`: what KVM reads back, then what guests saw by mode."""
    if table.bound is None:
        compared = enforcement.register(word)[1]
    else:
        compared = table.bound.get(word, 0) & ~enforcement.KVMS_OWN.get(word, 0)
    shown, *seen = views
    grade = REFUSED if refused and compared else grade_of(word, compared, value, shown, seen)
    return Sight(compared, value, shown, tuple(seen), grade)


def grade_of(word: str, compared: int, value: int, shown: int | None, seen: Sequence[int | None]) -> str:
    """What came of a word that KVM took, by what it reads back and what guests saw.

    A leak is a bit of a feature that neither was set nor is read back: KVM does not know, or does not say.
    """
    found = [one for one in seen if one is not None]
    rule = catalogs.load(words.X86_64).words.get(word)
    bits = compared if rule is None else compared & rule.bits_mask
    told = value if shown is None else value | shown
    if any(one & ~told & bits for one in found):
        return LEAKS
    if any((one ^ value) & compared for one in (*found, value if shown is None else shown)):
        return REPLACED
    if compared and not found and (shown is None or not word.startswith("msr:")):
        return UNTESTED  # no guest got as far; an MSR may be hidden from guests altogether
    return HONOURED


def xcr0_of(entries: Iterable[CpuidEntry]) -> int:
    """All that a guest with this table may have in XCR0, but for AMX; 0 without XSAVE."""
    found = next((entry for entry in entries if entry[:2] == (0xD, 0)), None)
    value = (found.edx << 32 | found.eax) & ~_XTILE if found else 0
    return value if value & 1 else 0


def _seen(
    kvm: Kvm,
    scratch: Scratch,
    mode: int,
    entries: Sequence[CpuidEntry],
    named: Registers,
    *,
    xcr0: int,
    msrs: Iterable[int],
    missed: Missed,
) -> dict[str, int]:
    """Word → what a guest in this mode saw; `missed` gets the words that it was to see and did not come to."""
    leaves = list(dict.fromkeys(entry[:2] for entry in entries))
    indices = [] if mode == guest.CPL3 else list(msrs)  # RDMSR is a kernel's
    questions = [Question(guest.ASK_CPUID, *leaf) for leaf in leaves]
    questions += [Question(guest.ASK_MSR, index) for index in indices]
    questions.append(Question(guest.ASK_XCR))
    answers = _ask(kvm, scratch, mode, questions, xcr0)
    asked = [
        *([word for word, _, _ in named[leaf]] for leaf in leaves),
        *([words.msr_word(index)] for index in indices),
    ]
    found: dict[str, int] = {}
    for row, answer in zip(asked, answers, strict=False):
        if answer.outcome == guest.ANSWERED:
            found.update(zip(row, answer[2:] if len(row) > 1 else (answer.wide,), strict=True))
    missed.add([*asked, [_XCR0]], [answer[:2] for answer in answers])
    if answers[-1].outcome == guest.ANSWERED and _XCR0 in found:
        found[_XCR0] |= answers[-1].eax & ~xcr0  # components it has and was not given
    return found


def _ask(kvm: Kvm, scratch: Scratch, mode: int, questions: Sequence[Question], xcr0: int) -> list[Answer]:
    """The answers to any number of questions: a guest has room for guest.QUESTIONS."""
    found: list[Answer] = []
    for first in range(0, len(questions), guest.QUESTIONS):
        part = questions[first : first + guest.QUESTIONS]
        found += guest.ask(kvm, scratch, mode, part, xcr0=xcr0)
    return found


def instructions(
    kvm: Kvm, offered: Sequence[CpuidEntry], hidden: Sequence[CpuidEntry], features: Sequence[str]
) -> dict[str, str]:
    """Whether the instructions of features that `hidden` lacks are trapped: #UD, where `offered` lets them pass.

    "untested" where a guest did not come to execute it in either. Raises KvmFault.
    """
    allowed, tried = _executed(kvm, offered, features), _executed(kvm, hidden, features)
    return {feature: mark(allowed[feature], tried[feature]) for feature in features}


def _executed(
    kvm: Kvm, entries: Sequence[CpuidEntry], features: Sequence[str]
) -> dict[str, list[bool | None]]:
    """Feature → what came of its instruction as a kernel and as a program: executed, #UD (False), or neither."""
    from kvmneg.host.instructions_x86 import CODE  # the other guests run none

    found: dict[str, list[bool | None]] = {feature: [] for feature in features}
    with kvm.scratch() as scratch:
        if kvm.try_cpuid(scratch, entries) is None:
            return {feature: [None, None] for feature in features}
        questions = [Question(guest.ASK_RUN, code=CODE[feature]) for feature in features]
        for mode in (guest.CPL0, guest.CPL3):
            answers = guest.ask(kvm, scratch, mode, questions, xcr0=xcr0_of(entries))
            for feature, answer in zip(features, answers, strict=True):
                found[feature].append(_came_through(answer))
    return found


def _came_through(answer: Answer) -> bool | None:
    if answer.outcome == guest.FAULTED:
        return answer.detail != guest.INVALID_OPCODE  # any other exception is the instruction's own
    return True if answer.outcome == guest.ANSWERED else None
