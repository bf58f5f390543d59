# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence: an admin's pinned feature set, an allow-list, as a text that people edit and diff.

    # kvmneg fence of x86_64
    architecture x86_64
    cpuid:0x7.0.ebx        0b1101_0001_1001_1111_0000_0111_1010_1011  # avx2 bmi1 bmi2 …
    cpuid:0x80000008.0.eax.phys-bits = 46

One line a word of single bits, all its bits written, and one line a number; of TSC rates "LOW-HIGH". A word that
is not named is hidden, a number that is not named is at its rule's bottom; only a limit that may be absent
(guest-phys-bits) is then absent. A fence that names no vendor holds for any. The comments are for people; reading
ignores them. State (state:…) whose feature is hidden is left out.

On arm64 lines of `registers ID …` list what every member of the pool has: what a guest may carry (`registers`). Where
there are none, nothing was said about other kernels than the host's own.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import BadInput, Incompatible
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet, fits
from kvmneg.policy import rates
from kvmneg.sha import sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmneg.features.catalog import Feature, WordRules

_REGISTERS_A_LINE = 5
_LOW = 0xFFFF_FFFF
_HEADLINE = "# kvmneg fence: 1 may be granted, 0 is hidden, a word that is not named is hidden"


class Fence:
    """A feature set pinned at a generation. `digest` is that of the set, so equal fences have equal digests.

    `floating`: nobody pinned it, it is the level that an unpinned host was at (kvmneg.policy.level).
    Raises Incompatible where the set is the meet of hosts that have no baseline.
    """

    __slots__ = ("floating", "generation", "granted", "registers")

    def __init__(
        self,
        granted: FeatureSet,
        generation: int = 0,
        *,
        registers: tuple[int, ...] = (),
        floating: bool = False,
    ) -> None:
        if granted.conflicts:
            blockers = [Blocker.of_conflict(conflict, "the pool") for conflict in granted.conflicts]
            raise Incompatible("there is no fence over hosts without a common baseline", blockers)
        self.granted = granted
        self.generation = generation
        self.registers = registers
        self.floating = floating

    @property
    def name(self) -> str:
        """What a refusal calls it."""
        return "the level this host floats at" if self.floating else f"fence generation {self.generation}"

    @property
    def because(self) -> str:
        """Why it hides what it does not name."""
        if self.floating:
            return "the host offers it by now, which raises no level by itself; `kvmneg fence unpin` does"
        return "the host offers it, the pinned fence does not name it"

    @property
    def digest(self) -> str:
        if not self.registers:
            return self.granted.digest()
        return (
            "sha256:"
            + sha256("\n".join([self.granted.digest(), *_registers(self.registers)]).encode()).hexdigest()
        )

    def unmet(
        self, offer: FeatureSet, *, missing_on: str = "this host", measured: Mapping[str, int] | None = None
    ) -> tuple[Blocker, ...]:
        """What the fence promises and `offer` does not hold: empty on a host that is not below its fence.

        `measured` are the raw words that the offer was made of, where they are known: what they say nothing about
        (kvmneg.policy.rates) breaks no fence.
        """
        unnamed = set(catalogs.load(offer.architecture).equal_words) - set(self.granted.words)
        found = fits(self.granted, offer, missing_on=missing_on)
        return tuple(
            blocker
            for blocker in found
            if blocker.word not in unnamed
            and (blocker.word != rates.WORD or rates.broken(self.granted, offer))
            and not (measured is not None and rates.unmeasured(blocker.word, measured))
        )

    def text(self) -> str:
        """The canonical text: the same set gives the same bytes."""
        lines = [_HEADLINE, f"architecture {self.granted.architecture}"]
        written = _written[self.granted.architecture]
        for word in sorted(self.granted.words, key=words.order):
            value = self.granted.words[word]
            last = written.get(word)
            if last is None or last[0] != value:
                last = written[word] = value, tuple(_lines(word, value, self.granted.architecture))
            lines += last[1]
        lines += _registers(self.registers)
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str, *, generation: int = 0, file: str = "fence") -> Fence:
        """Read a text. Raises BadInput with file and line for whatever is not exactly understood."""
        if len(text.encode("utf-8", "surrogatepass")) > limits.FENCE_BYTES:
            raise BadInput(f"larger than {limits.FENCE_BYTES} bytes", file=file)
        if text not in _last:
            reader = _Reader(file)
            read = reader.read(text), tuple(reader.registers)
            _last.clear()
            _last[text] = read
        granted, registers = _last[text]
        return cls(granted, generation, registers=registers)


