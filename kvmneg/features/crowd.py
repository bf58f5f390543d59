# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many guests' sets against many hosts: which of them do not fit, without comparing each with each. Pure.

Whether a set fits is decided word by word, and thousands of guests have a handful of values in a word, hundreds of
hosts too. So each pair of values is judged once. What does not fit, and why, `fits` tells of those that do not.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features.featureset import unfit_bits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvmneg.features.featureset import FeatureSet


class Crowd:
    """Sets, known by their place in the given sequence, to be held against hosts of one architecture."""

    __slots__ = ("_alone", "_catalog", "_everybody", "_judged", "_lost", "_odd", "_values", "architecture")

    def __init__(self, architecture: str, sets: Sequence[FeatureSet]) -> None:
        self.architecture = architecture
        self._catalog = catalogs.load(architecture)
        self._everybody = frozenset(range(len(sets)))
        # another architecture's, and those with a conflict, fit no host
        own = {n: one for n, one in enumerate(sets) if one.architecture == architecture and not one.conflicts}
        self._alone = self._everybody.difference(own)
        self._values: dict[str, dict[int, set[int]]] = {}  # word → value → the sets that have it
        for word, rule in self._catalog.words.items():
            found: dict[int, set[int]] = {}
            for place, one in own.items():
                found.setdefault(one.words.get(word, rule.bottom), set()).add(place)
            self._values[word] = found
        # registers that are one value together: where the guest's is absent, the host's has to be
        self._odd: dict[str, set[int]] = {}
        for lead, others in self._catalog.groups:
            for word in others:
                odd = {place for place, one in own.items() if lead in one.words and word not in one.words}
                self._odd.setdefault(word, set()).update(odd)
        # word → value of a host → the sets that do not fit it
        self._judged: dict[str, dict[int, frozenset[int]]] = {word: {} for word in self._values}
        # word → those that do not fit a host which does not have it
        lost = ((word, self._judge(word, self._catalog.words[word].bottom)) for word in self._values)
        self._lost = {word: places for word, places in lost if places}

    def unfit(self, host: FeatureSet, ignored: Callable[[str], bool] = lambda word: False) -> frozenset[int]:
        """The sets that do not fit a host; words that are `ignored` do not count."""
        if host.architecture != self.architecture or host.conflicts:
            return self._everybody
        found = self._alone
        offered, judged = host.words, self._judged
        for word, theirs in offered.items():
            places = judged[word].get(theirs)
            if places is None:
                places = judged[word][theirs] = self._judge(word, theirs)
            if places and not ignored(word):
                found |= places
        for word, places in self._lost.items():
            if word not in offered and not ignored(word):
                found |= places
        return found

    def _judge(self, word: str, theirs: int) -> frozenset[int]:
        rule = self._catalog.words[word]
        found: set[int] = set()
        for ours, places in self._values[word].items():
            if ours != theirs and unfit_bits(rule, ours, theirs):
                found |= places
        if theirs != rule.bottom:
            found |= self._odd.get(word, set())
        return frozenset(found)
