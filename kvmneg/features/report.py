# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one host measured: offer, accept, silicon, and the combo it was measured under.

A report is an ordinary document (kvmneg.report/1): another machine's is a file. It is kept as measured, so
values that make no sense stay visible; only the canonical `offer` and `accept` sets go on into decisions.
"""

from __future__ import annotations

import json
from itertools import pairwise
from sys import intern

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features import catalog, sanity, words
from kvmneg.features.featureset import FeatureSet
from kvmneg.sha import sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

FORMAT = "kvmneg.report/1"


class Report:
    """One host's measurement.

    `offer_words`, `accept_words`, `silicon_words` are raw word → value maps; `accept_words` holds only what
    differs from the offer. `measured`: at, by, host, source ("kvm", "recorded", or an importer's name).
    `combo`: everything that moves a measurement. `enforcement`: words that are not honoured, with the grade.
    `instructions`: what guests came through with of features that were hidden from them, by feature: "trapped" (#UD),
    "hidden only" (executed) or "untested".

    Of arm64 only: `settable_words`, the bits of registers that user space can change before the first run, proven by
    trial; `dropped_words`, bits of which a write was accepted and changed nothing; `registers`, KVM's list of ids.
    """

    __slots__ = (
        "_accepting", "_canonical", "_digest", "_offer", "accept_words", "architecture", "combo", "dropped_words",
        "enforcement", "identity", "instructions", "measured", "offer_words", "registers", "settable_words",
        "silicon_words",
    )  # fmt: skip

    def __init__(
        self,
        architecture: str,
        *,
        measured: dict[str, str],
        combo: dict[str, Any],
        identity: dict[str, Any],
        offer: dict[str, int],
        accept: dict[str, int] | None = None,
        silicon: dict[str, int] | None = None,
        enforcement: dict[str, str] | None = None,
        instructions: dict[str, str] | None = None,
        settable: dict[str, int] | None = None,
        dropped: dict[str, int] | None = None,
        registers: tuple[int, ...] = (),
    ) -> None:
        self.architecture = architecture
        self.measured = measured
        self.combo = combo
        self.identity = identity
        self.offer_words = offer
        self.accept_words = accept or {}
        self.silicon_words = silicon or {}
        self.enforcement = enforcement or {}
        self.instructions = instructions or {}
        self.settable_words = settable or {}
        self.dropped_words = dropped or {}
        self.registers = registers
        self._offer: FeatureSet | None = None
        self._accepting: Report | None = None
        self._canonical: bytes | None = None
        self._digest = ""

    @property
    def host(self) -> str:
        """The name people know the host by."""
        return self.measured.get("host") or "this host"

    @property
    def offer(self) -> FeatureSet:
        """What a new guest may be given. What no CPU can have is left out (kvmneg.features.sanity)."""
        if self._offer is None:
            self._offer = FeatureSet.of(self.architecture, sanity.sane(self.architecture, self.offer_words))
        return self._offer

    @property
    def accept(self) -> FeatureSet:
        """What an incoming guest may have, what is impossible left out as well."""
        return self.accepting().offer

    def accepting(self) -> Report:
        """The same host with its accept set as the offer: to ask what an incoming guest may have."""
        if not self.accept_words:
            return self
        if self._accepting is None:  # kept: every incoming guest is checked against it
            self._accepting = Report(
                self.architecture,
                measured=self.measured,
                combo=self.combo,
                identity=self.identity,
                offer={**self.offer_words, **self.accept_words},
                silicon=self.silicon_words,
                enforcement=self.enforcement,
                instructions=self.instructions,
                settable=self.settable_words,
                dropped=self.dropped_words,
                registers=self.registers,
            )
        return self._accepting

    def unclassified(self) -> dict[str, int]:
        """Measured bits that the catalogue does not know: kept here, never offered."""
        table = catalog.load(self.architecture)
        found = {word: table.unknown_bits(word, value) for word, value in self.offer_words.items()}
        return {word: bits for word, bits in found.items() if bits}

    def to_json(self) -> dict[str, Any]:
        """The document (kvmneg.report/1); sections that are empty are left out."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "architecture": self.architecture,
            "measured": self.measured,
            "combo": self.combo,
            "identity": self.identity,
            "offer": _texts(self.offer_words),
        }
        optional = {
            "accept": _texts(self.accept_words),
            "silicon": _texts(self.silicon_words),
            "enforcement": self.enforcement,
            "instructions": self.instructions,
            "settable": _texts(self.settable_words),
            "dropped": _texts(self.dropped_words),
            "registers": [f"{register:#x}" for register in self.registers],
        }
        document.update((key, value) for key, value in optional.items() if value)
        return document

    def canonical(self) -> bytes:
        """The document's canonical bytes, without when and by whom it was measured."""
        if self._canonical is None:  # kept: each measurement is compared, digested and stored by them
            document = {key: value for key, value in self.to_json().items() if key != "measured"}
            self._canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        return self._canonical

    def digest(self) -> str:
        """SHA-256 of `canonical`: two measurements with the same outcome have the same digest."""
        if not self._digest:  # kept, as each change of the fence is told with it
            self._digest = "sha256:" + sha256(self.canonical()).hexdigest()
        return self._digest

    def combo_digest(self) -> str:
        """SHA-256 of the combo (`combo_digest`)."""
        return combo_digest(self.combo)

    @classmethod
    def from_json(cls, document: object, *, file: str = "report") -> Report:
        """From a parsed document. Raises BadInput naming the file for anything that is not a report."""
        if not isinstance(document, dict):
            raise BadInput("not a report: a JSON object is expected", file=file)
        _check_format(document, file)
        architecture = document.get("architecture")
        if architecture not in words.ARCHITECTURES:
            known = ", ".join(words.ARCHITECTURES)
            raise BadInput(f"architecture {words.brief(architecture)} is not one of {known}", file=file)
        if architecture not in catalog.available():
            raise BadInput(f"a report of {architecture}, for which this build has no catalogue", file=file)
        if "offer" not in document:
            raise BadInput("the report has no offer", file=file, hint="was it cut short?")
        return cls(
            str(architecture),
            measured=_strings(document, "measured", file),
            combo=_section(document, "combo", file),
            identity=_section(document, "identity", file),
            offer=_values(document, "offer", file),
            accept=_values(document, "accept", file),
            silicon=_values(document, "silicon", file),
            enforcement=_strings(document, "enforcement", file),
            instructions=_strings(document, "instructions", file),
            settable=_values(document, "settable", file),
            dropped=_values(document, "dropped", file),
            registers=_registers(document, file),
        )

    @classmethod
    def loads(cls, data: bytes, *, file: str = "report") -> Report:
        """From a document's bytes. Raises BadInput with file and line."""
        return cls.from_json(parse_json(data, file=file, limit=limits.REPORT_BYTES), file=file)


def canonical_combo(combo: Mapping[str, Any]) -> bytes:
    """A combo's canonical JSON, without its boot id."""
    lasting = {name: value for name, value in combo.items() if name != "boot"}
    return json.dumps(lasting, sort_keys=True, separators=(",", ":")).encode()


def combo_digest(combo: Mapping[str, Any]) -> str:
    """SHA-256 of a combo without its boot id: "sha256:" and 64 hexadecimal digits.

    Equal digests mean the same software on the same machine, in this boot or another.
    """
    return "sha256:" + sha256(canonical_combo(combo)).hexdigest()


def parse_json(data: bytes, *, file: str, limit: int) -> object:
    """A JSON document of at most `limit` bytes; raises BadInput with file and line for anything else."""
    if len(data) > limit:
        raise BadInput(f"larger than {limit} bytes", file=file, hint="this is no document of kvmneg's")
    try:
        return json.loads(data, parse_constant=_no_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        at_end = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")
        where = "cut short" if at_end else f"{error.msg} (column {error.colno})"
        raise BadInput(f"not JSON: {where}", file=file, line=error.lineno) from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"not JSON: {error}", file=file) from None


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _texts(values: Mapping[str, int]) -> dict[str, str]:
    return {word: words.text_value(word, values[word]) for word in sorted(values, key=words.order)}


def _check_format(document: dict[str, Any], file: str) -> None:
    found = document.get("format")
    if found == FORMAT:
        return
    family, _, version = found.partition("/") if isinstance(found, str) else ("", "", "")
    if family == "kvmneg.report" and version.isdecimal():
        raise BadInput(
            f"made by a newer kvmneg ({str(found)[:40]}, this one reads {FORMAT})",
            file=file,
            hint="update kvmneg",
        )
    raise BadInput(f"not a report: format is {words.brief(found)}, not {FORMAT!r}", file=file)


def _section(document: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    section = document.get(name, {})
    if not isinstance(section, dict):
        raise BadInput(f"{name} is not a JSON object", file=file)
    _printable(section, name, file)
    return section


def _printable(value: object, name: str, file: str, depth: int = 1) -> None:
    """People read these on a terminal: another machine's report has no control characters, no deep nests."""
    if depth > limits.NESTING_DEPTH:
        raise BadInput(f"{name} is nested more than {limits.NESTING_DEPTH} deep", file=file)
    if isinstance(value, str):
        if not value.isprintable():
            raise BadInput(f"{name} holds characters that cannot be printed", file=file)
    elif isinstance(value, dict):
        for key, item in value.items():
            _printable(key, name, file, depth)
            _printable(item, name, file, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _printable(item, name, file, depth + 1)


def _strings(document: dict[str, Any], name: str, file: str) -> dict[str, str]:
    section = _section(document, name, file)
    if not all(isinstance(text, str) for text in section.values()):
        raise BadInput(f"{name} holds strings", file=file)
    return section


def _values(document: dict[str, Any], name: str, file: str) -> dict[str, int]:
    section = document.get(name, {})
    if not isinstance(section, dict):
        raise BadInput(f"{name} is not a JSON object", file=file)
    if len(section) > limits.WORDS:
        raise BadInput(f"{name} has more than {limits.WORDS} words", file=file)
    try:
        # interned: thousands of reports share some 300 addresses, and comparing them is then comparing pointers
        return {intern(words.check(word)): words.parse_value(word, text) for word, text in section.items()}
    except BadInput as error:
        raise BadInput(f"{name}: {error.message}", file=file, hint=error.hint) from None


def _registers(document: dict[str, Any], file: str) -> tuple[int, ...]:
    """KVM_GET_REG_LIST of a document: ids in ascending order, each once."""
    section = document.get("registers", [])
    if not isinstance(section, list):
        raise BadInput("registers is not a JSON list", file=file)
    if len(section) > limits.REGISTERS:
        raise BadInput(f"registers has more than {limits.REGISTERS} ids", file=file)
    try:
        found = tuple(words.parse_register(text) for text in section)
    except ValueError as error:
        raise BadInput(f"registers: {error}", file=file) from None
    if any(before >= after for before, after in pairwise(found)):
        raise BadInput("registers are not in their order, each once", file=file)
    return found
