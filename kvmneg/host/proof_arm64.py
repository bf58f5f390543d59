# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests see on this arm64 KVM of what they are to see: proof guests on a VM for each table.

    sights(kvm, table)                        {word: Sight}: promised, set, read back, seen at EL1 and EL0, the grade
    lowered(kvm, probe, keep)                 a table of all that KVM lets a guest be without, as KVM took it
    instructions(kvm, offered, hidden, ...)   {feature: "trapped", "hidden only" or "untested"}

A word is honoured where KVM reads it back, before and after the first run, and every guest that could ask saw it as it
was set. The twin of proof_x86.py.
"""

from __future__ import annotations

from kvmneg.errors import NotApplied
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.host import guest_arm64 as guest
from kvmneg.host import views_arm64 as views
from kvmneg.host.arm64 import FEATURES
from kvmneg.host.enforcement import REFUSED
from kvmneg.host.guest_arm64 import Machine
from kvmneg.host.instructions_arm64 import CODE, KERNELS, LEAST
from kvmneg.host.sight import HONOURED, Missed, Sight, mark
from kvmneg.host.views_arm64 import LENGTHS, REVISION, Question, register_of
from kvmneg.policy.contract_arm64 import place
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from kvmneg.features.catalog import Field
    from kvmneg.host.kvm import Kvm
    from kvmneg.host.kvm_arm64 import Probe
    from kvmneg.host.views_arm64 import Answer

PSCI_0_2, PMU_V3, SVE, PTRAUTH = 1 << 2, 1 << 3, 1 << 4, 0b11 << 5
GIVEN = PSCI_0_2 | PMU_V3 | SVE | PTRAUTH  # of vCPU features: the others are another kind of guest's
# What KVM takes before a vCPU is complete: lengths, MIDR_EL1, REVIDR_EL1, AIDR_EL1.
EARLY = (LENGTHS, *(f"arm64:0x603000000013c{low}" for low in ("000", "006", "807")))
# What a vGIC says: ID_AA64PFR0_EL1.GIC, ID_PFR1_EL1.GIC. At the first run KVM says it again.
_GIC = {"arm64:0x603000000013c020": 0xF << 24, "arm64:0x603000000013c009": 0xF << 28}
_PSCI = "arm64:0x6030000000140000"
_LEAST = (
    0,
    1,
    6,
)  # a field's values to try after its bottom: EL0 must be there, ID_AA64DFR0_EL1.DebugVer has 6


class Table(NamedTuple):
    """What a guest is to see, and the machine for it. `bound`: word → the bits that are compared."""

    values: Mapping[str, int]
    bound: Mapping[str, int]
    features: int  # for KVM_ARM_VCPU_INIT, bit n: number n
    models: int  # of the vGIC, KVMNEG_VGIC_*


class Seen(NamedTuple):
    """One table's guests: what KVM read back, what it did not take, what was seen by mode, and what was missed."""

    shown: Mapping[str, int | None]
    refused: Collection[str]
    modes: tuple[Mapping[str, int | None], ...]
    missed: Missed


def ordered(names: Iterable[str]) -> list[str]:
    """arm64: words in the order in which a VMM sets them."""
    return sorted(
        (word for word in names if word.startswith("arm64:")), key=lambda word: place(register_of(word))
    )


def sights(kvm: Kvm, table: Table, offered: int) -> dict[str, Sight]:
    """Every word of a table as guests see it; `offered` are vCPU features that KVM takes. Raises KvmFault."""
    machine, refused = _made(kvm, table, offered)
    with machine:
        found = _run(kvm, machine, table, refused)
    rows = {word: _sight(table, word, found) for word in table.values if views.questions(word)}
    if FEATURES in table.values:
        value, bound = table.values[FEATURES], table.bound[FEATURES]
        grade = REFUSED if FEATURES in refused and bound else HONOURED
        rows[FEATURES] = Sight(bound, value, machine.features, (None, None), grade)
    return rows


def _made(kvm: Kvm, table: Table, offered: int) -> tuple[Machine, set[str]]:
    """A machine for a table, and the words that KVM did not take for it. Raises NotApplied where none can be made."""
    refused: set[str] = set()
    features = table.features
    early = {word: value for word, value in table.values.items() if word in EARLY}
    for _try in range(3):
        try:
            return Machine(kvm, features, table.models, early), refused
        except NotApplied as error:
            word = str(error.fields["word"])
            if word not in (FEATURES, LENGTHS) or word in refused:
                raise
            refused.add(word)
            if word == LENGTHS:
                early.pop(LENGTHS)
            else:
                features &= offered
    return Machine(kvm, features, table.models, early), refused


def _run(kvm: Kvm, machine: Machine, table: Table, refused: set[str]) -> Seen:
    """Set everything, run guests, and read back: what was not as it should be before the run counts, or after it."""
    names = ordered(table.values)
    before: dict[str, int | None] = {}
    for word in names:
        if not _set(machine, word, table.values[word], table.bound[word]):
            refused.add(word)
        before[word] = machine.get(word)
    revision = None
    if table.values.get(REVISION):
        revision = machine.set_revision(table.values[REVISION])
        if revision is None:
            refused.add(REVISION)
    asked = [*names, *([REVISION] if REVISION in table.values else [])]
    missed = Missed()
    modes = tuple(_views(kvm, machine, mode, asked, missed) for mode in guest.MODES)
    shown = dict(before)
    for word in names:
        now = before[word]
        if now is not None and not (now ^ table.values[word]) & table.bound[word]:
            shown[word] = machine.get(word)
    return Seen({**shown, REVISION: revision}, refused, modes, missed)


