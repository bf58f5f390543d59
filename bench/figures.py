# SPDX-License-Identifier: LGPL-2.1-or-later
"""One figure of the bench, and how repeated rounds become one."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 7


class Figure(NamedTuple):
    """A figure with its target; `at_least` where more is better."""

    name: str
    value: float
    target: float
    unit: str = "×"
    detail: str = ""
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.target if self.at_least else self.value <= self.target

    def line(self) -> str:
        bound = "≥" if self.at_least else "≤"
        verdict = "" if self.met else "   MISSED"
        measured = f"{self.value:.2f} {self.unit}"
        return f"{self.name:<58} {measured:>9} {bound} {self.target:g} {self.unit:<4} {self.detail}{verdict}"


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def interleaved(
    ours: Callable[[], float], theirs: Callable[[], float], rounds: int = ROUNDS
) -> tuple[float, float, float]:
    """(median of the ratios, of ours, of theirs) over `rounds` pairs, measured in turn."""
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    return median(a / b for a, b in pairs), median(a for a, _ in pairs), median(b for _, b in pairs)
