# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg baseline REPORT…: what all hosts of a pool offer, and who holds what back."""

from __future__ import annotations

from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.pool import Holder

SCOPE = (
    "judged: what each report says its host offers to new guests",
    "not judged: whether the reports are current; machine types and device state of VMM builds; TSC rates",
)
_NAMED_HOSTS = 4


def options(parser: Parser) -> None:
    parser.add_argument("reports", metavar="REPORT", nargs="+", help="report files")
    parser.add_argument(
        "--fence", action="store_true", help="print it as a fence, for `kvmneg fence pin --from FILE`"
    )


def run(arguments: argparse.Namespace) -> int:
    from kvmneg.cli import files
    from kvmneg.policy import pool
    from kvmneg.policy.fence import Fence

    reports = [files.report(path) for path in arguments.reports]
    met = pool.baseline(reports)
    if arguments.json:
        hosts = [
            {"host": report.host, "file": path, "vendor": report.identity.get("vendor")}
            for report, path in zip(reports, arguments.reports, strict=True)
        ]
        held = [holder.to_json() for holder in pool.holders(reports, met)]
        print_json(
            {
                "architecture": met.architecture,
                "digest": met.digest(),
                "hosts": hosts,
                "words": met.to_json(),
                "fence": Fence(met).text(),
                "held_back": held,
                "scope": list(SCOPE),
            }
        )
    elif arguments.fence:
        print(Fence(met).text(), end="")
    else:
        _show(Screen(), reports, met, pool.holders(reports, met))
    return 0


def _show(screen: Screen, reports: Sequence[Report], met: FeatureSet, held: Sequence[Holder]) -> None:
    from kvmneg.cli.host import impossible
    from kvmneg.features import catalog, words

    table = catalog.names(met.architecture)
    names = [
        feature.name
        for word in sorted(met.words, key=words.order)
        for feature in table.within(word, met.words[word])
        if feature.width == 1 and feature.rule != "or"
    ]
    screen.line(
        screen.bold(f"{count(len(names), 'feature')} that all of {count(len(reports), 'host')} offer")
    )
    screen.words("", names, column=2)
    screen.words("digest", [met.digest()])
    groups: dict[tuple[str, ...], list[str]] = {}
    for holder in held:
        groups.setdefault(holder.hosts, []).append(holder.feature)
    if groups:
        screen.head(f"held back: {count(len(held), 'feature')}")
    for hosts, features in sorted(groups.items(), key=lambda row: len(row[0])):
        more = f" and {len(hosts) - _NAMED_HOSTS} more" if len(hosts) > _NAMED_HOSTS else ""
        who = f"by {', '.join(hosts[:_NAMED_HOSTS])}{more}" if hosts else "by rule"
        if len(hosts) == len(reports):
            who = "by all: they must have the same, and differ"
        screen.paragraph(who, indent=2)
        screen.words("", features, indent=4, column=4)
    impossible(screen, reports)
    screen.scope(SCOPE)
