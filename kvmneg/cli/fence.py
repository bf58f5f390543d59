# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg fence show|pin|unpin|history: the allow-list that no contract of this host exceeds."""

from __future__ import annotations

import sys

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser

_NAMED = ("host", "baseline")
_PREFIXED = ("level:", "platform:")


def options(parser: Parser) -> None:
    """One parser a verb; each has the options of every command too."""
    from argparse import SUPPRESS

    from kvmneg import limits
    from kvmneg.cli.arguments import file_name, number, utf8

    verbs = parser.add_subparsers(metavar="show|pin|unpin|history", required=True)
    for name, function, what in (
        ("show", _show, "the pinned fence as text"),
        ("pin", _pin, "pin a fence"),
        ("unpin", _unpin, "take the fence down"),
        ("history", _history, "who changed it, when, and why"),
    ):
        verb = verbs.add_parser(name, help=what, description=what, prog=f"kvmneg fence {name}")
        # given before the verb they hold too: a default here would overwrite them
        verb.add_argument("--json", action="store_true", default=SUPPRESS, help="print JSON")
        verb.add_argument(
            "--socket", metavar="PATH", type=file_name, default=SUPPRESS, help="the daemon's socket"
        )
        verb.set_defaults(run=function)
        if name == "pin":
            help_text = "host, baseline, level:NAME, platform:NAME, or a file: a fence, a report, a contract"
            verb.add_argument(
                "--from", dest="source", metavar="SOURCE", type=file_name, required=True, help=help_text
            )
        if name in ("pin", "unpin"):
            verb.add_argument(
                "--reason", metavar="TEXT", type=utf8, required=True, help="why, for the history"
            )
            expected = "only if the fence is at this generation"
            verb.add_argument("--expected-generation", metavar="N", type=number(0, 2**63 - 1), help=expected)
        if name == "history":
            rows = number(1, limits.HISTORY_ROWS)
            verb.add_argument("--limit", metavar="N", type=rows, default=20, help="the newest N changes (20)")


def _show(arguments: argparse.Namespace) -> int:
    fence = sources.snake(sources.call(arguments, "org.kvmneg.Fence.Get"))
    if arguments.json:
        print_json(fence)
        return 0
    screen = Screen(sys.stderr)  # standard output carries the text alone: it can be edited and pinned again
    if not fence.get("pinned"):
        screen.line(f"no fence is pinned; generation {fence['generation']}, {fence.get('state', 'floating')}")
        return 0
    state = fence.get("state", "pinned")
    screen.line(f"generation {fence['generation']}, {state}, {fence['digest']}")
    sys.stdout.write(fence["text"])
    return 0


def _pin(arguments: argparse.Namespace) -> int:
    source, text = _source(arguments.source)
    answer = sources.call(
        arguments,
        "org.kvmneg.Fence.Pin",
        **{"from": source, "text": text, "reason": arguments.reason},
        expectedGeneration=arguments.expected_generation,
    )
    if arguments.json:
        print_json(sources.snake(answer))
    else:
        Screen().line(f"pinned: generation {answer['generation']}, {answer['digest']}")
    return 0


def _source(source: str) -> tuple[str | None, str | None]:
    """(what the daemon resolves, None), or (None, the text of a file). Raises BadInput, UsageError."""
    if source in _NAMED or source.startswith(_PREFIXED):
        return source, None
    from kvmneg.cli import files
    from kvmneg.policy.fence_text import Fence

    found = files.document(source)
    if found.fence is not None:
        return None, files.fence_text(files.read(source), source)
    return None, Fence(found.granted).text()


def _unpin(arguments: argparse.Namespace) -> int:
    answer = sources.call(
        arguments,
        "org.kvmneg.Fence.Unpin",
        reason=arguments.reason,
        expectedGeneration=arguments.expected_generation,
    )
    if arguments.json:
        print_json(sources.snake(answer))
    else:
        Screen().line(f"no fence is pinned any more: generation {answer['generation']}")
    return 0


def _history(arguments: argparse.Namespace) -> int:
    answer = sources.call(arguments, "org.kvmneg.Fence.History", limit=arguments.limit)
    rows = [sources.snake(row) for row in answer["entries"]]
    if arguments.json:
        print_json({"entries": rows})
        return 0
    screen = Screen()
    names = ("generation", "at", "action", "uid", "pid", "reason")
    cells = [
        [f"{name} {row.get(name)}" if name in ("uid", "pid") else str(row.get(name)) for name in names]
        for row in rows
    ]
    screen.table(cells, indent=0)
    if not rows:
        screen.line("no fence was ever pinned here")
    return 0
