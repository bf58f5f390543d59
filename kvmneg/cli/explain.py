# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg explain FEATURE [REPORT…]: what a feature is, and who holds it back, here and in a pool."""

from __future__ import annotations

import sys

from kvmneg.cli import arguments as options_of
from kvmneg.cli import sources
from kvmneg.cli.features import describe
from kvmneg.cli.output import Screen, print_json, wrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.features.catalog import Feature, Names
    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.reasons import Standing
    from kvmneg.policy.vmm import Change

_COLUMN = 15
# what comes of hiding a feature whose instruction a guest executes all the same, or not
_HIDING = {
    "trapped": "trapped: without it, its instructions raise #UD",
    "hidden only": "hidden only: a guest that does not look at CPUID executes its instructions all the same",
    "untested": "untested: no guest came to execute its instructions",
}
_HOSTS = 8  # of one standing on the screen; the rest are counted


class Place:
    """A feature on one host: the report, how it stands there, what the VMM does with it."""

    __slots__ = ("change", "report", "standing")

    def __init__(self, feature: Feature, report: Report, fence: Fence | None, vmm: str | None) -> None:
        from kvmneg.policy import reasons

        seen = None
        if vmm is not None:
            from kvmneg.policy import vmm as vmms

            seen = vmms.through(report, vmm)
        self.report = report
        self.standing: Standing = reasons.standing(feature, report, fence, seen)
        self.change: Change | None = seen.change(feature) if seen is not None else None

    def to_json(self, feature: Feature) -> dict[str, Any]:
        found = self.standing
        return {
            "host": self.report.host,
            "state": found.state,
            "value": bool(found.value) if feature.width == 1 else found.value,
            "held_back_by": found.where or None,
            "cause": found.cause or None,
            "because": found.because or None,
            "enforcement": self.report.enforcement.get(feature.word),
            "instruction": self.report.instructions.get(feature.name),
            "vmm": self.change.to_json() if self.change else None,
        }


def options(parser: Parser) -> None:
    parser.add_argument(
        "feature", metavar="FEATURE", help="a name of any tool's, or WORD:BIT: cpuid:0x7.0.ebx:5"
    )
    parser.add_argument("reports", metavar="REPORT", nargs="*", help="the reports of a pool")
    sources.add_report_or_kvm(parser, "this report's host instead of measuring this one")
    parser.add_argument(
        "--fence", metavar="FILE", type=options_of.file_name, help="under this fence, not the daemon's"
    )
    options_of.add_vmm(parser)


def run(arguments: argparse.Namespace) -> int:
    from kvmneg.cli import files
    from kvmneg.errors import UsageError
    from kvmneg.features import catalog

    report, fence = _here(arguments)
    pool = [files.report(path) for path in arguments.reports]
    architecture = next((one.architecture for one in (report, *pool) if one), catalog.available()[0])
    if any(one.architecture != architecture for one in pool):
        raise UsageError("a pool has one architecture")
    table = catalog.names(architecture)
    feature = find(table, arguments.feature)
    if report and not arguments.report:
        _try_hiding(report, feature, arguments.kvm)
    here = Place(feature, report, fence, arguments.vmm) if report else None
    places = [Place(feature, one, None, arguments.vmm) for one in pool]
    if arguments.json:
        print_json(_document(table, feature, here, places))
    else:
        _show(table, feature, here, places)
    return 0


def _try_hiding(report: Report, feature: Feature, path: str) -> None:
    """Have a guest execute the instruction of a feature that is hidden from it, and put into the report what came."""
    from kvmneg.errors import KvmFault, NoKvm
    from kvmneg.host.measure import ARCHITECTURE

    if report.architecture != ARCHITECTURE or feature.name in report.instructions:
        return
    from kvmneg.host import proof
    from kvmneg.host.kvm import Kvm

    verifier = proof.verifier()
    if feature.name not in verifier.CODE:
        return
    try:
        with Kvm.open(path) as kvm:
            mark = verifier.mark_of(kvm, feature.name)
    except (NoKvm, KvmFault):
        return  # the report is the daemon's, or there is no room for a guest: it is told without
    if mark is not None:
        report.instructions[feature.name] = mark


