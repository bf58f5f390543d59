# SPDX-License-Identifier: LGPL-2.1-or-later
"""Feature sets: the laws on canonical sets of the real catalogue, dependencies, conflicts, digests, differences."""

from __future__ import annotations

import random
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import AMD, ARCHITECTURE, CATALOG, FULL, INTEL, NAMES, WORDS, any_vendor, feature_sets, raw

from kvmneg.errors import UsageError
from kvmneg.features import rules, words
from kvmneg.features.featureset import FeatureSet, diff, fits, meet, meet_all, within

SETS = feature_sets()
UNKNOWN_OR_INTEL = feature_sets((INTEL, None))


def make(**fields: int) -> FeatureSet:
    """The set with these words: leading "cpuid:" and dots written as _."""
    return FeatureSet.of(
        ARCHITECTURE, {f"cpuid:{name.replace('_', '.')}": value for name, value in fields.items()}
    )


def below(a: FeatureSet, b: FeatureSet) -> bool:
    return meet(a, b) == a


# -- meet --------------------------------------------------------------------------------------------


@given(SETS, SETS, SETS)
def test_meet_is_commutative_associative_and_idempotent(a: FeatureSet, b: FeatureSet, c: FeatureSet) -> None:
    assert meet(a, b) == meet(b, a)
    assert meet(a, meet(b, c)) == meet(meet(a, b), c)
    assert meet(a, a) == a


@given(SETS, SETS, SETS)
def test_meet_is_monotone(a: FeatureSet, b: FeatureSet, c: FeatureSet) -> None:
    assert below(meet(meet(a, b), c), meet(a, c))


@given(UNKNOWN_OR_INTEL, UNKNOWN_OR_INTEL)
def test_meet_fits_both_and_is_the_greatest_that_does(a: FeatureSet, b: FeatureSet) -> None:
    met = meet(a, b)
    assert fits(met, a) == fits(met, b) == ()
    assert below(met, a) and below(met, b)


@given(UNKNOWN_OR_INTEL, SETS)
def test_a_set_is_within_another_exactly_where_nothing_blocks_it(a: FeatureSet, b: FeatureSet) -> None:
    assert within(a, b) == (not fits(a, b))
    assert within(meet(a, b), a) == (not fits(meet(a, b), a))


@given(SETS, SETS, SETS)
def test_what_is_below_both_is_below_their_meet(a: FeatureSet, b: FeatureSet, c: FeatureSet) -> None:
    lower = meet(c, meet(a, b))
    assert below(lower, meet(a, b))
    if below(c, a) and below(c, b):
        assert below(c, meet(a, b))


