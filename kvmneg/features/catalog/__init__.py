# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every word and bit is called, its rule, its dependencies.

The tables are the TOML files beside this one; the build compiles them (compile.py), so that loading costs an
import. Merging needs only masks and rules; names are loaded when somebody asks for a name.
"""

from __future__ import annotations

from kvmneg.errors import UsageError
from kvmneg.features import rules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from kvmneg.features.catalog.controls import Control


_WIDEST = (1 << 64) - 1  # no word has more bits
_LONGEST_NAME = 64  # of what is looked up when a name is mistyped: comparing costs time by length


def _tables(name: str) -> Any:
    """A compiled module beside this one. Not by importlib: at start-up that costs more than the tables."""
    return __import__(f"{__name__}._{name}", fromlist=("",))


class Field:
    """A numeric field of a word: where it lies and the functions of its rule.

    `unset` is the lowest bit of the number of the same word that holds where this one is 0, None of a field in
    which 0 is a value like any other. Such a limit at or above that number is none, and its bottom is the number's.
    """

    __slots__ = ("bottom", "clear", "fits", "mask", "meet", "rule", "shift", "unset", "width")

    def __init__(self, shift: int, width: int, rule: str, unset: int | None = None) -> None:
        functions = rules.RULES[rule]
        self.shift = shift
        self.width = width
        self.mask = (1 << width) - 1
        self.rule = rule
        self.meet = functions.meet
        self.fits = functions.fits
        self.clear = ~(self.mask << shift)
        self.unset = unset
        self.bottom = functions.bottom(width) if unset is None else 0

    def limit(self, value: int) -> int:
        """Of a limit that may be unset: what holds, in a word's value."""
        most = value >> (self.unset or 0) & self.mask
        return min(value >> self.shift & self.mask or most, most)


class WordRules:
    """How one word merges.

    Its masks of single bits by rule, its numbers, its bottom, the bits that some row describes (`known`: what
    lies outside nobody has classified), and those that come and go with what they are built on (`follow`).
    """

    __slots__ = (
        "all_and", "and_mask", "bits_mask", "bottom", "fields", "follow", "hint_mask", "judged", "known",
        "limits", "or_mask", "ranges", "unjudged", "word",
    )  # fmt: skip

    def __init__(self, row: tuple[str, int, int, int, tuple[tuple[Any, ...], ...], int, int]) -> None:
        self.word, self.and_mask, self.or_mask, self.hint_mask, fields, self.known, self.follow = row
        self.all_and = not self.or_mask and not fields
        self.bits_mask = self.judged = self.and_mask | self.or_mask | self.hint_mask
        self.bottom = self.or_mask
        self.fields: tuple[Field, ...] = ()
        self.ranges: tuple[Field, ...] = ()
        self.limits: tuple[Field, ...] = ()
        if fields:  # most words have none, and this is most of what loading a catalogue costs
            self._add(tuple(Field(*field) for field in fields))
        self.unjudged = _WIDEST ^ self.judged

    def _add(self, fields: tuple[Field, ...]) -> None:
        self.fields = fields
        # the fields whose value may contradict itself
        self.ranges = tuple(field for field in fields if field.rule in rules.RANGES)
        self.limits = tuple(field for field in fields if field.unset is not None)
        for field in fields:
            self.judged |= field.mask << field.shift
            self.bottom |= field.bottom << field.shift


# (mask, bottom, base, base's bottom, field, least): `mask` of a word needs `field` of `base` to be `least` or more; a
# `least` of 0 is an or-field that is clear. `field` is a mask and `least` stands at its place, so that a test is one
# operation. A plain tuple, as the build makes it: closing unpacks hundreds of them for each set.
Requirement = tuple[int, int, str, int, int, int]
# a word that needs something, the bits that do, their bottom, and what they need
Closing = tuple[str, int, int, tuple[Requirement, ...]]


def is_met(need: Requirement, base_value: int) -> bool:
    """Whether the base's value is enough for what needs it."""
    value = base_value & need[4]
    return value >= need[5] if need[5] else not value


