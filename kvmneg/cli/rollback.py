# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg rollback check|add|remove|list: may this host go back, and to which combos is it to be able to?

`check --from NEW --to OLD` judges two report files and asks nobody; every other form asks the daemon.
"""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.report import Report
    from kvmneg.policy.rollback import Answer

COMBO = "COMBO"


def options(parser: Parser) -> None:
    """One parser a verb; each has the options of every command too."""
    from kvmneg.cli.arguments import common_again, utf8

    verbs = parser.add_subparsers(metavar="check|add|remove|list", required=True)
    for name, function, what in (
        ("check", _check, "may this host go back to a combo, with its guests?"),
        ("add", _add, "be able to return to a combo: the fence stays within it"),
        ("remove", _remove, "give up returning to a combo"),
        ("list", _list, "the roll-back set, and how each combo of it stands now"),
    ):
        verb = verbs.add_parser(name, help=what, description=what, prog=f"kvmneg rollback {name}")
        common_again(verb)
        verb.set_defaults(run=function)
        if name == "check":
            _check_options(verb)
        if name in ("add", "remove"):
            verb.add_argument(
                "combo", metavar=COMBO, type=utf8, help="its digest, or the beginning; or `running`"
            )
            verb.add_argument("--reason", metavar="TEXT", type=utf8, help="why, for the audit")
        if name == "add":
            verb.add_argument(
                "--plan", action="store_true", help="add nothing: print the fence that it would take"
            )


def _check_options(verb: argparse.ArgumentParser) -> None:
    from kvmneg.cli.arguments import file_name, utf8

    verb.add_argument("--to", dest="old", metavar="COMBO|OLD", type=file_name, help="a recorded combo")
    verb.add_argument("--kernel", metavar="RELEASE", type=utf8, help="another kernel, all else as it is now")
    verb.add_argument("--vmm", metavar="NAME", type=utf8, help="what runs the guests, or another build of it")
    verb.add_argument(
        "--set", metavar="DIMENSION=VALUE", dest="others", action="append", default=[], type=_dimension,
        help="another microcode, parameter, … (`kvmneg diff` shows their names)",
    )  # fmt: skip
    verb.add_argument(
        "--predict", action="store_true", help="of a combo never measured, what tables let expect"
    )
    verb.add_argument(
        "--from", dest="new", metavar="NEW", help="two report files: made under the new kernel, --to the old"
    )
    verb.add_argument("--fence", action="store_true", help="of two report files, print the fence alone")


def _dimension(text: str) -> tuple[str, str]:
    """Raises ArgumentTypeError."""
    from argparse import ArgumentTypeError

    from kvmneg.cli.arguments import utf8

    name, equals, value = utf8(text).partition("=")
    if not (name and equals):
        raise ArgumentTypeError(f"{text[:40]!r} is not DIMENSION=VALUE, like microcode=0xa0011d1")
    return name, value


def _check(arguments: argparse.Namespace) -> int:
    from kvmneg.errors import UsageError

    asked = arguments.kernel or arguments.others or arguments.predict
    if arguments.new is not None:
        if arguments.old is None or asked:
            raise UsageError(
                "--from NEW goes with --to OLD, and both are files", hint="the daemon needs neither"
            )
        return _offline(arguments)
    if arguments.fence:
        raise UsageError(
            "--fence goes with --from NEW --to OLD", hint="`kvmneg rollback add --plan` prints one"
        )
    if not (arguments.old or asked or arguments.vmm):
        return _list(arguments, ask=True)
    from kvmneg.cli import rollback_answer  # what it prints is long

    answer = sources.call(
        arguments,
        "org.kvmneg.Rollback.Check",
        combo=arguments.old,
        kernel=arguments.kernel,
        vmm=arguments.vmm,
        dimensions=dict(arguments.others) or None,
        predict=arguments.predict or None,
    )
    return rollback_answer.tell(answer, as_json=arguments.json)


# -- the roll-back set --------------------------------------------------------------------------------


def _add(arguments: argparse.Namespace) -> int:
    if arguments.plan:
        return _plan(arguments)
    answer = _change(arguments, "org.kvmneg.Rollback.Add")
    if not arguments.json:
        done = "is in the roll-back set now" if answer["changed"] else "was in the roll-back set already"
        Screen().line(f"{answer['combo']} {done}")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    answer = _change(arguments, "org.kvmneg.Rollback.Remove")
    if not arguments.json:
        done = "is in the roll-back set no more" if answer["changed"] else "was not in the roll-back set"
        Screen().line(f"{answer['combo']} {done}")
    return 0


def _change(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    from kvmneg.errors import UsageError

    if arguments.reason is None:
        raise UsageError("--reason is needed", hint="a later admin will ask for it")
    answer = sources.call(arguments, method, combo=arguments.combo, reason=arguments.reason)
    if arguments.json:
        print_json(sources.snake(answer))
    return answer


def _plan(arguments: argparse.Namespace) -> int:
    import sys

    answer = sources.call(arguments, "org.kvmneg.Rollback.Plan", combo=arguments.combo)
    if arguments.json:
        print_json(sources.snake(answer))
        return 0 if answer["text"] is not None else 1
    screen = Screen(sys.stderr)  # standard output carries the text alone: it can be proposed as it is
    if not answer["take"]:
        screen.line("it holds all of the fence: there is nothing to lower")
    else:
        screen.words("take", answer["take"])
    if answer["text"] is None:
        from kvmneg.errors import Blocked
        from kvmneg.features.difference import Blocker

        blockers = [Blocker.from_json(row) for row in answer["blockers"]]
        raise Blocked("no fence holds on that combo and on this one", blockers)
    sys.stdout.write(answer["text"])
    return 0


def _list(arguments: argparse.Namespace, *, ask: bool = False) -> int:
    """The set; with `ask` the exit status says whether every member is allowed."""
    answer = sources.call(arguments, "org.kvmneg.Rollback.List")
    entries = answer["entries"]
    if ask and not entries:
        from kvmneg.errors import UsageError

        raise UsageError(
            "no combo is asked for, and the roll-back set is empty",
            hint="--to COMBO (`kvmneg history` lists them), --kernel RELEASE, or `kvmneg rollback add` first",
        )
    status = 0 if not ask or all(entry["allowed"] for entry in entries) else 1
    if arguments.json:
        print_json({"entries": [_snaked(entry) for entry in entries], "scope": answer["scope"]})
        return status
    screen = Screen()
    if not entries:
        screen.line("the roll-back set is empty: the fence is bound by this combo alone")
        return status
    for entry in entries:
        _show_member(screen, entry)
    screen.scope(answer["scope"])
    return status


def _snaked(entry: dict[str, Any]) -> dict[str, Any]:
    return {**sources.snake(entry), "combo": sources.snake(entry["combo"])}


def _show_member(screen: Screen, entry: dict[str, Any]) -> None:
    combo = entry["combo"]
    verdict = screen.good("yes") if entry["allowed"] else screen.bad("no")
    screen.line(f"{verdict}  {combo['kernel']}  {combo['combo'][:19]}")
    if not entry["allowed"]:
        why = [f"lacks {count(entry['lacking'], 'feature')} of the fence"] * bool(entry["lacking"])
        why += [f"does not accept {count(entry['guests'], 'guest')}"] * bool(entry["guests"])
        screen.paragraph(
            ", ".join(why) + f"; `kvmneg rollback check --to {combo['combo'][7:19]}` says why", indent=5
        )
    vmms = ", ".join(combo["vmms"]) or "no VMM known"
    screen.paragraph(f"microcode {combo['microcode'] or 'none'}, {vmms}", indent=5)
    screen.paragraph(f"since {entry['at']}, by uid {entry['uid']}: {entry['reason']}", indent=5, style="dim")


# -- two report files ---------------------------------------------------------------------------------


def _offline(arguments: argparse.Namespace) -> int:
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
