# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg negotiate: a contract from the daemon, or by a report file without one."""

from __future__ import annotations

from kvmneg.cli import arguments as options_of
from kvmneg.cli import requests, sources
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.emit.qemu import Emission
    from kvmneg.features.difference import Blocker
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.policy.contract import Contract


class Offer:
    """What was answered: the contract, generation, what is not granted, the scope, and the host's offer."""

    def __init__(
        self,
        contract: Contract,
        generation: int,
        not_granted: tuple[Blocker, ...],
        scope: list[str],
        host: FeatureSet | None,
    ) -> None:
        self.contract = contract
        self.generation = generation
        self.not_granted = not_granted
        self.scope = scope
        self.host = host

    def to_json(self) -> dict[str, Any]:
        return {
            "contract": self.contract.to_json(),
            "digest": self.contract.digest,
            "generation": self.generation,
            "not_granted": [blocker.to_json() for blocker in self.not_granted],
            "scope": self.scope,
        }


def options(parser: Parser) -> None:
    options_of.add_request(parser)
    sources.add_report(parser, "asking the daemon; nothing can be begun then")
    parser.add_argument("--fence", metavar="FILE", help="with --report: under this fence")
    group = parser.add_argument_group("granting")
    group.add_argument("--begin", action="store_true", help="grant the contract to the VM of --vm at once")
    group.add_argument("--vm", metavar="UUID", help="the VM's UUID")
    requests.add_emit(parser)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    offer = _from_report(arguments) if arguments.report else _from_daemon(arguments)
    emitted = requests.emission(arguments, offer.contract, offer.host)
    begun = None
    if arguments.begin:
        from kvmneg.cli import vm

        begun = vm.begin(arguments, offer.contract.digest)
    if arguments.json:
        document = offer.to_json()
        if begun:
            document["begun"] = begun
        if emitted:
            document["qemu"] = emitted.to_json()
        print_json(document)
    else:
        _show(arguments, offer, begun, emitted)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from kvmneg.errors import UsageError

    if arguments.begin != (arguments.vm is not None):
        raise UsageError(
            "--begin and --vm go together", hint="--begin --vm UUID grants the contract to that VM"
        )
    if arguments.begin and arguments.report:
        raise UsageError("only the daemon grants: --begin and --report exclude each other")
    if arguments.fence and not arguments.report:
        raise UsageError(
            "--fence goes with --report", hint="the daemon has a fence of its own: kvmneg fence show"
        )


def _from_report(arguments: argparse.Namespace) -> Offer:
    from kvmneg.cli import files
    from kvmneg.errors import Blocked
    from kvmneg.policy import negotiation
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.scope import scope

    request = options_of.request_of(arguments)
    report = files.report(arguments.report)
    fence = None
    if arguments.fence:
        found = files.document(arguments.fence)
        fence = Fence(found.granted, registers=found.fence.registers if found.fence else ())
    try:
        answer = negotiation.negotiate(request, report, fence)
    except Blocked as no:
        no.blockers = tuple(_of_file(blocker, arguments.fence) for blocker in no.blockers)
        raise
    answer.not_granted = tuple(_of_file(blocker, arguments.fence) for blocker in answer.not_granted)
    host = negotiation.ceiling(report, None, request.vmm)
    judged = scope(fence is not None, report.architecture, report)
    return Offer(answer.contract, 0, answer.not_granted, judged, host)


def _of_file(blocker: Blocker, fence: str) -> Blocker:
    """A blocker as the fence of a file makes it: no pinned one has generation 0."""
    if blocker.missing_on != "fence generation 0":
        return blocker
    because = "the host offers it, the fence does not name it"
    return blocker._replace(missing_on=f"fence {fence}", because=because)


def _from_daemon(arguments: argparse.Namespace) -> Offer:
    from kvmneg.cli import files
    from kvmneg.features.difference import Blocker

    request = options_of.request_of(arguments)
    answer = sources.call(arguments, "org.kvmneg.Negotiate", request=request.to_json())
    contract = files.json_contract(answer["contract"], "the daemon's answer")
    not_granted = tuple(Blocker.from_json(row) for row in answer.get("notGranted") or ())
    host = None
    if arguments.emit:
        from kvmneg.policy import negotiation

        host = negotiation.ceiling(sources.daemon_report(arguments), None, request.vmm)
    return Offer(contract, answer["generation"], not_granted, answer["scope"], host)


def _show(
    arguments: argparse.Namespace, offer: Offer, begun: dict[str, Any] | None, emitted: Emission | None
) -> None:
    from kvmneg.cli import files

    screen = Screen()
    if arguments.report:
        sources.label(screen, files.report(arguments.report))
    request = options_of.request_of(arguments)
    screen.line(f"{screen.good('yes')}: a contract for {request.describe(offer.contract.architecture)}")
    requests.show_contract(screen, offer.contract, arguments.fence or "none pinned")
    if begun:
        screen.head(f"granted to VM {begun['vm']}")
        screen.words("file", [str(begun["path"])])
        if begun["expires_in_seconds"] is not None:
            screen.words("expires", f"in {begun['expires_in_seconds']} s, unless it is started".split(" "))
    requests.show_not_granted(screen, offer.not_granted)
    if emitted:
        requests.show_emission(screen, emitted)
    screen.scope(offer.scope)
