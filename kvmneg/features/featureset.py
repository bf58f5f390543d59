# SPDX-License-Identifier: LGPL-2.1-or-later
"""FeatureSet, the one value type: hosts, baselines, fences and contracts are feature sets.

A feature set is an immutable map word → value of one architecture, in a canonical form: bits that nobody
classified are masked out, dependencies are closed (a feature without its base is at its bottom), and a word
at its bottom is not kept. So equality is equality of meaning, and a word that is absent is not granted; only
of a vendor, which must be equal everywhere, absent means that nothing is known.

Three pure functions carry everything: `meet(a, b)`, `fits(guest, host)`, `diff(a, b)`. On canonical sets meet
is commutative, associative and idempotent, and `meet(a, b)` fits a and b. Hosts that cannot share a baseline
at all (different vendors) meet in a set with `conflicts`: those never go away again, keep every value seen,
and fit nothing.
"""

from __future__ import annotations

from functools import reduce

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.difference import Blocker, Conflict, Difference
from kvmneg.sha import sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from kvmneg.features.catalog import Catalog, Closing, WordRules
    from kvmneg.features.packed import Packed

__all__ = ["Blocker", "Conflict", "Difference", "FeatureSet", "diff", "fits", "meet", "meet_all", "within"]


_MANY = 32  # sets from which on packing them pays: they will meet again when one of them changes


class FeatureSet:
    """An immutable, canonical map word → value. Build one by `of`; `words` must not be changed."""

    __slots__ = ("_demands", "_digest", "_hash", "_packed", "architecture", "conflicts", "words")

    def __init__(
        self, architecture: str, canonical: dict[str, int], conflicts: tuple[Conflict, ...] = ()
    ) -> None:
        self.architecture = architecture
        self.words = canonical
        self.conflicts = conflicts
        self._hash: int | None = None
        self._digest: str | None = None
        self._packed: Packed | None = None
        self._demands: dict[str, int] | None = None

    @classmethod
    def of(cls, architecture: str, measured: Mapping[str, int]) -> FeatureSet:
        """The canonical set of raw values; words and bits without a rule are left out."""
        catalog = catalogs.load(architecture)
        kept: dict[str, int] = {}
        rule_of, unjudged_of = catalog.words, catalog.unjudged.get
        for word, value in measured.items():
            if value:  # most words of most hosts: zero, and zero is the bottom of most
                unjudged = unjudged_of(word)
                if unjudged is not None:
                    # most values are judged whole: a pool of sets then shares the reports' numbers
                    judged = value & rule_of[word].judged if value & unjudged else value
                    if judged:
                        kept[word] = judged
        for rule in catalog.particular:
            found = measured.get(rule.word)
            if found is not None:
                kept.pop(rule.word, None)
                found = _uncontradicted(rule, found & rule.judged)
                if found != rule.bottom:
                    kept[rule.word] = found
        # nothing else can be at its bottom: looking at each word again would cost a tenth of a measurement's decoding
        for word in _close(catalog, kept):
            if kept[word] == rule_of[word].bottom:
                del kept[word]
        return cls(architecture, kept)

    @classmethod
    def empty(cls, architecture: str) -> FeatureSet:
        """The set that grants nothing: every word at its bottom."""
        catalogs.load(architecture)
        return cls(architecture, {})

    def value(self, word: str) -> int:
        """The word's value, its bottom where the set does not have it, 0 for a word without rules."""
        found = self.words.get(word)
        if found is None:
            rule = catalogs.load(self.architecture).words.get(word)
            return rule.bottom if rule else 0
        return found

    def field(self, name: str) -> int:
        """The value of a feature by name (kvmneg.features.catalog); raises UsageError for an unknown name."""
        feature = catalogs.names(self.architecture).feature(name)
        return feature.of(self.value(feature.word))

    def explicit(self) -> dict[str, int]:
        """Every word of the catalogue with its value, in the order of addresses."""
        catalog = catalogs.load(self.architecture)
        return {word: self.value(word) for word in sorted(catalog.words, key=words.order)}

    def to_json(self) -> dict[str, str]:
        """The words that are not at their bottom, as documents carry them."""
        return {
            word: words.text_value(word, self.words[word]) for word in sorted(self.words, key=words.order)
        }

    def digest(self) -> str:
        """SHA-256 of the architecture and the words: "sha256:" and 64 hexadecimal digits."""
        if self._digest is None:
            lines = [self.architecture, *(f"{word} {value}" for word, value in self.to_json().items())]
            lines += [f"conflict {conflict}" for conflict in self.conflicts]
            self._digest = "sha256:" + sha256("\n".join(lines).encode()).hexdigest()
        return self._digest

    def demands(self) -> dict[str, int]:
        """What a guest here may not be without: word → the bits by which its bottom does not fit. Often empty."""
        if self._demands is None:  # kept: a host's offer is held against each guest's set
            rule_of = catalogs.load(self.architecture).words
            found = ((rule_of[word], value) for word, value in self.words.items())
            unfit = (
                (rule.word, unfit_bits(rule, rule.bottom, value)) for rule, value in found if not rule.all_and
            )
            self._demands = {word: bits for word, bits in unfit if bits}
        return self._demands

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FeatureSet):
            return NotImplemented
        return (
            self.architecture == other.architecture
            and self.words == other.words
            and self.conflicts == other.conflicts
        )

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.architecture, frozenset(self.words.items()), self.conflicts))
        return self._hash

    def __repr__(self) -> str:
        return f"<FeatureSet {self.architecture} of {len(self.words)} words, {len(self.conflicts)} conflicts>"


