# SPDX-License-Identifier: LGPL-2.1-or-later
"""arm64: which registers a VMM carries with a guest, and what becomes of those that it does not. Pure.

Values can be pinned before a guest starts; which registers a kernel lists cannot. A newer kernel lists some that an
older one does not know, and setting an unknown one fails. So a contract says of every register that its host lists:

    carry               every member lists it: it is saved and restored
    drop-if N           left out while it holds N, else the move is refused
    drop-if-timer-off   left out while CNTP_CTL_EL0.ENABLE is 0, else the move is refused
    refuse              no rule: a move to a host that does not know it is refused

Only a VMM that reads its contract can leave a register out. QEMU sends all it has, and fails on one that is unknown.
"""

from __future__ import annotations

from kvmneg.features import words
from kvmneg.features.difference import Blocker
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.vmm import Through

CARRY, DROP_IF, DROP_IF_TIMER_OFF, REFUSE = "carry", "drop-if", "drop-if-timer-off", "refuse"
RULES = (CARRY, DROP_IF, DROP_IF_TIMER_OFF, REFUSE)  # in the binary form: the place in here, from 1

STD, STD_HYP, VENDOR_HYP, VENDOR_HYP_2 = range(0x6030_0000_0016_0000, 0x6030_0000_0016_0004)
_PMMIR = 0x6030_0000_0013_C4F6  # PMMIR_EL1
# OSLSR_EL1: the OS lock. Kernels that do not list it (before 5.18) show every guest 8: there is a lock, and it is open.
_OSLSR, _UNLOCKED = 0x6030_0000_0013_808C, 8
# TCR2_EL1, PIRE0_EL1, PIR_EL1: before 6.13 listed without the feature too. A guest that is not given it cannot write
# them, so they hold what KVM resets them to (reset_val, reset_unknown of arch/arm64/kvm/sys_regs.c).
_UNWRITTEN = 0x1DE7_EC7E_DBAD_C0DE
_STAGE1 = {
    0x6030_0000_0013_C103: ("aa64mmfr3-tcrx", 0),
    0x6030_0000_0013_C512: ("aa64mmfr3-s1pie", _UNWRITTEN),
    0x6030_0000_0013_C513: ("aa64mmfr3-s1pie", _UNWRITTEN),
}
# Of the calls of a bitmap that a kernel does not list (before 5.19), those that it answers to all guests, since when:
# random numbers and the vendor's calls since 5.12, stolen time since 5.5. There no bit stays clear.
_ANSWERED = {STD: (5, 12), STD_HYP: (5, 5), VENDOR_HYP: (5, 12)}
_TIMER = (
    0x6030_0000_0013_DF01,
    0x6030_0000_0013_DF11,
    0x6030_0000_0013_DF12,
)  # CNTPCT, CNTP_CTL, CNTP_CVAL of EL0
_CCSIDR, _CCSIDRS = 0x6020_0000_0011_0000, 14


class Entry(NamedTuple):
    """One register: its KVM id, one of RULES, and the value of drop-if (0 for the others)."""

    register: int
    rule: str
    value: int

    def text(self) -> str:
        """As a contract's JSON has it."""
        return f"{self.rule} {self.value:#x}" if self.rule == DROP_IF else self.rule

    @classmethod
    def parse(cls, word: str, text: object) -> Entry:
        """Back from JSON. Raises ValueError on anything that `text` does not write."""
        register = words.parse_register(word.removeprefix("arm64:"))
        rule, _, number = text.partition(" ") if isinstance(text, str) else ("", "", "")
        found = cls(register, rule, words.parse_register(number) if number else 0)
        if rule not in RULES or found.text() != text or found.word() != word:
            raise ValueError(f"{words.brief(word)}: {words.brief(text)} is no rule for a register")
        return found

    def word(self) -> str:
        return words.register_word(self.register)


def entries(registers: Sequence[int], carried: Collection[int], granted: FeatureSet) -> tuple[Entry, ...]:
    """The rule of each register that a host lists, in the order of ids; `carried` are those that every member lists."""
    return tuple(
        Entry(register, CARRY, 0) if register in carried else drop_rule(register, granted)
        for register in registers
    )


def drop_rule(register: int, granted: FeatureSet | None = None) -> Entry:
    """What becomes of a register that is not carried, under a contract that grants this set."""
    if register in (STD, VENDOR_HYP, VENDOR_HYP_2, _PMMIR):
        # no call is offered, no event can be counted: nothing was ever shown
        return Entry(register, DROP_IF, 0)
    base = _STAGE1.get(register)
    if base is not None and granted is not None and not granted.field(base[0]):
        return Entry(register, DROP_IF, base[1])
    if register == _OSLSR:
        return Entry(register, DROP_IF, _UNLOCKED)
    if register in _TIMER:
        return Entry(register, DROP_IF_TIMER_OFF, 0)
    if 0 <= register - _CCSIDR < _CCSIDRS and granted is not None:
        # what KVM makes up for caches that are not there; the contract pins it
        return Entry(register, DROP_IF, granted.value(words.register_word(register)))
    return Entry(register, REFUSE, 0)


def common(reports: Iterable[Report]) -> tuple[int, ...]:
    """The registers that every member lists, in order; none where one of them was not asked."""
    lists = [frozenset(report.registers) for report in reports]
    return tuple(sorted(frozenset.intersection(*lists))) if lists and all(lists) else ()


def unknown(rules: Iterable[Entry], target: Report, vmm: Through | None = None) -> list[Blocker]:
    """Why a guest's registers cannot go to a host that lists fewer: one blocker a register.

    Without a VMM (kvmneg.policy.vmm) it is one that follows the contract. A target without a list tells nothing.
    """
    if not target.registers:
        return []
    lost: frozenset[int] | None = None
    if vmm is not None:
        from kvmneg.policy import vmm_arm64  # only where a VMM is named

        lost = vmm_arm64.leaves_out(vmm)
    listed, where, found = frozenset(target.registers), f"host {target.host}", []
    for rule in rules:
        if rule.register in listed:
            continue
        if vmm is not None and lost is not None and rule.register not in lost:
            because = f"{target.host} does not know this register, and {vmm.title} cannot leave it out"
            found.append(Blocker(rule.word(), rule.word(), None, "the guest", where, "vmm", because))
            continue
        because = _obstacle(rule, target)
        if because:
            found.append(Blocker(rule.word(), rule.word(), None, "the guest", where, "kvm", because))
    return found


def unlisted(carried: Iterable[int], host: Report) -> tuple[Blocker, ...]:
    """The registers that a fence says every member lists and this host does not; none where its list is unknown."""
    lost = sorted(set(carried) - set(host.registers)) if host.registers else ()
    where, because = f"host {host.host}", f"{host.host} does not know this register"
    addresses = map(words.register_word, lost)
    return tuple(Blocker(word, word, None, "the fence", where, "kvm", because) for word in addresses)


def _obstacle(rule: Entry, target: Report) -> str:
    """Why a register that a target does not list cannot be left out on the way there, "" where it can."""
    if rule.register in _ANSWERED:
        from kvmneg.policy.kernels import numbers  # with tables, which most answers do without

        release = numbers(str(target.combo.get("kernel") or ""))
        if not release or release >= _ANSWERED[rule.register]:
            does = "answers" if release else "may answer"
            return f"{target.host} does not know this register, and {does} the calls behind it to every guest"
    if rule.rule in (CARRY, REFUSE):
        return f"{target.host} does not know this register, and nothing says that it may be dropped"
    return ""