@given(st.lists(any_vendor(), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_meet_all_is_the_fold_in_any_order(sets: list[FeatureSet], order: random.Random) -> None:
    shuffled = [*sets, order.choice(sets)]
    order.shuffle(shuffled)
    assert meet_all(sets) == reduce(meet, shuffled) == meet_all(iter(shuffled))


@given(SETS)
def test_the_empty_set_is_below_all(a: FeatureSet) -> None:
    nothing = FeatureSet.empty(ARCHITECTURE)
    vendor = FeatureSet.of(ARCHITECTURE, dict(zip(CATALOG.equal_words, INTEL, strict=True)))
    assert meet(a, nothing) == vendor  # nothing is known of its vendor, so a's remains
    assert fits(vendor, a) == ()


def test_meet_needs_sets_of_one_architecture() -> None:
    with pytest.raises(ValueError, match="one or more"):
        meet_all([])
    other = FeatureSet("arm64", {})
    with pytest.raises(ValueError, match="one architecture"):
        meet(FeatureSet.empty(ARCHITECTURE), other)
    with pytest.raises(ValueError, match="cannot compare"):
        diff(FeatureSet.empty(ARCHITECTURE), other)
    (blocker,) = fits(other, FeatureSet.empty(ARCHITECTURE))
    assert blocker.cause == "silicon" and "arm64" in blocker.because
    with pytest.raises(UsageError, match="no catalogue"):
        FeatureSet.empty("x86_64_names")


# -- fits --------------------------------------------------------------------------------------------


@given(SETS, SETS, SETS)
def test_fits_is_reflexive_and_transitive(a: FeatureSet, b: FeatureSet, c: FeatureSet) -> None:
    assert fits(a, a) == ()
    assert not fits(a, c) or fits(a, b) or fits(b, c)


@given(SETS, SETS, SETS)
def test_fits_is_monotone(guest: FeatureSet, host: FeatureSet, other: FeatureSet) -> None:
    """What fits a host fits a host above it, and so does a guest that was promised less."""
    lower_host, lower_guest = meet(host, other), meet(guest, other)
    if not fits(guest, lower_host):
        assert fits(guest, host) == ()
    if not fits(guest, host):
        assert fits(lower_guest, host) == ()
    assert fits(meet(lower_guest, lower_host), host) == ()


@given(SETS, SETS)
def test_each_blocker_names_a_feature_that_does_not_fit(guest: FeatureSet, host: FeatureSet) -> None:
    """An independent reading of the table: feature by feature, by the rule of its own row."""
    expected = set()
    for feature in NAMES.by_name.values():
        rule = rules.RULES.get(feature.rule)
        mask = (1 << feature.width) - 1
        ours, theirs = (one.value(feature.word) >> feature.shift & mask for one in (guest, host))
        if feature.name == "guest-phys-bits":  # 0 is as many as phys-bits (APM vol. 3, 0x80000008 EAX)
            ours, rule = limit(guest), rules.RULES[rules.MINIMUM] if theirs else None
        if rule is not None and not feature.whole and not rule.fits(ours, theirs):
            expected.add(feature.name)
    for lead, others in CATALOG.groups:
        if guest.value(lead):
            expected |= {
                feature.name
                for word in others
                if guest.value(word) != host.value(word)
                for feature in NAMES.by_place[word]
            }
    found = fits(guest, host, missing_on="node7", cause="fence")
    # a control stands for the word that it is a part of
    assert {NAMES.by_name[blocker.feature].whole or blocker.feature for blocker in found} == expected
    assert all(blocker.missing_on == "node7" and blocker.cause == "fence" for blocker in found)
    places = [(words.order(blocker.word), blocker.bit or 0) for blocker in found if blocker.bit is not None]
    assert places == sorted(places)


def limit(one: FeatureSet) -> int:
    return one.field("guest-phys-bits") or one.field("phys-bits")


def test_an_or_bit_that_only_the_host_has_blocks_the_guest() -> None:
    told, not_told = make(**{"0x7_0_edx": 1 << 10}), make(**{"0x7_0_edx": 0})
    assert fits(told, not_told) == ()
    (blocker,) = fits(not_told, told, missing_on="node7")
    assert (blocker.feature, blocker.word, blocker.bit) == ("md-clear", "cpuid:0x7.0.edx", 10)
    assert "at risk" in blocker.because
    assert meet(told, not_told) == told  # the pool accumulates it


# -- incompatible ------------------------------------------------------------------------------------


@given(any_vendor(), any_vendor(), any_vendor())
def test_conflicts_absorb_and_keep_their_reasons(a: FeatureSet, b: FeatureSet, c: FeatureSet) -> None:
    assert meet(a, meet(b, c)) == meet(meet(a, b), c)
    assert meet(a, b) == meet(b, a)
    for one in (meet(a, b), meet(meet(a, b), c)):
        assert meet(one, one) == one
        if one.conflicts:
            wider = meet(one, c)
            assert {conflict.word for conflict in wider.conflicts} >= {
                conflict.word for conflict in one.conflicts
            }
            assert fits(one, a) and fits(a, one), "what is incompatible fits nothing, and nothing fits it"


def test_three_vendors_are_all_named() -> None:
    names = (0x756E6547, 0x68747541, 0x6F677948)
    word = CATALOG.equal_words[0]
    met = meet_all(FeatureSet.of(ARCHITECTURE, {word: name}) for name in names)
    (conflict,) = met.conflicts
    assert conflict.word == word and conflict.values == tuple(sorted(names))
    assert word not in met.words
    assert {f"{name:#x}" for name in names} <= set(conflict.describe().replace(",", " ").split())
    (blocker,) = fits(FeatureSet.empty(ARCHITECTURE), met)
    assert "'Genu'" in blocker.because and "'Auth'" in blocker.because and "'Hygo'" in blocker.because


# -- dependencies ------------------------------------------------------------------------------------


def by_feature(measured: dict[str, int]) -> dict[str, int]:
    """Raw words as the judged features' values; a word that is absent is at its bottom."""
    values = {}
    for feature in NAMES.by_name.values():
        rule = rules.RULES.get(feature.rule)
        if rule is not None and not feature.whole:  # a control is a part of its word: test_controls.py
            word = measured.get(feature.word)
            mask = (1 << feature.width) - 1
            value = rule.bottom(feature.width) if word is None else word >> feature.shift & mask
            values[feature.name] = rule.meet(value, value)
    return values


def holding(measured: dict[str, int]) -> dict[str, int]:
    """The same, with what holds for a limit: without one of its own a guest has as many as phys-bits."""
    values = by_feature(measured)
    most = values["phys-bits"]
    values["guest-phys-bits"] = min(values["guest-phys-bits"] or most, most)
    return values


def grouped(a: dict[str, int], b: dict[str, int], lower: dict[str, int]) -> dict[str, int]:
    """`lower` with the words that are one value together dropped where a and b differ in any of them."""
    for lead, others in CATALOG.groups:
        names = [feature.name for word in (lead, *others) for feature in NAMES.by_place[word]]
        if any(a[name] != b[name] for name in names):
            lower.update(dict.fromkeys(names, 0))
    return lower


def to_raw(values: dict[str, int]) -> dict[str, int]:
    measured: dict[str, int] = {}
    for name, value in values.items():
        feature = NAMES.by_name[name]
        measured[feature.word] = measured.get(feature.word, 0) | value << feature.shift
    return measured


@given(raw())
def test_closing_is_contracting_and_idempotent(measured: dict[str, int]) -> None:
    closed = FeatureSet.of(ARCHITECTURE, measured)
    assert FeatureSet.of(ARCHITECTURE, closed.words) == closed
    assert FeatureSet.of(ARCHITECTURE, closed.explicit()) == closed
    opened = holding(measured)
    for name, value in holding(closed.words).items():
        feature = NAMES.by_name[name]
        if feature.name == "guest-phys-bits":
            assert value <= opened[name]
        elif feature.rule != rules.EQUAL:
            assert rules.RULES[feature.rule].meet(value, opened[name]) == value, name


@given(raw(), raw())
def test_closing_is_monotone(a: dict[str, int], b: dict[str, int]) -> None:
    ours, theirs = holding(a), holding(b)
    lower = {
        name: rules.RULES[NAMES.by_name[name].rule].meet(value, theirs[name]) for name, value in ours.items()
    }
    closed = FeatureSet.of(ARCHITECTURE, to_raw(grouped(ours, theirs, lower)))
    assert below(closed, FeatureSet.of(ARCHITECTURE, a))
    assert closed == meet(FeatureSet.of(ARCHITECTURE, a), FeatureSet.of(ARCHITECTURE, b))


@given(SETS)
def test_no_feature_stands_without_its_base(one: FeatureSet) -> None:
    for feature in NAMES.by_name.values():
        rule = rules.RULES.get(feature.rule)
        if rule is None or feature.whole:  # controls come and go with their word
            continue
        mask = (1 << feature.width) - 1
        if one.value(feature.word) >> feature.shift & mask != rule.bottom(feature.width):
            for text in feature.requires:
                name, _, least = text.partition(">=")
                base = NAMES.by_name[name.lstrip("!")]
                # a control that must be 1 is a base too
                value = one.value(base.word) >> base.shift & 1 if base.whole else one.field(base.name)
                assert not value if name.startswith("!") else value >= int(least or "1", 0), (
                    feature.name,
                    text,
                )


def test_the_full_set_keeps_every_rule_alive() -> None:
    """Else the laws above would hold of sets that closing emptied."""
    full = FeatureSet.of(ARCHITECTURE, FULL)
    alive = {
        feature.rule
        for feature in NAMES.by_name.values()
        if feature.rule in rules.RULES
        and full.field(feature.name) != rules.RULES[feature.rule].bottom(feature.width)
    }
    assert alive == set(rules.RULES) & {feature.rule for feature in NAMES.by_name.values()}


def test_a_lost_component_takes_its_features() -> None:
    """Intel's and AMD's AVX-512 state lie at different offsets (SDM and APM, CPUID leaf 0xD)."""
    states = {"0xd_0_eax": 0xE7, "0xd_2_eax": 0x100, "0xd_2_ebx": 0x240, "0x1_0_ecx": 1 << 26 | 1 << 28}
    chain = {"0x1_0_edx": 0x0F8BFBFF, "0x7_0_ebx": 1 << 5 | 1 << 16 | 1 << 30}
    sizes = {"0xd_5_eax": 0x40, "0xd_6_eax": 0x200, "0xd_7_eax": 0x400}
    places = {"0xd_5_ebx": 0x440, "0xd_6_ebx": 0x480, "0xd_7_ebx": 0x680}
    elsewhere = {"0xd_5_ebx": 0x340, "0xd_6_ebx": 0x380, "0xd_7_ebx": 0x580}
    a = make(**states, **chain, **sizes, **places)
    assert a.field("avx512bw") == 1
    met = meet(a, make(**states, **chain, **sizes, **elsewhere))
    assert met.field("avx2") == 1
    assert [met.field(name) for name in ("avx512f", "avx512bw", "xcr0-opmask", "xcr0-hi16-zmm")] == [0] * 4
    assert met.value("cpuid:0xd.0.eax") == 0x7


def test_a_legal_zero_of_a_group_is_a_value_and_a_difference_drops_all_of_it() -> None:
    """Leaf 0x14 of Broadwell: no subleaf 1. A register that is 0 there is not what another host has."""
    lm = {"0x1_0_edx": 0x0F8BFBFF, "0x7_0_ebx": 1 << 25}
    broadwell = make(**lm, **{"0x14_0_ebx": 1, "0x14_0_ecx": 0xF})
    assert broadwell.field("intel-pt") == 1 and meet(broadwell, broadwell) == broadwell
    for word in ("0x14_0_eax", "0x14_1_eax", "0x14_1_ebx"):
        other = make(**lm, **{"0x14_0_ebx": 1, "0x14_0_ecx": 0xF, word: 1})
        assert other.field("intel-pt") == 1
        met = meet(broadwell, other)
        assert met == meet(other, broadwell) == meet_all([other, broadwell] * 20)
        assert met == make(**lm) and met.field("intel-pt") == 0
        name = f"cpuid:{word.replace('_', '.')}"
        assert [blocker.word for blocker in fits(broadwell, other)] == [name]
        assert [blocker.word for blocker in fits(other, broadwell)] == [name]
        assert fits(met, broadwell) == fits(met, other) == ()


def test_a_component_with_other_flags_is_another_component() -> None:
    """Bit 1 of ECX moves it in the compacted image (SDM vol. 1, 13.4.3)."""
    states = {"0x1_0_ecx": 1 << 26 | 1 << 28, "0xd_0_eax": 7, "0xd_2_eax": 0x100, "0xd_2_ebx": 0x240}
    states["0x1_0_edx"] = 0x0F8BFBFF
    plain, aligned = make(**states), make(**states, **{"0xd_2_ecx": 2})
    assert plain.field("avx") == aligned.field("avx") == 1
    assert meet(plain, aligned).field("avx") == meet_all([plain, aligned] * 20).field("avx") == 0
    assert {blocker.feature for blocker in fits(plain, aligned)} == {"xsave-avx-flags"}


WIDTHS = [
    # guest's phys-bits and guest-phys-bits, the host's, and whether it fits (APM vol. 3, 0x80000008 EAX)
    ((46, 0), (46, 46), True),
    ((46, 46), (46, 0), True),
    ((46, 0), (52, 48), True),
    ((52, 0), (52, 48), False),
    ((52, 48), (52, 0), True),
    ((52, 52), (52, 48), False),
    ((46, 48), (46, 46), True),
    ((39, 39), (46, 40), True),
]


@pytest.mark.parametrize(("guest", "host", "fit"), WIDTHS)
def test_an_unset_guest_width_is_the_physical_one(
    guest: tuple[int, int], host: tuple[int, int], fit: bool
) -> None:
    ours, theirs = (make(**{"0x80000008_0_eax": own << 16 | most}) for most, own in (guest, host))
    assert (fits(ours, theirs) == ()) is fit
    met = meet(ours, theirs)
    assert (met == ours) is fit
    assert met.field("phys-bits") == min(guest[0], host[0])
    assert limit(met) == min(limit(ours), limit(theirs))
    assert meet_all([theirs, ours] * 20) == met
    if fit and guest[1] in (0, guest[0]):
        assert met.field("guest-phys-bits") == 0, (
            "what bounds nothing is left unset: older VMMs have no name for it"
        )


# -- identity, digest, documents ---------------------------------------------------------------------


@given(SETS, SETS)
def test_equal_sets_have_equal_digests_and_no_other(a: FeatureSet, b: FeatureSet) -> None:
    assert (a == b) == (a.digest() == b.digest()) == (diff(a, b) == ())
    again = FeatureSet.of(ARCHITECTURE, dict(reversed(a.words.items())))
    assert again == a and hash(again) == hash(a) and again.digest() == a.digest()


@given(SETS)
def test_a_document_round_trips(a: FeatureSet) -> None:
    read = {word: words.parse_value(word, text) for word, text in a.to_json().items()}
    assert FeatureSet.of(ARCHITECTURE, read) == a
    assert list(a.to_json()) == sorted(a.words, key=words.order)


@given(SETS, SETS)
def test_diff_names_every_field_that_differs(a: FeatureSet, b: FeatureSet) -> None:
    found, theirs = diff(a, b), by_feature(b.explicit())
    differing = {name for name, value in by_feature(a.explicit()).items() if value != theirs[name]}
    # a control stands for the word that it is a part of
    assert {NAMES.by_name[row.feature].whole or row.feature for row in found} == differing
    assert [(row.b, row.a) for row in found] == [(row.a, row.b) for row in diff(b, a)]
    for row in found:
        assert (a.field(row.feature), b.field(row.feature)) == (row.a, row.b)
        assert row.to_json()["feature"] == row.feature


def test_digest_tells_conflicts_and_architectures_apart() -> None:
    a = FeatureSet.of(ARCHITECTURE, dict(zip(CATALOG.equal_words, INTEL, strict=True)))
    b = FeatureSet.of(ARCHITECTURE, dict(zip(CATALOG.equal_words, AMD, strict=True)))
    nothing = FeatureSet.empty(ARCHITECTURE)
    digests = {one.digest() for one in (a, b, nothing, meet(a, b), FeatureSet("arm64", {}))}
    assert len(digests) == 5
    assert nothing != object()


def test_unknown_words_and_bits_are_left_out() -> None:
    stray = FeatureSet.of(ARCHITECTURE, {"cpuid:0x1.0.edx": 1 << 10, "cpuid:0x99.0.eax": 5, "msr:0x10": 1})
    assert stray == FeatureSet.empty(ARCHITECTURE)
    assert stray.value("cpuid:0x99.0.eax") == 0


@pytest.mark.parametrize("word", WORDS)
def test_each_word_of_the_catalogue_can_be_held_and_differs_from_nothing(word: str) -> None:
    value = FULL[word] ^ CATALOG.words[word].or_mask
    one = FeatureSet.of(ARCHITECTURE, {**FULL, word: value})
    other = FeatureSet.of(ARCHITECTURE, {key: item for key, item in FULL.items() if key != word})
    assert one.value(word) & ~CATALOG.words[word].judged == 0
    assert (one == other) == (diff(one, other) == ())
    if any(word in others and lead in other.words for lead, others in CATALOG.groups):
        assert not below(other, FeatureSet.of(ARCHITECTURE, FULL)), "its 0 is another value of the whole"
    elif word not in CATALOG.equal_words:
        assert below(other, FeatureSet.of(ARCHITECTURE, FULL))
