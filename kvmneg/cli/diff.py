# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg diff COMBO COMBO: what each offers more, by name, and which inputs differ; as `compare` tells of two files."""

from __future__ import annotations

from kvmneg.cli import compare, sources

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser
    from kvmneg.cli.files import Document


def options(parser: Parser) -> None:
    from kvmneg.cli.arguments import utf8

    what = "a combo of `kvmneg history`: its digest or the beginning of it; `running` for this host now"
    parser.add_argument("a", metavar="A", type=utf8, help=what)
    parser.add_argument("b", metavar="B", type=utf8, help="another")


def run(arguments: argparse.Namespace) -> int:
    return compare.tell(
        compare.of(*(_side(arguments, text) for text in (arguments.a, arguments.b))), arguments
    )


def _side(arguments: argparse.Namespace, text: str) -> Document:
    from kvmneg.cli import files
    from kvmneg.features.report import Report

    answer = sources.call(arguments, "org.kvmneg.Rollback.GetReport", combo=text)
    report = Report.from_json(answer["report"], file=f"the daemon's report of {text}")
    return files.Document(answer["combo"][:19], report=report)
