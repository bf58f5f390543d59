# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg guests [list|import|waive]: who holds what on this host, and the VMs that nobody negotiated for."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser

_SHOWN_DIGEST = len("sha256:") + 12


def options(parser: Parser) -> None:
    """Without a verb: list."""
    from kvmneg.cli.arguments import common_again, file_name, number, utf8

    parser.set_defaults(run=_list)
    verbs = parser.add_subparsers(metavar="list|import|waive")
    for name, function, what in (
        ("list", _list, "the guests of this host (what it does without a verb)"),
        ("import", _import, "an unknown guest holds a contract from now on"),
        ("waive", _waive, "an unknown guest does not block any more"),
    ):
        verb = verbs.add_parser(name, help=what, description=what, prog=f"kvmneg guests {name}")
        common_again(verb)
        verb.set_defaults(run=function)
        if name == "list":
            continue
        verb.add_argument("pid", metavar="PID", type=number(1, 2**31 - 1), help="its process")
        if name == "import":
            verb.add_argument("vm", metavar="UUID", type=utf8, help="the UUID it is to have here")
            most = "what it can have at most: a contract file (all that this host offers)"
            verb.add_argument("--contract", metavar="FILE", type=file_name, help=most)
        verb.add_argument("--reason", metavar="TEXT", type=utf8, required=True, help="why, for the audit")


def _list(arguments: argparse.Namespace) -> int:
    from kvmneg.client import Client

    with Client(arguments.socket) as client:
        answer = client.guests_list()
    if arguments.json:
        guests = [sources.snake(one) for one in answer["guests"]]
        others = {"missed": answer.get("missed"), "others": answer["others"]}
        print_json({"guests": guests, "unknown": answer["unknown"], **others})
        return 0
    screen = Screen()
    guests, unknown = answer["guests"], answer["unknown"]
    screen.line(f"{count(len(guests), 'guest')} with a contract")
    screen.table([_row(guest) for guest in guests])
    if unknown:
        screen.head(f"{count(len(unknown), 'VM')} that nobody negotiated for")
        screen.table([_unknown_row(one) for one in unknown])
        if any(not one.get("waived") for one in unknown):
            text = "They stand in the way of a roll-back: `kvmneg guests import` or `waive`, or end them."
            screen.paragraph(text, indent=2)
    if answer["others"]:
        screen.paragraph(f"{answer['others']} of other users, which an admin sees.")
    if answer.get("missed"):
        screen.paragraph(f"There may be others: {answer['missed']}.", style="warn")
    return 0


def _row(guest: dict[str, Any]) -> list[str]:
    kept = ", ".join(
        f"{holder['by']} of {holder['pid']}" if holder["by"] == "connection" else f"process {holder['pid']}"
        for holder in guest["holders"]
    )
    if guest.get("reported"):
        has = f"reported {guest['reported'][:_SHOWN_DIGEST]}…"
    else:
        has = f"{guest['digest'][:_SHOWN_DIGEST]}…"
    state = guest["state"] if guest["certain"] else f"{guest['state']}?"
    uid, generation = f"uid {guest['uid']}", f"generation {guest['generation']}"
    return [guest["vm"], state, has, generation, uid, kept or "until it is ended"]


def _unknown_row(one: dict[str, Any]) -> list[str]:
    called = one.get("name") or one.get("uuid") or ""
    what = f"waived: {one['waived']}" if one.get("waived") else "unknown"
    return [f"process {one['pid']}", one["process"], called, f"uid {one['uid']}", what]


def _import(arguments: argparse.Namespace) -> int:
    document = None
    if arguments.contract:
        from kvmneg.cli import files
        from kvmneg.errors import BadInput

        found = files.document(arguments.contract).contract
        if found is None:
            raise BadInput("not a contract", file=arguments.contract)
        document = found.to_json()
    given = {"pid": arguments.pid, "vm": arguments.vm, "contract": document, "reason": arguments.reason}
    answer = sources.call(arguments, "org.kvmneg.Guests.Import", **given)
    if arguments.json:
        print_json({"vm": arguments.vm, **answer})
    else:
        Screen().line(
            f"imported: VM {arguments.vm} holds {answer['digest']} while process {arguments.pid} lives"
        )
    return 0


def _waive(arguments: argparse.Namespace) -> int:
    sources.call(arguments, "org.kvmneg.Guests.Waive", pid=arguments.pid, reason=arguments.reason)
    if arguments.json:
        print_json({"pid": arguments.pid, "waived": arguments.reason})
    else:
        Screen().line(f"waived: process {arguments.pid} does not block any more")
    return 0