def find(table: Names, text: str) -> Feature:
    """The feature of a name, or at WORD:BIT. Raises UsageError where nobody classified it."""
    word, colon, bit = text.rpartition(":")
    if not colon or not bit.isdecimal():
        return table.feature(text)
    from kvmneg.errors import BadInput, UsageError
    from kvmneg.features import catalog, words

    try:
        words.check(word)
    except BadInput as error:
        raise UsageError(error.message, hint="say a word and a bit: cpuid:0x7.0.ebx:5") from None
    if int(bit[:4]) >= words.width(word):
        raise UsageError(f"{word} has {words.width(word)} bits, counted from 0")
    for control in table.controls.get(word, ()):
        if int(bit) in (control.shift, control.number):  # both halves of the word tell of it
            return control
    for feature in table.at(word, 1 << int(bit)):
        return feature
    rule = catalog.load(catalog.available()[0]).leaf_rule(word)
    raise UsageError(
        f"nobody has classified {word} bit {bit}"
        if rule is None
        else f"{word} is one for all of its bits: {rule}",
        hint="what nobody has classified is never offered" if rule is None else "no pool merges it",
    )


def _here(arguments: argparse.Namespace) -> tuple[Report | None, Fence | None]:
    """This host, and the fence over it: by --report, by measuring, or by asking the daemon."""
    from kvmneg.errors import KvmFault, NoKvm, Unreachable

    fence = None
    if arguments.fence:
        from kvmneg.cli import files
        from kvmneg.policy.fence_text import Fence

        fence = Fence(files.document(arguments.fence).granted, generation=0)
    if arguments.report:
        return sources.report_or_host(arguments), fence
    fence = fence or _daemons_fence(arguments)
    try:
        return sources.report_or_host(arguments), fence
    except (NoKvm, KvmFault) as error:
        try:
            return sources.daemon_report(arguments), fence
        except (Unreachable, NoKvm, KvmFault):
            print(f"kvmneg: names only: {error.message}", file=sys.stderr)
            return None, None


def _daemons_fence(arguments: argparse.Namespace) -> Fence | None:
    """The fence that the daemon has pinned; none where there is no daemon."""
    import os

    from kvmneg.errors import KvmnegError

    if not os.path.exists(arguments.socket):
        return None
    try:
        answer = sources.call(arguments, "org.kvmneg.Fence.Get")
    except KvmnegError as error:
        print(f"kvmneg: without the daemon's fence: {error.message}", file=sys.stderr)
        return None
    if not answer.get("pinned"):
        return None
    from kvmneg.policy.fence_text import Fence

    return Fence.parse(answer["text"], generation=answer["generation"], file="the daemon's fence")


def needed_by(table: Names, feature: Feature) -> list[str]:
    """The features that are built on this one, in the catalogue's order."""
    return [
        other.name
        for other in table.by_name.values()
        if any(name == feature.name for name, _least in other.bases)
    ]


def _shared(table: Names, feature: Feature) -> dict[str, list[str]]:
    """Names that other features have too: {QEMU's kvmclock: [kvmclock-old]}."""
    found: dict[str, list[str]] = {}
    for tool in ("qemu", "libvirt", "linux", "vendor"):
        name = getattr(feature, tool)
        others = [
            other.name
            for other in table.by_name.values()
            if name and other is not feature and getattr(other, tool) == name
        ]
        if others:
            found[tool] = others
    return found


def _document(table: Names, feature: Feature, here: Place | None, places: list[Place]) -> dict[str, Any]:
    from kvmneg.features import rules

    told = {key: value for key, value in describe(feature, None).items() if key not in ("offered", "silicon")}
    return {
        **told,
        "meaning": rules.MEANING[feature.rule],
        "shared_names": _shared(table, feature),
        "needed_by": needed_by(table, feature),
        "here": here.to_json(feature) if here else None,
        "pool": [place.to_json(feature) for place in places],
    }


