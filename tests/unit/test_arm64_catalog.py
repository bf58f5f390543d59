# SPDX-License-Identifier: LGPL-2.1-or-later
"""The arm64 tables: every field of Linux's has its place, sign and rule; the laws hold on sets of them."""

from __future__ import annotations

import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import numbers

from kvmneg.errors import UsageError
from kvmneg.features import catalog, featureset, rules
from kvmneg.features.featureset import FeatureSet, fits, meet, meet_all

HERE = Path(__file__).parent
CATALOG, NAMES = catalog.load("arm64"), catalog.names("arm64")
PFR0, PFR1, ISAR1 = "arm64:0x603000000013c020", "arm64:0x603000000013c021", "arm64:0x603000000013c031"
MMFR0, MMFR1, MMFR3 = (f"arm64:0x603000000013c03{n}" for n in "89b")
ZFR0, DFR0, CTR = "arm64:0x603000000013c024", "arm64:0x603000000013c028", "arm64:0x603000000013d801"
VLS, INIT = "arm64:0x606000000015ffff", "arm:vcpu-features"


class Row(NamedTuple):
    """One line of data/arm64_id_fields.csv."""

    register: str
    id: str
    field: str
    shift: str
    width: str
    sign: str
    rule: str
    safe: str
    kvm_rule: str
    settable: str


def _table() -> list[Row]:
    lines = (HERE / "data" / "arm64_id_fields.csv").read_text("utf-8").splitlines()
    return [Row(*line.split(", ")) for line in lines if not line.startswith("#")]


TABLE = _table()
FIELDS = [row for row in TABLE if row.field != "-"]
# rule, sign and safe value of Linux → the rule of a field; of one bit in brackets
EXPECTED = {
    ("LOWER_SAFE", "unsigned", "0"): "minimum", ("LOWER_SAFE", "unsigned", "1"): "minimum",
    ("LOWER_SAFE", "signed", "0"): "signed-minimum", ("LOWER_SAFE", "signed", "15"): "signed-minimum",
    ("HIGHER_SAFE", "unsigned", "0"): "highest", ("HIGHER_OR_ZERO_SAFE", "unsigned", "0"): "maximum",
    ("EXACT", "unsigned", "0"): "equal-or-drop", ("EXACT", "unsigned", "1"): "equal-or-one",
    ("EXACT", "unsigned", "2"): "equal-or-two", ("-", "unsigned", "-"): "match", ("-", "signed", "-"): "match",
}  # fmt: skip
ONE_BIT = {"minimum": "and", "equal-or-drop": "and"}  # the same lattices
# Where the rule is another one, with the reason in the table.
OTHERWISE = {
    "aa64pfr1-mte-frac": "match", "aa64mmfr4-e2h0": "match", "gmid-bs": "match", "dczid-bs": "match",
    "dczid-dzp": "or", "cntfrq": "match", "zcr-len": "dynamic", "smcr-len": "dynamic", "smcr-fa64": "dynamic",
    "smcr-ezt0": "dynamic", "mpamidr-pmg-max": "match", "mpamidr-vpmr-max": "match", "mpamidr-has-hcr": "match",
    "mpamidr-partid-max": "match",
}  # fmt: skip
# Kernels between those that the table was made of: measured, or in the kernels' history.
EARLIER = {
    "aa64mmfr1-hcx": "6.18",
    "aa64pfr1-df2": "6.17",
    "aa64mmfr3-sctlrx": "6.17",
    "aa64dfr0-pmuver": "6.2",
}
PARTLY = {
    "aa64dfr0-debugver": "from 6", "dfr0-copdbg": "from 6", "dfr0-perfmon": "0 or from 3", "aa64pfr0-el0": "from 1",
    "aa64pfr0-el1": "from 1", "ctr-l1ip": "from 2",
}  # fmt: skip


def test_the_table_is_whole() -> None:
    assert len({row.register for row in TABLE}) == 53
    assert len(FIELDS) == 437


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: f"{row.register}.{row.field}")
def test_every_field_has_its_place_its_rule_and_its_name(row: Row) -> None:
    place = f"{row.register}.{row.field}" if row.field != "bits31_0" else row.register
    feature = NAMES.feature(place)
    assert (feature.word, feature.shift, feature.width) == (f"arm64:{row.id}", int(row.shift), int(row.width))
    rule = EXPECTED[
        "LOWER_SAFE" if row.kvm_rule != "-" else row.rule, row.sign, "0" if row.kvm_rule != "-" else row.safe
    ]
    if feature.width == 1:
        rule = ONE_BIT.get(rule, rule)
    assert feature.rule == OTHERWISE.get(feature.name, rule)
    assert feature.why or feature.rule in ("and", "minimum")
    assert feature.title and "no named values" not in feature.title


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: f"{row.register}.{row.field}")
def test_what_user_space_can_set_is_what_the_kernels_let_through(row: Row) -> None:
    feature = NAMES.feature(f"{row.register}.{row.field}" if row.field != "bits31_0" else row.register)
    since, _, values = feature.settable.partition(", ")
    first = "6.3" if row.register == "CLIDR_EL1" else "" if row.settable == "-" else row.settable
    assert since == EARLIER.get(feature.name, first)
    assert values == PARTLY.get(feature.name, "")


