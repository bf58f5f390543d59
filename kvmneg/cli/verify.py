# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg verify: run guests on this host's KVM, and tell what they see of what they are to see."""

from __future__ import annotations

from kvmneg.cli import sources
from kvmneg.cli.output import Screen, count, print_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.host.sight import Proof, Sight, Standing
    from kvmneg.policy.contract import Contract

BROKEN = 1
_BROKEN_GRADES = ("replaced", "refused", "leaks")
_TITLES = {
    "contract": "under the contract",
    "offer": "everything that this host offers",
    "hyperv": "with Hyper-V's leaves, and KVM's behind them: everything that this host offers",
    "hyperv-emptied": "with Hyper-V's leaves and none of its features",
    "emptied": "none of the features that this host offers, but for what no guest can be without",
}
_MODES = {"real": "real mode", "cpl0": "CPL 0", "cpl3": "CPL 3", "el1": "EL1", "el0": "EL0"}
_NOTHING = "-"


def options(parser: Parser) -> None:
    parser.add_argument(
        "--contract", metavar="FILE|DIGEST", help="under this contract, not under what the host offers"
    )
    parser.add_argument("--kvm", metavar="PATH", default=sources.KVM, help=f"KVM's device ({sources.KVM})")
    parser.add_argument("--all", action="store_true", help="words that are zero, as they should be, too")


def run(arguments: argparse.Namespace) -> int:
    contract = _contract(arguments)
    proof = _prove(arguments.kvm, contract)
    broken = [word for word, grade in proof.grades().items() if grade in _BROKEN_GRADES]
    if arguments.json:
        print_json({**to_json(proof), "contract": contract.digest if contract else None, "broken": broken})
    else:
        _show(Screen(), proof, broken, everything=arguments.all)
    return BROKEN if broken else 0


def _contract(arguments: argparse.Namespace) -> Contract | None:
    """What --contract names: a file, or a contract that the daemon knows."""
    if not arguments.contract:
        return None
    import os

    if sources.is_digest(arguments.contract) and not os.path.exists(arguments.contract):
        return sources.contract_of_digest(arguments, arguments.contract)[0]
    from kvmneg.cli import requests

    return requests.contract_file(arguments.contract)


def _prove(path: str, contract: Contract | None) -> Proof:
    """Run the guests. Raises NoKvm, KvmFault, UsageError."""
    from kvmneg.errors import UsageError
    from kvmneg.host import proof
    from kvmneg.host.measure import ARCHITECTURE

    if contract and contract.architecture != ARCHITECTURE:
        raise UsageError(f"a contract of {contract.architecture}, this host is {ARCHITECTURE}")
    return proof.on_each_kind(path, contract.bound() if contract else None)


# -- JSON -------------------------------------------------------------------------------------------------------


def to_json(proof: Proof) -> dict[str, Any]:
    """{"grades", "tables": {name: {word: …}}, "paravirtual", "instructions", "untried"}, as kvmneg(1) tells."""
    return {
        "grades": proof.grades(),
        "tables": {
            name: {word: _sight_json(proof.modes, word, sight) for word, sight in table.items()}
            for name, table in proof.tables.items()
        },
        "paravirtual": {
            feature: {
                "shown": one.shown,
                "refused": one.refused,
                "refused_when_enforced": one.refused_enforced,
                "ignored": one.ignored,
            }
            for feature, one in proof.paravirtual.items()
        },
        "instructions": dict(proof.instructions),
        "untried": list(proof.untried),
        "kinds": list(proof.kinds),
        "unvisited": list(proof.unvisited),
    }


def _sight_json(modes: Sequence[str], word: str, sight: Sight) -> dict[str, Any]:
    from kvmneg.features.words import text_value

    def text(value: int | None) -> str | None:
        return None if value is None else text_value(word, value)

    return {
        "promised": text(sight.value & sight.bound),
        "mask": text(sight.bound),
        "set": text(sight.value),
        "read_back": text(sight.shown),
        **dict(zip(modes, map(text, sight.seen), strict=True)),
        "grade": sight.grade,
    }


# -- for people ---------------------------------------------------------------------------------------------------