class Catalog:
    """The rules of one architecture: words by address, whole leaves, dependencies, constants."""

    __slots__ = (
        "architecture", "built_before", "built_on", "closing", "equal_words", "groups", "leaves", "limited",
        "particular", "policy", "requirements", "state_capabilities", "state_msrs", "unjudged", "words",
    )  # fmt: skip

    def __init__(self, architecture: str) -> None:
        if architecture not in available():
            raise UsageError(
                f"no catalogue for architecture {architecture!r}",
                hint=f"there is one for: {', '.join(available())}",
            )
        tables = _tables(architecture)
        self.architecture = architecture
        self.words = {row[0]: WordRules(row) for row in tables.WORDS}
        # each word's bits that are not judged: a dictionary of their own, as each measurement asks for all of them
        self.unjudged = {word: rule.unjudged for word, rule in self.words.items()}
        # the words whose bottom is not zero, or whose value may contradict itself
        self.particular = tuple(rule for rule in self.words.values() if rule.bottom or rule.ranges)
        # a must-be-equal field is a word of its own (compile.py sees to it)
        self.equal_words = tuple(
            word
            for word, rule in self.words.items()
            if any(field.rule == rules.EQUAL for field in rule.fields)
        )
        # words with a limit that may be unset
        self.limited = tuple(rule for rule in self.words.values() if rule.limits)
        # words that are equal together or dropped together: the one that is 0 only where all are, and the others
        self.groups: tuple[tuple[str, tuple[str, ...]], ...] = tables.GROUPS
        self.leaves: dict[str, str] = tables.LEAVES
        # by the word that needs; as far as there is no circle, words come after the words they are built on
        self.requirements: dict[str, tuple[Requirement, ...]] = tables.REQUIREMENTS
        # the same with the bits that need something, and their bottom: often a set has none of them
        self.closing: dict[str, Closing] = {
            word: (word, *tables.DEPENDENTS[word], needs) for word, needs in self.requirements.items()
        }
        # what there is to close when a word changed: the words with a need of it
        self.built_on: dict[str, tuple[str, ...]] = tables.BUILT_ON
        # of these the words that do not come after it: one pass over all words in their order leaves only them to do
        self.built_before: dict[str, tuple[str, ...]] = tables.BUILT_BEFORE
        # index of an MSR → the word and the bit that stand for it as state
        self.state_msrs: dict[int, tuple[str, int]] = tables.STATE_MSRS
        # (word, bit, kvm: word, mask of its answer) of the state that a capability tells about
        self.state_capabilities: tuple[tuple[str, int, str, int], ...] = tables.STATE_CAPABILITIES
        # (word, mask, value) of the constants that every guest gets
        self.policy: tuple[tuple[str, int, int], ...] = tables.POLICY

    def leaf_rule(self, word: str) -> str | None:
        """The rule of the whole leaf (or subleaf, or word) that `word` belongs to, where it has one."""
        leaf, _, rest = word.partition(".")
        subleaf = f"{leaf}.{rest.partition('.')[0]}"
        return self.leaves.get(leaf) or self.leaves.get(subleaf) or self.leaves.get(word)

    def unknown_bits(self, word: str, value: int) -> int:
        """The bits of a measured value that no row classifies: never offered to a guest."""
        known = self.words.get(word)
        if known is not None:
            return value & ~known.known
        return 0 if self.leaf_rule(word) else value


class Feature:
    """What people call one field. `requires` as in the table; aliases are "" where the tool has none."""

    __slots__ = (
        "libvirt", "linux", "mask", "name", "qemu", "requires", "rule", "settable", "shift", "title", "vendor", "why",
        "width", "withheld", "word",
    )  # fmt: skip

    def __init__(self, row: tuple[Any, ...]) -> None:
        self.name: str
        self.word: str
        self.shift: int
        self.width: int
        self.rule: str
        self.requires: tuple[str, ...]
        self.title: str
        self.why: str
        self.withheld: str
        self.qemu: str
        self.linux: str
        self.libvirt: str
        self.vendor: str
        self.settable: str  # arm64: the upstream kernel from which user space can set it, and what it takes
        (
            self.name, self.word, self.shift, self.width, self.rule, self.requires, self.title, self.why,
            self.withheld, self.qemu, self.linux, self.libvirt, self.vendor, self.settable,
        ) = row  # fmt: skip
        self.mask = ((1 << self.width) - 1) << self.shift

    def of(self, value: int) -> int:
        """The feature's own value in a word's."""
        return value >> self.shift & ((1 << self.width) - 1)

    @property
    def is_bit(self) -> bool:
        """Whether it is bits that are granted one by one: only by name, and 0 where they are not."""
        return self.rule in (rules.AND, rules.HINT)

    @property
    def whole(self) -> str:
        """Of a single control the name of the word that it is a part of (controls.py), "" else."""
        return ""

    def given_to(self, value: int) -> int:
        """A word's value with this feature in it."""
        return value | self.mask

    def taken_from(self, value: int) -> int:
        """A word's value without this feature."""
        return value & ~self.mask

    @property
    def bases(self) -> Iterator[tuple[str, int]]:
        """What it is built on: (name, least value), 0 for an or-feature that must be clear."""
        for text in self.requires:
            name, _, least = text.partition(">=")
            yield name.lstrip("!"), 0 if text.startswith("!") else int(least or "1", 0)