def test_every_register_is_a_word() -> None:
    assert {f"arm64:{row.id}" for row in TABLE} <= set(CATALOG.words)


def test_a_feature_is_found_by_the_names_of_linux_and_qemu() -> None:
    assert NAMES.feature("ID_AA64PFR0_EL1.FP").name == "aa64pfr0-fp"
    assert [NAMES.feature(name).name for name in ("sve", "pauth", "pmu", "mte", "aes")] == [
        "aa64pfr0-sve", "vcpu-ptrauth-address", "vcpu-pmu-v3", "aa64pfr1-mte", "aa64isar0-aes",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="several features"):
        NAMES.feature("paca")  # APA, API or APA3


def test_zero_is_present_and_absent_is_not_granted() -> None:
    nothing = FeatureSet.empty("arm64")
    assert [nothing.field(f"aa64pfr0-{name}") for name in ("fp", "advsimd")] == [15, 15]
    assert [nothing.field(f"aa64mmfr0-{name}") for name in ("tgran4", "tgran64", "tgran16")] == [15, 15, 0]
    assert nothing.field("aa64dfr0-doublelock") == 15
    assert nothing.field("aa64mmfr1-specsei") == 15
    assert nothing.field("ctr-l1ip") == 2
    with_fp = FeatureSet.of("arm64", {PFR0: 0x11})
    assert (with_fp.field("aa64pfr0-fp"), with_fp.field("aa64pfr0-el1")) == (0, 1)


# word → value of two hosts, what they merge to
MERGES = [
    ({PFR0: 0x11_0011}, {PFR0: 0x0012}, PFR0, 0x11),  # half precision on one, AArch32 at EL0 on the other
    ({PFR0: 0x11}, {PFR0: 0xFF_0011}, PFR0, 0xFF_0011),  # no floating point at all on one
    ({MMFR0: 0xF000_0000_0000_0025}, {MMFR0: 0x0F10_1124}, MMFR0, 0x0F00_0024),  # 64K granules absent on one, PARange
    ({MMFR1: 0x0100_0000}, {MMFR1: 0x2}, MMFR1, 0x0100_0000),  # SErrors by speculation on one
    ({CTR: 0x8444_C004}, {CTR: 0xB444_8003}, CTR, 0x8444_8003),  # PIPT and VIPT, cleaning needed on one
    ({CTR: 0x8444_C004}, {CTR: 0x8504_C004}, CTR, 0x8504_C004),  # the larger write-back granule, ERG not told on one
    ({DFR0: 0x8}, {DFR0: 0x6}, DFR0, 0x6),
    ({ISAR1: 0x10, INIT: 0x60}, {ISAR1: 0x100, INIT: 0x60}, ISAR1, 0),  # two algorithms of signing
    ({ISAR1: 0x10, INIT: 0x60}, {ISAR1: 0x10, INIT: 0x60}, ISAR1, 0x10),
    ({ISAR1: 0x10, INIT: 0x60}, {ISAR1: 0x10, INIT: 0x0}, ISAR1, 0),  # the other's VMM would not get it
    ({VLS: 0b1011, INIT: 0x10}, {VLS: 0b1111, INIT: 0x10}, VLS, 0b11),
    ({VLS: 0b1011, INIT: 0x10}, {VLS: 0b1100, INIT: 0x10}, INIT, 0),  # no length in common: no SVE
    ({VLS: 1, INIT: 0x10, PFR0: 1 << 32, ZFR0: 1}, {VLS: 1, INIT: 0x10, PFR0: 1 << 32, ZFR0: 0x11}, ZFR0, 1),
    ({VLS: 1, INIT: 0x10, PFR0: 1 << 32, ZFR0: 1}, {PFR0: 0, ZFR0: 0}, ZFR0, 0),
    ({MMFR3: 0x0101}, {MMFR3: 0x0100}, MMFR3, 0),  # permission indirection without TCR2_EL1
    ({PFR1: 0xF00_0000_0200}, {PFR1: 0}, PFR1, 0),  # MTE_frac means something with MTE only
    ({"arm64:0x6030000000140000": 0x1_0003, INIT: 4}, {"arm64:0x6030000000140000": 0x1_0001, INIT: 4},
     "arm64:0x6030000000140000", 0x1_0001),
    ({"arm64:0x6030000000160002": 0b11}, {"arm64:0x6030000000160002": 0b10}, "arm64:0x6030000000160002", 0),
]  # fmt: skip


