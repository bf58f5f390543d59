# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg watch: a line for each change of generation, fence, host or state, the present one first."""

from __future__ import annotations

import sys

from kvmneg.cli.output import Screen

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser


def options(parser: Parser) -> None:
    from kvmneg.cli.arguments import number

    lines = number(1, 2**63 - 1)
    parser.add_argument("--count", metavar="N", type=lines, default=0, help="end after N lines (never)")


def run(arguments: argparse.Namespace) -> int:
    import json

    from kvmneg.cli import failure
    from kvmneg.errors import KvmnegError

    try:
        return _follow(arguments)
    except KvmnegError as error:
        if not arguments.json:
            raise
        sys.stdout.write(json.dumps(failure(error)) + "\n")  # one object a line, to the end
        return error.exit_code


def _follow(arguments: argparse.Namespace) -> int:
    import json
    import time

    from kvmneg.cli.sources import snake
    from kvmneg.client import Client

    screen = Screen()
    seen = 0
    with Client(arguments.socket) as client:
        for event in client.watch():
            if arguments.json:
                sys.stdout.write(json.dumps(snake(event)) + "\n")
            else:
                fence = str(event.get("fenceDigest") or "no fence")[:19]
                at = time.strftime("%H:%M:%S")
                screen.line(f"{at}  generation {event['generation']}  {event['state']}  {fence}")
            sys.stdout.flush()
            seen += 1
            if seen == arguments.count:
                break
    return 0
