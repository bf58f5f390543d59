# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg rollback check --from NEW --to OLD: the widest fence under which guests can go back, from two reports."""

from __future__ import annotations

from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.report import Report
    from kvmneg.policy.rollback import Answer


def options(parser: Parser) -> None:
    """One verb for now; it has the options of every command too."""
    from argparse import SUPPRESS

    from kvmneg.cli.arguments import file_name, utf8

    verbs = parser.add_subparsers(metavar="check", required=True)
    what = "whether guests of a new kernel could go on under an old one, from two reports"
    verb = verbs.add_parser("check", help=what, description=what, prog="kvmneg rollback check")
    verb.add_argument("--json", action="store_true", default=SUPPRESS, help="print JSON")
    verb.add_argument(
        "--socket", metavar="PATH", type=file_name, default=SUPPRESS, help="the daemon's socket"
    )
    verb.add_argument(
        "--from", dest="new", metavar="NEW", required=True, help="the report made under the new kernel"
    )
    verb.add_argument(
        "--to", dest="old", metavar="OLD", required=True, help="the report made under the old one"
    )
    verb.add_argument(
        "--vmm", metavar="NAME", type=utf8, help="what runs the guests (one that follows contracts)"
    )
    verb.add_argument("--fence", action="store_true", help="print the fence alone")
    verb.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from kvmneg.cli import files
    from kvmneg.errors import Blocked
    from kvmneg.policy import rollback

    new, old = files.report(arguments.new), files.report(arguments.old)
    answer = rollback.judge(new, old, arguments.vmm)
    if answer.fence is None:
        names = ", ".join(dict.fromkeys(blocker.feature for blocker in answer.blockers))
        fields = {key: value for key, value in answer.to_json().items() if key != "blockers"}
        raise Blocked(
            f"no fence exists under which guests could go back from {new.host} to {old.host}: {names}",
            answer.blockers,
            **fields,
        )
    if arguments.json:
        print_json(answer.to_json())
    elif arguments.fence:
        print(answer.fence.text(), end="")
    else:
        _show(Screen(), answer, new, old)
    return 0


def _show(screen: Screen, answer: Answer, new: Report, old: Report) -> None:
    from kvmneg.features.featureset import diff

    assert answer.fence is not None
    lost = [row.feature for row in diff(new.offer, answer.fence.granted)]
    screen.line(f"{screen.good('yes')}: under a fence, guests can go back from {new.host} to {old.host}")
    screen.words("fence", [answer.fence.digest, *(["(--fence prints it)"])])
    screen.words("without", lost or ["nothing"])
    if answer.dropped:
        screen.head(f"left out by the VMM: {count(len(answer.dropped), 'register')}")
        screen.table([[one.word(), one.text()] for one in answer.dropped])
    if answer.unfenced:
        screen.head("a guest that was started without the fence cannot go back")
        screen.blockers(answer.unfenced)
    screen.scope(answer.scope)