@pytest.mark.parametrize(("a", "b", "word", "met"), MERGES)
def test_two_hosts_merge(a: dict[str, int], b: dict[str, int], word: str, met: int) -> None:
    one, other = FeatureSet.of("arm64", a), FeatureSet.of("arm64", b)
    for merged in (meet(one, other), meet(other, one)):
        assert hex(merged.value(word)) == hex(met)
        assert fits(merged, one) == fits(merged, other) == ()


# what a host offers that a guest was promised, and what blocks
FITS = [
    ({PFR0: 0x0}, {PFR0: 0xFF_0000}, ["aa64pfr0-fp", "aa64pfr0-advsimd"]),
    ({PFR0: 0xFF_0000}, {PFR0: 0x0}, []),
    ({MMFR1: 0}, {MMFR1: 1 << 24}, ["aa64mmfr1-specsei"]),
    ({CTR: 0x8444_C004}, {CTR: 0x8444_8004}, ["ctr-l1ip"]),
    ({VLS: 0b11, INIT: 0x10}, {VLS: 0b101, INIT: 0x10}, ["sve-lengths"]),
    ({"arm64:0x6030000000160003": 1, "arm64:0x6030000000160002": 1}, {"arm64:0x6030000000160002": 1},
     ["hypercall-discover-impl-version"]),
]  # fmt: skip


@pytest.mark.parametrize(("guest", "host", "blocked"), FITS)
def test_a_guest_fits_a_host(guest: dict[str, int], host: dict[str, int], blocked: list[str]) -> None:
    found = fits(FeatureSet.of("arm64", guest), FeatureSet.of("arm64", host))
    assert [blocker.feature for blocker in found] == blocked


# -- the laws ----------------------------------------------------------------------------------------


def _values(word: str) -> st.SearchStrategy[int]:
    rule = CATALOG.words[word]
    parts = [
        numbers(field.rule, field.width).map(lambda value, shift=field.shift: value << shift)
        for field in rule.fields
    ]
    return st.tuples(*parts, st.integers(0, rule.bits_mask).map(lambda value: value & rule.bits_mask)).map(
        sum
    )


def _raw() -> st.SearchStrategy[dict[str, int]]:
    base = {word: rule.and_mask for word, rule in CATALOG.words.items()} | {VLS: 0b11, INIT: 0x7C}
    words = st.lists(st.sampled_from(sorted(CATALOG.words)), max_size=10, unique=True)
    changes = words.flatmap(lambda some: st.fixed_dictionaries({word: _values(word) for word in some}))
    return st.tuples(st.sampled_from(({}, base)), changes).map(lambda row: {**row[0], **row[1]})


SETS = _raw().map(lambda words: FeatureSet.of("arm64", words))


@given(SETS, SETS, SETS)
def test_meet_is_a_semilattice(a: FeatureSet, b: FeatureSet, c: FeatureSet) -> None:
    assert meet(a, b) == meet(b, a)
    assert meet(a, meet(b, c)) == meet(meet(a, b), c)
    assert meet(a, a) == a
    assert fits(meet(a, b), a) == fits(meet(a, b), b) == ()


@given(SETS)
def test_nothing_is_below_everything(one: FeatureSet) -> None:
    assert meet(one, FeatureSet.empty("arm64")) == FeatureSet.empty("arm64")
    assert fits(FeatureSet.empty("arm64"), one) == ()


@given(st.lists(SETS, min_size=1, max_size=5))
def test_many_meet_as_two_do(sets: list[FeatureSet]) -> None:
    many = max(featureset._MANY, len(sets))
    assert meet_all([sets[n % len(sets)] for n in range(many)]) == reduce(meet, sets)


@given(SETS)
def test_what_is_canonical_stays_as_it_is(one: FeatureSet) -> None:
    assert FeatureSet.of("arm64", one.explicit()) == one


def test_each_architecture_is_loaded_alone() -> None:
    code = (
        "import sys; from kvmneg.features import catalog; catalog.load('arm64');"
        "assert not [n for n in sys.modules if n.endswith(('_x86_64', '_names'))]"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)


def test_rules_that_only_one_architecture_has_are_in_use() -> None:
    used = {feature.rule for feature in NAMES.by_name.values()}
    assert {
        rules.SIGNED_MINIMUM,
        rules.HIGHEST,
        rules.EQUAL_OR_ONE,
        rules.EQUAL_OR_TWO,
        rules.MATCH,
        rules.PREFIX,
    } <= used
