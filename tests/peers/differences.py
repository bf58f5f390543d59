# SPDX-License-Identifier: LGPL-2.1-or-later
"""The checked-in list of known differences from QEMU (qemu_differences.txt), and which of them are due here.

A line is one difference:

    WORD BIT VERSION PART WRONG WHEN  SOURCE: why

PART: `models` (a model's unavailable features), `host` (-cpu host) or `both`. WRONG: `kvmneg`, `qemu` or
`neither` (both are right, of different things). WHEN says on which hosts it shows, so that a line is stale, or
missing, on any host for a reason: see CONDITIONS.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kvmneg.features.report import Report

PARTS = ("models", "host", "both")
WRONG = ("kvmneg", "qemu", "neither")

_ARCH_CAPABILITIES = "msr:0x10a"
# MDS_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO (Intel, "CPUID enumeration and architectural MSRs")
_IMMUNITIES = 1 << 5 | 1 << 8 | 1 << 13 | 1 << 14 | 1 << 15


class Known(NamedTuple):
    """One line of the list."""

    word: str
    bit: int
    version: str
    part: str
    wrong: str
    when: str
    source: str

    @property
    def place(self) -> tuple[str, int]:
        return self.word, self.bit

    def due(self, report: Report) -> bool:
        """Whether this difference must show on that host."""
        return CONDITIONS[self.when](self, report)


def _lacking(line: Known, report: Report) -> bool:
    return not report.offer.words.get(line.word, 0) >> line.bit & 1


def _silicon(line: Known, report: Report) -> bool:
    return _lacking(line, report) and bool(report.silicon_words.get(line.word, 0) >> line.bit & 1)


def _immune(line: Known, report: Report) -> bool:
    value = report.offer_words.get(_ARCH_CAPABILITIES, 0)
    return _lacking(line, report) and value & _IMMUNITIES == _IMMUNITIES


def _offered(line: Known, report: Report) -> bool:
    return not _lacking(line, report)


CONDITIONS: dict[str, Callable[[Known, Report], bool]] = {
    "lacking": _lacking,  # KVM does not offer the bit
    "offered": _offered,  # it does
    "silicon": _silicon,  # lacking, though the CPUID instruction shows it
    "immune": _immune,  # lacking, and the CPU says that no data sampling weakness concerns it
}


def read(path: Path) -> list[Known]:
    """The list. Raises ValueError naming the line for what is malformed or listed twice."""
    found: dict[tuple[str, int, str, str], Known] = {}
    for number, text in enumerate(path.read_text("utf-8").splitlines(), 1):
        if text.strip() and not text.startswith("#"):
            line = _parse(text, f"{path.name}:{number}")
            if found.setdefault((*line.place, line.version, line.part), line) is not line:
                raise ValueError(f"{path.name}:{number}: listed twice")
    return list(found.values())


def _parse(text: str, where: str) -> Known:
    fields = text.split(maxsplit=6)
    if len(fields) != 7 or ": " not in fields[6] or not fields[1].isdecimal():
        raise ValueError(f"{where}: not WORD BIT VERSION PART WRONG WHEN SOURCE: why")
    word, bit, version, part, wrong, when, source = fields
    if part not in PARTS or wrong not in WRONG or when not in CONDITIONS:
        raise ValueError(f"{where}: {part}, {wrong} or {when} is none of the known words")
    return Known(word, int(bit), version, part, wrong, when, source)
