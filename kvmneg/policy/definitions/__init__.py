# SPDX-License-Identifier: LGPL-2.1-or-later
"""Named things, as data: levels, platforms, what a guest boots with. One TOML file each, one loader.

A name is a label: what counts is the list of features in the file. A definition that changes later changes no
pinned fence and no contract, as those hold the resolved set.
"""

from __future__ import annotations

import os

from kvmneg.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HERE = os.path.dirname(__file__)
_loaded: dict[tuple[str, str], dict[str, Any]] = {}


def available(kind: str) -> tuple[str, ...]:
    """The names of a kind ("levels", "platforms", "boot", "vmms"), sorted."""
    names = os.listdir(os.path.join(_HERE, kind))
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def _load(kind: str, name: str) -> dict[str, Any]:
    found = _loaded.get((kind, name))
    if found is None:
        if name not in available(kind):
            there_are = ", ".join(available(kind))
            raise UsageError(
                f"no {kind.removesuffix('s')} is called {name!r}", hint=f"there are: {there_are}"
            )
        import tomllib  # 5 ms: only for the first use of a definition

        with open(os.path.join(_HERE, kind, f"{name}.toml"), "rb") as file:
            found = _loaded[kind, name] = tomllib.load(file)
    return found


class Boot:
    """What a guest starts with: features required and optional, numbers carried, and the essential ones.

    `at_most`: (number, value, feature): the number is that value or less in a guest without the feature. `decided`:
    words that a level or an exact request decides alone (arm64; on x86 it decides all).
    """

    __slots__ = ("at_most", "carry", "decided", "essential", "optional", "require")

    def __init__(self, architecture: str) -> None:
        table = _load("boot", architecture)
        self.require: tuple[str, ...] = tuple(table["require"])
        self.optional: tuple[str, ...] = tuple(table["optional"])
        self.carry: tuple[str, ...] = tuple(table["carry"])
        self.essential: tuple[str, ...] = tuple(table["essential"])
        self.decided: tuple[str, ...] = tuple(table.get("decided", ()))
        self.at_most = tuple((row["number"], row["value"], row["unless"]) for row in table.get("at-most", ()))


def level(name: str, architecture: str) -> tuple[str, ...]:
    """The features of a level, with its bases'. Raises UsageError for another name or architecture."""
    return tuple(least(name, architecture))


def least(name: str, architecture: str) -> dict[str, int]:
    """The features of a level and the least value of each ("name>=2" in the file, 1 else). Raises as `level` does."""
    table = _load("levels", name)
    if table["architecture"] != architecture:
        raise UsageError(f"level {name} is of {table['architecture']}, this host is {architecture}")
    bases = table.get("based-on", ())
    found: dict[str, int] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        for feature, value in least(base, architecture).items():
            found[feature] = max(value, found.get(feature, 0))
    for text in table["features"]:
        feature, _, value = text.partition(">=")
        found[feature] = max(int(value or 1), found.get(feature, 0))
    return found


def levels(architecture: str) -> tuple[str, ...]:
    """The names of an architecture's levels, sorted."""
    return tuple(
        name for name in available("levels") if _load("levels", name)["architecture"] == architecture
    )


def platform(name: str, architecture: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(beginnings of the addresses of the words it bounds, the features it has in these).

    Raises UsageError for another name or architecture.
    """
    table = _load("platforms", name)
    bounds = table["bounds"].get(architecture)
    if bounds is None:
        raise UsageError(f"platform {name} is not defined for {architecture}")
    return tuple(bounds), tuple(table["features"].get(architecture, ()))


def at_most(name: str, architecture: str) -> dict[str, int]:
    """The numbers that a platform bounds, with the highest value of each. Raises UsageError for another name."""
    found: dict[str, int] = _load("platforms", name).get("at-most", {}).get(architecture, {})
    return found


def vmm(name: str) -> dict[str, Any]:
    """What a VMM makes of KVM's set, as kvmneg.policy.vmm reads it. Raises UsageError for another name."""
    return _load("vmms", name)