def _uncontradicted(rule: WordRules, value: int) -> int:
    """The value with each range that contradicts itself (must-be-1 bits that may not be) dropped."""
    for field in rule.ranges:
        part = value >> field.shift & field.mask
        value ^= (part ^ field.meet(part, part)) << field.shift
    return value


def _unlimited(rule: WordRules, value: int) -> int:
    """The value with each limit that bounds nothing left unset: so that equal sets are equal words."""
    for field in rule.limits:
        if value >> field.shift & field.mask and field.limit(value) == field.limit(value & field.clear):
            value &= field.clear
    return value


def _closed(catalog: Catalog, kept: dict[str, int]) -> dict[str, int]:
    """`kept` with every unmet dependency at its bottom and without the words at their bottom."""
    _close(catalog, kept)
    rule_of = catalog.words
    return {word: value for word, value in kept.items() if value != rule_of[word].bottom}


def _close(catalog: Catalog, kept: dict[str, int]) -> dict[str, None]:
    """Put every unmet dependency in `kept` at its bottom; the words that this changed."""
    value_of, closing = kept.get, catalog.closing
    pending: Iterable[Closing] = closing.values()
    every_changed: dict[str, None] = {}
    built_on = catalog.built_before
    while pending:  # few rounds: bases mostly come before what is built on them
        changed: dict[str, None] = {}
        for word, every, none, needs in pending:
            value = value_of(word)
            if value is None or value & every == none:
                continue
            for mask, bottom, base, base_bottom, field, least in needs:
                if value & mask != bottom:
                    found = value_of(base, base_bottom) & field
                    if found < least if least else found:  # not is_met: 100 calls cost too much
                        kept[word] = value = value & ~mask | bottom
                        changed[word] = None
        every_changed |= changed
        built = {built: None for word in changed for built in built_on.get(word, ())}
        pending, built_on = [closing[word] for word in built], catalog.built_on
    for rule in catalog.limited:
        value = value_of(rule.word)
        if value:
            kept[rule.word] = _unlimited(rule, value)
            every_changed[rule.word] = None
    return every_changed


