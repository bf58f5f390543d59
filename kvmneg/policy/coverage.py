# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a report covers its whole host: every kind of CPU that guests can run on. Pure.

A guest runs on any CPU of its host. What was met over some kinds of CPU says nothing of the others, so an offer of
such a host may hold a feature that a guest loses when the scheduler moves it: a fence pinned over it would promise
what nobody measured, a contract would bind it. There is no lesser yes to be given, and every answer is no until the
host is measured as a whole. Its report is kept and shown as it is. CPUs that are offline do not count: no guest runs
there, and a host on which one comes online is measured again before anything is granted.
"""

from __future__ import annotations

from kvmneg.errors import Blocked
from kvmneg.features.difference import Blocker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.report import Report

_HINT = "let kvmnegd run on every CPU (no CPUAffinity=, taskset or cpuset for it), or take those offline"


def unvisited(report: Report) -> list[tuple[str, str, str]]:
    """(CPUs, what they are, why they were not measured) of each kind of CPU that the report does not cover."""
    rows = report.combo.get("unvisited")
    if not rows:
        return []
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return [("some CPUs", "", "the report does not say why")]
    return [(f"CPUs {row.get('cpus', '?')}", _kind(row.get("kind")), str(row.get("because"))) for row in rows]


def blockers(report: Report) -> list[Blocker]:
    """Why nothing can be said of the whole host, one for each kind of CPU that was not measured; empty where it can."""
    return [
        Blocker(
            "cpus", "", None, "every guest", f"{cpus} of {report.host}", "policy", _because(cpus, kind, why)
        )
        for cpus, kind, why in unvisited(report)
    ]


def require(report: Report) -> None:
    """Raises Blocked where the report does not cover its host."""
    found = blockers(report)
    if found:
        raise Blocked(f"not every kind of CPU of {report.host} was measured", found, hint=_HINT)


def _kind(identity: object) -> str:
    if not isinstance(identity, dict):
        return ""
    return ", ".join(f"{name} {value}" for name, value in identity.items() if name != "flags")


def _because(cpus: str, kind: str, why: str) -> str:
    return f"{cpus}{f' ({kind})' if kind else ''} were not measured: {why}"
