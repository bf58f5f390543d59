# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packed sets meet as feature sets do: every rule, every word, conflicts included."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import AMD, ARCHITECTURE, CATALOG, FULL, INTEL, any_vendor, feature_sets, numbers, raw

from kvmneg.features import catalog, featureset, packed, rules
from kvmneg.features.featureset import FeatureSet, diff, meet, meet_all

if TYPE_CHECKING:
    from kvmneg.features.catalog import Field

LAYOUT = packed.layout(ARCHITECTURE)
MANY = featureset._MANY
INTEL_WORDS = dict(zip(CATALOG.equal_words, INTEL, strict=True))
ARM64 = catalog.load("arm64")
# every number of x86, and those of arm64 whose rule x86 has not
FIELDS = [
    pytest.param(one.architecture, word, field, id=f"{word}[{field.shift}]-{field.rule}")
    for one in (CATALOG, ARM64)
    for word, rule in one.words.items()
    for field in rule.fields
    if one is CATALOG or field.rule in ("signed-minimum", "highest", "equal-or-one", "equal-or-two")
    or word == "arm64:0x603000000013c000"
]  # fmt: skip


def in_bulk(sets: list[FeatureSet]) -> FeatureSet:
    """The meet of the packed path: as many sets as it takes, the given ones over and over."""
    return meet_all([sets[n % len(sets)] for n in range(max(MANY, len(sets)))])


@given(st.lists(any_vendor(), min_size=1, max_size=6))
def test_the_packed_meet_is_the_fold_of_meet(sets: list[FeatureSet]) -> None:
    assert in_bulk(sets) == reduce(meet, sets)


@given(st.lists(raw((INTEL, AMD, None)), min_size=2, max_size=4))
def test_sets_that_met_before_are_met_again_with_others(hosts: list[dict[str, int]]) -> None:
    """What a set keeps of its packing does not depend on whom it met; conflicts of earlier meets stay."""
    sets = [FeatureSet.of(ARCHITECTURE, host) for host in hosts]
    first = in_bulk(sets[:-1])
    again = in_bulk([first, *sets])
    assert again == reduce(meet, sets)
    assert {conflict.word for conflict in again.conflicts} >= {conflict.word for conflict in first.conflicts}


@pytest.mark.parametrize(("architecture", "word", "field"), FIELDS)
def test_each_number_meets_as_its_rule_says(architecture: str, word: str, field: Field) -> None:
    """By its place alone, nothing closed: also the numbers of features that few sets keep."""
    rule = catalog.load(architecture).words[word]
    layout = packed.layout(architecture)
    others = rule.bottom & ~(field.mask << field.shift)

    @settings(max_examples=25)
    @given(st.lists(numbers(field.rule, field.width), min_size=1, max_size=5))
    def check(values: list[int]) -> None:
        wholes = [others | value << field.shift for value in values]
        sets = [layout.pack({word: whole} if whole != rule.bottom else {}) for whole in wholes]
        found, conflicts = layout.unpack(layout.meet(sets))
        differ = field.rule == rules.EQUAL and len({*values} - {0}) > 1
        assert conflicts == ([word] if differ else [])
        expected = 0 if differ else reduce(field.meet, [field.meet(value, value) for value in values])
        assert found[word] == others | expected << field.shift

    check()


@pytest.mark.parametrize("word", CATALOG.words)
def test_each_bit_of_a_word_meets_as_its_rule_says(word: str) -> None:
    rule = CATALOG.words[word]
    full, numbers_ = FULL[word] & rule.bits_mask, rule.bottom & ~rule.bits_mask
    for a, b in ((0, full), (full, 0), (full, rule.bits_mask), (0, 0), (rule.or_mask, full)):
        sets = [LAYOUT.pack({word: value | numbers_}) for value in (a, b)]
        expected = a & b & (rule.and_mask | rule.hint_mask) | (a | b) & rule.or_mask
        assert LAYOUT.unpack(LAYOUT.meet(sets))[0].get(word, 0) & rule.bits_mask == expected


@given(feature_sets((INTEL, AMD, None)))
def test_unpacking_gives_back_what_was_packed(one: FeatureSet) -> None:
    found, conflicts = LAYOUT.unpack(LAYOUT.pack(one.words))
    assert not conflicts
    assert {word: found.get(word, 0) for word in CATALOG.words} == one.explicit()


def test_a_number_that_falls_with_every_set_ends_at_the_smallest() -> None:
    """Each set lowers another lane, and one lane every time."""
    words = {word: FULL[word] | INTEL_WORDS.get(word, 0) for word in CATALOG.words}
    sets = [
        FeatureSet.of(ARCHITECTURE, {**words, "kvm:max-vcpus": 5000 - n, "cpuid:0x0.0.eax": 0x80 - n % 7})
        for n in range(100)
    ]
    met = meet_all(sets)
    assert met.field("cap-max-vcpus") == 4901 and met.field("level") == 0x7A
    assert met == reduce(meet, sets)
    assert {row.word for row in diff(met, sets[0])} == {"kvm:max-vcpus", "cpuid:0x0.0.eax"}


def test_every_rule_that_merges_has_its_place() -> None:
    placed = {field.values[2].rule for field in FIELDS} | rules.BITWISE
    assert placed == set(rules.RULES) - {rules.PREFIX}
    assert [word for word, _field in packed.layout("arm64").odd] == [
        "arm64:0x606000000015ffff"
    ]  # which is met outside


def test_a_rule_without_an_order_is_refused() -> None:
    with pytest.raises(ValueError, match="no order of rule"):
        packed._orders(rules.DERIVED, 8)


def test_ranks_are_forgotten_rather_than_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_KEPT_RANKS", 3)
    own = packed.Layout(CATALOG)
    sets = [
        own.pack({"cpuid:0x1.0.eax": signature}) for signature in (0x806F8, 0x606A6, 0xA00F11, 0xF4A, 0x663)
    ]
    assert len(own._ranks) == 3
    assert own.unpack(own.meet(sets))[0]["cpuid:0x1.0.eax"] == 0x663  # family 6, model 6: the lowest
