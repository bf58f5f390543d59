# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading a fence's text (kvmneg.policy.fence_text). Pure.

Whatever is not exactly understood is refused with its line. Most texts differ from the last one in few rows: what its
rows mean is kept, for one text of each architecture.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy.fence_text import LOW, binary

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.catalog import Feature, WordRules

    # what a row with bits or a number means: what it is about, the word, the value there
    Row = tuple[str, str, int]

_rows: dict[str, dict[str, Row]] = {}  # of the text that was read last, by architecture


def _interval(text: str) -> int:
    """LOW-HIGH as its lines have it; raises ValueError."""
    low, dash, high = (part.strip() for part in text.partition("-"))
    if not (dash and low.isdecimal() and high.isdecimal() and int(low) <= int(high) <= LOW):
        raise ValueError(text)
    return int(high) << 32 | int(low)


class Reader:
    """Reads one fence text, keeping file and line for what is wrong."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.line = 0
        self.architecture = ""
        self.rules: dict[str, WordRules] = {}
        self.values: dict[str, int] = {}
        self.registers: list[int] = []
        self.lines: dict[str, int] = {}  # of each word with bits and of each number
        self.known: dict[str, Row] = {}
        self.rows: dict[str, Row] = {}

    def read(self, text: str) -> FeatureSet:
        # not splitlines(): a line separator of Unicode inside a comment would start a line that nobody sees
        for line, row in enumerate(text.split("\n"), 1):
            content = row.partition("#")[0].strip()
            if content:
                self.line = line
                known = self.known.get(content)
                if known is None:
                    self._row(content)
                else:
                    self._once(known[0])
                    self._take(content, known)
        self.line = 0
        if not self.architecture:
            raise self._wrong("names no architecture", 'the first line is like "architecture x86_64"')
        named = self._complete()
        granted = FeatureSet.of(self.architecture, named)
        for word, value in named.items():
            # state goes with the features that bring it: who hides a feature need not know what it carries
            if granted.value(word) != value and not word.startswith("state:"):
                self._explain(word, value, granted)
        _rows[self.architecture] = self.rows
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
            self.known = _rows.get(architecture, {})
            return
        if not self.architecture:
            raise self._wrong("the architecture comes first", 'like "architecture x86_64"')
        if content.startswith("registers "):
            self._registers(content.split()[1:])
            return
        name, equals, number = content.partition("=")
        if equals:
            self._take(content, self._number(name.rstrip(), number.lstrip()))
            return
        parts = content.split()
        if len(parts) != 2:
            raise self._wrong(
                f"{words.brief(content)} is neither a word with its bits nor a number",
                "WORD 0b… or WORD.NAME = N",
            )
        self._take(content, self._bits(*parts))

    def _take(self, content: str, row: Row) -> None:
        _, word, value = self.rows[content] = row
        self.values[word] = self.values.get(word, 0) | value

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

    def _bits(self, word: str, text: str) -> Row:
        rule = self._rule(word)
        self._once(word)
        digits = text.removeprefix("0b").replace("_", "")
        if text[:2] != "0b" or len(digits) != words.width(word) or digits.strip("01"):
            raise self._wrong(f"{word} needs {words.width(word)} binary digits, like {binary(word, 0)}")
        value = int(digits, 2)
        foreign = value & ~rule.bits_mask
        if foreign:
            place = foreign.bit_length() - 1
            raise self._wrong(
                f"{word}: no feature of one bit lies at {place}", "a number has a line of its own"
            )
        return word, word, value

    def _number(self, name: str, text: str) -> Row:
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
        return name, word, number << feature.shift

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
