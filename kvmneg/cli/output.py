# SPDX-License-Identifier: LGPL-2.1-or-later
"""What commands print: JSON, or short aligned lines that name features rather than bits."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TextIO

    from kvmneg.features.difference import Blocker

_WIDTH = 100  # where the output is no terminal
_WIDEST = 120
_NARROWEST = 40
_ROOM = 18  # characters that words after a label need at least; with fewer they get lines of their own
_BOLD, _DIM, _RED, _GREEN, _YELLOW, _PLAIN = "1", "2", "31", "32", "33", "0"
# Styles travel inside the text as private characters, one each: whatever else is not printable came from a
# file or from elsewhere, and a terminal must not obey it.
_MARKS = {chr(0xF0000 + int(style)): style for style in (_BOLD, _DIM, _RED, _GREEN, _YELLOW, _PLAIN)}
_MARK_OF = {style: mark for mark, style in _MARKS.items()}


def print_json(document: object) -> None:
    """One document on standard output, indented, keys in the order given; escaped where it is not UTF-8."""
    import json

    text = json.dumps(document, indent=2, ensure_ascii=False)
    if not text.isascii():
        encoding = (sys.stdout.encoding or "").lower().replace("-", "")
        try:
            text.encode()  # a name that is not UTF-8 has surrogates
            escape = encoding != "utf8"
        except UnicodeEncodeError:
            escape = True
        if escape:
            text = json.dumps(document, indent=2)
    sys.stdout.write(text + "\n")


class Screen:
    """Lines for people. Colours only on a terminal, and not where NO_COLOR is set (no-color.org)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        terminal = self._stream.isatty()
        self._colours = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        wanted = os.environ.get("COLUMNS", "")
        columns = int(wanted) if wanted.isascii() and wanted.isdigit() and len(wanted) < 6 else 0
        if terminal and not columns:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        self.width = max(_NARROWEST, min(columns, _WIDEST)) if columns else _WIDTH

    def _styled(self, style: str, text: str) -> str:
        return f"{_MARK_OF[style]}{text}{_MARK_OF[_PLAIN]}" if self._colours and text else text

    def bold(self, text: str) -> str:
        return self._styled(_BOLD, text)

    def dim(self, text: str) -> str:
        return self._styled(_DIM, text)

    def good(self, text: str) -> str:
        return self._styled(_GREEN, text)

    def bad(self, text: str) -> str:
        return self._styled(_RED, text)

    def warn(self, text: str) -> str:
        return self._styled(_YELLOW, text)

    def line(self, text: str = "") -> None:
        """One line; what the stream's encoding cannot hold, or no terminal should get, becomes "?"."""
        if not text.isprintable():
            text = "".join(map(self._printable, text))
        encoding = self._stream.encoding or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")

    def _printable(self, character: str) -> str:
        if character in _MARKS:
            return f"\x1b[{_MARKS[character]}m" if self._colours else ""
        return character if character.isprintable() or character == "\n" else "?"

    def paragraph(self, text: str, *, indent: int = 0, style: str = "") -> None:
        """Running text, filled into lines; `style` is the name of one of the methods above."""
        styled = getattr(self, style) if style else str
        for row in wrap(text.split(" "), self.width - indent):
            self.line(" " * indent + styled(row))

    def head(self, text: str) -> None:
        """A heading, an empty line before it."""
        self.line()
        self.line(self.bold(text))

    def words(self, label: str, words: Iterable[str], *, indent: int = 2, column: int = 14) -> None:
        """A label and words that wrap under each other: `  label       one two three`."""
        column = max(column, indent + len(label) + 2)
        if label and self.width - column < _ROOM:
            self.line(" " * indent + label)
            label, column = "", indent + 4
        rows = wrap(list(words), self.width - column) or [""]
        self.line(f"{' ' * indent}{label:<{column - indent}}{rows[0]}".rstrip())
        for row in rows[1:]:
            self.line(" " * column + row)

    def table(self, rows: Sequence[Sequence[str]], *, indent: int = 2) -> None:
        """Columns as wide as their widest cell, the last one as long as it is."""
        if not rows:
            return
        rows = [[cell.replace("\n", " ") for cell in row] for row in rows]
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
            self.line((" " * indent + "  ".join(cells)).rstrip())

    def blockers(self, blockers: Iterable[Blocker], *, label: str = "no") -> None:
        """Why not: features with the same reason stand together."""
        reasons: dict[tuple[str, str, str], list[str]] = {}
        for blocker in blockers:
            reasons.setdefault((blocker.because, blocker.cause, blocker.wanted_by), []).append(
                blocker.feature
            )
        for (because, cause, wanted_by), features in reasons.items():
            self.words(label, features, column=6)
            why = f"{because} [{cause}]" + (f"; wanted by {wanted_by}" if wanted_by else "")
            for row in wrap(why.split(" "), self.width - 6):
                self.line(self.dim("      " + row))

    def scope(self, scope: Iterable[str]) -> None:
        """What a yes is about, and what it is not about: part of every yes."""
        self.head("scope")
        for text in scope:
            what, _, rest = text.partition(": ")
            self.words(what, rest.split(" "), column=14)


def wrap(words: Sequence[str], width: int) -> list[str]:
    """Words filled into lines of at most `width`; a longer word has a line of its own."""
    rows: list[str] = []
    for word in words:
        if rows and len(rows[-1]) + 1 + len(word) <= width:
            rows[-1] += " " + word
        else:
            rows.append(word)
    return rows


def count(number: int, what: str) -> str:
    """ "1 feature", "2 features"."""
    return f"{number} {what}" + ("" if number == 1 else "s")
