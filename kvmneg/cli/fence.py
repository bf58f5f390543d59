# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg fence: the allow-list that no contract of this host exceeds, and how it moves."""

from __future__ import annotations

import sys

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser

# verb: what it does. Those that have no function here are kvmneg.cli.fence_levels'.
_VERBS = {
    "show": "the fence as text, and why each feature that guests do not get is absent",
    "plan": "what a level would change, who stands in the way, which guests would stay above",
    "pin": "pin a fence",
    "raise": "propose a higher fence: in force once it is committed",
    "lower": "propose a lower fence: in force for new guests at once",
    "commit": "bring what is proposed to its end",
    "abort": "drop what is proposed",
    "unpin": "take the fence down; without one, float at what the host offers now",
    "emergency": "lower at once, and follow the guests that must be cold-booted",
    "restore": "go on from the copy of the fence, where its database is lost",
    "history": "who changed it, when, and why",
}


def options(parser: Parser) -> None:
    """One parser a verb; each has the options of every command too."""
    from kvmneg.cli.arguments import common_again

    functions = {"show": _show, "pin": _pin, "unpin": _unpin, "restore": _restore, "history": _history}
    verbs = parser.add_subparsers(metavar="|".join(_VERBS), required=True)
    for name, what in _VERBS.items():
        verb = verbs.add_parser(name, help=what, description=what, prog=f"kvmneg fence {name}")
        common_again(verb)
        verb.set_defaults(run=functions.get(name, _level), verb=name)
        _options_of(name, verb)


def _options_of(name: str, verb: argparse.ArgumentParser) -> None:
    from kvmneg import limits
    from kvmneg.cli.arguments import file_name, names, number, utf8

    if name in ("pin", "plan", "raise", "lower", "emergency"):
        one = verb.add_mutually_exclusive_group(required=name in ("pin", "raise", "lower"))
        help_text = "host, baseline, level:NAME, platform:NAME, or a file: a fence, a report, a contract"
        one.add_argument("--from", dest="source", metavar="SOURCE", type=file_name, help=help_text)
        if name not in ("pin", "raise"):
            one.add_argument(
                "--without", metavar="F,…", type=names, default=[], help="what is in force, without these"
            )
    if name not in ("show", "plan", "history"):
        told = "why, for the history" if name != "emergency" else "why; without one, show how far it is"
        verb.add_argument("--reason", metavar="TEXT", type=utf8, required=name != "emergency", help=told)
        if name != "restore":
            expected = "only if the fence is at this generation"
            verb.add_argument("--expected-generation", metavar="N", type=number(0, 2**63 - 1), help=expected)
            verb.add_argument(
                "--dry-run", action="store_true", help="change nothing, say what would come of it"
            )
    if name == "restore":
        seen = "a generation that was seen, so that the new one is above it"
        verb.add_argument("--above", metavar="N", type=number(0, limits.GENERATIONS - 1), help=seen)
    if name == "commit":
        verb.add_argument(
            "--consent", metavar="COMBO", action="append", help="a combo that may leave the roll-back set"
        )
        verb.add_argument(
            "--override", metavar="VM", action="append", help="a guest above that may stay there"
        )
        verb.add_argument("--digest", metavar="DIGEST", type=utf8, help="only if this is what is proposed")
    if name == "show":
        verb.add_argument("--absent", action="store_true", help="name every absent feature, by who lacks it")
    if name == "history":
        rows = number(1, limits.HISTORY_ROWS)
        verb.add_argument(
            "--all", action="store_true", help="with proposals, breaches, roll-back sets, leases"
        )
        verb.add_argument("--limit", metavar="N", type=rows, default=20, help="the newest N changes (20)")


def _level(arguments: argparse.Namespace) -> int:
    from kvmneg.cli import fence_levels

    return fence_levels.run(arguments)


def _show(arguments: argparse.Namespace) -> int:
    from kvmneg.cli import fence_absent

    fence = sources.snake(sources.call(arguments, "org.kvmneg.Fence.Get"))
    groups = fence_absent.groups(arguments, fence)
    if arguments.json:
        print_json({**fence, "absent": fence_absent.rows(groups)} if arguments.absent else fence)
        return 0
    screen = Screen(sys.stderr)  # standard output carries the text alone: it can be edited and pinned again
    if fence.get("stale"):
        screen.line(fence["stale"])
    state = fence.get("state", "floating")
    if fence.get("pinned"):
        screen.line(f"generation {fence['generation']}, {state}, {fence['digest']}")
        sys.stdout.write(fence["text"])
        sys.stdout.flush()
    else:
        screen.line(f"no fence is pinned; generation {fence['generation']}, {state}")
    if fence.get("proposal"):
        screen.line(f"it is proposed to {fence['proposal']} it: see `kvmneg fence plan`")
    if fence.get("held_back"):
        screen.paragraph(
            "the host offers more by now than the level it floats at; `kvmneg fence unpin` lets that rise"
        )
    fence_absent.tell(screen, groups, every=arguments.absent)
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    source, text = sources.fence_source(arguments.source)
    answer = sources.call(
        arguments,
        "org.kvmneg.Fence.Pin",
        **{"from": source, "text": text, "reason": arguments.reason},
        expectedGeneration=arguments.expected_generation,
        dryRun=arguments.dry_run or None,
    )
    if arguments.json:
        print_json(sources.snake(answer))
    else:
        done = "it would be pinned" if arguments.dry_run else "pinned"
        Screen().line(f"{done}: generation {answer['generation']}, {answer['digest']}")
    return 0


def _unpin(arguments: argparse.Namespace) -> int:
    answer = sources.call(
        arguments,
        "org.kvmneg.Fence.Unpin",
        reason=arguments.reason,
        expectedGeneration=arguments.expected_generation,
        dryRun=arguments.dry_run or None,
    )
    if arguments.json:
        print_json(sources.snake(answer))
    else:
        done = "no fence would be pinned" if arguments.dry_run else "no fence is pinned any more"
        Screen().line(f"{done}: generation {answer['generation']}")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    given = {"reason": arguments.reason, "above": arguments.above}
    answer = sources.call(arguments, "org.kvmneg.Fence.Restore", **given)
    if arguments.json:
        print_json(sources.snake(answer))
    else:
        what = answer["digest"] or "no fence is pinned"
        Screen().line(f"restored: generation {answer['generation']}, {what}")
    return 0


def _history(arguments: argparse.Namespace) -> int:
    method = "Audit" if arguments.all else "History"
    answer = sources.call(arguments, f"org.kvmneg.Fence.{method}", limit=arguments.limit)
    rows = [sources.snake(row) for row in answer["entries"]]
    if arguments.json:
        print_json({"entries": rows})
        return 0
    screen = Screen()

    def shown(who: int | None) -> str:
        return "not told" if who is None else str(who)  # for admins

    names = ("generation", "at", "action", "uid", "pid", "reason")
    cells = [
        [f"{name} {shown(row.get(name))}" if name in ("uid", "pid") else str(row.get(name)) for name in names]
        for row in rows
    ]
    screen.table(cells, indent=0)
    if not rows:
        screen.line("no fence was ever pinned here" if not arguments.all else "nothing was ever changed here")
    return 0
