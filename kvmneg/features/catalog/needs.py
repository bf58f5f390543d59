# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build-time only: the dependencies of a catalogue, arranged as closing wants them, so that loading is free.

    arranged([(word, mask, base, field, least), …], {word: bottom}) → {table's name: rows}

`mask` of a word needs `field` of `base` to be `least` or more, where 0 is an or-field that is clear. What the
tables hold stands in catalog/__init__.py, Catalog.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

_Need = tuple[str, int, str, int, int]


def arranged(needs: list[_Need], bottom_of: dict[str, int]) -> dict[str, dict[str, Any]]:
    """REQUIREMENTS, DEPENDENTS, BUILT_ON and BUILT_BEFORE, the words of each in the order of `needs`."""
    requirements: dict[str, tuple[tuple[int, int, str, int, int, int], ...]] = {}
    dependents: dict[str, tuple[int, int]] = {}
    built_on: dict[str, dict[str, None]] = {}
    for word, mask, base, field, least in needs:
        row = (mask, bottom_of[word] & mask, base, bottom_of[base], field, least)
        requirements[word] = (*requirements.get(word, ()), row)
        every = dependents.get(word, (0, 0))[0] | mask
        dependents[word] = every, every & bottom_of[word]
        built_on.setdefault(base, {})[word] = None
    built = {base: tuple(words) for base, words in built_on.items()}
    place = {word: number for number, word in enumerate(requirements)}
    before = {
        base: tuple(word for word in words if place[word] <= place[base])
        for base, words in built.items()
        if base in place
    }
    return {
        "REQUIREMENTS": requirements,
        "DEPENDENTS": dependents,
        "BUILT_ON": built,
        "BUILT_BEFORE": {base: words for base, words in before.items() if words},
    }


def bases_first(names: Iterable[str], bases: Callable[[str], list[str]]) -> list[str]:
    """The names, each after what it is built on where there is no circle: closing needs few rounds."""
    placed: dict[str, None] = {}
    begun: set[str] = set()

    def place(name: str) -> None:
        if name in begun:
            return
        begun.add(name)
        for base in bases(name):
            place(base)
        placed[name] = None

    for name in names:
        place(name)
    return list(placed)
