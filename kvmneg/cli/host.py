# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg host: what this host's KVM offers to guests, what it holds back, and why."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.catalog import Feature
    from kvmneg.features.report import Report

_GROUPS = (
    ("cpu", ("cpuid:",)),
    ("kvm guest", ("cpuid:0x4000",)),
    ("hyper-v", ("hyperv:",)),
    ("msr", ("msr:",)),
    ("vm", ("kvm:",)),
    ("network", ("tap:", "vhost-net:")),
)


def options(parser: Parser) -> None:
    sources.add_report(parser, "measuring this host")
    sources.add_kvm(parser)


def run(arguments: argparse.Namespace) -> int:
    report = sources.report_or_host(arguments)
    if arguments.json:
        print_json(report.to_json())
    else:
        screen = Screen()
        sources.label(screen, report)
        show(screen, report)
    return 0


def show(screen: Screen, report: Report) -> None:
    """A report for people."""
    _identity(screen, report)
    _levels(screen, report)
    _offered(screen, report)
    _held_back(screen, report)
    _unclassified(screen, report)


def _identity(screen: Screen, report: Report) -> None:
    from kvmneg.emit.qemu import family_model_stepping

    combo, identity = report.combo, report.identity
    vendor = str(identity.get("vendor") or "unknown vendor")
    screen.line(screen.bold(f"{report.host}: {report.architecture}, {vendor}"))
    cpus = [cpu for cpu in combo.get("cpus", ()) if isinstance(cpu, dict)]
    names = list(dict.fromkeys(str(cpu["name"]) for cpu in cpus if cpu.get("name")))
    if identity.get("signature"):
        family, model, stepping = family_model_stepping(int(str(identity["signature"]), 16))
        names.append(f"family {family} model {model} stepping {stepping}")
    if names:
        screen.words("cpu", " · ".join(names).split(" "))
    kernel = " ".join(str(combo[key]) for key in ("kernel", "build") if combo.get(key))
    if kernel:
        screen.words("kernel", kernel.split(" "))
    modules = [name for name in combo.get("modules", {}) if "." not in name]
    if modules:
        screen.words("kvm", modules)
    rest = [f"{key} {combo[key]}" for key in ("microcode", "smt", "lockdown", "bios") if combo.get(key)]
    if rest:
        screen.words("also", " · ".join(rest).split(" "))
    measured = report.measured
    when = f"{measured.get('at', 'at an unknown time')} by {measured.get('by', 'somebody')}"
    screen.words("measured", when.split(" "))


def _levels(screen: Screen, report: Report) -> None:
    from kvmneg.features import catalog
    from kvmneg.policy import definitions

    table = catalog.names(report.architecture)
    screen.head("levels")
    told: set[str] = set()
    for name in definitions.available("levels"):
        wanted = [table.feature(feature) for feature in definitions.level(name, report.architecture)]
        missing = [feature.name for feature in wanted if not report.offer.value(feature.word) & feature.mask]
        if missing:
            # each level holds the one before: what that one lacks is not told again
            also = ["no,", "nor:"] if told else ["no:"]
            screen.words(name, [*also, *(feature for feature in missing if feature not in told)])
        else:
            screen.words(name, ["yes"])
        told.update(missing)


def _offered(screen: Screen, report: Report) -> None:
    from kvmneg.features import catalog

    table = catalog.names(report.architecture)
    found: dict[str, list[str]] = {group: [] for group, _ in _GROUPS}
    numbers: list[str] = []
    for word, value in sorted_words(report):
        for feature in table.at(word, value):
            if feature.rule == "or":
                continue  # told to guests as a warning, not offered
            if feature.width == 1:
                found[_group(word)].append(feature.name)
            elif feature.name in ("phys-bits", "linear-bits", "guest-phys-bits", "cap-max-vcpus"):
                numbers.append(f"{feature.name} {value >> feature.shift & (1 << feature.width) - 1}")
    total = sum(map(len, found.values()))
    screen.head(f"offers {count(total, 'feature')}")
    for group, names in found.items():
        if names:
            screen.words(group, names)
    if numbers:
        screen.words("numbers", ", ".join(numbers).split(" "))


def sorted_words(report: Report) -> list[tuple[str, int]]:
    """The canonical offer in the order of addresses."""
    from kvmneg.features import words

    return sorted(report.offer.words.items(), key=lambda row: words.order(row[0]))


def _group(word: str) -> str:
    return [group for group, prefixes in _GROUPS if word.startswith(prefixes)][-1]


def _held_back(screen: Screen, report: Report) -> None:
    held = [feature.name for feature in held_back(report)]
    if held:
        screen.head(f"the CPU has, and KVM does not offer: {count(len(held), 'feature')}")
        screen.words("", held, column=2)


def held_back(report: Report) -> Iterable[Feature]:
    """Features of the silicon that the offer lacks, in the order of addresses."""
    from kvmneg.features import catalog, rules, words

    table = catalog.names(report.architecture)
    for word in sorted(report.silicon_words, key=words.order):
        lacking = report.silicon_words[word] & ~report.offer.value(word)
        for feature in table.at(word, lacking):
            if feature.width == 1 and feature.rule in (rules.AND, rules.HINT):
                yield feature


def _unclassified(screen: Screen, report: Report) -> None:
    from kvmneg.features import words

    unknown = report.unclassified()
    if unknown:
        screen.head("never offered: bits that kvmneg does not know")
        screen.table(
            [(word, words.text_value(word, unknown[word])) for word in sorted(unknown, key=words.order)]
        )
