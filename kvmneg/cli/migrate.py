# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg migrate check GUEST --to HOST: may a guest move there, and is it an island once it has?"""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.moving import Move
    from kvmneg.policy.portable import Entry


def options(parser: Parser) -> None:
    """One verb for now; it has the options of every command too."""
    from kvmneg.cli.arguments import common_again, file_name, utf8

    verbs = parser.add_subparsers(metavar="check", required=True)
    what = "whether another host accepts a guest, and whether the guest stands above its level"
    verb = verbs.add_parser("check", help=what, description=what, prog="kvmneg migrate check")
    common_again(verb)
    verb.add_argument(
        "guest",
        metavar="GUEST",
        type=file_name,
        help="its UUID, or its contract: a file, or a digest known here",
    )
    verb.add_argument(
        "--to",
        metavar="HOST",
        type=file_name,
        required=True,
        help="a report file, or the socket of its daemon",
    )
    verb.add_argument("--vmm", metavar="NAME", type=utf8, help="what will run the guest there: qemu, …")
    verb.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from kvmneg.errors import Blocked
    from kvmneg.policy import moving

    granted, portable = _guest(arguments)
    there, fence, held_back = _target(arguments)
    move = moving.judge(granted, there, fence, arguments.vmm, portable=portable)
    if held_back:
        line = "not judged: whether the guest is an island there; that host floats at a level below what it offers"
        move = move._replace(scope=(*move.scope, line))
    if not move.allowed:
        fields = {key: value for key, value in move.to_json().items() if key != "blockers"}
        raise Blocked(f"the guest may not move to {there.host}", move.blockers, **fields)
    if arguments.json:
        print_json(move.to_json())
    else:
        _show(Screen(), move, there)
    return 0


def _guest(arguments: argparse.Namespace) -> tuple[FeatureSet, tuple[Entry, ...]]:
    """What the guest holds, and on arm64 its registers. Raises BadInput, NoSuchContract, UsageError, Unreachable."""
    import os

    from kvmneg.cli import files
    from kvmneg.errors import BadInput

    name = arguments.guest
    if sources.is_digest(name):
        contract = sources.contract_of_digest(arguments, name)[0]
        return contract.granted, contract.portable
    if _is_uuid(name) and not os.path.exists(name):
        return _running(arguments, name)
    found = files.document(name)
    if found.contract is None:
        raise BadInput(f"a {found.kind}, not a contract", file=name, hint="`kvmneg contract` prints them")
    return found.contract.granted, found.contract.portable


def _is_uuid(text: str) -> bool:
    return [len(part) for part in text.split("-")] == [8, 4, 4, 4, 12]


def _running(arguments: argparse.Namespace, vm: str) -> tuple[FeatureSet, tuple[Entry, ...]]:
    """What a VM here holds: the set that its VMM reported, until then its contract's."""
    from kvmneg.policy import images
    from kvmneg.policy.contract import Contract

    found = sources.call(arguments, "org.kvmneg.Guests.Get", vm=vm)
    contract = Contract.from_json(found["contract"], file="the daemon's contract")
    return images.reported(contract.architecture, found["holds"]), contract.portable


def _target(arguments: argparse.Namespace) -> tuple[Report, Fence | None, bool]:
    """The other host's report and, of a daemon, its fence, and whether it floats below what it offers.

    Raises BadInput, Unreachable, NoKvm.
    """
    import os
    import stat

    from kvmneg.cli import files

    try:
        is_socket = stat.S_ISSOCK(os.stat(arguments.to).st_mode)
    except (OSError, ValueError):
        is_socket = False
    if not is_socket:
        return files.report(arguments.to), None, False
    from kvmneg.client import Client
    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence

    with Client(arguments.to) as client:
        host, fence = client.get_host(), client.fence_get()
    text, generation = fence.get("text"), fence["generation"]
    where = f"the fence of {arguments.to}"
    pinned = Fence.parse(text, generation=generation, file=where) if text is not None else None
    report = Report.from_json(host["host"], file=f"the report of {arguments.to}")
    return report, pinned, bool(fence.get("heldBack"))


def _show(screen: Screen, move: Move, there: Report) -> None:
    screen.line(f"{screen.good('yes')}: the guest may move to {there.host}")
    if move.above:
        names = list(dict.fromkeys(blocker.feature for blocker in move.above))
        screen.paragraph(
            f"an island: it has more than {move.level}, and goes on from there only to hosts that have as much",
            style="warn",
        )
        screen.words("above", names)
    screen.scope(move.scope)
