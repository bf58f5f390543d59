# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg compare A B: what differs between two reports, contracts or fences, by name."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.host import flagged, impossible
from kvmneg.cli.output import Screen, count, print_json
from kvmneg.features.rules import EQUAL
from kvmneg.policy.scope import unmeasured

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.cli.files import Document
    from kvmneg.features.difference import Blocker, Difference

_LONG = 32  # characters of a combo value that are shown to people
_TABLE = 90  # columns of a terminal that has room for two such values side by side


def options(parser: Parser) -> None:
    parser.add_argument("a", metavar="A", help="a report, a contract or a fence; `host` for this host")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument(
        "--ignore-vendor", action="store_true", help="what differs besides the vendor, for study"
    )
    sources.add_report_or_kvm(parser, "what `host` means instead of measuring this host")


def run(arguments: argparse.Namespace) -> int:
    result = of(*(_side(arguments, path) for path in (arguments.a, arguments.b)))
    if arguments.ignore_vendor:
        result.ignore_vendor()
    return tell(result, arguments)


def of(a: Document, b: Document) -> Result:
    """The comparison of two documents."""
    from kvmneg.features.featureset import diff

    mixed = a.granted.architecture != b.granted.architecture
    differences = () if mixed else diff(a.granted, b.granted)
    accepting = () if mixed or not (a.report and b.report) else diff(a.accept, b.accept)
    return Result(a, b, differences, accepting, _combo(a, b))


def tell(result: Result, arguments: argparse.Namespace) -> int:
    """Print it; the exit status is 0 where no feature differs."""
    if arguments.json:
        print_json(result.to_json())
    else:
        _show(Screen(), result)
    return 0 if result.same else 1


def _side(arguments: argparse.Namespace, path: str) -> Document:
    import os

    from kvmneg.cli import files

    if path == "host" and not os.path.exists(path):
        return files.Document("this host", report=sources.report_or_host(arguments))
    return files.document(path)


class Result:
    """A comparison: `forth` is why a guest of A does not fit B, `back` the other way round."""

    def __init__(
        self,
        a: Document,
        b: Document,
        differences: tuple[Difference, ...],
        accepting: tuple[Difference, ...],
        combo: list[dict[str, Any]],
    ) -> None:
        self.a = a
        self.b = b
        self.differences = differences
        self.accepting = accepting if accepting != differences else ()
        self.combo = combo
        self.forth = _obstacles(a, b)
        self.back = _obstacles(b, a)
        self.fit = not self.forth, not self.back
        self.same = not (differences or accepting) and a.granted.architecture == b.granted.architecture
        self.unnamed = [] if a.granted.architecture != b.granted.architecture else _unnamed(a, b)
        self.study = ""
        # what the answers to "fits" rest on besides the two sets
        self.scope = unmeasured([side.report for side in (a, b) if side.report])

    def ignore_vendor(self) -> None:
        """Leave the vendor out of what is told. It keeps guests from moving all the same."""
        from kvmneg.policy.pool import spelled_vendor

        vendors = [spelled_vendor(side.granted) for side in (self.a, self.b)]
        if not all(vendors) or vendors[0] == vendors[1]:
            return
        self.study = f"{vendors[0]} on A, {vendors[1]} on B"
        self.differences, self.accepting = (
            tuple(row for row in rows if row.rule != EQUAL) for rows in (self.differences, self.accepting)
        )
        words = _vendor_words(self.a)
        self.forth, self.back = (
            tuple(row for row in rows if row.word not in words) for rows in (self.forth, self.back)
        )

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "same": self.same,
            "study": {"vendors": self.study} if self.study else None,
        }
        if not self.same:
            number = len(self.differences) + len(self.accepting)
            document["error"] = {
                "name": "org.kvmneg.Different",
                "message": f"{count(number, 'feature')} differ",
            }
        for name, side in (("a", self.a), ("b", self.b)):
            host = side.report.host if side.report else None
            document[name] = {
                "file": side.path,
                "kind": side.kind,
                "host": host,
                "digest": side.granted.digest(),
            }
        document |= {
            "differences": [row.to_json() for row in self.differences],
            "accept_differences": [row.to_json() for row in self.accepting],
            "a_fits_b": self.fit[0],
            "b_fits_a": self.fit[1],
            "blockers": [row.to_json() for row in self.forth],
            "blockers_back": [row.to_json() for row in self.back],
            "unnamed": self.unnamed,
            "scope": self.scope,
            "flagged": flagged([side.report for side in (self.a, self.b) if side.report]),
            "combo": self.combo,
        }
        return document


def _vendor_words(side: Document) -> tuple[str, ...]:
    from kvmneg.features import catalog

    return catalog.load(side.granted.architecture).equal_words


def _unnamed(a: Document, b: Document) -> list[dict[str, str]]:
    """The bits that differ between two reports and that the catalogue does not name: never offered."""
    if not (a.report and b.report):
        return []
    from kvmneg.features import words

    ours, theirs = a.report.unclassified(), b.report.unclassified()
    rows = []
    for word in sorted({*ours, *theirs}, key=words.order):
        left, right = ours.get(word, 0), theirs.get(word, 0)
        if left != right:
            values = {"bits": left ^ right, "a": left, "b": right}
            rows.append({"word": word, **{name: f"{value:#x}" for name, value in values.items()}})
    return rows


