# SPDX-License-Identifier: LGPL-2.1-or-later
"""A feature set as two integers, so that a pool of any size meets in a few operations for each set.

Merging is a product of small lattices, one a field, and each of them fits into one of two that an integer
holds for all fields at once:

    bits      meet is `&`. And-bits and hints as they are, or-bits complemented, VMX controls as an or half and
              an and half; a value that must be equal stands beside its complement, and where two differ, what
              is left of them is no value beside its complement.
    numbers   meet is the smallest. A lane for each number, holding its rank in the rule's order, below a free
              bit, the guard: one subtraction tells by the guards whether any lane is smaller than the
              smallest so far, which is seldom the case.

Only the meet is here; closing dependencies and naming conflicts stay with FeatureSet.
"""

from __future__ import annotations

from functools import reduce
from operator import and_
from struct import Struct

from kvmneg.features import catalog as catalogs
from kvmneg.features import rules

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

    from kvmneg.features.catalog import Catalog, Field, WordRules

    Packed: TypeAlias = tuple[int, int]  # bits, numbers with every guard set

_LOW = 0xFFFF_FFFF
_SAME = rules.EQUAL_OR_SAFE | {rules.EQUAL}
_IN_BITS = _SAME | {rules.VMX_CONTROLS}
_ODD = rules.PREFIX  # the order of a tree, which no product of numbers and bits has
_CODES = ((8, "B"), (16, "H"), (32, "I"), (64, "Q"))  # of struct: the least that holds a word's judged bits
_KEPT_RANKS = 4096  # combinations of the numbers whose rank is no plain number


class _Order:
    """A rule's order as the order of plain numbers: the rank of a value and back. `bits`: of the rank."""

    __slots__ = ("bits", "rank", "value")

    def __init__(self, bits: int, rank: Callable[[int], int], value: Callable[[int], int]) -> None:
        self.bits = bits
        self.rank = rank
        self.value = value


def _signature_rank(signature: int) -> int:
    family, model, whole = rules.signature_key(signature)
    return family << 40 | model << 32 | whole


def _orders(rule: str, width: int) -> tuple[_Order, ...]:
    """The orders whose product is a rule's; none where the rank is the number itself."""
    mask = (1 << width) - 1
    if rule == rules.MINIMUM:
        return ()
    simple: dict[str, tuple[Callable[[int], int], Callable[[int], int]]] = {
        # 0 is no limit: above all
        rules.MINIMUM_NONZERO: (lambda value: value - 1 & mask, lambda rank: rank + 1 & mask),
        # the largest is the lowest, but for 0, which is none at all
        rules.MAXIMUM: (lambda value: -value & mask, lambda rank: -rank & mask),
        rules.HIGHEST: (lambda value: ~value & mask, lambda rank: ~rank & mask),
        # -1 is the lowest, and what is less the same
        rules.SIGNED_MINIMUM: (lambda value: value + 1 if value < 8 else 0, lambda rank: rank - 1 & mask),
    }
    if rule in simple:
        return (_Order(width, *simple[rule]),)
    if rule == rules.LOWEST:  # 9 bits of family, 8 of model, the signature
        return (_Order(49, _signature_rank, lambda rank: rank & _LOW),)
    if rule in (rules.VERSION_RANGE, rules.INTERVAL):  # the highest of the lowest, the lowest of the highest
        half = width // 2
        low = (1 << half) - 1
        return (
            _Order(half, lambda value: ~value & low, lambda rank: ~rank & low),
            _Order(half, lambda value: value >> half, lambda rank: rank << half),
        )
    raise ValueError(f"no order of rule {rule}")


class _Place:
    """Where a field of a word lies in `bits`, or its rank in `numbers`: `mask` bits from `place` on.

    `order` makes a value of a rank that is none; `twin` is the place of a complement.
    """

    __slots__ = ("field", "mask", "order", "place", "twin", "word")

    def __init__(self, word: str, field: Field, place: int, order: _Order | None = None) -> None:
        self.word = word
        self.field = field
        self.place = place
        self.order = order
        self.mask = (1 << order.bits) - 1 if order else field.mask
        self.twin = 0

    def rank(self, value: int | None) -> int:
        """Of the word's value, None where the set does not have it, at its place."""
        own = self.field.bottom if value is None else value >> self.field.shift & self.field.mask
        return (self.order.rank(own) if self.order else own) << self.place

    def value(self, numbers: int) -> int:
        """The field's part of the word."""
        rank = numbers >> self.place & self.mask
        return (self.order.value(rank) if self.order else rank) << self.field.shift


