# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg vm begin|started|end: what a VM monitor tells the daemon of its VM, for scripts that start one."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser


def options(parser: Parser) -> None:
    """One parser a verb; each has the options of every command too."""
    from argparse import SUPPRESS

    from kvmneg.cli.arguments import file_name, utf8

    verbs = parser.add_subparsers(metavar="begin|started|end", required=True)
    for name, function, what in (
        ("begin", _begin, "take an offer for a VM: its contract counts from now on"),
        ("started", _started, "the VM runs: its contract does not expire any more"),
        ("end", _end, "the VM is gone, and its contract with it"),
    ):
        verb = verbs.add_parser(name, help=what, description=what, prog=f"kvmneg vm {name}")
        # given before the verb they hold too: a default here would overwrite them
        verb.add_argument("--json", action="store_true", default=SUPPRESS, help="print JSON")
        verb.add_argument(
            "--socket", metavar="PATH", type=file_name, default=SUPPRESS, help="the daemon's socket"
        )
        verb.set_defaults(run=function)
        if name == "begin":
            verb.add_argument("digest", metavar="DIGEST", type=_digest, help="the digest that negotiate gave")
        verb.add_argument("vm", metavar="UUID", type=utf8, help="the VM's UUID")


def _digest(text: str) -> str:
    """Raises ArgumentTypeError."""
    if not sources.is_digest(text):
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text[:40]!r} is no digest: sha256: and 64 hexadecimal digits")
    return sources.full_digest(text)


def begin(arguments: argparse.Namespace, digest: str) -> dict[str, Any]:
    """Grant an offer to the VM that the arguments name; the document of what was granted."""
    answer = sources.call(arguments, "org.kvmneg.Begin", digest=digest, vm=arguments.vm)
    return {
        "vm": arguments.vm,
        "digest": answer["digest"],
        "generation": answer["generation"],
        "path": answer.get("path"),
        "expires_in_seconds": answer.get("expiresInSeconds"),
    }


def _begin(arguments: argparse.Namespace) -> int:
    begun = begin(arguments, arguments.digest)
    if arguments.json:
        print_json(begun)
        return 0
    screen = Screen()
    screen.line(f"begun: VM {begun['vm']} holds {begun['digest']}")
    screen.words("file", [str(begun["path"])])
    if begun["expires_in_seconds"] is not None:
        screen.words("expires", f"in {begun['expires_in_seconds']} seconds, unless it is started".split(" "))
    return 0


def _started(arguments: argparse.Namespace) -> int:
    return _tell(arguments, "Started", "started", "does not expire any more")


def _end(arguments: argparse.Namespace) -> int:
    return _tell(arguments, "End", "ended", "is put away")


def _tell(arguments: argparse.Namespace, method: str, state: str, then: str) -> int:
    sources.call(arguments, f"org.kvmneg.{method}", vm=arguments.vm)
    if arguments.json:
        print_json({"vm": arguments.vm, "state": state})
    else:
        Screen().line(f"{state}: the contract of VM {arguments.vm} {then}")
    return 0