class Names:
    """All features of one architecture by name, by alias, and by place: a word's lowest bit first.

    `controls` are the single controls of words that merge whole; by place there is such a word only. `default1` are the
    controls of each such word that are 1 where they are not offered.
    """

    __slots__ = ("by_alias", "by_name", "by_place", "controls", "default1")

    def __init__(self, architecture: str) -> None:
        tables = _tables(f"{architecture}_names")
        self.by_name = {row[0]: Feature(row) for row in tables.FEATURES}
        self.by_place: dict[str, list[Feature]] = {}
        self.by_alias: dict[str, list[Feature]] = {}
        for feature in self.by_name.values():
            self.by_place.setdefault(feature.word, []).append(feature)
        self.default1: dict[str, int] = tables.DEFAULT1
        self.controls = self._controls(tables.CONTROLS)
        for feature in self.by_name.values():
            for alias in {feature.qemu, feature.linux, feature.libvirt, feature.vendor} - {"", feature.name}:
                self.by_alias.setdefault(alias, []).append(feature)
        for features in self.by_place.values():
            features.sort(key=lambda feature: feature.shift)

    def _controls(self, rows: tuple[tuple[Any, ...], ...]) -> dict[str, tuple[Control, ...]]:
        """The single controls by word, put among the names."""
        from kvmneg.features.catalog.controls import Control  # built on Feature, which is here

        found: dict[str, tuple[Control, ...]] = {}
        for row in rows:
            control = Control(row, self.default1[row[1]])
            found[control.word] = (*found.get(control.word, ()), control)
            self.by_name[control.name] = control
        return found

    def feature(self, name: str) -> Feature:
        """The feature of that name or unambiguous alias; raises UsageError with what is near it."""
        found = self.by_name.get(name)
        if found is not None:
            return found
        aliased = self.by_alias.get(name, [])
        if len(aliased) == 1:
            return aliased[0]
        if aliased:
            both = " or ".join(feature.name for feature in aliased)
            raise UsageError(f"{name!r} is used for several features", hint=f"say {both}")
        from difflib import get_close_matches  # only for a mistake

        near = get_close_matches(name[:_LONGEST_NAME], [*self.by_name, *self.by_alias], 3)
        raise UsageError(
            f"no feature is called {name[:_LONGEST_NAME]!r}",
            hint=f"did you mean {', '.join(near)}?" if near else "`kvmneg features` lists them",
        )

    def at(self, word: str, mask: int) -> list[Feature]:
        """The features of a word that lie in `mask`, lowest bit first."""
        return [feature for feature in self.by_place.get(word, ()) if feature.mask & mask] if mask else []

    def within(self, word: str, value: int) -> Iterator[Feature]:
        """The features that a word's value has: those of its bits, and the single controls that it offers."""
        yield from self.at(word, value)
        for control in self.controls.get(word, ()):
            if control.of(value):
                yield control


_catalogs: dict[str, Catalog] = {}
_names: dict[str, Names] = {}


def load(architecture: str) -> Catalog:
    """The rules of an architecture, made once. Raises UsageError where there is no catalogue for it."""
    found = _catalogs.get(architecture)
    if found is None:
        found = _catalogs[architecture] = Catalog(architecture)
    return found


def names(architecture: str) -> Names:
    """The names of an architecture, made once. Raises UsageError where there is no catalogue for it."""
    found = _names.get(architecture)
    if found is None:
        load(architecture)
        found = _names[architecture] = Names(architecture)
    return found


def available() -> tuple[str, ...]:
    """The architectures this build has a catalogue for."""
    return ("x86_64", "arm64")