def _obstacles(guest: Document, there: Document) -> tuple[Blocker, ...]:
    """Why a guest of one may not go to the other; on arm64 also what a host there cannot be told to show."""
    from kvmneg.features.featureset import fits
    from kvmneg.policy.negotiation import unreachable

    found = fits(guest.granted, there.accept, missing_on=there.title)
    if there.report is None or guest.granted.architecture != there.accept.architecture:
        return found
    return (*found, *unreachable(guest.granted, there.report.accepting(), "the guest"))


def _combo(a: Document, b: Document) -> list[dict[str, Any]]:
    """The dimensions of the combo in which two reports differ; None where one does not have it."""
    if not (a.report and b.report):
        return []
    from kvmneg.policy.combos import flat

    ours, theirs = flat(a.report.combo), flat(b.report.combo)
    ours |= {f"identity.{key}": str(value) for key, value in a.report.identity.items() if key != "flags"}
    theirs |= {f"identity.{key}": str(value) for key, value in b.report.identity.items() if key != "flags"}
    names = dict.fromkeys((*ours, *theirs))
    return [
        {"dimension": name, "a": ours.get(name), "b": theirs.get(name)}
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _show(screen: Screen, result: Result) -> None:
    a, b = result.a, result.b
    if result.study:
        screen.paragraph(f"STUDY, the vendors differ: {result.study}", style="warn")
    for name, side in (("A", a), ("B", b)):
        screen.words(f"{name}  {side.kind}", side.title.split(" "), indent=0, column=13)
    if a.granted.architecture != b.granted.architecture:
        screen.line(f"different: A is {a.granted.architecture}, B is {b.granted.architecture}")
        return
    if result.same:
        screen.line(screen.good("same") + ": no feature differs")
    else:
        screen.line(screen.bad("different") + f": {count(len(result.differences), 'feature')}\n")
    _differences(screen, result.differences)
    if result.accepting:
        screen.head("of what they accept from incoming guests")
        _differences(screen, result.accepting)
    for row in result.unnamed:
        only = "A" if row["b"] == "0x0" else "B" if row["a"] == "0x0" else ""
        screen.line(f"{row['word']} bits {row['bits']}: not named" + (f", only {only}" if only else ""))
    for title, fit, blockers in (
        ("a guest of A fits B", result.fit[0], result.forth),
        ("a guest of B fits A", result.fit[1], result.back),
    ):
        why = ", by its vendor already; besides:" if result.study and blockers else ""
        why = why or (", by its vendor" if result.study else "")
        screen.line(f"\n{screen.bold(title)}: {screen.good('yes') if fit else screen.bad('no') + why}")
        if blockers and not result.same:
            screen.words("", dict.fromkeys(blocker.feature for blocker in blockers), column=2)
    impossible(screen, [report for report in (a.report, b.report) if report])
    _measured_under(screen, result)
    if result.scope:
        screen.scope(result.scope)


def _measured_under(screen: Screen, result: Result) -> None:
    """The dimensions that differ, side by side."""
    for side, report in (("A", result.a.report), ("B", result.b.report)):
        if report and not report.combo and result.combo:
            screen.head(f"{side} does not say what it was measured under")
            return
    if not result.combo:
        return
    screen.head("measured under")
    rows = [row for row in result.combo if None not in (row["a"], row["b"])]
    if rows and screen.width >= _TABLE:
        cells = [(row["dimension"], _short(row["a"]), _short(row["b"])) for row in rows]
        screen.table([("", "A", "B"), *cells])
    else:
        for row in rows:
            screen.words(row["dimension"], [f"{row['a']} on A,", f"{row['b']} on B"])
    for name, other in (("A", "b"), ("B", "a")):
        alone = [row["dimension"] for row in result.combo if row[other] is None]
        if alone:
            screen.words(f"only {name} says", alone, column=15)


def _short(text: str) -> str:
    return text if len(text) <= _LONG else text[: _LONG - 1] + "…"


def _differences(screen: Screen, differences: tuple[Difference, ...]) -> None:
    """A group a word: which features only one side has, which numbers differ. Capabilities are one group."""
    groups: dict[str, list[Difference]] = {}
    for row in differences:
        groups.setdefault("kvm:…" if row.word.startswith("kvm:") else row.word, []).append(row)
    column = max(map(len, groups), default=0) + 2
    for group, rows in groups.items():
        lines = [
            ("only A", [row.feature for row in rows if row.width == 1 and row.a]),
            ("only B", [row.feature for row in rows if row.width == 1 and row.b]),
        ]
        lines += [(row.feature, _values(row)) for row in rows if row.width > 1]
        for place, (label, names) in enumerate((label, names) for label, names in lines if names):
            if screen.width < _TABLE:
                if not place:
                    screen.line(group)
                screen.words(label, names, column=10)
            else:
                head = f"{'' if place else group:<{column}}{label}"
                screen.words(head, names, indent=0, column=column + 8)


def _values(row: Difference) -> list[str]:
    return [f"{_number(row.word, row.a)} on A,", f"{_number(row.word, row.b)} on B"]


def _number(word: str, value: int) -> str:
    from kvmneg.features.difference import show

    text = show(word, value)
    return str(value) if text.startswith("0x") and value < 1 << 16 else text