# What was read last: a fence that is pinned is read as it comes, and again before it is stored.
_last: dict[str, tuple[FeatureSet, tuple[int, ...]]] = {}
# A word's lines as they were written last, and the value they are of: most fences differ in few words.
_written: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {one: {} for one in words.ARCHITECTURES}


def _lines(word: str, value: int, architecture: str) -> Iterator[str]:
    rule, names = catalogs.load(architecture).words[word], catalogs.names(architecture)
    bits = rule.bits_mask
    if bits:
        shown = " ".join([feature.name for feature in names.at(word, value & bits)])
        yield f"{word:<24} {_binary(word, value & bits)}" + (f"  # {shown}" if shown else "")
    for feature in names.at(word, rule.judged & ~bits):
        number = feature.of(value)
        if feature.rule == rules.INTERVAL:
            yield f"{word}.{feature.name} = {number & _LOW}-{number >> 32}"
            continue
        yield f"{word}.{feature.name} = {number if feature.width <= 16 else format(number, '#x')}"


def _registers(registers: tuple[int, ...]) -> Iterator[str]:
    for at in range(0, len(registers), _REGISTERS_A_LINE):
        yield " ".join(("registers", *(f"{one:#x}" for one in registers[at : at + _REGISTERS_A_LINE])))


def _binary(word: str, value: int) -> str:
    digits = f"{value:0{words.width(word)}b}"
    return "0b" + "_".join(digits[at : at + 4] for at in range(0, len(digits), 4))


def _interval(text: str) -> int:
    """LOW-HIGH as its lines have it; raises ValueError."""
    low, dash, high = (part.strip() for part in text.partition("-"))
    if not (dash and low.isdecimal() and high.isdecimal() and int(low) <= int(high) <= _LOW):
        raise ValueError(text)
    return int(high) << 32 | int(low)


