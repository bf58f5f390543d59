# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg history: the combos this host was ever measured under, the newest first."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser

_SHORT = slice(7, 19)  # the digits of a digest that people type


def options(parser: Parser) -> None:
    from kvmneg import limits
    from kvmneg.cli.arguments import number

    parser.add_argument(
        "--limit", metavar="N", type=number(1, limits.COMBO_ROWS), default=50, help="the newest N combos (50)"
    )


def run(arguments: argparse.Namespace) -> int:
    answer = sources.call(arguments, "org.kvmneg.Rollback.History", limit=arguments.limit)
    entries = answer["entries"]
    if arguments.json:
        print_json({"entries": [sources.snake(entry) for entry in entries]})
        return 0
    screen = Screen()
    if not entries:
        screen.line("this host was never measured")
        return 0
    rows = [("combo", "kernel", "microcode", "first", "last", "", "VMM builds")]
    for entry in entries:
        marks = ["running"] * entry["running"] + ["roll-back"] * entry["rollback"]
        rows.append(
            (
                entry["combo"][_SHORT],
                entry["kernel"] or "-",
                entry["microcode"] or "-",
                entry["firstAt"][:10],
                entry["lastAt"][:10],
                " ".join(marks),
                ", ".join(entry["vmms"]) or "-",
            )
        )
    screen.table(rows, indent=0)
    return 0
