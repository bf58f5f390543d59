# SPDX-License-Identifier: LGPL-2.1-or-later
"""JSON of other tools, read so that an error names the line of the element that is wrong. Pure.

The line is looked for only when there is an error: json's parser does not keep it, and walking the text once
more by the element's path finds it.
"""

from __future__ import annotations

import json

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features.report import parse_json
from kvmneg.features.words import brief

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_BETWEEN = frozenset(" \t\r\n,:")


class Element:
    """A value of a JSON document, and where it stands in its file."""

    __slots__ = ("_data", "_file", "_path", "value")

    def __init__(self, value: object, data: bytes, file: str, path: tuple[str | int, ...] = ()) -> None:
        self.value = value
        self._data = data
        self._file = file
        self._path = path

    @classmethod
    def loads(cls, data: bytes, file: str) -> Element:
        """A whole document. Raises BadInput with file and line where it is no JSON or too large."""
        return cls(parse_json(data, file=file, limit=limits.REPORT_BYTES), data, file)

    def bitmap(self, bits: int) -> int:
        """A number written "0b…" with at most `bits` digits, as Firecracker writes them. Raises BadInput."""
        text = self.text()
        digits = text.removeprefix("0b")
        if digits == text or not 1 <= len(digits) <= bits or not set(digits) <= {"0", "1"}:
            hint = "a template, which leaves bits open, is no fingerprint" if "x" in digits else ""
            raise self.wrong(f"{text[:80]!r} is not a bitmap of {bits} bits", hint)
        return int(digits, 2)

    def wrong(self, what: str, hint: str = "") -> BadInput:
        """The error that names this element: its path, and the line where it begins."""
        path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self._path)
        place = f"{path[1:]}: " if path else ""
        return BadInput(place + what, file=self._file, line=_line(self._data, self._path), hint=hint)

    def find(self, name: str) -> Element | None:
        """A member of this object, None where it has no such. Raises BadInput where this is no object."""
        if not isinstance(self.value, dict):
            raise self.wrong("a JSON object is expected")
        if name not in self.value:
            return None
        return self._inner(self.value[name], name)

    def member(self, name: str) -> Element:
        """A member of this object; raises BadInput where there is none."""
        found = self.find(name)
        if found is None:
            raise self.wrong(f"has no {name!r}")
        return found

    def members(self) -> Iterator[tuple[str, Element]]:
        """Every member of this object. Raises BadInput where this is none."""
        if not isinstance(self.value, dict):
            raise self.wrong("a JSON object is expected")
        for name, value in self.value.items():
            yield name, self._inner(value, name)

    def items(self) -> Iterator[Element]:
        """Every item of this array. Raises BadInput where this is none."""
        if not isinstance(self.value, list):
            raise self.wrong("a JSON array is expected")
        for place, value in enumerate(self.value):
            yield self._inner(value, place)

    def text(self) -> str:
        """This string. Raises BadInput where it is none, or cannot be printed."""
        if not isinstance(self.value, str) or not self.value.isprintable():
            raise self.wrong(f"{brief(self.value)} is not a string")
        return self.value

    def _inner(self, value: object, step: str | int) -> Element:
        return Element(value, self._data, self._file, (*self._path, step))


def _line(data: bytes, path: tuple[str | int, ...]) -> int:
    """The line, from 1, on which the element at `path` of a well-formed document begins."""
    text = data.decode(json.detect_encoding(data), "surrogatepass")
    decoder = json.JSONDecoder()
    at = _next(text, 0)
    for step in path:
        at = _next(text, at + 1)  # past the bracket
        place = 0
        while True:
            found: str | int = place
            if isinstance(step, str):
                found, at = decoder.raw_decode(text, at)
                at = _next(text, at)
            if found == step:
                break
            at = _next(text, decoder.raw_decode(text, at)[1])
            place += 1
    return text.count("\n", 0, at) + 1


def _next(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BETWEEN:
        at += 1
    return at