def _show(table: Names, feature: Feature, here: Place | None, places: list[Place]) -> None:
    from kvmneg.features import rules

    screen = Screen()
    if here:
        sources.label(screen, here.report)
    screen.line(screen.bold(feature.name))
    bits = f"bit {feature.shift}"
    if feature.width > 1:
        bits = f"bits {feature.shift + feature.width - 1}:{feature.shift}"
    shared = _shared(table, feature)
    rows = [("what", feature.title), ("place", f"{feature.word} {bits}")]
    for tool in ("qemu", "libvirt", "linux", "vendor"):
        name = getattr(feature, tool)
        also = f" (also of {', '.join(shared[tool])})" if tool in shared else ""
        rows.append((tool, name + also if name else ""))
    rows += [
        ("rule", f"{feature.rule}: {rules.MEANING[feature.rule]}"),
        ("because", feature.why),
        ("withheld", feature.withheld),
        (
            "settable",
            f"upstream since Linux {feature.settable}" if feature.settable not in ("", "never") else "",
        ),
        ("needs", ", ".join(feature.requires)),
        ("needed by", ", ".join(needed_by(table, feature))),
    ]
    for label, text in rows:
        _row(screen, label, text)
    if here:
        screen.head(f"on {here.report.host}")
        _standing(screen, feature, here)
    if places:
        screen.head(f"in the pool of {len(places)}")
        _pool(screen, feature, places)


def _row(screen: Screen, label: str, text: str) -> None:
    if text:
        first, *rest = wrap(text.split(" "), screen.width - _COLUMN)
        screen.words(label, first.split(" "), column=_COLUMN)
        for line in rest:
            screen.line(" " * _COLUMN + line)


def _verdict(screen: Screen, feature: Feature, found: Standing) -> str:
    number = f" {found.value:#x}" if feature.width > 1 and found.value > 0xFFFF else f" {found.value}"
    value = number if feature.width > 1 else ""
    if found.state == "held-back":
        return f"{screen.bad('held back')} by {found.where} [{found.cause}]: {found.because}"
    because = f": {found.because}" if found.because else ""
    words = {
        "offered": screen.good("offered"),
        "told": "set: guests are told of it",
        "clear": "clear: guests that come from here are not told",
        "not-merged": "not negotiated",
    }
    return f"{words[found.state]}{value}{because}"


def _standing(screen: Screen, feature: Feature, place: Place) -> None:
    _row(screen, "state", _verdict(screen, feature, place.standing))
    change = place.change
    if change is not None:
        needs = f"; with {change.needs}" if change.needs else ""
        _row(screen, "vmm", f"{change.what}: {change.because}{needs} ({change.source})")
    _row(screen, "enforced", place.report.enforcement.get(feature.word, ""))
    mark = place.report.instructions.get(feature.name, "")
    _row(screen, "hiding it", _HIDING.get(mark, mark))


def _pool(screen: Screen, feature: Feature, places: list[Place]) -> None:
    """Hosts where it stands alike stand together."""
    kinds: dict[tuple[Any, ...], list[Place]] = {}
    for place in places:
        found = place.standing
        # each host blames itself by name
        key = (found.state, found.value, found.cause, found.because)
        kinds.setdefault(key, []).append(place)
    for alike in kinds.values():
        hosts = [place.report.host for place in alike]
        more = [f"and {len(hosts) - _HOSTS} more"] if len(hosts) > _HOSTS else []
        screen.words("", [*hosts[:_HOSTS], *more])
        found = alike[0].standing
        if found.state == "held-back" and len(hosts) > 1:
            found = found._replace(where="each of them")
        for line in wrap(_verdict(screen, feature, found).split(" "), screen.width - 4):
            screen.line("    " + line)
