# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg baseline REPORT…: what all hosts of a pool offer, and who holds what back."""

from __future__ import annotations

from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.pool import Holder

SCOPE = (
    "judged: what each report says its host offers to new guests",
    "not judged: whether the reports are current; machine types and device state of VMM builds; TSC rates",
)
_STUDY = (
    "judged: what hosts of several vendors have in common, for study; it can be neither pinned nor negotiated"
)
STUDY_FORMAT = "kvmneg.study/1"
_NAMED_HOSTS = 4


def options(parser: Parser) -> None:
    parser.add_argument("reports", metavar="REPORT", nargs="+", help="report files")
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--fence", action="store_true", help="print it as a fence, for `kvmneg fence pin --from FILE`"
    )
    group.add_argument(
        "--ignore-vendor",
        action="store_true",
        help="go on where vendors differ, for study: no such pool can be",
    )


def run(arguments: argparse.Namespace) -> int:
    from kvmneg.cli import files
    from kvmneg.errors import Incompatible
    from kvmneg.policy import pool, portable
    from kvmneg.policy.fence_text import Fence

    reports = [files.report(path) for path in arguments.reports]
    try:
        met = pool.study(reports) if arguments.ignore_vendor else pool.baseline(reports)
    except Incompatible as no:
        no.hint += "; --ignore-vendor goes on, for study"
        raise
    if arguments.json:
        print_json(_document(arguments, reports, met))
    elif arguments.fence:
        print(Fence(met, registers=portable.common(reports)).text(), end="")
    else:
        _show(Screen(), reports, met, pool.holders(reports, met))
    return 0


def _document(arguments: argparse.Namespace, reports: Sequence[Report], met: FeatureSet) -> dict[str, Any]:
    """The baseline; of a study with the format of one, which no command reads as anything to pin."""
    from kvmneg.cli.host import flagged
    from kvmneg.features import words
    from kvmneg.policy import pool, portable
    from kvmneg.policy.fence_text import Fence

    hosts = [
        {"host": report.host, "file": path, "vendor": report.identity.get("vendor")}
        for report, path in zip(reports, arguments.reports, strict=True)
    ]
    study = {"vendors": pool.vendors(reports)} if met.conflicts else None
    return {
        **({"format": STUDY_FORMAT} if study else {}),
        "architecture": met.architecture,
        "digest": met.digest(),
        "study": study,
        "hosts": hosts,
        "words": met.to_json(),
        "fence": None if study else Fence(met, registers=portable.common(reports)).text(),
        "held_back": [holder.to_json() for holder in pool.holders(reports, met)],
        "unnamed": {word: words.text_value(word, bits) for word, bits in unnamed(reports).items()},
        "flagged": flagged(reports),
        "scope": _scope(met, reports),
    }


def unnamed(reports: Sequence[Report]) -> dict[str, int]:
    """The bits that some report has and the catalogue does not name, in the order of addresses."""
    from kvmneg.features import words

    found: dict[str, int] = {}
    for report in reports:
        for word, bits in report.unclassified().items():
            found[word] = found.get(word, 0) | bits
    return {word: found[word] for word in sorted(found, key=words.order)}


def _scope(met: FeatureSet, reports: Sequence[Report]) -> list[str]:
    from kvmneg.policy.scope import unmeasured

    return [*SCOPE, *([_STUDY] if met.conflicts else []), *unmeasured(reports)]


def _show(screen: Screen, reports: Sequence[Report], met: FeatureSet, held: Sequence[Holder]) -> None:
    from kvmneg.cli.host import impossible
    from kvmneg.features import words
    from kvmneg.policy import pool, reasons

    if met.conflicts:
        study = f"STUDY, no baseline: {pool.sides(pool.vendors(reports))}. It can be neither pinned nor negotiated."
        screen.paragraph(study, style="warn")
    names = [
        feature.name
        for word in sorted(met.words, key=words.order)
        for feature in reasons.shown(met.architecture, word, met.words[word])
        if feature.rule != "or"
    ]
    screen.line(
        screen.bold(f"{count(len(names), 'feature')} that all of {count(len(reports), 'host')} offer")
    )
    screen.words("", names, column=2)
    screen.words("digest", [met.digest()])
    groups: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for holder in held:
        groups.setdefault((holder.hosts, holder.because), []).append(holder.feature)
    if groups:
        screen.head(f"held back: {count(len(held), 'feature')}")
    for (hosts, because), features in sorted(groups.items(), key=lambda row: len(row[0][0])):
        more = f" and {len(hosts) - _NAMED_HOSTS} more" if len(hosts) > _NAMED_HOSTS else ""
        who = f"by {', '.join(hosts[:_NAMED_HOSTS])}{more}" if hosts else "by rule"
        if len(hosts) == len(reports):
            who = "by all: they must have the same, and differ"
        screen.paragraph(because or who, indent=2)
        screen.words("", features, indent=4, column=4)
    unknown = unnamed(reports)
    if unknown:
        many = count(sum(bits.bit_count() for bits in unknown.values()), "bit")
        screen.head(f"kept back: {many} that kvmneg does not name, in {count(len(unknown), 'word')}")
        screen.words("", unknown, column=2)
    impossible(screen, reports)
    screen.scope(_scope(met, reports))
