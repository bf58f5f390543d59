# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests saw of what they were to see: the outcome of a proof, on either architecture. Pure."""

from __future__ import annotations

from typing import NamedTuple

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.host import enforcement
from kvmneg.host.enforcement import LEAKS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HONOURED = "honoured"
TRAPPED = "trapped"  # the instruction raises an exception: #UD of x86, undefined of arm64
HIDDEN_ONLY = "hidden only"  # the CPU executes it all the same

PARAVIRTUAL = "cpuid:0x40000001.0.eax"


class Sight(NamedTuple):
    """One word. `shown` is what KVM reads back, `seen` by mode what a guest saw; None where neither was possible."""

    bound: int  # the bits that are compared
    value: int  # what it was set to, all bits
    shown: int | None
    seen: tuple[int | None, ...]
    grade: str


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

    __slots__ = ("instructions", "modes", "paravirtual", "tables", "untried")

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
