# SPDX-License-Identifier: LGPL-2.1-or-later
"""The single controls of a VMX control word, which merges whole. Loaded with the names only.

A word says of each of 32 controls whether it must be 1 (bits 31:0) and whether it may be 1 (bits 63:32). A control
is offered where the hypervisor in the guest may choose: it may be 1, and need not be. Only that survives a merge
as an and-bit does, and it is what QEMU's vmx-* properties mean (target/i386/kvm/kvm.c, make_vmx_msr_value).
"""

from __future__ import annotations

from kvmneg.features.catalog import Feature
from kvmneg.features.difference import Blocker, Difference

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_LOW = 0xFFFF_FFFF
HALF = 32  # bits of a half; a control's `shift` is its bit of the upper one


class Control(Feature):
    """One control: `shift` is the bit that says that it may be 1; `default1` is what it is where it is not offered."""

    __slots__ = ("default1",)

    def __init__(self, row: tuple[Any, ...], default1: int) -> None:
        super().__init__(row)
        self.default1 = default1 >> self.number & 1

    @property
    def number(self) -> int:
        """Its bit of the VMCS field, and of each half."""
        return self.shift - HALF

    @property
    def whole(self) -> str:
        return self.requires[0]

    @property
    def is_bit(self) -> bool:
        return True

    def of(self, value: int) -> int:
        """1 where it may be 1 and need not be, in a word's value."""
        return offered(value) >> self.number & 1

    def given_to(self, value: int) -> int:
        return (value | self.mask) & ~(self.mask >> HALF)

    def taken_from(self, value: int) -> int:
        """What is no longer offered is 1 in the default1 class, 0 else; what was fixed stays."""
        if not self.of(value):
            return value
        return value | self.mask >> HALF if self.default1 else value & ~self.mask


def offered(value: int) -> int:
    """The controls of a word that may be 1 and need not be, by number."""
    return value >> HALF & ~value & _LOW


def value_of(controls: int, default1: int) -> int:
    """The word that offers these controls and no other (Intel SDM vol. 3D A.2: the default1 class stays 1)."""
    return (controls | default1) << HALF | default1 & ~controls


def only(value: int, keep: int, default1: int) -> int:
    """The word without the controls that it offers and `keep` does not name: each is what its class is."""
    gone = offered(value) & ~keep
    return value & ~((gone & ~default1) << HALF) | gone & default1


def _numbers(bits: int) -> Iterator[int]:
    return (number for number in range(HALF) if bits >> number & 1)


def unfit(
    whole: Feature, named: tuple[Control, ...], values: tuple[int, int], missing_on: str, cause: str
) -> Iterator[Blocker]:
    """A blocker for each control by which a guest's word does not fit a host's; the word's own name where it has none.

    `bit` is the one at fault: of the upper half where the guest has a control that the host lacks, of the lower where
    the host insists on it.
    """
    ours, theirs = values
    if not theirs:
        because = f"{missing_on} offers none of its controls"
        yield Blocker(whole.name, whole.word, None, "the guest", missing_on, cause, because)
        return
    names = {control.number: control.name for control in named}
    forced, absent = theirs & ~ours & _LOW, ours >> HALF & ~(theirs >> HALF)
    found = [
        (number, number, f"must be 1 there: {missing_on} leaves no choice") for number in _numbers(forced)
    ]
    for number in _numbers(absent & ~forced):
        because = f"{missing_on} does not offer it"
        if ours >> number & 1:
            because = f"must be 1 for the guest, and must be 0 there: {missing_on} does not have it"
        found.append((number, number + HALF, because))
    for number, bit, because in found:
        yield Blocker(names.get(number, whole.name), whole.word, bit, "the guest", missing_on, cause, because)


def differing(whole: Feature, named: tuple[Control, ...], a: int, b: int) -> Iterator[Difference]:
    """The controls that only one of two words offers; the whole word too, where that does not tell all of it."""
    apart = offered(a) ^ offered(b)
    known = sum(control.mask >> HALF for control in named)
    differ = ((a ^ b) >> HALF | a ^ b) & _LOW
    if differ & ~(apart & known):
        yield Difference(whole.name, whole.word, whole.shift, whole.width, whole.rule, a, b)
    for control in named:
        if apart >> control.number & 1:
            place = control.name, control.word, control.shift, control.width, control.rule
            yield Difference(*place, control.of(a), control.of(b))
