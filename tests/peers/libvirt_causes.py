# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where libvirt's baseline of some hosts and kvmneg's differ, and by which cause; the checked-in list of that.

Compared are the places, (word, bit), of libvirt's names that the catalogue names too and merges; what it never
merges (topology, mirrors of a guest's registers) is test_libvirt_recorded.py's `unmerged`. A cause is a claim
about each single occurrence, and found by looking at it, so that hundreds of occurrences are one honest line:

    polarity        + the bit's rule is `or`, and some of the hosts have it, not all
    filtered        + each host has it, on both sides, and libvirt's baseline does not
    unequal=BASE    - each host has it, and what it is built on in word BASE is not the same on them
    unread=BASE     - each host has it, and word BASE, on which it is built, was recorded of none of them
    without=BASE    - each host has it, and BASE says the same on all of them, which does not suffice
    unexplained       anything else: never listed

"+": only kvmneg's baseline has the bit, "-": only libvirt's. A line of the list is

    VERSION SIGN WORD BIT CAUSE WRONG: why
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.catalog import Feature
from kvmneg.features.featureset import FeatureSet, meet_all

if TYPE_CHECKING:
    from tests.peers.libvirt_data import CpuMap

WRONG = ("libvirt:", "kvmneg:", "neither:")
UNEXPLAINED = "unexplained"
NAMES = catalogs.names(words.X86_64)
_CATALOG = catalogs.load(words.X86_64)
_FIELDS = 5

Place = tuple[str, int]


class Host(NamedTuple):
    """One CPU: its words as they were read, kvmneg's set of them, and the names that libvirt is told."""

    name: str
    vendor: str
    raw: dict[str, int]
    offer: FeatureSet
    told: frozenset[str]


class Difference(NamedTuple):
    """One line of the list, or what would be one."""

    version: str
    sign: str
    word: str
    bit: int
    cause: str

    def __str__(self) -> str:
        return f"{self.version} {self.sign} {self.word} {self.bit} {self.cause} ({self.name})"

    @property
    def name(self) -> str:
        return " ".join(one.name for one in NAMES.within(self.word, 1 << self.bit) if one.shift == self.bit)


def compared(cpu_map: CpuMap) -> Iterator[tuple[str, Feature]]:
    """The names of libvirt's map with the features of the catalogue that are the same bits, and merge."""
    for name, places in cpu_map.places.items():
        for word, mask in places.items():
            for feature in NAMES.within(word, mask):
                if feature.mask == mask and feature.rule not in rules.UNMERGED:
                    yield name, feature


def differences(
    version: str, hosts: Sequence[Host], theirs: frozenset[str], cpu_map: CpuMap, prefix: str = ""
) -> set[Difference]:
    """How libvirt's baseline of the hosts differs from theirs; `prefix` restricts it to some words."""
    met = meet_all([host.offer for host in hosts])
    assert not met.conflicts, met.conflicts
    found = set()
    for name, feature in compared(cpu_map):
        if feature.word.startswith(prefix) and _has(met.words, feature) != (name in theirs):
            sign = "-" if name in theirs else "+"
            cause = _lost(feature, hosts, met) if name in theirs else _gained(name, feature, hosts)
            found.add(Difference(version, sign, feature.word, feature.shift, cause))
    return found


def _has(values: dict[str, int], feature: Feature) -> bool:
    return feature.of(values.get(feature.word, 0)) == feature.of(feature.mask)


def _gained(name: str, feature: Feature, hosts: Sequence[Host]) -> str:
    have = [_has(host.raw, feature) for host in hosts]
    if have != [name in host.told for host in hosts]:
        return UNEXPLAINED  # then libvirt was asked about other hosts
    if feature.rule == rules.OR and any(have) and not all(have):
        return "polarity"
    return "filtered" if all(have) else UNEXPLAINED


def _lost(feature: Feature, hosts: Sequence[Host], met: FeatureSet) -> str:
    if not all(_has(host.raw, feature) for host in hosts):
        return UNEXPLAINED
    bases = list(_unmet(feature, met))
    for base, field in bases:
        if len({host.raw.get(base, 0) & field for host in hosts}) > 1:
            return f"unequal={base}"
    for base, _ in bases:
        if not any(base in host.raw for host in hosts):
            return f"unread={base}"
    return f"without={bases[0][0]}" if bases else UNEXPLAINED


def _unmet(feature: Feature, met: FeatureSet) -> Iterator[Place]:
    """The words, and the part of each, on which the feature is built and that the baseline does not have."""
    for need in _CATALOG.requirements.get(feature.word, ()):
        if need[0] & feature.mask and not catalogs.is_met(need, met.value(need[2])):
            yield need[2], need[4]


def read(path: Path) -> set[Difference]:
    """The list. Raises ValueError naming the line for what is malformed or listed twice."""
    found: set[Difference] = set()
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not text.strip() or text.startswith("#"):
            continue
        line = _parse(text, f"{path.name}:{number}")
        if line in found:
            raise ValueError(f"{path.name}:{number}: listed twice")
        found.add(line)
    return found


def _parse(text: str, where: str) -> Difference:
    fields = text.split(maxsplit=_FIELDS + 1)
    if len(fields) != _FIELDS + 2 or fields[_FIELDS] not in WRONG or ": " not in fields[_FIELDS + 1]:
        raise ValueError(f"{where}: not VERSION SIGN WORD BIT CAUSE WRONG: SOURCE: why")
    version, sign, word, bit, cause = fields[:_FIELDS]
    if sign not in "+-" or not bit.isdecimal() or cause == UNEXPLAINED or "*" in text:
        raise ValueError(f"{where}: the sign, the bit or the cause cannot be listed")
    return Difference(version, sign, word, int(bit), cause)


def lines(found: Iterable[Difference]) -> str:
    """Differences as text for people, one a line."""
    return "".join(f"\n{one}" for one in sorted(found))
