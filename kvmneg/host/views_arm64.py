# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an arm64 guest is asked about each word, what its answers say of it, and the grade of a word. Pure.

    questions(word)                            what is asked, at EL1 and at EL0
    view(word, answers)                        the word as those answers have it; None where there is no telling
    grade_of(word, compared, value, shown, seen)   what came of a word that KVM took

An ID register is read by MRS, a cache's size through CSSELR_EL1, vector lengths are tried one by one, and what KVM's
firmware registers stand for is called (SMCCC, Arm DEN 0028; Linux Documentation/virt/kvm/arm/hypercalls.rst). At EL0
only a few registers can be read: of the others the answer is an exception, and no view.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.host.enforcement import LEAKS, REPLACED, UNTESTED
from kvmneg.host.sight import HONOURED
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

OPEN, ANSWERED, FAULTED, ENDED = range(4)  # KVMNEG_OUTCOME_*
EXIT_TIME = 0x7FFF0001  # KVMNEG_EXIT_TIME
EL1, EL0 = MODES = (0, 1)  # KVMNEG_MODE_*
MODE_NAMES = ("el1", "el0")
CODE_WORDS = 12  # KVMNEG_QUESTION_CODE

UNDEFINED = 0x00  # exception class (ESR_EL1.EC) of an instruction that there is not
_AVAILABLE = 2  # of workaround 2

REVISION = "arm:vgic-revision"
LENGTHS = "arm64:0x606000000015ffff"
DISTRIBUTOR = 0x0800_0000  # of kvmneg_create_machine
_SYSREG, _DEMUX, _FIRMWARE, _SVE, _BITMAP = 0x13, 0x11, 0x14, 0x15, 0x16  # coprocessors of register ids
_PSCI = 0x6030_0000_0014_0000
_GEOMETRY = 0x0FFF_FFF8  # CCSIDR_EL1: associativity and sets

# Instructions (Arm ARM, C6.2); each piece of code ends in RET.
RET, HVC, ISB = 0xD65F03C0, 0xD4000002, 0xD5033FDF
MSR_CSSELR, MRS_CCSIDR = 0xD51A0000, 0xD5390000  # X0
MSR_ZCR, RDVL = 0xD5181200, 0x04BF5020  # X0; X0, #1
LDR_W = 0xB9400000  # W0, [X0]

# Functions that a guest calls
PSCI_VERSION, ARCH_FEATURES = 0x84000000, 0x80000001
WORKAROUNDS = {1: 0x80008000, 2: 0x80007FFF, 3: 0x80003FFF}  # by the number of their firmware register
TRNG_VERSION, PV_TIME_FEATURES = 0x84000050, 0xC5000020
VENDOR_UID, VENDOR_FEATURES, VENDOR_PTP = 0x8600FF01, 0x86000000, 0x86000001


class Question(NamedTuple):
    """Some instructions, with what is in x0 to x3 at their beginning; how many of them are wanted at their end."""

    code: tuple[int, ...]
    arguments: tuple[int, ...] = ()
    answers: int = 1


class Answer(NamedTuple):
    """What came of it: OPEN, ANSWERED, FAULTED (detail: ESR_EL1) or ENDED (detail: KVM_EXIT_* or EXIT_TIME)."""

    outcome: int
    detail: int
    x: tuple[int, ...]  # x0 to x3

    @property
    def exception(self) -> int | None:
        """The class of the exception that it raised (ESR_EL1.EC)."""
        return self.detail >> 26 & 0x3F if self.outcome == FAULTED else None


def coprocessor(register: int) -> int:
    """KVM_REG_ARM_COPROC_MASK of a register's id."""
    return register >> 16 & 0xFFF


def register_of(word: str) -> int:
    """The id of an arm64: word."""
    return int(word.partition(":")[2], 16)


def mrs(register: int) -> int:
    """MRS X0, the system register of that id (api.rst 4.68)."""
    return 0xD5300000 | (register >> 14 & 1) << 19 | (register & 0x3FFF) << 5


def questions(word: str, mode: int = EL1) -> list[Question]:
    """What a guest is asked; nothing for words that no guest sees."""
    if word == REVISION:
        return [Question((LDR_W, RET), (DISTRIBUTOR + 8,))]  # GICD_IIDR
    if not word.startswith("arm64:"):
        return []
    register = register_of(word)
    if coprocessor(register) == _SYSREG:
        return [Question((mrs(register), RET))]
    return _kernels_questions(register) if mode == EL1 else []


