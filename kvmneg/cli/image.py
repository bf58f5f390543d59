# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg image tag|check FILE: what a saved guest holds lies beside its image, as FILE.kvmneg."""

from __future__ import annotations

import os

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser
    from kvmneg.policy.images import Image

SUFFIX = ".kvmneg"


def options(parser: Parser) -> None:
    """One parser a verb; each has the options of every command too."""
    from kvmneg.cli.arguments import common_again, file_name, utf8

    verbs = parser.add_subparsers(metavar="tag|check", required=True)
    for name, function, what in (
        ("tag", _tag, "write what a guest holds beside its saved image"),
        ("check", _check, "may the guest in an image be restored on this host?"),
    ):
        verb = verbs.add_parser(name, help=what, description=what, prog=f"kvmneg image {name}")
        common_again(verb)
        verb.set_defaults(run=function)
        verb.add_argument("file", metavar="FILE", type=file_name, help="the image")
        if name == "tag":
            verb.add_argument("--vm", metavar="UUID", type=utf8, required=True, help="the guest in it")
        else:
            sources.add_report(verb, "the daemon's")
            verb.add_argument("--vmm", metavar="NAME", type=utf8, help="what would run it here")


def _looked_at(path: str) -> tuple[int, str]:
    """An image's size, and the digest of parts of it, all over it. Raises BadInput.

    A guest's memory always has the same size: that another was saved over it only its content tells, and to read all
    of it takes minutes.
    """
    from hashlib import sha256

    from kvmneg import limits
    from kvmneg.errors import BadInput

    found = sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            last = max(size - limits.IMAGE_PART_BYTES, 0)
            for place in range(limits.IMAGE_PARTS):
                file.seek(last * place // (limits.IMAGE_PARTS - 1))
                found.update(file.read(limits.IMAGE_PART_BYTES))
    except OSError as error:
        raise BadInput(f"cannot be looked at: {error.strerror}", file=path) from None
    return size, f"sha256:{found.hexdigest()}"


def _tag(arguments: argparse.Namespace) -> int:
    from kvmneg.policy import images
    from kvmneg.policy.contract import Contract

    size, sample = _looked_at(arguments.file)
    answer = sources.call(arguments, "org.kvmneg.Guests.Get", vm=arguments.vm)
    contract = Contract.from_json(answer["contract"], file="the daemon's contract")
    holds = images.reported(contract.architecture, answer["holds"])
    image = images.Image(str(answer["guest"]["vm"]), contract, holds, size, sample)
    path = arguments.file + SUFFIX
    _write(path, image)
    if arguments.json:
        print_json({"file": path, "vm": image.vm, "digest": contract.digest})
    else:
        Screen().line(f"tagged: {path} says what VM {image.vm} holds ({contract.digest})")
    return 0


def _write(path: str, image: Image) -> None:
    """Whole and on the disk, or not at all. Raises StoreError."""
    import json

    from kvmneg.errors import StoreError

    new = f"{path}.new"
    try:
        with open(new, "w", encoding="utf-8") as file:
            json.dump(image.to_json(), file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from None


def _check(arguments: argparse.Namespace) -> int:
    from kvmneg import limits
    from kvmneg.cli import files
    from kvmneg.errors import Blocked
    from kvmneg.features.report import parse_json
    from kvmneg.policy import images, scope

    size, sample = _looked_at(arguments.file)
    path = arguments.file + SUFFIX
    if not os.path.exists(path):
        raise Blocked(
            f"{arguments.file} has no {os.path.basename(path)} beside it: what the guest in it saw is unknown",
            [],
            hint="restore it where it was saved; an image is tagged with `kvmneg image tag` when it is saved",
        )
    image = images.Image.from_json(
        parse_json(files.read(path), file=path, limit=limits.REPORT_BYTES), file=path
    )
    if image.size != size:
        raise Blocked(
            f"{arguments.file} is not what was tagged: it has {size} bytes, not {image.size}",
            [],
            hint="it was written again since: tag it again where its guest was saved",
        )
    if image.sample and image.sample != sample:
        raise Blocked(
            f"{arguments.file} is not what was tagged: its content is another's",
            [],
            hint="it was written again since: tag it again where its guest was saved",
        )
    report = files.report(arguments.report) if arguments.report else sources.daemon_report(arguments)
    blockers = images.judge(image, report, arguments.vmm)
    if blockers:
        raise Blocked(f"VM {image.vm} cannot be restored on {report.host}", blockers)
    judged = scope.scope(False, report.architecture, report)
    if arguments.json:
        print_json({"fits": True, "vm": image.vm, "digest": image.contract.digest, "scope": list(judged)})
        return 0
    screen = Screen()
    screen.line(f"{screen.good('yes')}: VM {image.vm} may be restored on {report.host}")
    screen.scope(judged)
    return 0
