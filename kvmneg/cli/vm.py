# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg vm begin|started|…|end: what a VM monitor tells the daemon of its VM, for scripts that start one."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.policy.contract import Contract


def options(parser: Parser) -> None:
    """One parser a verb; each has the options of every command too."""
    from kvmneg.cli.arguments import common_again, file_name, number, utf8

    verbs = parser.add_subparsers(metavar="|".join(verb[0] for verb in _VERBS), required=True)
    for name, function, what in _VERBS:
        verb = verbs.add_parser(name, help=what, description=what, prog=f"kvmneg vm {name}")
        common_again(verb)
        verb.set_defaults(run=function)
        if name == "begin":
            verb.add_argument("digest", metavar="DIGEST", type=_digest, help="the digest that negotiate gave")
        if name == "receive":
            verb.add_argument(
                "contract",
                metavar="CONTRACT",
                type=file_name,
                help="a contract file, as another host gave it",
            )
        verb.add_argument("vm", metavar="UUID", type=utf8, help="the VM's UUID")
        if name == "report":
            verb.add_argument(
                "file", metavar="FILE", type=file_name, help="a contract file with what was really set"
            )
        if name in ("started", "saved", "handover", "end"):
            which = (
                "only this life of the VM: one of several users' VMs of that UUID (`kvmneg guests --json`)"
            )
            verb.add_argument("--incarnation", metavar="N", type=number(1, 2**63 - 1), help=which)
        if name in ("begin", "handover", "receive"):
            keeps = "the process that runs the VM: the contract is kept while it lives"
            required = name == "handover"
            verb.add_argument("--pid", metavar="N", type=number(1, 2**31 - 1), required=required, help=keeps)


def _digest(text: str) -> str:
    """Raises ArgumentTypeError."""
    if not sources.is_digest(text):
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text[:40]!r} is no digest: sha256: and 64 hexadecimal digits")
    return sources.full_digest(text)


def begin(arguments: argparse.Namespace, digest: str) -> dict[str, Any]:
    """Grant an offer to the VM that the arguments name; the document of what was granted."""
    pid = getattr(arguments, "pid", None)  # `negotiate --begin` has none
    answer = sources.call(arguments, "org.kvmneg.Begin", digest=digest, vm=arguments.vm, pid=pid)
    return {
        "vm": arguments.vm,
        "digest": answer["digest"],
        "generation": answer["generation"],
        "path": answer.get("path"),
        "expires_in_seconds": answer.get("expiresInSeconds"),
        "incarnation": answer.get("incarnation"),
    }


def _begin(arguments: argparse.Namespace) -> int:
    begun = begin(arguments, arguments.digest)
    if arguments.json:
        print_json(begun)
        return 0
    screen = Screen()
    screen.line(f"begun: VM {begun['vm']} holds {begun['digest']}")
    screen.words("file", [str(begun["path"])])
    if getattr(arguments, "pid", None):
        screen.words("kept", f"while process {arguments.pid} lives".split(" "))
    elif begun["expires_in_seconds"] is not None:
        screen.words("expires", f"in {begun['expires_in_seconds']} seconds, unless it is started".split(" "))
    return 0


def _started(arguments: argparse.Namespace) -> int:
    return _tell(arguments, "org.kvmneg.Started", "started", "does not expire any more")


def _saved(arguments: argparse.Namespace) -> int:
    return _tell(arguments, "org.kvmneg.Guests.Saved", "saved", "counts on, whatever becomes of its process")


def _handover(arguments: argparse.Namespace) -> int:
    then = f"is kept by process {arguments.pid} too"
    return _tell(arguments, "org.kvmneg.Guests.Handover", "handed over", then, pid=arguments.pid)


def _end(arguments: argparse.Namespace) -> int:
    return _tell(arguments, "org.kvmneg.End", "ended", "is put away")


def _tell(arguments: argparse.Namespace, method: str, state: str, then: str, **given: Any) -> int:
    sources.call(arguments, method, vm=arguments.vm, incarnation=arguments.incarnation, **given)
    if arguments.json:
        print_json({"vm": arguments.vm, "state": state})
    else:
        Screen().line(f"{state}: the contract of VM {arguments.vm} {then}")
    return 0


def _receive(arguments: argparse.Namespace) -> int:
    document = _contract(arguments.contract).to_json()
    answer = sources.call(
        arguments, "org.kvmneg.Guests.Receive", contract=document, vm=arguments.vm, pid=arguments.pid
    )
    if arguments.json:
        print_json({"vm": arguments.vm, **sources.snake(answer), "above": _blockers(answer["above"])})
        return 0
    screen = Screen()
    screen.line(f"received: VM {arguments.vm} holds {answer['digest']}")
    screen.words("file", [str(answer["path"])])
    if answer["above"]:
        from kvmneg.features.difference import Blocker

        screen.head("an island: beyond the level of this host, and in the way of a lowering")
        screen.blockers([Blocker.from_json(row) for row in answer["above"]], label="more")
    return 0


def _blockers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a reply as documents have them."""
    from kvmneg.features.difference import Blocker

    return [Blocker.from_json(row).to_json() for row in rows]


def _report(arguments: argparse.Namespace) -> int:
    from kvmneg.features.difference import Blocker

    words = _contract(arguments.file).to_json()["words"]
    answer = sources.call(arguments, "org.kvmneg.Guests.Report", vm=arguments.vm, words=words)
    if arguments.json:
        print_json({"vm": arguments.vm, **answer, "exceeds": _blockers(answer["exceeds"])})
        return 0
    screen = Screen()
    screen.line(f"reported: VM {arguments.vm} has {answer['digest']}")
    if answer["exceeds"]:
        screen.head("beyond its contract")
        screen.blockers([Blocker.from_json(row) for row in answer["exceeds"]], label="more")
    return 0


def _contract(path: str) -> Contract:
    """A contract file, binary or JSON. Raises BadInput."""
    from kvmneg.cli import files
    from kvmneg.errors import BadInput

    found = files.document(path).contract
    if found is None:
        raise BadInput("not a contract", file=path, hint="`kvmneg contract --json` writes one")
    return found


_VERBS = (
    ("begin", _begin, "take an offer for a VM: its contract counts from now on"),
    ("started", _started, "the VM runs: its contract does not expire any more"),
    ("report", _report, "what its monitor has really set: it counts in the place of the contract"),
    ("saved", _saved, "the VM lies in an image: its contract goes on to count"),
    ("handover", _handover, "the VM goes on in another process"),
    ("receive", _receive, "the VM comes from another host, with its contract"),
    ("end", _end, "the VM is gone, and its contract with it"),
)