def _show(screen: Screen, proof: Proof, broken: list[str], *, everything: bool) -> None:
    if broken:
        screen.line(f"{screen.bad('broken')}: this KVM does not keep to {count(len(broken), 'word')}")
    else:
        unseen = len(proof.grades())  # untested, or they were broken
        but = f", but for {count(unseen, 'word')} that some guest did not come to see" if unseen else ""
        screen.line(f"{screen.good('kept')}: guests see what they are to see{but}")
    _kinds(screen, proof)
    for name, table in proof.tables.items():
        _table(screen, proof.modes, name, table, everything=everything)
    _paravirtual(screen, proof.paravirtual)
    _instructions(screen, proof.instructions)
    if proof.untried:
        screen.head("promised, and nothing that a guest can be asked")
        screen.words("", proof.untried)
    screen.line()
    screen.paragraph(
        "= is what was set, - what could not be asked there (RDMSR and MRS are a kernel's). Bits that the VMM or KVM "
        "gives by itself are left out.",
        style="dim",
    )


def _kinds(screen: Screen, proof: Proof) -> None:
    """Of a host with several kinds of CPU: where guests ran, and where they did not."""
    if len(proof.kinds) > 1:
        each = " and on ".join(proof.kinds)
        screen.paragraph(f"Guests ran on CPUs {each}, on one of each kind; what is worse on either is told.")
    for one in proof.unvisited:
        kind = " ".join(f"{name} {value}" for name, value in one["kind"].items())
        screen.paragraph(f"untested: CPUs {one['cpus']} ({kind}): {one['because']}")


def _table(
    screen: Screen, modes: Sequence[str], name: str, table: Mapping[str, Sight], *, everything: bool
) -> None:
    rows = {word: sight for word, sight in table.items() if sight.bound}
    grades = [sight.grade for sight in rows.values()]
    totals = ", ".join(f"{grades.count(grade)} {grade}" for grade in dict.fromkeys(grades))
    screen.head(f"{_TITLES[name]}: {totals or 'no word'}")
    shown = [
        _row(word, sight)
        for word, sight in rows.items()
        if everything or sight.grade != "honoured" or sight.value & sight.bound
    ]
    head = ("word", "promised", "set", "read back", *(_MODES[mode] for mode in modes), "")
    screen.table([head, *shown])


def _row(word: str, sight: Sight) -> tuple[str, ...]:
    """One word; bits that are not compared are left out."""
    promised = sight.value & sight.bound

    def cell(value: int | None) -> str:
        if value is None:
            return _NOTHING
        return "=" if value & sight.bound == promised else f"{value & sight.bound:#x}"

    return (
        word, f"{promised:#x}", f"{sight.value:#x}" if sight.value != promised else "=", cell(sight.shown),
        *map(cell, sight.seen), sight.grade,
    )  # fmt: skip


def _paravirtual(screen: Screen, found: Mapping[str, Standing]) -> None:
    """MSRs of KVM's own and Hyper-V's features that the guest is not shown."""
    for title, capability, ours in (
        ("KVM's own MSRs, hidden", "KVM_CAP_ENFORCE_PV_FEATURE_CPUID", True),
        ("Hyper-V's MSRs, hidden", "KVM_CAP_HYPERV_ENFORCE_CPUID", False),
    ):
        kinds: dict[str, list[str]] = {}
        for feature, one in found.items():
            if not one.shown and feature.startswith("kvm") == ours:
                kinds.setdefault(_standing(one, capability), []).append(feature)
        if kinds:
            screen.head(title)
        for kind, features in kinds.items():
            screen.words("", features)
            screen.paragraph(kind, indent=4, style="dim")


def _standing(one: Standing, capability: str) -> str:
    if one.refused_enforced is None:
        return f"this KVM has no {capability}, or no guest could ask: hidden only"
    if not one.refused_enforced:
        return f"a guest reads them, {capability} or not: leaks"
    if one.ignored:
        return f"a guest reads 0 with {capability}, as kvm.ignore_msrs is set: nothing leaks by that"
    if one.refused:
        return f"refused to a guest, with {capability} and without"
    return f"refused to a guest with {capability}, hidden only without"


_MARKS = {
    "trapped": "hidden, and their instructions raise an exception",
    "hidden only": "hidden, and their instructions are executed all the same",
    "untested": "hidden; no guest came to execute their instructions",
}


def _instructions(screen: Screen, marks: Mapping[str, str]) -> None:
    if marks:
        screen.head("instructions of hidden features")
        for mark, meaning in _MARKS.items():
            features = [feature for feature, one in marks.items() if one == mark]
            if features:
                screen.words(mark, features)
                screen.paragraph(meaning, indent=14, style="dim")