def _set(machine: Machine, word: str, value: int, bound: int) -> bool:
    """Have a register as it is to be, where it is not; whether KVM took it. One with nothing in it may be missing."""
    now = machine.get(word)
    if now is None:
        return not value & bound
    if word == LENGTHS or not (now ^ value) & bound:
        return True  # lengths are final; what is the same is no change
    return machine.set(word, now & ~bound | value & bound)


def _views(
    kvm: Kvm, machine: Machine, mode: int, asked: Sequence[str], missed: Missed
) -> dict[str, int | None]:
    """Word → what a guest in this mode saw; `missed` gets the words that it was to see and did not come to."""
    each = [(word, views.questions(word, mode)) for word in asked]
    answers = guest.ask(kvm, machine, mode, [question for _, row in each for question in row])
    missed.add([[word] for word, row in each for _ in row], [answer[:2] for answer in answers])
    found: dict[str, int | None] = {}
    at = 0
    for word, row in each:
        found[word] = views.view(word, answers[at : at + len(row)])
        at += len(row)
    return found


def _sight(table: Table, word: str, found: Seen) -> Sight:
    bound, value, shown = table.bound[word], table.values[word], found.shown.get(word)
    seen = tuple(views.as_kept(word, shown, mode.get(word)) for mode in found.modes)
    refused = bool(bound) and word in found.refused
    grade = REFUSED if refused else views.grade_of(word, bound, value, shown, seen)
    sight = Sight(bound, value, shown, tuple(mode.get(word) for mode in found.modes), grade)
    return found.missed.judge(word, sight)


def lowered(kvm: Kvm, probe: Probe, features: int, models: int) -> Table:
    """What KVM lets a guest be without: each field that can be set at the lowest that KVM takes. Raises KvmFault."""
    values, bound = {}, {}
    with Machine(kvm, features, models, {}) as machine:
        settable = {f"arm64:{trial.id:#x}": trial.settable for trial in probe.trials}
        for word in ordered(settable):
            if settable[word] and word not in EARLY:
                _lower(machine, word, settable[word] & ~_GIC.get(word, 0), probe)
        for word in settable:
            now = machine.get(word)
            if now is not None and word not in EARLY:
                values[word], bound[word] = now, views.compared(word)
    return Table(values, bound, features, models)


def _lower(machine: Machine, word: str, settable: int, probe: Probe) -> None:
    now = machine.get(word)
    if now is None:
        return  # it is not there without what it is built on
    if word == _PSCI:
        machine.set(word, min(probe.psci_versions, default=now))
        return
    rule = catalogs.load(words.ARM64).words.get(word)
    if rule is None:
        return
    if rule.and_mask & settable & now:
        machine.set(word, now & ~(rule.and_mask & settable))
    for field in rule.fields:
        mask = field.mask << field.shift
        if settable & mask:
            _lower_field(machine, word, field)


def _lower_field(machine: Machine, word: str, field: Field) -> None:
    """Have a field as low as KVM takes it."""
    now = machine.get(word) or 0
    has = now >> field.shift & field.mask
    for value in (field.bottom, *_LEAST):
        if value == has or not field.fits(value, has):
            return
        if machine.set(word, now & field.clear | value << field.shift):
            return


def instructions(
    kvm: Kvm, offered: Table, hidden: Table, features: Sequence[str], host: Collection[str] = ()
) -> dict[str, str]:
    """Whether the instructions of features that `hidden` lacks are trapped: undefined, where `offered` has them.

    Features of `host` are the CPU's, whether KVM offers them or not. "untested" where a guest did not come to execute
    an instruction in either. Raises KvmFault.
    """
    allowed, tried = _executed(kvm, offered, features), _executed(kvm, hidden, features)
    return {feature: mark(allowed[feature], tried[feature], has=feature in host) for feature in features}


def _executed(kvm: Kvm, table: Table, features: Sequence[str]) -> dict[str, list[bool | None]]:
    """Feature → what came of its instruction as a kernel and as a program: executed, undefined (False), or neither."""
    found: dict[str, list[bool | None]] = {feature: [None] * len(guest.MODES) for feature in features}
    try:
        machine, refused = _made(kvm, table, table.features)
    except NotApplied:
        return found
    with machine:
        for word in ordered(table.values):
            if word not in refused:
                _set(machine, word, table.values[word], table.bound[word])
        for mode in guest.MODES:
            asked = [feature for feature in features if mode == views.EL1 or feature not in KERNELS]
            answers = guest.ask(kvm, machine, mode, [Question(CODE[feature]) for feature in asked])
            for feature, answer in zip(asked, answers, strict=True):
                found[feature][mode] = _came_through(answer)
    return found


# Exceptions that say that an instruction is there and something has to be enabled for it (ESR_EL1.EC): SIMD and SVE by
# CPACR_EL1, a system register, memory copies at EL0. Nothing of them is KVM's.
_NOT_ENABLED = (0x07, 0x18, 0x19, 0x1D, 0x27)


def _came_through(answer: Answer) -> bool | None:
    if answer.outcome == views.FAULTED:
        if answer.exception in _NOT_ENABLED:
            return None
        return answer.exception != views.UNDEFINED  # any other exception is the instruction's own
    return True if answer.outcome == views.ANSWERED else None


def has(feature: str, values: Mapping[str, int]) -> bool:
    """Whether these words show what a feature's instruction needs."""
    row = catalogs.names(words.ARM64).feature(feature)
    return row.of(values.get(row.word, 0)) >= LEAST[feature]
