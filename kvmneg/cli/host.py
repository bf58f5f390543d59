# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg host: what this host's KVM offers to guests, what it holds back, and why."""

from __future__ import annotations

from kvmneg.cli import arguments as options_of
from kvmneg.cli import sources
from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.catalog import Feature
    from kvmneg.features.report import Report
    from kvmneg.policy.vmm import Through

_GROUPS = (
    ("cpu", ("cpuid:",)),
    ("kvm guest", ("cpuid:0x4000",)),
    ("hyper-v", ("hyperv:",)),
    ("msr", ("msr:",)),
    ("registers", ("arm64:",)),
    ("vm", ("kvm:", "arm:")),
    ("network", ("tap:", "vhost-net:")),
)

_GRADES = {
    "replaced": "KVM takes them, and shows guests other values",
    "refused": "KVM does not take them as they are, or not without their bits",
    "leaks": "KVM lets guests see what they hide",
}


def options(parser: Parser) -> None:
    sources.add_report_or_kvm(parser, "show this report instead of measuring this host")
    options_of.add_vmm(parser)


def run(arguments: argparse.Namespace) -> int:
    report = sources.report_or_host(arguments)
    seen = None
    if arguments.vmm:
        from kvmneg.policy import vmm

        seen = vmm.through(report, arguments.vmm)
    if arguments.json:
        # the report stays the one that was measured: others read it as such
        found = {"flagged": flagged([report]), "unnamed": unnamed(report)}
        print_json({**report.to_json(), **found, **({"vmm": seen.to_json()} if seen else {})})
    else:
        screen = Screen()
        sources.label(screen, report)
        show(screen, report)
        if seen:
            _through(screen, seen)
    return 0


def show(screen: Screen, report: Report) -> None:
    """A report for people."""
    _identity(screen, report)
    _levels(screen, report)
    _offered(screen, report)
    _held_back(screen, report)
    _unclassified(screen, report)
    impossible(screen, [report])
    _enforcement(screen, report)


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
    _coverage(screen, report)
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


def _coverage(screen: Screen, report: Report) -> None:
    """The kinds of CPU of a host that has several, and what of it was not measured."""
    from kvmneg.policy import coverage

    kinds = report.identity.get("kinds")
    for row in kinds if isinstance(kinds, list) else ():
        if isinstance(row, dict):
            screen.words("", f"CPUs {row.get('cpus')} · signature {row.get('signature')}".split(" "))
    for cpus, kind, why in coverage.unvisited(report):
        text = f"{cpus}{f' ({kind})' if kind else ''}: {why}. Nothing is granted or pinned on this host."
        screen.words("UNMEASURED", text.split(" "))
    if report.measured.get("offline"):
        screen.words("offline", f"CPUs {report.measured['offline']}, not measured".split(" "))


def _levels(screen: Screen, report: Report) -> None:
    from kvmneg.features import catalog
    from kvmneg.policy import definitions

    table = catalog.names(report.architecture)
    names = definitions.levels(report.architecture)
    if names:
        screen.head("levels")
    told: set[str] = set()
    for name in names:
        missing = []
        for wanted, least in definitions.least(name, report.architecture).items():
            value = table.feature(wanted).of(report.offer.value(table.feature(wanted).word))
            if value < least:
                missing.append(f"{wanted}>={least}" if least > 1 else wanted)
        if missing:
            # most levels hold the one before: what that one lacks is not told again
            new = [feature for feature in missing if feature not in told]
            also = ["no,", "nor:"] if told else ["no:"]
            screen.words(name, [*also, *new] if new else ["no"])
        else:
            screen.words(name, ["yes"])
        told.update(missing)


