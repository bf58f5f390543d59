# SPDX-License-Identifier: LGPL-2.1-or-later
"""What comparing feature sets tells: blockers (why not), differences, conflicts. Plain records."""

from __future__ import annotations

from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kvmneg.features.catalog import Feature


class Conflict(NamedTuple):
    """A word that must be equal on all hosts and is not; `values` are all that were seen, sorted."""

    word: str
    values: tuple[int, ...]

    def describe(self) -> str:
        return f"{self.word}: " + " and ".join(f"{value:#x}" for value in self.values)


class Difference(NamedTuple):
    """One feature whose value differs between two sets, `a` and `b`."""

    feature: str
    word: str
    shift: int
    width: int
    rule: str
    a: int
    b: int

    def to_json(self) -> dict[str, Any]:
        """As documents carry it; a field of several bits has `bits` "high:low" instead of `bit`."""
        high = self.shift + self.width - 1
        return {
            "feature": self.feature,
            "word": self.word,
            **({"bit": self.shift} if self.width == 1 else {"bits": f"{high}:{self.shift}"}),
            "rule": self.rule,
            "a": f"{self.a:#x}",
            "b": f"{self.b:#x}",
        }


class Blocker(NamedTuple):
    """Why not: the unit of every no.

    `bit` is None for a field of several bits; `cause` is the layer that takes it away (silicon, microcode,
    kernel, kvm, module-parameter, vmm, fence, policy, dependency, unknown).
    """

    feature: str
    word: str
    bit: int | None
    wanted_by: str
    missing_on: str
    cause: str
    because: str

    @classmethod
    def of_feature(cls, feature: Feature, values: tuple[int, int], missing_on: str, cause: str) -> Blocker:
        """The blocker of one feature whose `values` on the guest and on the host do not fit."""
        ours, theirs = values
        if feature.width > 1:
            needed, found = show(feature.word, ours), show(feature.word, theirs)
            because = f"{needed} is needed, {missing_on} has {found} (rule: {feature.rule})"
        elif theirs:
            because = f"{missing_on} has it, and a guest that was not told is at risk there"
        else:
            because = f"{missing_on} does not offer it"
        bit = feature.shift if feature.width == 1 else None
        return cls(feature.name, feature.word, bit, "the guest", missing_on, cause, because)

    @classmethod
    def of_conflict(cls, conflict: Conflict, missing_on: str) -> Blocker:
        """Hosts that must agree on a field do not."""
        seen = ", ".join(show(conflict.word, value) for value in conflict.values)
        because = f"must be the same on every host, seen: {seen}"
        return cls(conflict.word, conflict.word, None, "the pool", missing_on, "silicon", because)

    @classmethod
    def of_architecture(cls, guest: str, host: str, missing_on: str) -> Blocker:
        """A guest of one architecture cannot run on a host of another."""
        because = f"the guest is {guest}, {missing_on} is {host}"
        return cls(f"architecture {guest}", "", None, "the guest", missing_on, "silicon", because)

    def describe(self) -> str:
        """One line for people: feature, place, who wants it, why not."""
        place = f"{self.word} bit {self.bit}" if self.bit is not None else self.word
        where = f" ({place})" if place and place != self.feature else ""
        return f"{self.feature}{where}, wanted by {self.wanted_by}: {self.because} [{self.cause}]"

    def to_json(self) -> dict[str, Any]:
        """As documents carry it."""
        return dict(zip(self._fields, self, strict=True))

    def to_varlink(self) -> dict[str, Any]:
        """As org.kvmneg.Blocker on the wire: the same fields in camelCase."""
        return dict(zip(_WIRE, self, strict=True))

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Blocker:
        """From either form; absent fields are empty."""
        found = {name: row.get(name, row.get(wire)) for name, wire in zip(cls._fields, _WIRE, strict=True)}
        bit = found.pop("bit")
        return cls(bit=bit, **{name: value or "" for name, value in found.items()})


_WIRE = ("feature", "word", "bit", "wantedBy", "missingOn", "cause", "because")


def show(word: str, value: int) -> str:
    """A value for people: the four letters of a vendor word, the rates of tsc:khz, hexadecimal else."""
    if word.startswith(("cpuid:0x0.0.e", "cpuid:0x80000000.0.e")):
        text = value.to_bytes(4, "little")
        if all(0x20 <= byte < 0x7F for byte in text):
            return repr(text.decode())
    if word == "tsc:khz":
        low, high = value & 0xFFFF_FFFF, value >> 32
        return "no rate" if not value else f"{low} kHz" if low == high else f"{low} to {high} kHz"
    return f"{value:#x}"
