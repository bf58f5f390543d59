# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parsers: what all commands share, and the flags of a request."""

from __future__ import annotations

import argparse
import os
import sys

from kvmneg import limits
from kvmneg.cli import COMMANDS, SOCKET, command_module
from kvmneg.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from kvmneg.policy.request import Request


class _Help(argparse.HelpFormatter):
    """As wide as all other output: argparse's own way to ask imports shutil, 2 ms of every start."""

    def __init__(self, prog: str) -> None:
        from kvmneg.cli.output import Screen

        super().__init__(prog, max_help_position=30, width=Screen().width)


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes as UsageError, whole option names only, and the options of every command."""

    def __init__(
        self,
        *,
        description: str | None = None,
        prog: str | None = None,
        add_help: bool = True,
        color: bool = False,  # what Python 3.14 hands on to the parsers of verbs; Screen sees to colours
    ) -> None:
        super().__init__(
            prog=prog, description=description, allow_abbrev=False, add_help=add_help, formatter_class=_Help
        )
        self.color = color

    def common(self) -> None:
        """The options that every command has."""
        self.add_argument("--json", action="store_true", help="print JSON, as kvmneg(1) describes it")
        self.add_argument(
            "--socket", metavar="PATH", type=file_name, default=SOCKET, help=f"the daemon's socket ({SOCKET})"
        )
        self.add_argument(
            "--no-ask-password", dest="ask_password", action="store_false", help="have polkit ask nobody"
        )

    def print_help(self, file: object = None) -> None:
        from kvmneg.cli.output import Screen

        screen = Screen()
        for row in self.format_help().splitlines():
            screen.line(row)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.exit(status)  # only --help comes here: mistakes are raised


def parser_of(command: str) -> Parser:
    """The parser of a command, its `run` set as a default."""
    module = command_module(command)
    parser = Parser(prog=f"kvmneg {command}", description=COMMANDS[command][1])
    parser.common()
    module.options(parser)
    if hasattr(module, "run"):
        parser.set_defaults(run=module.run)
    return parser


def common_again(verb: argparse.ArgumentParser) -> None:
    """The options that every command has, after its verb too. Given before that they hold: there is no default."""
    absent = argparse.SUPPRESS
    verb.add_argument("--json", action="store_true", default=absent, help="print JSON")
    verb.add_argument("--socket", metavar="PATH", type=file_name, default=absent, help="the daemon's socket")
    verb.add_argument(
        "--no-ask-password",
        dest="ask_password",
        action="store_false",
        default=absent,
        help="have polkit ask nobody",
    )


def utf8(text: str) -> str:
    """An argument that is passed on as text, whatever the locale. Raises ArgumentTypeError where it is none."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8") from None


def file_name(text: str) -> str:
    """An argument that names a file: "" is a variable that was not set. Raises ArgumentTypeError."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def number(least: int, most: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number within bounds."""

    def parse(text: str) -> int:
        digits = text.removeprefix("-")
        if digits.isascii() and digits.isdigit() and len(digits) < 20 and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number from {least} to {most}")

    return parse


def names(text: str) -> list[str]:
    """A list of names from one argument: commas between them."""
    found = [name.strip() for name in utf8(text).split(",")]
    if not any(found):
        raise argparse.ArgumentTypeError("it names no feature; leave the option out to ask for none")
    return [name for name in found if name]


def add_request(parser: Parser) -> None:
    """The flags of a request: --max, --level, --require, --optional, --exact, --tsc-khz, --vmm."""
    group = parser.add_argument_group("what is asked for", "x86-64-v1 if nothing is said")
    group.add_argument("--max", action="store_true", help="everything that host and fence allow")
    group.add_argument("--level", metavar="NAME", help="a psABI level and what a guest boots with: x86-64-v2")
    group.add_argument(
        "--require", metavar="F,…", type=names, action="extend", default=[], help="features it must have"
    )
    group.add_argument(
        "--optional",
        metavar="F,…",
        type=names,
        action="extend",
        default=[],
        help="features if there are any",
    )
    group.add_argument(
        "--exact",
        metavar="F,…",
        type=names,
        action="extend",
        default=None,
        help="these features, nothing else",
    )
    group.add_argument(
        "--require-enforced", action="store_true", help="no, unless KVM was seen to keep to every word"
    )
    group.add_argument(
        "--tsc-khz",
        metavar="KHZ",
        type=number(1, limits.TSC_KHZ),
        help="pin the TSC to this rate: only then can a guest have invtsc",
    )
    add_vmm(parser)


def add_vmm(parser: Parser) -> None:
    """The option --vmm."""
    parser.add_argument(
        "--vmm", metavar="NAME", help="what will run the guest: qemu, qemu-10.0, firecracker, generic"
    )


def has_request(arguments: argparse.Namespace) -> bool:
    """Whether any of a request's flags was given."""
    given = (arguments.max, arguments.level, arguments.require, arguments.optional, arguments.tsc_khz)
    return any(given) or arguments.exact is not None


def request_of(arguments: argparse.Namespace) -> Request:
    """The request that the flags say. Raises UsageError where they exclude each other."""
    from kvmneg.policy.request import Request

    return Request(
        maximum=arguments.max,
        level=arguments.level,
        require=tuple(arguments.require),
        optional=tuple(arguments.optional),
        exact=None if arguments.exact is None else tuple(arguments.exact),
        vmm=arguments.vmm,
        require_enforced=arguments.require_enforced,
        tsc_khz=arguments.tsc_khz,
    )
