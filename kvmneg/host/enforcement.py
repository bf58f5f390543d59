# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether KVM keeps to what a guest is to see: each word of an offer set on a scratch vCPU and read back.

    grades(kvm, scratch, probe, offer)   {word: grade} of the words that are not honoured

A KVM that takes every table and shows guests something else (kvm-pvm does so with leaves 1, 7 and 0xD) looks
like any other until it is asked to hide something: what it forces on a guest is often just what it offers. So
three tables are tried: the offer, the offer without any of its bits, and nothing at all; and each feature MSR
with its value and without its bits. The vCPU never runs, and a vCPU that never ran takes another table each
time (KVM freezes CPUID at the first KVM_RUN, Linux 5.16 and later).

What this cannot see is what KVM shows to a running guest besides: only a guest sees that (kvmneg.host.proof_x86).
"""

from __future__ import annotations

from kvmneg.errors import KvmFault
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvmneg.host.kvm import Kvm, Scratch
    from kvmneg.host.tables import CpuidEntry, Probe

REPLACED = "replaced"  # KVM takes the word and shows another value
REFUSED = "refused"  # KVM does not take the word
LEAKS = (
    "leaks"  # KVM takes it and says so, and a running guest sees bits that it hides (kvmneg.host.proof_x86)
)
UNTESTED = "untested"  # nothing reads it back: capabilities, Hyper-V's leaves, devices
BY_SEVERITY = (UNTESTED, REPLACED, LEAKS, REFUSED)

_EVERY_32, _EVERY_64 = (1 << 32) - 1, (1 << 64) - 1
# What KVM sets by itself, whatever it was given (kvm_update_cpuid_runtime in arch/x86/kvm/cpuid.c).
KVMS_OWN = {
    "cpuid:0x1.0.ecx": 1 << 27 | 1 << 3,  # OSXSAVE follows CR4; MONITOR follows MSR 0x1a0 without its quirk
    "cpuid:0x1.0.edx": 1 << 9,  # APIC follows MSR 0x1b
    "cpuid:0x7.0.ecx": 1 << 4,  # OSPKE follows CR4
    "cpuid:0xd.0.ebx": _EVERY_32,  # size of the XSAVE area for what is in XCR0
    "cpuid:0xd.1.ebx": _EVERY_32,  # the compacted size
    "cpuid:0x12.1.ecx": 0b11,  # x87 and SSE of enclaves, where the leaf is there (Linux 5.13 to 6.3)
    "cpuid:0x40000001.0.eax": 1 << 7,  # PV_UNHALT goes where HLT does not exit
}


MCG_CAP = "msr:0x179"

# One word: its address, the bits that are compared, and those that stay when all features are taken away.
_Register = tuple[str, int, int]
_ZERO = (0, 0, 0, 0)


def register(word: str) -> _Register:
    """By its rules; words that nobody catalogued are compared in full, topology is the VMM's."""
    catalog = catalogs.load(words.X86_64)
    every = _EVERY_64 if word.startswith("msr:") else _EVERY_32
    rule = catalog.words.get(word)
    if rule is None:
        compared = 0 if catalog.leaf_rule(word) else every
        return word, compared, every & ~compared
    compared = every & ~(rule.known & ~rule.judged)
    for name, mask, _constant in catalog.policy:
        if name == word:
            compared |= mask
    compared &= ~KVMS_OWN.get(word, 0)
    kept = rule.known & ~rule.bits_mask
    if every == _EVERY_64:
        kept |= rule.or_mask  # KVM checks MSRs: 0x486 may not lose what CR0 must have
    return word, compared, kept


class Registers(dict[tuple[int, int], "tuple[_Register, ...]"]):
    """(leaf, subleaf) → its four registers, made when first seen."""

    def __missing__(self, key: tuple[int, int]) -> tuple[_Register, ...]:
        self[key] = row = tuple(register(words.cpuid_word(*key, name)) for name in words.REGISTERS)
        return row


registers = Registers()


def grades(kvm: Kvm, scratch: Scratch, probe: Probe, offer: Mapping[str, int]) -> dict[str, str]:
    """Every word of an x86 offer that is not honoured, with its grade; empty where KVM cannot be tried at all.

    `scratch` is used up: its vCPU keeps the last table tried. Never raises: a host is worth a report without
    grades.
    """
    trial = Trial(kvm, scratch)
    try:
        offered = trial.cpuid([offered_entry(entry, offer) for entry in probe.supported], [])
        trial.msrs(probe.feature_msrs)
        if probe.mce_cap is not None:
            trial.mce(offer[MCG_CAP])
        trial.cpuid([lowered_entry(entry) for entry in offered], offered)
        trial.cpuid([_with(entry, _ZERO) for entry in offered], offered)
    except KvmFault:
        return {}
    found = {word: trial.found[word] for word in sorted(trial.found, key=words.order)}
    for word in offer:
        if not word.startswith("cpuid:") and word not in trial.tried:
            found.setdefault(word, UNTESTED)
    return found


