# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg fence plan|raise|lower|commit|abort|emergency: moves of the level, and how far they are."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, count, print_json
from kvmneg.errors import UsageError
from kvmneg.features.difference import Blocker

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

_DONE = {
    "raise": ("proposed to raise the fence", "it could be proposed to raise the fence"),
    "lower": ("lowered for new guests", "it could be lowered for new guests"),
    "emergency": ("lowered for new guests", "it could be lowered for new guests"),
    "commit": ("committed", "it could be committed"),
    "abort": ("aborted", "it could be aborted"),
}
# What is to be done about a guest above, by its state.
_TO_DO = {
    "begun": "not started: ask again",
    "running": "cold-boot it",
    "unknown": "find out what it is",
    "suspended": "cold-boot it",
    "saved": "cold-boot or delete it",
}
_NEXT = {
    "raise": "`kvmneg fence commit` brings it into force",
    "lower": "`kvmneg fence commit` ends it, once no guest is above",
    "emergency": "`kvmneg fence emergency` shows how far it is; `kvmneg fence commit` ends it",
}


def run(arguments: argparse.Namespace) -> int:
    """One verb."""
    if arguments.verb == "plan":
        return _plan(arguments)
    if arguments.verb == "emergency" and arguments.reason is None:
        if arguments.source is not None or arguments.without or arguments.dry_run:
            raise UsageError("a reason is needed to lower the fence", hint="say --reason TEXT")
        return _progress(arguments)
    answer = sources.call(arguments, f"org.kvmneg.Fence.{arguments.verb.capitalize()}", **_given(arguments))
    plan = _plain(answer.pop("plan"))
    if arguments.json:
        print_json({**sources.snake(answer), "dry_run": arguments.dry_run, "plan": plan})
        return 0
    screen = Screen()
    done = _DONE[arguments.verb][bool(arguments.dry_run)]
    screen.line(f"{done}: generation {answer['generation']}, {answer['state']}")
    _tell(screen, plan)
    if not arguments.dry_run and arguments.verb in _NEXT:
        screen.paragraph(_NEXT[arguments.verb])
    return 0


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {
        "reason": arguments.reason,
        "expectedGeneration": arguments.expected_generation,
        "dryRun": arguments.dry_run or None,
    }
    if arguments.verb == "commit":
        named = {"consent": arguments.consent, "override": arguments.override}
        return {**given, **named, "digest": arguments.digest}
    return {**given, **_asked(arguments)}


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the level is named. Raises BadInput."""
    source, text = None, None
    if getattr(arguments, "source", None) is not None:
        source, text = sources.fence_source(arguments.source)
    return {"from": source, "text": text, "without": getattr(arguments, "without", None) or None}


def _plan(arguments: argparse.Namespace) -> int:
    answer = sources.call(arguments, "org.kvmneg.Fence.Plan", **_asked(arguments))
    plan = _plain(answer["plan"])
    if arguments.json:
        print_json({"plan": plan})
    else:
        _tell(Screen(), plan)
    return 0


def _plain(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan as documents spell it."""
    blockers = [Blocker.from_json(row).to_json() for row in plan["blockers"]]
    return {**sources.snake(plan), "blockers": blockers}


def _tell(screen: Screen, plan: dict[str, Any]) -> None:
    kinds = {
        "raise": "new guests get more",
        "lower": "new guests get less",
        "mixed": "new guests get more of one and less of the other",
        "none": "nothing changes for new guests",
    }
    screen.line(f"{kinds.get(plan['kind'], plan['kind'])}: {plan['digest']}")
    for label, names in (("gained", plan["gained"]), ("lost", plan["lost"])):
        if names:
            screen.words(label, names)
    screen.blockers(Blocker.from_json(row) for row in plan["blockers"])
    for row in plan["left"]:
        screen.words("combo", f"{row['name']} ({row['combo']}) could not be returned to".split(" "))
    for row in plan["missing"]:
        screen.words("host", f"{row['host']}: {row['because']}".split(" "))
    if plan["guest_count"]:
        screen.head(f"{count(plan['guest_count'], 'guest')} above, in the order to deal with them")
        screen.table([guest_cells(row) for row in plan["guests"]])


def guest_cells(row: dict[str, Any]) -> list[str]:
    """One guest as a table has it."""
    names = row["features"]
    held = ", ".join(names[:4]) + (f" and {row['count'] - 4} more" if row["count"] > 4 else "")
    return [
        row["vm"],
        row["state"],
        f"uid {row['uid']}",
        held if row["known"] else "nobody knows what it holds",
    ]


def _progress(arguments: argparse.Namespace) -> int:
    """How far a lowering is: 0 where every guest is done, 1 where some are to be waited for."""
    answer = sources.call(arguments, "org.kvmneg.Fence.Progress")
    proposal = answer["proposal"]
    if proposal is None or proposal["kind"] != "lower":
        raise UsageError("nothing is being lowered", hint="`kvmneg fence emergency --reason TEXT` starts it")
    left = answer["count"] - answer["done"]
    if arguments.json:
        print_json(answer)
        return int(left > 0)
    screen = Screen()
    screen.line(f"lowering since {proposal['at']}: {proposal['reason']}")
    screen.line(f"{answer['done']} of {count(answer['count'], 'guest')} done")
    screen.table(
        [[row.get("became") or _TO_DO.get(row["state"], ""), *guest_cells(row)] for row in answer["guests"]]
    )
    if not left:
        screen.paragraph("no guest is above any more: `kvmneg fence commit` ends it")
    return int(left > 0)