def _meet_word(rule: WordRules, a: int, b: int) -> int:
    value = a & b & (rule.and_mask | rule.hint_mask) | (a | b) & rule.or_mask
    for field in rule.fields:
        value |= field.meet(a >> field.shift & field.mask, b >> field.shift & field.mask) << field.shift
    return value


def _meet_open(catalog: Catalog, a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    """The words of both, met, dependencies not yet closed."""
    met: dict[str, int] = {}
    rule_of = catalog.words
    for word, value in a.items():
        other = b.get(word)
        if other == value:
            met[word] = value
        elif other is not None:
            rule = rule_of[word]
            met[word] = value & other if rule.all_and else _meet_word(rule, value, other)
    for lead, others in catalog.groups:
        if met.get(lead):
            for word in others:
                if a.get(word) != b.get(word):
                    met[lead] = 0  # and what they need goes with it, and all of them with that
                    break
    return met


def _meet_equal(catalog: Catalog, sets: Iterable[FeatureSet], met: dict[str, int]) -> tuple[Conflict, ...]:
    """Put the must-be-equal words into `met`; where sets disagree, the conflicts with all values seen.

    A set that does not have such a word says nothing about it: an unknown vendor is no other vendor.
    """
    seen: dict[str, set[int]] = {}
    for one in sets:
        for conflict in one.conflicts:
            seen.setdefault(conflict.word, set()).update(conflict.values)
        for word in catalog.equal_words:
            if word in one.words:
                seen.setdefault(word, set()).add(one.words[word])
    conflicts = []
    for word in sorted(seen, key=words.order):
        values = sorted(seen[word])
        if len(values) == 1:
            met[word] = values[0]
        else:
            met.pop(word, None)
            conflicts.append(Conflict(word, tuple(values)))
    return tuple(conflicts)


def meet(a: FeatureSet, b: FeatureSet) -> FeatureSet:
    """The greatest set that fits both. Raises ValueError where the architectures differ."""
    return meet_all((a, b))


def meet_all(sets: Iterable[FeatureSet]) -> FeatureSet:
    """The meet of one or more sets, equal ones counted once. Raises ValueError on none or two architectures.

    Dependencies are closed once, at the end: closing is an interior operator, so the result is the same as
    closing after every step.
    """
    every = list(sets)
    if len({one.architecture for one in every}) != 1:
        raise ValueError("meet needs one or more sets of one architecture")
    if len(every) >= _MANY:
        return _meet_many(every)
    distinct = list(dict.fromkeys(every))
    if len(distinct) == 1:
        return distinct[0]
    catalog = catalogs.load(distinct[0].architecture)
    met = reduce(lambda a, b: _meet_open(catalog, a, b), (one.words for one in distinct))
    conflicts = _meet_equal(catalog, distinct, met)
    return FeatureSet(distinct[0].architecture, _closed(catalog, met), conflicts)


def _meet_many(sets: list[FeatureSet]) -> FeatureSet:
    """`meet_all` on packed sets; each is packed at its first such meet and keeps that."""
    from kvmneg.features.packed import layout  # no guest's start meets so many

    architecture = sets[0].architecture
    catalog, places = catalogs.load(architecture), layout(architecture)
    packed = []
    for one in sets:
        if one._packed is None:
            one._packed = places.pack(one.words, [conflict.word for conflict in one.conflicts])
        packed.append(one._packed)
    met, unequal = places.unpack(places.meet(packed))
    for word, field in places.odd:
        values = {one.words.get(word, field.bottom) >> field.shift & field.mask for one in sets}
        met[word] = met.get(word, 0) | reduce(field.meet, values) << field.shift
    conflicts = _meet_equal(catalog, sets, met) if unequal else ()
    return FeatureSet(architecture, _closed(catalog, met), conflicts)


def unfit_bits(rule: WordRules, guest: int, host: int) -> int:
    """The bits of a word by which a guest's value does not fit a host's; a numeric field counts whole."""
    unfit = guest & ~host & rule.and_mask | host & ~guest & rule.or_mask
    for field in rule.fields:
        if field.unset is not None:
            own = host >> field.shift & field.mask  # where unset, the number it follows is what blocks
            if own and field.limit(guest) > own:
                unfit |= field.mask << field.shift
        elif not field.fits(guest >> field.shift & field.mask, host >> field.shift & field.mask):
            unfit |= field.mask << field.shift
    return unfit


def _unfit_words(guest: FeatureSet, host: FeatureSet) -> Iterator[tuple[str, int, int, int]]:
    """(word, guest's value, host's value, unfit bits) of each word that does not fit."""
    catalog = catalogs.load(guest.architecture)
    rule_of, promised, offered = catalog.words, guest.words, host.words
    for word, ours in promised.items():
        theirs = offered.get(word)
        if ours != theirs:  # most are equal: asking their rules costs ten times as much
            rule = rule_of[word]
            if theirs is None:
                theirs = rule.bottom
            unfit = ours & ~theirs & rule.and_mask if rule.all_and else unfit_bits(rule, ours, theirs)
            if unfit:
                yield word, ours, theirs, unfit
    for word, unfit in host.demands().items():
        if word not in promised:
            yield word, rule_of[word].bottom, offered[word], unfit
    for lead, others in catalog.groups:
        if lead in promised:
            for word in others:  # 0 on the guest: alone it would fit whatever the host has
                if word in offered and word not in promised:
                    yield word, 0, offered[word], rule_of[word].judged


def within(guest: FeatureSet, host: FeatureSet) -> bool:
    """Whether `guest` fits `host`: `fits` for who does not ask why not."""
    alike = guest.architecture == host.architecture and not (guest.conflicts or host.conflicts)
    return alike and next(_unfit_words(guest, host), None) is None


def fits(
    guest: FeatureSet, host: FeatureSet, *, missing_on: str = "this host", cause: str = "kvm"
) -> tuple[Blocker, ...]:
    """Why a guest that was promised `guest` cannot run on `host`: one blocker a feature, none when it can.

    `missing_on` and `cause` go into the blockers: who lacks it, and what takes it away as far as the caller
    knows ("kvm", "fence", "vmm", "silicon", …).
    """
    if guest.architecture != host.architecture:
        return (Blocker.of_architecture(guest.architecture, host.architecture, missing_on),)
    table = catalogs.names(guest.architecture)
    blockers: list[Blocker] = []
    for word, ours, theirs, unfit in sorted(_unfit_words(guest, host), key=lambda row: words.order(row[0])):
        for feature in table.at(word, unfit):
            values = feature.of(ours), feature.of(theirs)
            if word in table.controls:
                from kvmneg.features.catalog import controls  # few guests have nested VMX

                blockers += controls.unfit(feature, table.controls[word], values, missing_on, cause)
            else:
                blockers.append(Blocker.of_feature(feature, values, missing_on, cause))
    blockers += (
        Blocker.of_conflict(conflict, missing_on) for conflict in (*guest.conflicts, *host.conflicts)
    )
    return tuple(blockers)


def diff(a: FeatureSet, b: FeatureSet) -> tuple[Difference, ...]:
    """Every feature whose value differs, in the order of addresses; conflicts are not compared.

    Raises ValueError on mixed architectures.
    """
    if a.architecture != b.architecture:
        raise ValueError(f"cannot compare {a.architecture} with {b.architecture}")
    table = catalogs.names(a.architecture)
    found: list[Difference] = []
    for word in sorted({*a.words, *b.words}, key=words.order):
        ours, theirs = a.value(word), b.value(word)
        for feature in table.at(word, ours ^ theirs) if ours != theirs else ():
            if word in table.controls:
                from kvmneg.features.catalog import controls  # as in fits

                found += controls.differing(feature, table.controls[word], ours, theirs)
                continue
            place = feature.name, word, feature.shift, feature.width, feature.rule
            found.append(Difference(*place, feature.of(ours), feature.of(theirs)))
    return tuple(found)
