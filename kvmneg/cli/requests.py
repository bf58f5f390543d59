# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `negotiate`, `check` and `contract` say of a contract, and the QEMU arguments it leads to."""

from __future__ import annotations

from kvmneg.cli.output import Screen, count

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from kvmneg.cli.arguments import Parser
    from kvmneg.emit.qemu import Emission, LeftOut
    from kvmneg.features.difference import Blocker
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.policy.contract import Contract


_GRADES = {
    "enforced": "KVM takes every word of it and shows it unchanged",
    "partial": "KVM does not keep to every word of it; see `kvmneg host`",
    "unverified": "whether KVM keeps to it was not tried",
}


def add_emit(parser: Parser) -> None:
    """The options --emit, --machine, --qemu, --accel."""
    group = parser.add_argument_group("the contract in others' words")
    group.add_argument("--emit", choices=["qemu"], help="the arguments for that VMM")
    group.add_argument("--machine", metavar="TYPE", help="QEMU's machine type, with version (the newest q35)")
    group.add_argument("--qemu", metavar="PATH", help="the QEMU to be started (qemu-system-x86_64 in PATH)")
    group.add_argument("--accel", metavar="NAME", help="QEMU's accelerator (kvm)")


def emission(arguments: argparse.Namespace, contract: Contract, host: FeatureSet | None) -> Emission | None:
    """What --emit asks for: the arguments for the QEMU of --qemu, or of PATH, or without asking one.

    Raises UsageError where there is neither QEMU nor --machine, VmmFault, Blocked (QEMU would refuse).
    """
    from kvmneg.errors import UsageError

    if arguments.emit is None:
        for option in ("machine", "qemu", "accel"):
            if getattr(arguments, option) is not None:
                raise UsageError(f"--{option} goes with --emit qemu")
        return None
    from kvmneg.emit import qemu
    from kvmneg.host import qemu_probe

    binary = qemu_probe.BINARIES[contract.architecture]
    path = arguments.qemu or qemu_probe.find(binary)
    if path is None and arguments.machine is None:
        hint = "install it, name one with --qemu, or its machine type with --machine"
        raise UsageError(f"there is no {binary} to ask", hint=hint)
    build = qemu_probe.probe(path, contract.architecture) if path else None
    machine = arguments.machine or (build.machine if build else "")
    known = build.properties if build else None
    return qemu.emit(contract, machine, known=known, host=host, accelerator=arguments.accel or "kvm")


def show_contract(screen: Screen, contract: Contract, fence: str = "none pinned") -> None:
    """A contract for people: the features by kind, the numbers that matter; `fence` where it has no generation."""
    from kvmneg.features import catalog
    from kvmneg.policy import reasons

    table = catalog.names(contract.architecture)
    kinds: dict[str, list[str]] = {
        "cpu": [],
        "kvm guest": [],
        "hyper-v": [],
        "msr": [],
        "registers": [],
        "vm": [],
    }
    kinds["told of"] = []  # what the guest must know to be safe, not something it is given
    numbers = []
    for word, value in contract.words().items():
        for feature in reasons.shown(contract.architecture, word, value):
            kinds["told of" if feature.rule == "or" else _kind(word)].append(feature.name)
        for feature in table.at(word, value):
            if feature.name in ("phys-bits", "linear-bits", "guest-phys-bits"):
                numbers.append(f"{feature.name} {value >> feature.shift & (1 << feature.width) - 1}")
    screen.words("digest", [contract.digest])
    generation, _digest = contract.fence
    screen.words("fence", (f"generation {generation}" if generation else fence).split(" "))
    show_grade(screen, contract.grade)
    total = sum(len(names) for kind, names in kinds.items() if kind != "told of")
    screen.words("grants", ", ".join([count(total, "feature"), *numbers]).split(" "))
    for kind, names in kinds.items():
        if names:
            screen.words(kind, names)


def show_grade(screen: Screen, grade: str | None) -> None:
    """How far the host holds a guest to its contract; nothing where that is not told."""
    if grade is not None:
        meaning = _GRADES.get(grade, "")
        screen.words("grade", (f"{grade}: {meaning}" if meaning else grade).split(" "))


def _kind(word: str) -> str:
    if word.startswith("cpuid:0x4000"):
        return "kvm guest"
    prefix = word.partition(":")[0]
    return {"cpuid": "cpu", "hyperv": "hyper-v", "msr": "msr", "arm64": "registers"}.get(prefix, "vm")


def show_not_granted(screen: Screen, blockers: Iterable[Blocker]) -> None:
    """The optional features that are not in the contract."""
    blockers = list(blockers)
    if blockers:
        screen.head("optional, not granted")
        screen.blockers([blocker._replace(wanted_by="") for blocker in blockers], label="-")


def show_emission(screen: Screen, found: Emission) -> None:
    """QEMU arguments to copy, and what they do not carry."""
    import shlex

    screen.head("QEMU arguments")
    machine, accelerator, cpu = (shlex.quote(part) for part in found.arguments[1::2])
    screen.line(f"  -machine {machine} -accel {accelerator} \\")
    screen.line(f"  -cpu {cpu}")
    lost = found.lost()
    if lost:
        screen.head(f"granted, and not to be had from QEMU: {count(len(lost), 'feature')}")
        reasons: dict[str, list[LeftOut]] = {}
        for row in lost:
            reasons.setdefault(
                row.because if row.kind != "unknown" else "this QEMU does not know it", []
            ).append(row)
        for because, rows in reasons.items():
            screen.line(f"  {because}")
            screen.words("", [row.feature for row in rows], indent=4, column=6)


def contract_file(path: str) -> Contract:
    """A contract file, binary or JSON. Raises BadInput for any other file."""
    from kvmneg.cli import files
    from kvmneg.errors import BadInput

    document = files.document(path)
    if document.contract is None:
        raise BadInput(f"a {document.kind}, not a contract", file=path)
    return document.contract
