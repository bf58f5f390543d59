# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg import KIND FILE: what another tool found out about some machine, as a report."""

from __future__ import annotations

import sys

from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from kvmneg.cli.arguments import Parser

# kind → (the module that reads it, whose output it is)
KINDS = {
    "cpuid-raw": ("cpuid_raw", "cpuid -r"),
    "firecracker-fingerprint": ("firecracker_fingerprint", "cpu-template-helper fingerprint dump"),
    "instlatx64": ("instlatx64", "AIDA64's CPUID dump"),
    "libvirt-cpudata": ("libvirt_cpudata", "libvirt's <cpudata>"),
    "qemu-expansion": ("qemu_expansion", "QMP query-cpu-model-expansion"),
}


def options(parser: Parser) -> None:
    kinds = "; ".join(f"{kind}: {origin}" for kind, (_, origin) in KINDS.items())
    parser.add_argument("source", metavar="KIND", choices=[*KINDS], help=f"what the file is ({kinds})")
    parser.add_argument("file", metavar="FILE", help='the file ("-": standard input)')
    parser.add_argument("--host", metavar="NAME", default="", help="the host's name (the file's)")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; what it is worth goes to standard error."""
    from importlib import import_module

    from kvmneg import __version__
    from kvmneg.cli import files
    from kvmneg.clock import now
    from kvmneg.emit.imported import Measured

    reader = import_module(f"kvmneg.emit.{KINDS[arguments.source][0]}")
    data = files.read(arguments.file)
    report = reader.read(data, Measured(arguments.file, arguments.host, now(), f"kvmneg {__version__}"))
    print_json(report.to_json())
    if not arguments.json:
        screen = Screen(sys.stderr)
        cpus = f"{count(report.identity['cpus'], 'CPU')}, " if "cpus" in report.identity else ""
        amount = count(len(report.offer_words), "word")
        screen.line(f"{report.host}: {report.identity['vendor']}, {cpus}{amount}")
        screen.line(screen.warn(f"  {report.measured['source']}: {report.measured['note']}"))
        screen.line(screen.warn("  do not pin a fence on it"))
    return 0
