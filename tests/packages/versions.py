# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which of the available versions stands in for a wanted one.

Debian keeps one version of a package in a suite: 10.0.2 of last month is 10.0.13 today. What a test wants is
"a QEMU 10.0", so versions are compared by the numbers of their upstream part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_EPOCH = re.compile(r"^[0-9]+:")
_NUMBERS = re.compile(r"[0-9]+(?:\.[0-9]+)*")


def numbers(version: str) -> tuple[int, ...]:
    """The upstream numbers of a Debian version: "1:10.0.13+ds-0+deb13u1" is (10, 0, 13); () where it has none."""
    match = _NUMBERS.match(_EPOCH.sub("", version))
    return tuple(map(int, match[0].split("."))) if match else ()


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version is the wanted one: "10.0" is any 10.0.x, and "" is any."""
    prefix = numbers(wanted)
    return numbers(version)[: len(prefix)] == prefix


def nearest(available: Iterable[str], wanted: str) -> str | None:
    """The version that stands in for `wanted`: a satisfying one, else the next newer, else the next older.

    None where nothing is available. Among several equally near ones the newest; of equal numbers the first
    listed, which is the one apt prefers.
    """
    listed = list(available)
    fitting = [version for version in listed if satisfies(version, wanted)]
    newer = [version for version in listed if numbers(version) > numbers(wanted)]
    if fitting:
        return max(fitting, key=numbers)
    if newer:
        return min(newer, key=numbers)
    return max(listed, key=numbers, default=None)