def _kernels_questions(register: int) -> list[Question]:
    """What only EL1 can be asked: it selects a cache or a vector length first, or calls its hypervisor."""
    kind = coprocessor(register)
    if kind == _SVE:
        return [Question((MSR_ZCR, ISB, RDVL, RET), (length,)) for length in range(16)]
    if kind == _DEMUX:
        return [Question((MSR_CSSELR, ISB, MRS_CCSIDR, RET), (register & 0xFF,))]
    if kind == _FIRMWARE:
        function = WORKAROUNDS.get(register - _PSCI)
        calls: tuple[tuple[int, ...], ...] = ((ARCH_FEATURES, function),) if function else ()
        if register == _PSCI:
            calls = ((PSCI_VERSION,),)
    else:
        calls = _CALLS.get(register & 0xFFFF, ()) if kind == _BITMAP else ()
    return [Question((HVC, RET), call, 4) for call in calls]


_CALLS: dict[int, tuple[tuple[int, ...], ...]] = {
    0: ((TRNG_VERSION,),),
    1: ((ARCH_FEATURES, PV_TIME_FEATURES),),
    2: ((VENDOR_UID,), (VENDOR_FEATURES,), (VENDOR_PTP,)),
    3: ((VENDOR_FEATURES,),),
}


def view(word: str, answers: Sequence[Answer]) -> int | None:
    """A word as a guest saw it, by its answers to questions(word); None where any of them did not come."""
    if not answers or any(answer.outcome != ANSWERED for answer in answers):
        return None
    first = answers[0].x[0]
    if word == REVISION:
        return first >> 12 & 0xF
    register = register_of(word)
    kind = coprocessor(register)
    if kind == _SVE:
        return sum({1 << answer.x[0] // 16 - 1 for answer in answers})
    if kind == _FIRMWARE and register != _PSCI:
        return _workaround(register - _PSCI, first)
    if kind == _BITMAP:
        return _bitmap(register & 0xFFFF, answers)
    return first & 0xFFFF_FFFF if kind == _DEMUX else first


def _workaround(number: int, answer: int) -> int | None:
    """The firmware register's value for what a guest is told: -1 there is none, 0 call it, 1 or -2 there is no need."""
    told = answer & 0xFFFF_FFFF
    if number == 2:
        return {0xFFFF_FFFF: 0, 0: _AVAILABLE, 1: 3, 0xFFFF_FFFE: 3}.get(told)
    return {0xFFFF_FFFF: 0, 0: 1, 1: 2}.get(told)


def _bitmap(number: int, answers: Sequence[Answer]) -> int | None:
    """The hypercall bitmap that gives these answers."""
    there = [answer.x[0] & 0xFFFF_FFFF != 0xFFFF_FFFF for answer in answers]
    if number == 2:
        uid, features, ptp = there
        listed = features and bool(answers[1].x[0] & 0b10)
        return (uid or features) | (listed or ptp) << 1
    if number == 3:  # the third register of FEATURES: functions 64 and 65
        return answers[0].x[2] & 0b11 if there[0] else None
    return int(there[0])


def as_kept(word: str, shown: int | None, seen: int | None) -> int | None:
    """What a guest saw; where that is KVM's way of showing what it keeps, what it keeps.

    Of a data cache KVM has one set and one way for guests until Linux 6.2, where it intercepts them (CPUs whose caches
    differ), so that nobody cleans by set and way (access_ccsidr in arch/arm64/kvm/sys_regs.c); of workaround 2 guests
    are not told whether it is unknown or available.
    """
    if shown is None or seen is None or not word.startswith("arm64:"):
        return seen
    register = register_of(word)
    one_set = coprocessor(register) == _DEMUX and not register & 1 and seen == shown & ~_GEOMETRY
    unknown = register == _PSCI + 2 and seen == _AVAILABLE and shown & 0xF in (1, _AVAILABLE)
    return shown if one_set or unknown else seen


def compared(word: str) -> int:
    """The bits of a word that are compared: those that its rules judge; all of a word that nobody catalogued."""
    rule = catalogs.load(words.ARM64).words.get(word)
    return (1 << words.width(word)) - 1 if rule is None else rule.judged


def grade_of(word: str, bits: int, value: int, shown: int | None, seen: Sequence[int | None]) -> str:
    """What came of a word that KVM took, by what it reads back and what guests saw; `bits` are compared.

    A leak is more than was set and more than is read back: KVM does not know, or does not say.
    """
    found = [one for one in seen if one is not None]
    told = [value] if shown is None else [value, shown]
    if any(all(_more(word, bits, one, other) for other in told) for one in found):
        return LEAKS
    if any((one ^ value) & bits for one in (*found, value if shown is None else shown)):
        return REPLACED
    if value & bits and not found:
        return UNTESTED  # a register that is zero may as well not be there
    return HONOURED


def _more(word: str, bits: int, seen: int, told: int) -> bool:
    """Whether a guest that was told the one is told more by the other, in any field of these bits."""
    seen = seen & bits | told & ~bits
    rule = catalogs.load(words.ARM64).words.get(word)
    if rule is None:
        return bool(seen & ~told)
    if seen & ~told & rule.and_mask:
        return True
    return any(
        not field.fits(seen >> field.shift & field.mask, told >> field.shift & field.mask)
        for field in rule.fields
    )
