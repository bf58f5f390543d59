# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests saw of what they were to see: the outcome of a proof, on either architecture. Pure."""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.host import enforcement
from kvmneg.host.enforcement import LEAKS
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

HONOURED = "honoured"
_BY_SEVERITY = (HONOURED, *enforcement.BY_SEVERITY)
TRAPPED = "trapped"  # the instruction raises an exception: #UD of x86, undefined of arm64
HIDDEN_ONLY = "hidden only"  # the CPU executes it all the same
MARKS = (HIDDEN_ONLY, TRAPPED, enforcement.UNTESTED)  # of instructions, the worst first
_REFUSED = (False, None, True)  # the same of MSRs
_OPEN, _ENDED = 0, 3  # KVMNEG_OUTCOME_*
_EXIT_TIME = 0x7FFF0001  # KVMNEG_EXIT_TIME

PARAVIRTUAL = "cpuid:0x40000001.0.eax"


class Sight(NamedTuple):
    """One word. `shown` is what KVM reads back, `seen` by mode what a guest saw; None where neither was possible."""

    bound: int  # the bits that are compared
    value: int  # what it was set to, all bits
    shown: int | None
    seen: tuple[int | None, ...]
    grade: str
    late: bool = False  # some guest had no time for it: another run may tell


class Standing(NamedTuple):
    """A feature with MSRs of KVM's or Hyper-V's: whether CPUID shows it, and whether a guest's RDMSR is refused.

    None where untested. The capability is KVM_CAP_ENFORCE_PV_FEATURE_CPUID or KVM_CAP_HYPERV_ENFORCE_CPUID.
    """

    shown: bool
    refused: bool | None  # without the capability
    refused_enforced: bool | None  # with it
    ignored: bool = False  # KVM answers 0 where it would refuse (kvm.ignore_msrs): it counts as refused


class Proof:
    """What came of it. `tables`: name → word → Sight; `paravirtual` (x86's) and `instructions` by feature."""

    __slots__ = ("instructions", "kinds", "modes", "paravirtual", "tables", "untried", "unvisited")

    def __init__(
        self,
        modes: tuple[str, ...],
        tables: Mapping[str, Mapping[str, Sight]],
        paravirtual: Mapping[str, Standing],
        instructions: Mapping[str, str],
        untried: Sequence[str] = (),
    ) -> None:
        self.modes = modes  # names of the modes that guests asked in, as in each Sight
        self.tables = tables
        self.paravirtual = paravirtual
        self.instructions = instructions
        self.untried = untried  # words that were promised, and that no guest can be asked for
        self.kinds: Sequence[str] = ()  # CPUs of each kind that guests ran on, "0-3"; empty where all are one
        self.unvisited: Sequence[
            Mapping[str, Any]
        ] = ()  # kinds that they could not run on: a combo's "unvisited"

    def grades(self) -> dict[str, str]:
        """The words that are not honoured in every table, with the worst grade."""
        found: dict[str, str] = {}
        for table in self.tables.values():
            one = {word: sight.grade for word, sight in table.items() if sight.grade != HONOURED}
            found = enforcement.joined(found, one)
        for feature, standing in self.paravirtual.items():
            if standing.refused_enforced is False and not standing.shown:
                found.setdefault(catalogs.names(words.X86_64).feature(feature).word, LEAKS)
        return {word: found[word] for word in sorted(found, key=words.order)}

    def late(self) -> bool:
        """Whether guests had too little time to see everything."""
        return any(sight.late for table in self.tables.values() for sight in table.values())

    def honoured(self, beginning: str) -> list[str]:
        """The words with this beginning that some guest saw as they were to be, in every table that has them."""
        seen = {
            word
            for table in self.tables.values()
            for word, sight in table.items()
            if word.startswith(beginning) and any(one is not None for one in sight.seen)
        }
        return sorted(seen - self.grades().keys(), key=words.order)


class Missed(dict[str, bool]):
    """The words that a guest was to see and did not come to, and whether for want of time."""

    def add(self, rows: Iterable[Iterable[str]], outcomes: Sequence[tuple[int, int]]) -> None:
        """What came of a guest in one mode: each question's words, and (KVMNEG_OUTCOME_*, its detail).

        It left by a question, or had no time for it. Where all are open KVM lets no guest be in that mode, and there
        is nothing to be seen in it.
        """
        if all(outcome == _OPEN for outcome, _ in outcomes):
            return
        late = (_ENDED, _EXIT_TIME) in outcomes
        for row, (outcome, _) in zip(rows, outcomes, strict=True):
            if outcome in (_OPEN, _ENDED):
                self.update(dict.fromkeys(row, late))

    def judge(self, word: str, sight: Sight) -> Sight:
        """What some guest did not come to is not honoured, for nobody looked."""
        if word not in self or not sight.bound or sight.grade != HONOURED:
            return sight
        return sight._replace(grade=enforcement.UNTESTED, late=self[word])


def mark(allowed: Sequence[bool | None], tried: Sequence[bool | None], *, has: bool = False) -> str:
    """What becomes of an instruction whose feature is hidden, by what came of it in each mode.

    Executed (True), an invalid one (False) or neither (None): where the feature is offered, then where it is hidden.
    `has`: the CPU has it, whether or not it is offered. A mode that executes what is offered has to have been tried.
    """
    if True in tried:
        return HIDDEN_ONLY
    if any(one and other is None for one, other in zip(allowed, tried, strict=True)):
        return enforcement.UNTESTED
    return TRAPPED if False in tried and (has or True in allowed) else enforcement.UNTESTED


def worst(proofs: Sequence[Proof]) -> Proof:
    """One proof of a host with several kinds of CPU, from one or more: of each word, MSR and instruction the worst.

    For a guest may run on any of them.
    """
    if len(proofs) == 1:
        return proofs[0]
    names = dict.fromkeys(name for proof in proofs for name in proof.tables)
    return Proof(
        proofs[0].modes,
        {name: _worst_sights([proof.tables.get(name, {}) for proof in proofs]) for name in names},
        _worst_standings(proofs),
        _worst_marks(proof.instructions for proof in proofs),
        list(dict.fromkeys(word for proof in proofs for word in proof.untried)),
    )


def _worst_sights(tables: Sequence[Mapping[str, Sight]]) -> dict[str, Sight]:
    found: dict[str, Sight] = {}
    for table in tables:
        for word, sight in table.items():
            before = found.setdefault(word, sight)
            if _BY_SEVERITY.index(sight.grade) > _BY_SEVERITY.index(before.grade):
                found[word] = sight
    return {word: found[word] for word in sorted(found, key=words.order)}


def _worst_standings(proofs: Sequence[Proof]) -> dict[str, Standing]:
    found: dict[str, Standing] = {}
    for proof in proofs:
        for feature, one in proof.paravirtual.items():
            before = found.setdefault(feature, one)
            found[feature] = Standing(
                one.shown and before.shown,
                min(one.refused, before.refused, key=_REFUSED.index),
                min(one.refused_enforced, before.refused_enforced, key=_REFUSED.index),
                one.ignored or before.ignored,
            )
    return found


def _worst_marks(each: Iterable[Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for marks in each:
        for feature, mark in marks.items():
            found[feature] = min(mark, found.get(feature, mark), key=MARKS.index)
    return found
