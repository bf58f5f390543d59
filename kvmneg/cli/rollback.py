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
        whose = f"guests of {arguments.vmm}" if arguments.vmm else "guests"
        raise Blocked(
            f"no fence exists under which {whose} could go back from {new.host} to {old.host}: {names}",
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
    from kvmneg.policy import rollback

    assert answer.fence is not None
    screen.line(f"{screen.good('yes')}: under a fence, guests can go back from {new.host} to {old.host}")
    if rollback.forward(new, old):
        screen.paragraph(f"{old.host} has the newer kernel: this is the way forward", style="warn")
    screen.words("fence", [answer.fence.digest, *(["(--fence prints it)"])])
    lost = diff(new.offer, answer.fence.granted)
    screen.words("takes away", [row.feature for row in lost if row.width == 1] or ["no feature"])
    changed = [f"{row.feature} {row.b:#x} ({row.a:#x})" for row in lost if row.width > 1]
    if changed:
        screen.words("sets", [*changed, f"(in brackets: as {new.host} has it)"])
    if answer.dropped:
        _show_dropped(screen, answer)
    if answer.unfenced:
        screen.head("a guest that was started without the fence cannot go back")
        screen.blockers(answer.unfenced)
    screen.scope(answer.scope)


def _show_dropped(screen: Screen, answer: Answer) -> None:
    """The registers that move no further than the new kernel, by the condition on each."""
    from kvmneg.policy import portable

    screen.head(
        f"left out on the way back: {count(len(answer.dropped), 'register')} the old kernel does not know"
    )
    rules: dict[str, list[str]] = {}
    for one in answer.dropped:
        holds = f"while it holds {one.value:#x}" if one.rule == portable.DROP_IF else "while the timer is off"
        rules.setdefault(holds, []).append(one.word())
    for condition, names in rules.items():
        screen.line(f"  {condition}")
        screen.words("", names, indent=4, column=6)
    screen.paragraph("The move is refused where one holds anything else.", indent=2)