class _Buffer:
    """Words one after another: struct's format, the words with their bottoms, the bits they take."""

    __slots__ = ("bits", "bottoms", "format", "words")

    def __init__(self) -> None:
        self.format = "<"
        self.words: list[str] = []
        self.bottoms: list[int] = []
        self.bits = 0

    def add(self, rule: WordRules, spare: int = 0) -> int:
        """The place of a word; `spare` bytes above it stay free."""
        size, code = next(row for row in _CODES if rule.judged.bit_length() <= row[0])
        place = self.bits
        self.format += code + "x" * spare
        self.words.append(rule.word)
        self.bottoms.append(rule.bottom)
        self.bits += size + 8 * spare
        return place


class Layout:
    """Where each field of a catalogue lies in the two integers. Use `layout()`: making one passes all rules."""

    __slots__ = (
        "_bits_end", "_bottoms", "_equal", "_flip", "_groups", "_guards", "_keep", "_lanes", "_numbers_end",
        "_plain", "_plain_odd", "_ranges", "_ranked", "_ranks", "_same", "_same_mask", "_same_start",
        "_single", "_struct", "_words", "odd",
    )  # fmt: skip

    def __init__(self, catalog: Catalog) -> None:
        buffer = _Buffer()
        self._place_bits(catalog, buffer)
        self._place_numbers(catalog, buffer)
        # (word, field) of what is met outside: see FeatureSet
        self.odd = [
            (word, field)
            for word, rule in catalog.words.items()
            for field in rule.fields
            if field.rule == _ODD
        ]
        self._ranges = [(word, field) for word, rule in catalog.words.items() for field in rule.ranges]
        # of the words that are one value together, the one that is dropped for all
        self._groups = {word: lead for lead, others in catalog.groups for word in others}
        self._struct = Struct(buffer.format)
        self._words, self._bottoms = buffer.words, buffer.bottoms

    def _place_bits(self, catalog: Catalog, buffer: _Buffer) -> None:
        self._flip = self._keep = 0  # what is complemented; what `bits` takes
        self._single: list[tuple[str, int, int]] = []  # (word, place, mask of what is read back as it is)
        self._same: list[_Place] = []
        # words with values that must be equal come last: their complements are one piece then
        for rule in sorted(
            catalog.words.values(), key=lambda rule: any(f.rule in _SAME for f in rule.fields)
        ):
            fields = [field for field in rule.fields if field.rule in _IN_BITS]
            if not (rule.bits_mask or fields):
                continue
            place, mask = buffer.add(rule), rule.bits_mask
            self._flip |= rule.or_mask << place
            for field in fields:
                if field.rule == rules.VMX_CONTROLS:
                    self._flip |= _LOW << place + field.shift
                    mask |= field.mask << field.shift
                else:
                    self._same.append(_Place(rule.word, field, place + field.shift))
                    self._keep |= field.mask << place + field.shift
            self._keep |= mask << place
            self._single.append((rule.word, place, mask))
        self._bits_end = buffer.bits
        self._same_start = min((one.place for one in self._same), default=buffer.bits)
        self._same_mask = 0
        for one in self._same:
            self._same_mask |= one.mask << one.place - self._same_start
            one.twin = one.place - self._same_start + self._bits_end
        self._equal = [one for one in self._same if one.field.rule == rules.EQUAL]

    def _place_numbers(self, catalog: Catalog, buffer: _Buffer) -> None:
        """Every second number of a word goes to a second row of lanes: so each has a free bit above it."""
        rows: tuple[list[_Place], list[_Place]] = [], []
        ranked: list[tuple[str, Field]] = []
        for rule in catalog.words.values():
            numbers = [field for field in rule.fields if field.rule not in _IN_BITS and field.rule != _ODD]
            plain = [field for field in numbers if field.rule == rules.MINIMUM]
            place = buffer.add(rule, spare=1) - self._bits_end if plain else 0
            for number, field in enumerate(sorted(plain, key=lambda field: field.shift)):
                rows[number & 1].append(_Place(rule.word, field, place + field.shift))
            ranked += [(rule.word, field) for field in numbers if field.rule != rules.MINIMUM]
        self._plain, self._plain_odd = (sum(lane.mask << lane.place for lane in row) for row in rows)
        self._numbers_end = buffer.bits - self._bits_end
        for lane in rows[1]:
            lane.place += self._numbers_end
        self._ranked: list[_Place] = []
        place = 2 * self._numbers_end
        for word, field in ranked:
            for order in _orders(field.rule, field.width):
                self._ranked.append(_Place(word, field, place, order))
                place += order.bits + 1
        self._ranks: dict[tuple[int | None, ...], int] = {}
        # by the place of the guard above it
        self._lanes = {
            lane.place + lane.mask.bit_length(): lane for lane in (*rows[0], *rows[1], *self._ranked)
        }
        self._guards = sum(1 << guard for guard in self._lanes)

    def pack(self, words: Mapping[str, int], conflicts: Sequence[str] = ()) -> Packed:
        """The two integers of a canonical set; `conflicts` are the words on which it has no value any more."""
        get = words.get
        raw = int.from_bytes(self._struct.pack(*map(get, self._words, self._bottoms)), "little")
        twins = ~(raw >> self._same_start) & self._same_mask
        bits = (raw ^ self._flip) & self._keep | twins << self._bits_end
        for field in self._equal:
            if field.word in conflicts:
                bits &= ~(field.mask << field.place | field.mask << field.twin)
            elif field.word not in words:  # nothing is known of it: above every value
                bits |= field.mask << field.place | field.mask << field.twin
        raw >>= self._bits_end
        numbers = raw & self._plain | (raw & self._plain_odd) << self._numbers_end
        return bits, numbers | self._rank(get) | self._guards

    def _rank(self, get: Callable[[str], int | None]) -> int:
        """The lanes whose rank is not the number itself; few combinations occur, so they are kept."""
        values = tuple([get(lane.word) for lane in self._ranked])
        found = self._ranks.get(values)
        if found is None:
            found = sum(lane.rank(value) for lane, value in zip(self._ranked, values, strict=True))
            if len(self._ranks) < _KEPT_RANKS:
                self._ranks[values] = found
        return found

    def meet(self, sets: Sequence[Packed]) -> Packed:
        """The meet of one or more, dependencies not closed."""
        bits = reduce(and_, [one[0] for one in sets])
        guards = self._guards
        least = sets[0][1] ^ guards
        for _, guarded in sets:
            above = (guarded - least) & guards
            if above != guards:
                least = self._lower(least, guarded, above ^ guards)
        return bits, least | guards

    def _lower(self, least: int, guarded: int, below: int) -> int:
        """`least` with the lanes taken over whose guards are in `below`."""
        while below:
            guard = below.bit_length() - 1
            lane = self._lanes[guard]
            least ^= ((least ^ guarded) >> lane.place & lane.mask) << lane.place
            below ^= 1 << guard
        return least

    def unpack(self, packed: Packed) -> tuple[dict[str, int], list[str]]:
        """The words, and those that must be equal and are not. Words at their bottom are among them."""
        bits, numbers = packed
        plain = bits ^ self._flip
        found = {word: plain >> place & mask for word, place, mask in self._single}
        conflicts, dropped = [], []
        for one in self._same:
            value, twin = bits >> one.place & one.mask, bits >> one.twin & one.mask
            if value ^ twin == one.mask:
                found[one.word] |= value << one.field.shift
            elif one.field.rule == rules.EQUAL:
                if value & twin != one.mask:
                    conflicts.append(one.word)
            else:
                found[one.word] |= one.field.bottom << one.field.shift
                if one.word in self._groups:
                    dropped.append(self._groups[one.word])
        # whole words; what is built on them, and the others of the group, go when the set is closed
        found.update(dict.fromkeys(dropped, 0))
        for lane in self._lanes.values():
            found[lane.word] = found.get(lane.word, 0) | lane.value(numbers)
        for word, range_ in self._ranges:
            part = found[word] >> range_.shift & range_.mask
            found[word] ^= (part ^ range_.meet(part, part)) << range_.shift
        return found, conflicts


_layouts: dict[str, Layout] = {}


def layout(architecture: str) -> Layout:
    """The layout of an architecture, made once. Raises UsageError where there is no catalogue for it."""
    found = _layouts.get(architecture)
    if found is None:
        found = _layouts[architecture] = Layout(catalogs.load(architecture))
    return found
