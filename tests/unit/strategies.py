# SPDX-License-Identifier: LGPL-2.1-or-later
"""Feature sets for hypothesis, word by word and field by field from the catalogue, so that every rule occurs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from kvmneg.features import catalog, rules
from kvmneg.features.featureset import FeatureSet

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.features.catalog import Field

ARCHITECTURE = "x86_64"
CATALOG = catalog.load(ARCHITECTURE)
NAMES = catalog.names(ARCHITECTURE)
WORDS = sorted(CATALOG.words)
INTEL = (0x756E6547, 0x6C65746E, 0x49656E69)
AMD = (0x68747541, 0x444D4163, 0x69746E65)

RECORDED = ("intel-ice-lake", "amd-milan", "software-kvm")

# Values that meet each other: equal, off by one, contradicting themselves.
_POOLS = {
    rules.VMX_CONTROLS: (0, 0x7F_0000_0016, 0x3F_0000_0016, 0x7F_0000_0017, 0x1_0000_0016, 0xFFFF_FFFF << 32),
    rules.VERSION_RANGE: (0, 0x0101, 0x0201, 0x0102, 0x0302),
    rules.INTERVAL: (0, 0x2_0000_0001, 0x4_0000_0002, 0x3_0000_0003, 0x1_0000_0002, 0xFFFF_FFFF << 32),
    rules.LOWEST: (0, 0x606A6, 0xA00F11, 0x806F8, 0x100F42, 0xF4A),
    rules.EQUAL_OR_DROP: (0, 1, 0x240, 0x340),
}


def numbers(rule: str, width: int) -> st.SearchStrategy[int]:
    """Values of a field of that rule and width, near each other often enough to be equal."""
    mask = (1 << width) - 1
    pool = st.sampled_from([value & mask for value in _POOLS.get(rule, (0, 1, 2, 3, mask))])
    return pool | st.integers(0, mask)


def _numbers_of(field: Field) -> st.SearchStrategy[int]:
    return numbers(field.rule, field.width).map(lambda value: value << field.shift)


def word_values(word: str) -> st.SearchStrategy[int]:
    """Raw values of a word, also with bits that nobody classified."""
    rule = CATALOG.words[word]
    parts = [_numbers_of(field) for field in rule.fields]
    if rule.bits_mask:
        bits = st.integers(0, rule.bits_mask) | st.sampled_from((0, rule.bits_mask))
        parts.append(bits.map(lambda value: value & rule.bits_mask))
    stray = ~rule.judged & ((1 << 32) - 1)
    parts.append(st.sampled_from((0, stray)))
    return st.tuples(*parts).map(sum)


def _full() -> dict[str, int]:
    """Everything that can be granted at once: so that features survive closing their dependencies."""
    few = {rules.VMX_CONTROLS: 0xFFFF_FFFF << 32, rules.VERSION_RANGE: 0x0201, rules.MINIMUM_NONZERO: 0}
    few[rules.INTERVAL] = 0x0028_0000_0024_0000
    words = {}
    for word, rule in CATALOG.words.items():
        words[word] = rule.and_mask | rule.hint_mask
        for field in rule.fields:
            words[word] |= (few.get(field.rule, 0x40) & field.mask or field.mask) << field.shift
    return words


def _possible() -> dict[str, int]:
    """The full set as a CPU could have it: highest leaves, address bits, counters and XSAVE places that add up."""
    levels = {0x0: 0xFF, 0x7: 2, 0x8000_0000: 0x8000_00FF, 0xC000_0000: 0xC000_00FF}
    words = _full() | {f"cpuid:{leaf:#x}.0.eax": highest for leaf, highest in levels.items()}
    words |= {"cpuid:0x80000008.0.eax": 0x30_39_34, "cpuid:0xa.0.eax": 0x0830_0805, "kvm:xsave2": 0x1000}
    supervisor = 1 << 8 | 0x7F << 10  # SDM vol. 1, 13.1
    words["cpuid:0xd.0.eax"] &= ~supervisor
    for number in (number for number in range(2, 63) if f"cpuid:0xd.{number}.eax" in words):
        own = supervisor >> number & 1
        words[f"cpuid:0xd.{number}.ebx"] = 0 if own else 576 + 64 * number
        words[f"cpuid:0xd.{number}.ecx"] = own
    return words


def _recorded() -> list[dict[str, int]]:
    here = Path(__file__).parent / "data"
    documents = [json.loads((here / f"{name}.json").read_text("utf-8")) for name in RECORDED]
    return [{word: int(text, 16) for word, text in document["offer"].items()} for document in documents]


FULL = _full()
POSSIBLE = _possible()
BASES: list[dict[str, int]] = [{}, FULL, POSSIBLE, *_recorded()]


def raw(vendors: tuple[tuple[int, int, int] | None, ...] = (INTEL,)) -> st.SearchStrategy[dict[str, int]]:
    """Raw words of one host: a base, some words of it changed or left out, one of the vendors (None: unknown)."""
    some = st.lists(st.sampled_from(WORDS), max_size=8, unique=True)
    changes = some.flatmap(lambda words: st.fixed_dictionaries({word: word_values(word) for word in words}))
    left_out = st.lists(st.sampled_from(WORDS), max_size=3)
    return st.builds(_host, st.sampled_from(BASES), changes, left_out, st.sampled_from(vendors))


def _host(
    base: dict[str, int], changes: dict[str, int], left_out: list[str], vendor: tuple[int, int, int] | None
) -> dict[str, int]:
    words = {word: value for word, value in {**base, **changes}.items() if word not in left_out}
    for word, value in zip(CATALOG.equal_words, vendor or (0, 0, 0), strict=True):
        words[word] = value
    return words


def _set(words: dict[str, int]) -> FeatureSet:
    return FeatureSet.of(ARCHITECTURE, words)


def feature_sets(
    vendors: tuple[tuple[int, int, int] | None, ...] = (INTEL,),
) -> st.SearchStrategy[FeatureSet]:
    """Canonical sets; of one vendor unless told otherwise, so that any two have a meet without conflicts."""
    return raw(vendors).map(_set)


any_vendor: Callable[[], st.SearchStrategy[FeatureSet]] = lambda: feature_sets((INTEL, AMD, None))  # noqa: E731