class _Reader:
    """Reads one fence text, keeping file and line for what is wrong."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.line = 0
        self.architecture = ""
        self.rules: dict[str, WordRules] = {}
        self.values: dict[str, int] = {}
        self.registers: list[int] = []
        self.lines: dict[str, int] = {}  # of each word with bits and of each number

    def read(self, text: str) -> FeatureSet:
        # not splitlines(): a line separator of Unicode inside a comment would start a line that nobody sees
        for line, row in enumerate(text.split("\n"), 1):
            content = row.partition("#")[0].strip()
            if content:
                self.line = line
                self._row(content)
        self.line = 0
        if not self.architecture:
            raise self._wrong("names no architecture", 'the first line is like "architecture x86_64"')
        named = self._complete()
        granted = FeatureSet.of(self.architecture, named)
        for word, value in named.items():
            # state goes with the features that bring it: who hides a feature need not know what it carries
            if granted.value(word) != value and not word.startswith("state:"):
                self._explain(word, value, granted)
        return granted

    def _wrong(self, message: str, hint: str = "") -> BadInput:
        return BadInput(message, file=self.file, line=self.line, hint=hint)

    def _row(self, content: str) -> None:
        if content.startswith("architecture "):
            if self.architecture:
                raise self._wrong("names its architecture twice")
            architecture = content.split(None, 1)[1]
            if architecture not in catalogs.available():
                raise self._wrong(f"no catalogue for architecture {words.brief(architecture)}")
            self.architecture, self.rules = architecture, catalogs.load(architecture).words
            return
        if not self.architecture:
            raise self._wrong("the architecture comes first", 'like "architecture x86_64"')
        if content.startswith("registers "):
            self._registers(content.split()[1:])
            return
        name, equals, number = content.partition("=")
        if equals:
            self._number(name.rstrip(), number.lstrip())
            return
        parts = content.split()
        if len(parts) != 2:
            raise self._wrong(
                f"{words.brief(content)} is neither a word with its bits nor a number",
                "WORD 0b… or WORD.NAME = N",
            )
        self._bits(*parts)

    def _registers(self, ids: list[str]) -> None:
        if self.architecture != words.ARM64:
            raise self._wrong(f"{self.architecture} has no registers to carry")
        for text in ids:
            try:
                register = words.parse_register(text)
            except ValueError as error:
                raise self._wrong(str(error), "like 0x6030000000160000") from None
            if self.registers and register <= self.registers[-1]:
                raise self._wrong(f"{text} is not in its order, or given twice")
            self.registers.append(register)
        if len(self.registers) > limits.REGISTERS:
            raise self._wrong(f"more than {limits.REGISTERS} registers")

    def _once(self, name: str) -> None:
        if name in self.lines:
            raise self._wrong(f"{name} is given twice, first on line {self.lines[name]}")
        self.lines[name] = self.line

    def _rule(self, word: str) -> WordRules:
        rule = self.rules.get(word)
        if rule is None:
            raise self._wrong(
                f"{words.brief(word)} is no word of the catalogue", "`kvmneg features` lists them"
            )
        return rule

    def _bits(self, word: str, text: str) -> None:
        rule = self._rule(word)
        self._once(word)
        digits = text.removeprefix("0b").replace("_", "")
        if text[:2] != "0b" or len(digits) != words.width(word) or digits.strip("01"):
            raise self._wrong(f"{word} needs {words.width(word)} binary digits, like {_binary(word, 0)}")
        value = int(digits, 2)
        foreign = value & ~rule.bits_mask
        if foreign:
            place = foreign.bit_length() - 1
            raise self._wrong(
                f"{word}: no feature of one bit lies at {place}", "a number has a line of its own"
            )
        self.values[word] = self.values.get(word, 0) | value

    def _number(self, name: str, text: str) -> None:
        word, _, field_name = name.rpartition(".")
        rule = self._rule(word)
        feature = catalogs.names(self.architecture).by_name.get(field_name)
        if feature is None or feature.word != word or not feature.mask & rule.judged & ~rule.bits_mask:
            raise self._wrong(f"{words.brief(name)} is no number of the catalogue")
        self._once(name)
        try:
            number = _interval(text) if feature.rule == rules.INTERVAL else int(text, 0)
        except ValueError:
            raise self._wrong(f"{words.brief(text)} is no number") from None
        if not 0 <= number < 1 << feature.width:
            raise self._wrong(f"{name} is a number of {feature.width} bits")
        self.values[word] = self.values.get(word, 0) | number << feature.shift

    def _complete(self) -> dict[str, int]:
        """The values, with the bottom of what has no line in a word that has one."""
        complete = {}
        table = catalogs.names(self.architecture)
        for word, named in self.values.items():
            rule = self._rule(word)
            value = named if word in self.lines else named | rule.or_mask
            for feature in table.at(word, rule.bottom & ~rule.bits_mask):
                # a limit that may be absent is absent: its bottom would be a limit of one
                if f"{word}.{feature.name}" not in self.lines and feature.rule != rules.MINIMUM_NONZERO:
                    value |= rule.bottom & feature.mask
            complete[word] = value
        return complete

    def _explain(self, word: str, value: int, granted: FeatureSet) -> None:
        """Refuse what is granted without its base: taking it as hidden would hide the mistake."""
        lost = value & ~granted.value(word)
        for field in self._rule(word).limits:
            lost &= field.clear  # a limit that bounds nothing is left unset, and no lie
        for feature in catalogs.names(self.architecture).at(word, lost):
            self.line = self.lines.get(f"{word}.{feature.name}") or self.lines.get(word, 0)
            raise self._contradiction(feature)

    def _contradiction(self, feature: Feature) -> BadInput:
        if not feature.requires:
            return self._wrong(f"{feature.name} contradicts itself: its limits leave nothing")
        needs = ", ".join(feature.requires)
        return self._wrong(
            f"{feature.name} is granted without what it is built on, or contradicts itself",
            f"{feature.name} requires {needs}: grant these too, or take it out of {feature.word}",
        )
