# SPDX-License-Identifier: LGPL-2.1-or-later
"""The merge rules, each by itself: hand-written vectors, and the laws of a meet-semilattice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import NAMES, numbers

from kvmneg.features import catalog, rules
from kvmneg.features.rules import RULES

WIDTHS = {
    rules.VMX_CONTROLS: 64, rules.VERSION_RANGE: 16, rules.LOWEST: 32, rules.EQUAL: 32, rules.SIGNED_MINIMUM: 4,
    rules.PREFIX: 16, rules.INTERVAL: 64,
}  # fmt: skip
# Of a field that must be equal 0 is "not known"; two that differ are a conflict, which feature sets keep.
LATTICES = sorted(set(RULES) - {rules.EQUAL})


def width_of(rule: str) -> int:
    return WIDTHS.get(rule, 8)


def values(rule: str, draw: st.DrawFn) -> int:
    """A value that does not contradict itself: feature sets keep no other."""
    value = draw(numbers(rule, width_of(rule)))
    return RULES[rule].meet(value, value)


@st.composite
def three(draw: st.DrawFn) -> tuple[str, int, int, int]:
    rule = draw(st.sampled_from(LATTICES))
    return rule, values(rule, draw), values(rule, draw), values(rule, draw)


@given(three())
def test_meet_is_commutative_associative_and_idempotent(case: tuple[str, int, int, int]) -> None:
    rule, a, b, c = case
    meet = RULES[rule].meet
    assert meet(a, b) == meet(b, a)
    assert meet(a, meet(b, c)) == meet(meet(a, b), c)
    assert meet(a, a) == a


@given(three())
def test_meet_is_monotone_and_fits_both(case: tuple[str, int, int, int]) -> None:
    rule, a, b, c = case
    meet, fits = RULES[rule].meet, RULES[rule].fits
    below = meet(a, b)
    assert fits(below, a) and fits(below, b)
    assert meet(meet(below, c), meet(a, c)) == meet(below, c)


@given(three())
def test_fits_is_reflexive_transitive_and_the_order_of_meet(case: tuple[str, int, int, int]) -> None:
    rule, a, b, c = case
    fits = RULES[rule].fits
    assert fits(a, a)
    assert fits(a, c) or not (fits(a, b) and fits(b, c))
    if rule not in (rules.HINT, rules.LOWEST, rules.MATCH):  # which fit everywhere: they never block
        assert fits(a, b) == (RULES[rule].meet(a, b) == a)
    else:
        assert fits(a, b)


@given(three())
def test_bottom_is_below_everything(case: tuple[str, int, int, int]) -> None:
    rule, a, *_ = case
    bottom = RULES[rule].bottom(width_of(rule))
    assert RULES[rule].meet(bottom, a) == bottom
    assert RULES[rule].fits(bottom, a)


@given(numbers(rules.EQUAL, 32), numbers(rules.EQUAL, 32))
def test_equal_knows_a_value_or_not(a: int, b: int) -> None:
    rule = RULES[rules.EQUAL]
    assert rule.meet(a, a) == a
    assert rule.meet(a, 0) == rule.meet(0, a) == a
    assert rule.fits(a, b) == (b in (0, a))


VECTORS = [
    # rule, a, b, met, and whether a guest of a fits a host of b
    (rules.AND, 0b1100, 0b1010, 0b1000, False),
    (rules.AND, 0b0100, 0b1110, 0b0100, True),
    (rules.OR, 0b1100, 0b1010, 0b1110, False),
    (rules.OR, 0b1110, 0b1010, 0b1110, True),
    (rules.HINT, 0b11, 0b01, 0b01, True),
    (rules.MINIMUM, 46, 52, 46, True),
    (rules.MINIMUM, 52, 46, 46, False),
    (rules.MINIMUM_NONZERO, 0, 46, 46, False),  # no limit of its own on a host that limits
    (rules.MINIMUM_NONZERO, 46, 0, 46, True),
    (rules.MINIMUM_NONZERO, 0, 0, 0, True),
    (rules.MAXIMUM, 5, 9, 9, False),  # the lowest ASID a guest may count on
    (rules.MAXIMUM, 9, 5, 9, True),
    (rules.MAXIMUM, 9, 0, 0, False),  # none there
    (rules.EQUAL_OR_DROP, 0x440, 0x340, 0, False),
    (rules.EQUAL_OR_DROP, 0x440, 0x440, 0x440, True),
    (rules.EQUAL_OR_DROP, 0, 0x440, 0, True),
    (rules.LOWEST, 0x000606A6, 0x000806F8, 0x000606A6, True),  # Ice Lake is model 0x6a, Sapphire Rapids 0x8f
    (rules.LOWEST, 0x00000F4A, 0x000606A6, 0x000606A6, True),  # family 15 is later than family 6
    (rules.LOWEST, 0x00A00F11, 0x00830F10, 0x00830F10, True),  # Milan is family 25, Rome 23
    (rules.VERSION_RANGE, 0x0301, 0x0402, 0x0302, False),
    (rules.VERSION_RANGE, 0x0201, 0x0403, 0, False),
    (
        rules.INTERVAL,
        2_400_600 << 32 | 2_399_400,
        2_400_602 << 32 | 2_399_402,
        2_400_600 << 32 | 2_399_402,
        False,
    ),
    (
        rules.INTERVAL,
        2_400_000 << 32 | 2_400_000,
        2_400_602 << 32 | 2_399_402,
        2_400_000 << 32 | 2_400_000,
        True,
    ),
    (rules.INTERVAL, 2_400_600 << 32 | 2_399_400, 2_600_650 << 32 | 2_599_350, 0, False),  # no rate in common
    (rules.INTERVAL, 0, 2_400_600 << 32 | 2_399_400, 0, True),  # a guest without a pinned rate runs anywhere
    (rules.VMX_CONTROLS, 0x7F_0000_0016, 0x3F_0000_0012, 0x3F_0000_0016, False),
    (rules.VMX_CONTROLS, 0x3F_0000_0016, 0x7F_0000_0012, 0x3F_0000_0016, True),
    (rules.VMX_CONTROLS, 0x16_0000_0016, 0x7F_0000_0001, 0, False),  # bit 0 must be 1 there, may not be here
    (rules.SIGNED_MINIMUM, 0x0, 0xF, 0xF, False),  # floating point, and none
    (rules.SIGNED_MINIMUM, 0xF, 0x1, 0xF, True),
    (rules.SIGNED_MINIMUM, 0x1, 0x0, 0x0, False),  # half precision too, and not
    (rules.HIGHEST, 0, 1, 1, False),  # speculation never ends in an SError, and may
    (rules.HIGHEST, 1, 0, 1, True),
    (rules.EQUAL_OR_ONE, 2, 3, 1, False),  # granules at stage 2: two kinds, and none is promised
    (rules.EQUAL_OR_ONE, 1, 0, 1, True),
    (rules.EQUAL_OR_ONE, 2, 2, 2, True),
    (rules.EQUAL_OR_TWO, 3, 2, 2, False),  # PIPT and VIPT
    (rules.EQUAL_OR_TWO, 2, 3, 2, True),
    (rules.MATCH, 0x413FD0C1, 0x411FD401, 0, True),  # Neoverse N1 and V1: kvmneg.policy.levelling refuses
    (rules.MATCH, 0x413FD0C1, 0x413FD0C1, 0x413FD0C1, True),
    (rules.PREFIX, 0b1011, 0b1111, 0b0011, False),  # 128, 256, 512 and 128 to 512: 384 tells them apart
    (rules.PREFIX, 0b0011, 0b1011, 0b0011, True),
    (rules.PREFIX, 0b1000, 0b1011, 0, False),  # a hole at 128, which the host has
]


@pytest.mark.parametrize(("rule", "a", "b", "met", "fit"), VECTORS)
def test_vectors(rule: str, a: int, b: int, met: int, fit: bool) -> None:
    assert RULES[rule].meet(a, b) == RULES[rule].meet(b, a) == met
    assert RULES[rule].fits(a, b) is fit


def test_every_rule_has_a_vector_and_a_feature() -> None:
    assert {vector[0] for vector in VECTORS} == set(LATTICES)
    tables = [NAMES, catalog.names("arm64")]
    assert {feature.rule for table in tables for feature in table.by_name.values()} == set(rules.MEANING)
    assert set(rules.MEANING) == set(RULES) | rules.UNMERGED


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0x1_0000_0016, rules.VMX_CONTROLS),
        (0x0102, rules.VERSION_RANGE),
        (0xE, rules.SIGNED_MINIMUM),
        (0x1_0000_0002, rules.INTERVAL),
    ],
)
def test_a_range_that_contradicts_itself_is_nothing(value: int, rule: str) -> None:
    assert RULES[rule].meet(value, value) == RULES[rule].bottom(width_of(rule))
    assert rule in rules.RANGES
