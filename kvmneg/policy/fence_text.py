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


_REGISTERS_A_LINE = 5
LOW = 0xFFFF_FFFF
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
            from kvmneg.policy.fence_reader import Reader  # a daemon without a fence starts without it

            reader = Reader(file)
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
        yield f"{word:<24} {binary(word, value & bits)}" + (f"  # {shown}" if shown else "")
    for feature in names.at(word, rule.judged & ~bits):
        number = feature.of(value)
        if feature.rule == rules.INTERVAL:
            yield f"{word}.{feature.name} = {number & LOW}-{number >> 32}"
            continue
        yield f"{word}.{feature.name} = {number if feature.width <= 16 else format(number, '#x')}"


def _registers(registers: tuple[int, ...]) -> Iterator[str]:
    for at in range(0, len(registers), _REGISTERS_A_LINE):
        yield " ".join(("registers", *(f"{one:#x}" for one in registers[at : at + _REGISTERS_A_LINE])))


def binary(word: str, value: int) -> str:
    """A word's bits as the text has them."""
    digits = f"{value:0{words.width(word)}b}"
    return "0b" + "_".join(digits[at : at + 4] for at in range(0, len(digits), 4))
