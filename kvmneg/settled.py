# SPDX-License-Identifier: LGPL-2.1-or-later
"""The limits as an administrator settled them, on their way from the daemon to the processes that it starts."""

from __future__ import annotations

import json
import os

from kvmneg import limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "KVMNEG_LIMITS"


def numbers() -> dict[str, float]:
    """Every limit that is one number, as it is now."""
    return {
        name: value
        for name, value in vars(limits).items()
        if name.isupper() and isinstance(value, (int, float))
    }


def environment() -> dict[str, str]:
    """This process's, with the limits."""
    return {**os.environ, VARIABLE: json.dumps(numbers())}


def take(found: Mapping[str, float] | None = None) -> None:
    """Make these limits this process's, by default those of its environment."""
    given = json.loads(os.environ.get(VARIABLE, "{}")) if found is None else found
    for name, value in given.items():
        setattr(limits, name, value)