def worst(each: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The grades of a host with several kinds of CPU: a guest may run on any, so a word is kept to on all or not.

    Empty where one of the kinds could not be tried: what is not in a table of grades counts as honoured.
    """
    if not all(each):
        return {}
    found: dict[str, str] = {}
    for grades in each:
        found = joined(found, grades)
    return found


def joined(grades: Mapping[str, str], others: Mapping[str, str]) -> dict[str, str]:
    """Two tables of grades as one, in the order of addresses: the worse grade of a word that is in both."""
    found = dict(grades)
    for word, grade in others.items():
        if word not in found or BY_SEVERITY.index(grade) > BY_SEVERITY.index(found[word]):
            found[word] = grade
    return {word: found[word] for word in sorted(found, key=words.order)}


def _with(entry: CpuidEntry, values: Iterable[int]) -> CpuidEntry:
    """The same leaf and subleaf with other registers."""
    eax, ebx, ecx, edx = values
    return entry._replace(eax=eax, ebx=ebx, ecx=ecx, edx=edx)


def offered_entry(entry: CpuidEntry, offer: Mapping[str, int]) -> CpuidEntry:
    """A leaf as it is offered: with what VMMs give, without what a guest cannot be permitted."""
    if entry[3:] == _ZERO:  # half of all tables; saves making their addresses
        return entry
    rows = zip(registers[entry[:2]], entry[3:], strict=True)
    return _with(entry, (offer.get(word, value) for (word, _, _), value in rows))


def lowered_entry(entry: CpuidEntry, named: Registers = registers) -> CpuidEntry:
    """A leaf without its bits; numbers, and what is the VMM's, stay. `named`: how registers are addressed there."""
    if entry[3:] == _ZERO:
        return entry
    rows = zip(named[entry[:2]], entry[3:], strict=True)
    return _with(entry, (value & kept for (_, _, kept), value in rows))


class Trial:
    """What a scratch vCPU was given, and what was found: word → grade, and the MSR words that KVM was given."""

    __slots__ = ("_kvm", "_named", "_scratch", "found", "tried")

    def __init__(self, kvm: Kvm, scratch: Scratch, named: Registers = registers) -> None:
        self._kvm = kvm
        self._scratch = scratch
        self._named = named  # how registers are addressed
        self.found: dict[str, str] = {}
        self.tried: set[str] = set()

    def cpuid(self, wanted: list[CpuidEntry], base: list[CpuidEntry]) -> list[CpuidEntry]:
        """Try a table; returns what of it KVM took. `base` is one that it takes.

        KVM refuses a table as a whole: leaf by leaf on the base tells which leaves it does not take.
        """
        shown = self._kvm.try_cpuid(self._scratch, wanted)
        if shown is None:
            leaves = dict.fromkeys(entry[0] for entry in wanted)
            refused = [leaf for leaf in leaves if self._refuses(_merged(base, wanted, [leaf]))]
            self._grade((entry for entry in wanted if entry[0] in refused), REFUSED)
            taken = _merged(base, wanted, [leaf for leaf in leaves if leaf not in refused])
            shown = self._kvm.try_cpuid(self._scratch, taken)
            if shown is None:  # each leaf alone, and not together: none of it can be relied on
                self._grade(wanted, REFUSED)
                return base
            wanted = taken
        self._compare(wanted, shown)
        return wanted

    def _refuses(self, table: Sequence[CpuidEntry]) -> bool:
        return self._kvm.try_cpuid(self._scratch, table) is None

    def _grade(self, entries: Iterable[CpuidEntry], grade: str) -> None:
        for entry in entries:
            for word, compared, _ in self._named[entry[:2]]:
                if compared:
                    self.found.setdefault(word, grade)

    def _compare(self, sent: Sequence[CpuidEntry], shown: Sequence[CpuidEntry]) -> None:
        """Grade what came back with another value; a leaf that is missing on either side reads zero."""
        rest = {entry[:2]: entry[3:] for entry in shown}
        rows = [(entry[:2], entry[3:], rest.pop(entry[:2], _ZERO)) for entry in sent]
        rows += [(key, _ZERO, values) for key, values in rest.items()]
        for key, ours, theirs in rows:
            if ours != theirs:
                for (word, compared, _), mine, other in zip(self._named[key], ours, theirs, strict=True):
                    if (mine ^ other) & compared:
                        self.found.setdefault(word, REPLACED)

    def msrs(self, values: Mapping[int, int]) -> None:
        """Try each feature MSR with its value, then without its bits."""
        rows = {index: register(words.msr_word(index)) for index in values}
        exact = {index: value for index, value in values.items() if rows[index][1]}
        self._msrs(rows, exact)
        lowered = {index: lowered_msr(rows[index], value) for index, value in exact.items()}
        self._msrs(rows, {index: value for index, value in lowered.items() if value != exact[index]})

    def mce(self, value: int) -> None:
        """Try the machine checks, which have an ioctl of their own, then without their bits."""
        row = register(MCG_CAP)
        for given in (value, value & row[2]):
            shown = self._kvm.try_mce(self._scratch, given)
            if shown is None:
                self.found.setdefault(MCG_CAP, REFUSED)
            elif (shown ^ given) & row[1]:
                self.found.setdefault(MCG_CAP, REPLACED)
        self.tried.add(MCG_CAP)

    def _msrs(self, rows: Mapping[int, _Register], values: Mapping[int, int]) -> None:
        for index, shown in self._kvm.try_msrs(self._scratch, values).items():
            word, compared, _kept = rows[index]
            if shown.unset:
                self.found.setdefault(word, REFUSED)
            elif not shown.unread and (shown.value ^ values[index]) & compared:
                self.found.setdefault(word, REPLACED)
            if not shown.unread:
                self.tried.add(word)


def lowered_msr(row: _Register, value: int) -> int:
    """An MSR without its bits. Numbers stay, for KVM takes few other values; VMX controls to what must be 1."""
    rule = catalogs.load(words.X86_64).words.get(row[0])
    if rule is None:
        return value
    if any(field.rule == rules.VMX_CONTROLS for field in rule.fields):
        must = value & _EVERY_32
        return must << 32 | must
    return value & row[2]


def _merged(
    base: Sequence[CpuidEntry], other: Sequence[CpuidEntry], leaves: Sequence[int]
) -> list[CpuidEntry]:
    """A table with these leaves of another."""
    return [entry for entry in base if entry[0] not in leaves] + [
        entry for entry in other if entry[0] in leaves
    ]
