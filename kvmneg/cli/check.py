# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg check: may a guest come to this host? Judged by what the host accepts; nothing is kept."""

from __future__ import annotations

from kvmneg.cli import arguments as options_of
from kvmneg.cli import requests, sources
from kvmneg.cli.host import flagged, impossible
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.difference import Blocker
    from kvmneg.features.report import Report
    from kvmneg.policy.contract import Contract

_Verdict = tuple["tuple[Blocker, ...]", list[str], "str | None"]  # blockers, scope, the contract's grade


def options(parser: Parser) -> None:
    options_of.add_request(parser)
    parser.add_argument(
        "--contract", metavar="FILE|DIGEST", help="a guest with this contract, instead of a request"
    )
    sources.add_report(parser, "asking the daemon")


def run(arguments: argparse.Namespace) -> int:
    from kvmneg.errors import Blocked, UsageError

    if arguments.contract and options_of.has_request(arguments):
        raise UsageError("--contract says it all: leave the request's flags out")
    architecture = "x86_64"
    if arguments.report:
        from kvmneg.cli import files

        architecture = files.report(arguments.report).architecture
    subject = options_of.request_of(arguments).describe(architecture)
    if arguments.contract:
        subject = f"the contract {arguments.contract}"
    blockers, scope, grade = _by_contract(arguments) if arguments.contract else _by_request(arguments)
    if blockers:
        there = _where(arguments)
        found: dict[str, Any] = {"flagged": _flagged(arguments)} if arguments.json else {}
        raise Blocked(
            f"a guest with {subject} may not come {there}", blockers, fits=False, scope=scope, **found
        )
    if arguments.json:
        answer = {"fits": True, "blockers": [], "grade": grade, "scope": scope}
        print_json({**answer, "flagged": _flagged(arguments)})
        return 0
    screen = Screen()
    if arguments.report:
        from kvmneg.cli import files

        sources.label(screen, files.report(arguments.report))
    screen.line(f"{screen.good('yes')}: a guest with {subject} may come {_where(arguments)}")
    requests.show_grade(screen, grade)
    impossible(screen, [_report(arguments)])
    screen.scope(scope)
    return 0


def _report(arguments: argparse.Namespace) -> Report:
    """The report that was judged."""
    from kvmneg.cli import files

    return files.report(arguments.report) if arguments.report else sources.daemon_report(arguments)


def _flagged(arguments: argparse.Namespace) -> list[dict[str, str]]:
    return flagged([_report(arguments)])


def _where(arguments: argparse.Namespace) -> str:
    """The host that was judged, as a sentence names it."""
    if not arguments.report:
        return "here"
    from kvmneg.cli import files

    return f"to {files.report(arguments.report).host}"


def _by_contract(arguments: argparse.Namespace) -> _Verdict:
    from kvmneg.policy import grade, negotiation
    from kvmneg.policy.scope import scope

    alone = arguments.require_enforced  # the daemon's Check does not insist
    if not arguments.report and not alone and _digest_of(arguments):
        return _daemon(arguments, digest=sources.full_digest(arguments.contract), vmm=arguments.vmm)
    contract, report = _contract(arguments), _report(arguments)
    blockers = list(negotiation.check(contract, report, arguments.vmm))
    if arguments.require_enforced:
        blockers += grade.blockers(contract.granted, report)
    judged = scope(False, report.architecture, report)
    return tuple(blockers), judged, grade.of(contract.granted, report)


def _digest_of(arguments: argparse.Namespace) -> bool:
    """A file of that name wins: granted contracts lie in files named by their digest."""
    import os

    return sources.is_digest(arguments.contract) and not os.path.exists(arguments.contract)


def _contract(arguments: argparse.Namespace) -> Contract:
    if _digest_of(arguments):
        return sources.contract_of_digest(arguments, arguments.contract)[0]
    return requests.contract_file(arguments.contract)


def _by_request(arguments: argparse.Namespace) -> _Verdict:
    request = options_of.request_of(arguments)
    if not arguments.report:
        return _daemon(arguments, request=request.to_json())
    from kvmneg.cli import files
    from kvmneg.errors import Blocked
    from kvmneg.policy import negotiation
    from kvmneg.policy.scope import scope

    report = files.report(arguments.report)
    judged = scope(False, report.architecture, report)
    try:
        answer = negotiation.check_request(request, report)
    except Blocked as no:  # told as the daemon's no is
        return no.blockers, judged, None
    return (), judged, answer.contract.grade


def _daemon(arguments: argparse.Namespace, **parameters: Any) -> _Verdict:
    from kvmneg.features.difference import Blocker

    answer = sources.call(arguments, "org.kvmneg.Check", **parameters)
    blockers = tuple(Blocker.from_json(row) for row in answer.get("blockers") or ())
    if not answer["fits"] and not blockers:
        blockers = (
            Blocker("contract", "", None, "the guest", "this host", "unknown", "the daemon gave no reason"),
        )
    return blockers, list(answer["scope"]), answer.get("grade")
