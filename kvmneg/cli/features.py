# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg features [PATTERN]: the catalogue, and which of its features a host has."""

from __future__ import annotations

import sys

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, count, print_json, wrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.catalog import Feature
    from kvmneg.features.report import Report

_DETAILED = 3  # so few matches are told in full
_SHORTEST_TITLE = 15  # characters; a shorter piece of a title tells nothing


def options(parser: Parser) -> None:
    parser.add_argument(
        "pattern", metavar="PATTERN", nargs="?", default="", help="part of a name, or a glob: avx*"
    )
    sources.add_report_or_kvm(parser, "tell what this report's host has instead of measuring this one")


def run(arguments: argparse.Namespace) -> int:
    from kvmneg.errors import UsageError
    from kvmneg.features import catalog

    report = _report(arguments)
    table = catalog.names(report.architecture if report else catalog.available()[0])
    found = [feature for feature in table.by_name.values() if _matches(feature, arguments.pattern)]
    if not found:
        raise UsageError(f"no feature matches {arguments.pattern!r}", hint="`kvmneg features` lists them all")
    if arguments.json:
        rows = [describe(feature, report) for feature in found]
        print_json({"host": report.host if report else None, "features": rows})
        return 0
    screen = Screen()
    if report:
        sources.label(screen, report)
    if len(found) <= _DETAILED:
        for feature in found:
            _detail(screen, feature, report)
    else:
        _list(screen, found, report)
    return 0


def _report(arguments: argparse.Namespace) -> Report | None:
    """The host to compare with: without a usable KVM the names alone are told."""
    from kvmneg.errors import KvmFault, NoKvm

    try:
        return sources.report_or_host(arguments)
    except (NoKvm, KvmFault) as error:
        print(f"kvmneg: names only: {error.message}", file=sys.stderr)
        return None


def _matches(feature: Feature, pattern: str) -> bool:
    names = (feature.name, feature.qemu, feature.linux, feature.libvirt, feature.vendor, feature.word)
    if any(character in pattern for character in "*?["):
        from fnmatch import fnmatchcase

        return any(fnmatchcase(name.lower(), pattern.lower()) for name in names if name)
    return any(pattern.lower() in name.lower() for name in names)


def describe(feature: Feature, report: Report | None) -> dict[str, Any]:
    """One feature as JSON; `offered` is null without a host, a number for a feature of more than one bit."""
    high = feature.shift + feature.width - 1
    return {
        "feature": feature.name,
        "word": feature.word,
        **({"bit": feature.shift} if feature.width == 1 else {"bits": f"{high}:{feature.shift}"}),
        "rule": feature.rule,
        "title": feature.title,
        "requires": list(feature.requires),
        "why": feature.why or None,
        "withheld": feature.withheld or None,
        "names": {
            tool: getattr(feature, tool)
            for tool in ("qemu", "libvirt", "linux", "vendor")
            if getattr(feature, tool)
        },
        "offered": _value(feature, report.offer_words) if report else None,
        "silicon": _value(feature, report.silicon_words)
        if report and feature.word in report.silicon_words
        else None,
    }


def _value(feature: Feature, values: dict[str, int]) -> bool | int:
    number = feature.of(values.get(feature.word, 0))
    return bool(number) if feature.width == 1 else number


def _state(feature: Feature, report: Report | None) -> str:
    if report is None:
        return ""
    offered = _value(feature, report.offer_words)
    if feature.width > 1:
        return f"{offered:#x}" if offered > 0xFFFF else str(offered)
    if offered:
        return "yes"
    return "cpu only" if _value(feature, report.silicon_words) else "no"


def _list(screen: Screen, found: list[Feature], report: Report | None) -> None:
    from kvmneg.features import words

    found = sorted(found, key=lambda feature: (words.order(feature.word), feature.shift))
    rows = [(feature.name, _state(feature, report), feature.rule, feature.title) for feature in found]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    word = ""
    for feature, row in zip(found, rows, strict=True):
        if feature.word != word:
            word = feature.word
            screen.line(screen.bold(word))
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False) if width]
        left = "  " + "  ".join(cells)
        room = screen.width - len(left) - 2
        screen.line((left + "  " + row[3][:room]).rstrip() if room >= _SHORTEST_TITLE else left.rstrip())
    yes = sum(1 for row in rows if row[1] == "yes")
    total = count(len(rows), "feature")
    if report:
        numbers = sum(1 for feature in found if feature.width > 1)
        total += f"; {report.host} offers {yes}" + (
            f", and has values for {numbers} numbers" if numbers else ""
        )
    screen.paragraph(total, style="dim")


def _detail(screen: Screen, feature: Feature, report: Report | None) -> None:
    from kvmneg.features import rules

    place = f"bit {feature.shift}"
    if feature.width > 1:
        place = f"bits {feature.shift + feature.width - 1}:{feature.shift}"
    screen.line(screen.bold(feature.name))
    rows = [("what", feature.title), ("place", f"{feature.word} {place}")]
    rows.append(("rule", f"{feature.rule}: {rules.MEANING[feature.rule]}"))
    rows += [
        ("because", feature.why),
        ("withheld", feature.withheld),
        ("requires", ", ".join(feature.requires)),
    ]
    rows += [(tool, getattr(feature, tool)) for tool in ("qemu", "libvirt", "linux", "vendor")]
    if report:
        rows.append((f"on {report.host}", _state(feature, report)))
    column = 4 + max(len(label) for label, _ in rows)
    for label, text in rows:
        if text:
            lines = wrap(text.split(" "), screen.width - column)
            screen.words(label, lines[0].split(" "), column=column)
            for line in lines[1:]:
                screen.line(" " * column + line)
