# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg import cpuid-raw FILE: what `cpuid -r` printed on some machine, as a report."""

from __future__ import annotations

import sys
import time

from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser


def options(parser: Parser) -> None:
    parser.add_argument(
        "source", metavar="cpuid-raw", choices=["cpuid-raw"], help="the tool whose output it is"
    )
    parser.add_argument("file", metavar="FILE", help='its output ("-": standard input)')
    parser.add_argument("--host", metavar="NAME", default="", help="the host's name (the file's)")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; what it is worth goes to standard error."""
    from kvmneg import __version__
    from kvmneg.cli import files
    from kvmneg.emit import cpuid_raw

    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    data = files.read(arguments.file)
    report = cpuid_raw.read(data, file=arguments.file, host=arguments.host, at=at, by=f"kvmneg {__version__}")
    print_json(report.to_json())
    if not arguments.json:
        screen = Screen(sys.stderr)
        cpus = count(report.identity["cpus"], "CPU")
        screen.line(
            f"{report.host}: {report.identity['vendor']}, {cpus}, {count(len(report.offer_words), 'word')}"
        )
        screen.line(screen.warn(f"  {cpuid_raw.NOTE}: do not pin a fence on it"))
    return 0
