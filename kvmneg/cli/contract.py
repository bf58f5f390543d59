# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg contract: one contract, by its digest from the daemon, or from a file."""

from __future__ import annotations

import os

from kvmneg.cli import requests, sources
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser


def options(parser: Parser) -> None:
    parser.add_argument("digest", metavar="DIGEST|FILE", help="the digest, or a contract file")
    requests.add_emit(parser)


def run(arguments: argparse.Namespace) -> int:
    from kvmneg.errors import UsageError
    from kvmneg.policy.scope import scope

    path, state = None, None
    if os.path.exists(arguments.digest):
        path, contract = arguments.digest, requests.contract_file(arguments.digest)
    elif sources.is_digest(arguments.digest):
        contract, answer = sources.contract_of_digest(arguments, arguments.digest)
        path, state = answer.get("path"), answer.get("state")
    else:
        raise UsageError(
            f"{arguments.digest!r} is neither a digest nor a file",
            hint="a digest is sha256: and 64 hexadecimal digits",
        )
    emitted = requests.emission(arguments, contract, None)
    if arguments.json:
        document = {"contract": contract.to_json(), "digest": contract.digest, "path": path, "state": state}
        print_json({**document, "qemu": emitted.to_json()} if emitted else document)
        return 0
    screen = Screen()
    screen.line(screen.bold(f"contract{f', {state}' if state else ''}"))
    requests.show_contract(screen, contract)
    if path:
        screen.words("file", [path])
    if emitted:
        requests.show_emission(screen, emitted)
    screen.scope(scope(True, contract.architecture))
    return 0