def _offered(screen: Screen, report: Report) -> None:
    from kvmneg.features import catalog, rules
    from kvmneg.features.difference import show as show_value
    from kvmneg.policy import reasons

    table = catalog.names(report.architecture)
    found: dict[str, list[str]] = {group: [] for group, _ in _GROUPS}
    numbers: list[str] = []
    carried = 0  # classes of state: too many to name here, and nothing that anybody asks for
    for word, value in sorted_words(report):
        # an or-feature is told to guests as a warning, not offered
        shown = [f.name for f in reasons.shown(report.architecture, word, value) if f.rule != "or"]
        if word.startswith("state:"):
            carried += len(shown)
        elif shown:
            found[_group(word)] += shown
        for feature in table.at(word, value):
            if feature.name in ("phys-bits", "linear-bits", "guest-phys-bits", "cap-max-vcpus"):
                numbers.append(f"{feature.name} {value >> feature.shift & (1 << feature.width) - 1}")
            elif feature.rule == rules.INTERVAL:
                numbers.append(f"TSC {show_value(word, value)}")
    total = sum(map(len, found.values()))
    screen.head(f"offers {count(total, 'feature')}")
    for group, names in found.items():
        if names:
            screen.words(group, names)
    if carried:
        numbers.append(f"{carried} kinds of portable state")
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


def _through(screen: Screen, seen: Through) -> None:
    """What a VMM makes of the offer: each difference with its rule."""
    version = f" {seen.version}" if seen.version else ""
    screen.head(f"through {seen.title}{version}: {count(len(seen.changes), 'difference')}")
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for change in seen.changes:
        needs = f", with {change.needs}" if change.needs else ""
        key = change.what, change.because + needs, change.source
        reasons.setdefault(key, []).append(change.feature)
    for (what, because, source), features in reasons.items():
        screen.words(what, features)
        screen.paragraph(f"{because} ({source})", indent=14, style="dim")


def _unclassified(screen: Screen, report: Report) -> None:
    from kvmneg.features import words

    unknown = report.unclassified()
    if unknown:
        bits = count(sum(value.bit_count() for value in unknown.values()), "bit")
        screen.head(f"never offered: {bits} that kvmneg does not name")
        screen.table(
            [(word, words.text_value(word, unknown[word])) for word in sorted(unknown, key=words.order)]
        )


def _enforcement(screen: Screen, report: Report) -> None:
    """Which words KVM does not keep to: a guest may see more than its contract says."""
    if not report.enforcement:
        return  # never tried: an older kvmneg, an import, or a KVM that cannot be asked
    from kvmneg.features import words

    found: dict[str, list[str]] = {grade: [] for grade in _GRADES}
    for word, grade in report.enforcement.items():
        if grade in found:
            found[grade].append(word)
    total = sum(map(len, found.values()))
    screen.head(f"KVM does not keep to: {count(total, 'word')}" if total else "KVM keeps to every word")
    for grade, names in found.items():
        if names:
            screen.words(grade, names)
            screen.words("", _GRADES[grade].split(" "))
    kinds = {words.X86_64: "CPUID and feature MSRs, each set", words.ARM64: "registers, each changed"}
    tried = f"{kinds[report.architecture]} and read back; a running guest may see more (kvmneg verify)"
    if report.measured.get("guests"):
        seen = f"and seen by guests ({report.measured['guests']})"
        tried = f"{kinds[report.architecture]} and read back, {seen}"
    screen.words("tried", tried.split(" "))


def unnamed(report: Report) -> dict[str, str]:
    """The measured bits that the catalogue does not name, as documents have them: word → mask."""
    from kvmneg.features import words

    unknown = report.unclassified()
    return {word: words.text_value(word, unknown[word]) for word in sorted(unknown, key=words.order)}


def flagged(reports: Iterable[Report]) -> list[dict[str, str]]:
    """What no CPU can have, as documents have it: {"host", "word", "finding"} each."""
    from kvmneg.features.sanity import findings

    return [
        {"host": report.host, "word": finding.word, "finding": finding.what}
        for report in reports
        for finding in findings(report)
    ]


def impossible(screen: Screen, reports: Iterable[Report]) -> None:
    """What no CPU can have, in each report that says it."""
    from kvmneg.features.sanity import findings

    for report in reports:
        found = findings(report)
        if found:
            screen.head(f"never offered: impossible in the report of {report.host}")
            for finding in found:
                screen.paragraph(finding.describe(), indent=2)
