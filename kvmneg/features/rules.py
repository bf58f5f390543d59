# SPDX-License-Identifier: LGPL-2.1-or-later
"""The merge rules: how two hosts' values of one field become one, and when a guest's value fits a host.

Each rule is a meet-semilattice over the field's values: `meet` is commutative, associative and idempotent,
`fits(guest, host)` is its order, and `bottom` is what a field gets that is not granted: below everything.
Zero is not always that element. A field whose register merely reads zero is a value like any other.

`bits` is a field's width. Bit rules (AND, OR, HINT) work on a whole mask at once, so a word of single-bit
features merges in three operations, whatever it holds.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

AND = "and"
OR = "or"
HINT = "hint"
MINIMUM = "minimum"
MINIMUM_NONZERO = "minimum-nonzero"
MAXIMUM = "maximum"
EQUAL = "equal"
EQUAL_OR_DROP = "equal-or-drop"
LOWEST = "lowest"
VERSION_RANGE = "version-range"
INTERVAL = "interval"
VMX_CONTROLS = "vmx-controls"
SIGNED_MINIMUM = "signed-minimum"
HIGHEST = "highest"
EQUAL_OR_ONE = "equal-or-one"
EQUAL_OR_TWO = "equal-or-two"
MATCH = "match"
PREFIX = "prefix"
DERIVED = "derived"
TOPOLOGY = "topology"
DYNAMIC = "dynamic"
POLICY = "policy"
REPORTED = "reported"

BITWISE = frozenset((AND, OR, HINT))
# A value of these holds two limits and can contradict itself: meeting it with itself then gives the bottom.
# So can a signed field below -1: that is less than "not there", and becomes it.
RANGES = frozenset((VERSION_RANGE, INTERVAL, VMX_CONTROLS, SIGNED_MINIMUM))
# Equal everywhere, or the safe value, which is the bottom.
EQUAL_OR_SAFE = frozenset((EQUAL_OR_DROP, EQUAL_OR_ONE, EQUAL_OR_TWO, MATCH))
# Never merged: recomputed, the VMM's, the guest's own doing, a constant, or only for the record.
UNMERGED = frozenset((DERIVED, TOPOLOGY, DYNAMIC, POLICY, REPORTED))

_LOW = 0xFFFF_FFFF


class Rule:
    """One rule for a numeric field: `meet(a, b)`, `fits(guest, host)`, `bottom(bits)`, and what it means."""

    __slots__ = ("bottom", "fits", "meaning", "meet")

    def __init__(
        self,
        meaning: str,
        meet: Callable[[int, int], int],
        fits: Callable[[int, int], bool],
        bottom: Callable[[int], int],
    ) -> None:
        self.meaning = meaning
        self.meet = meet
        self.fits = fits
        self.bottom = bottom


def _zero(bits: int) -> int:
    return 0


def _ones(bits: int) -> int:
    return (1 << bits) - 1


def _one(bits: int) -> int:
    return 1


def _minimum_nonzero(a: int, b: int) -> int:
    return min(a, b) if a and b else a or b


def _maximum(a: int, b: int) -> int:
    # 0 is "there is none" (SEV without an ASID range): absent on one host is absent in the pool
    return max(a, b) if a and b else 0


def _equal(a: int, b: int) -> int:
    """0 is "not known", so above all; two that differ are a conflict, which the feature set keeps."""
    if a and b:
        return a if a == b else 0
    return a or b


def _equal_or_drop(a: int, b: int) -> int:
    return a if a == b else 0


def signature_key(signature: int) -> tuple[int, int, int]:
    """(family, model, stepping) of CPUID 1.EAX: the extended fields count only where the SDM says so."""
    family = signature >> 8 & 0xF
    model = signature >> 4 & 0xF
    if family in (0x6, 0xF):
        model |= signature >> 12 & 0xF0
    if family == 0xF:
        family += signature >> 20 & 0xFF
    return family, model, signature


def _equal_or(
    safe: int,
) -> tuple[Callable[[int, int], int], Callable[[int, int], bool], Callable[[int], int]]:
    """meet, fits and bottom of a field that is the same everywhere or has its safe value."""
    return lambda a, b: a if a == b else safe, lambda g, h: g in (safe, h), lambda bits: safe


_NONE = 0xF  # -1 of the 4 bits that every signed field of arm64's ID registers has


def _signed(value: int) -> int:
    return value if value < 8 else -1


def _signed_minimum(a: int, b: int) -> int:
    return min(_signed(a), _signed(b)) & _NONE


def _prefix(a: int, b: int) -> int:
    """Of two sets of lengths, what both have below the first length on which they differ."""
    differ = a ^ b
    return a & (differ & -differ) - 1 if differ else a


def _lowest(a: int, b: int) -> int:
    return min(a, b, key=signature_key)


def _version_range(a: int, b: int) -> int:
    """Two ranges of versions, low byte the lowest, high byte the highest: their intersection, empty is 0."""
    if not (a and b):
        return 0
    low, high = max(a & 0xFF, b & 0xFF), min(a >> 8, b >> 8)
    return high << 8 | low if low <= high else 0


def _version_range_fits(guest: int, host: int) -> bool:
    return _version_range(guest, host) == guest


def _interval(a: int, b: int) -> int:
    """Two intervals, low half the lowest value, high half the highest: their intersection, empty is 0."""
    if not (a and b):
        return 0
    low, high = max(a & _LOW, b & _LOW), min(a >> 32, b >> 32)
    return high << 32 | low if low <= high else 0


def _interval_fits(guest: int, host: int) -> bool:
    return _interval(guest, host) == guest


def _vmx_controls(a: int, b: int) -> int:
    """Two VMX capability MSRs: must-be-1 halves joined, may-be-1 halves met; what clashes has no baseline."""
    if not (a and b):
        return 0
    must, may = (a | b) & _LOW, a >> 32 & b >> 32
    return may << 32 | must if not must & ~may else 0


def _vmx_controls_fit(guest: int, host: int) -> bool:
    return _vmx_controls(guest, host) == guest


RULES: dict[str, Rule] = {
    AND: Rule("offered where every host has it", int.__and__, lambda g, h: not g & ~h, _zero),
    OR: Rule(
        "set where any host has it: a guest that was not told may not land there",
        int.__or__,
        lambda g, h: not h & ~g,
        _ones,
    ),
    HINT: Rule(
        "a performance hint: offered where every host has it, acceptable everywhere",
        int.__and__,
        lambda g, h: True,
        _zero,
    ),
    MINIMUM: Rule("the smallest of the pool", min, lambda g, h: g <= h, _zero),
    MINIMUM_NONZERO: Rule(
        "the smallest of the pool, 0 means no limit of its own: as many as the number it goes with",
        _minimum_nonzero,
        lambda g, h: _minimum_nonzero(g, h) == g,
        _one,
    ),
    MAXIMUM: Rule("the largest of the pool", _maximum, lambda g, h: _maximum(g, h) == g, _zero),
    EQUAL: Rule(
        "must be the same on every host: there is no baseline otherwise",
        _equal,
        lambda g, h: h in (0, g),
        _zero,
    ),
    EQUAL_OR_DROP: Rule(
        "the same on every host, else dropped with what needs it",
        _equal_or_drop,
        lambda g, h: g in (0, h),
        _zero,
    ),
    LOWEST: Rule("the lowest CPU signature of the pool; never blocks", _lowest, lambda g, h: True, _zero),
    VERSION_RANGE: Rule("the versions every host has", _version_range, _version_range_fits, _zero),
    INTERVAL: Rule(
        "what every host can be set to; hosts with nothing in common have none",
        _interval,
        _interval_fits,
        _zero,
    ),
    VMX_CONTROLS: Rule(
        "must-be-1 joined, may-be-1 met; a clash has no baseline", _vmx_controls, _vmx_controls_fit, _zero
    ),
    SIGNED_MINIMUM: Rule(
        "the smallest of the pool, of 4 bits with a sign: 0 means present, -1 (0xf) absent",
        _signed_minimum,
        lambda g, h: _signed_minimum(g, h) == _signed(g) & _NONE,
        _ones,
    ),
    HIGHEST: Rule("the largest of the pool: less is promised to guests", max, lambda g, h: g >= h, _ones),
    EQUAL_OR_ONE: Rule("the same on every host, else 1, which promises nothing", *_equal_or(1)),
    EQUAL_OR_TWO: Rule("the same on every host, else 2, which promises least", *_equal_or(2)),
    MATCH: Rule(
        "must be the same on every host; where KVM can be told, it is told",
        _equal_or_drop,
        lambda g, h: True,
        _zero,
    ),
    PREFIX: Rule(
        "lengths that every host has, up to the first that one lacks",
        _prefix,
        lambda g, h: _prefix(g, h) == g,
        _zero,
    ),
}

MEANING: dict[str, str] = {
    **{name: rule.meaning for name, rule in RULES.items()},
    DERIVED: "recomputed from the rest after the merge",
    TOPOLOGY: "the VMM's own: caches, cores, APIC ids",
    DYNAMIC: "changes while the guest runs",
    POLICY: "a constant of this project, the same for every guest",
    REPORTED: "recorded for people, never merged",
}
