# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why each feature that new guests do not get is absent: the host lacks it, by which layer, or the fence hides it."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.errors import KvmFault, NoKvm
from kvmneg.features import catalog as catalogs

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.output import Screen
    from kvmneg.features.catalog import Feature
    from kvmneg.policy.reasons import Standing

    Groups = dict[str, list[tuple[Feature, Standing]]]

_FENCE = "fence"
# What a cause means here; every other layer is told by its name.
_HEADS = {
    _FENCE: "hidden by the fence",
    "silicon": "not in the CPU",
    "policy": "kvmneg gives it only under a condition",
    "unknown": "nobody knows which layer lacks it",
}


def groups(arguments: argparse.Namespace, fence: dict[str, Any]) -> Groups:
    """The absent features by cause, the fence's first; none where the host cannot be measured, or no fence be read."""
    from kvmneg.policy import reasons
    from kvmneg.policy.fence_text import Fence

    try:
        report = sources.daemon_report(arguments)
    except (NoKvm, KvmFault):
        return {}
    pinned = None
    if fence.get("pinned"):
        pinned = Fence.parse(fence["text"], generation=fence["generation"], file="the daemon's fence")
    found: Groups = {_FENCE: []}
    for feature in catalogs.names(report.architecture).by_name.values():
        standing = reasons.standing(feature, report, pinned)
        if standing.state == reasons.HELD_BACK:
            found.setdefault(standing.cause, []).append((feature, standing))
    return {cause: rows for cause, rows in found.items() if rows}


def rows(found: Groups) -> list[dict[str, Any]]:
    """Them as JSON: {"feature", "word", "bit" or null, "missing_on", "cause", "because"}."""
    return [
        {
            "feature": feature.name,
            "word": feature.word,
            "bit": feature.shift if feature.width == 1 else None,
            "missing_on": standing.where,
            "cause": standing.cause,
            "because": standing.because,
        }
        for row in found.values()
        for feature, standing in row
    ]


def tell(screen: Screen, found: Groups, *, every: bool) -> None:
    """What the fence hides by name, and what else is absent: how much by cause, with `every` by name too."""
    for cause, row in found.items():
        head = f"{_HEADS.get(cause, f'taken away by the {cause}')} [{cause}]: {len(row)}"
        if every or cause == _FENCE:
            screen.head(head)
            screen.words("", [feature.name for feature, _standing in row], column=2)
        else:
            screen.line(head)
    if found and not every:
        screen.line(screen.dim("--absent names them; `kvmneg explain FEATURE` tells why"))
