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


def add_emit(parser: Parser) -> None:
    """The options --emit, --machine, --qemu, --accel."""
    group = parser.add_argument_group("the contract in others' words")
    group.add_argument("--emit", choices=["qemu"], help="the arguments for that VMM")
    group.add_argument("--machine", metavar="TYPE", help="QEMU's machine type, with version (the newest q35)")
    group.add_argument("--qemu", metavar="PATH", help="the QEMU to be started (qemu-system-x86_64 in PATH)")
    group.add_argument("--accel", metavar="NAME", default="kvm", help="QEMU's accelerator (kvm)")


def emission(arguments: argparse.Namespace, contract: Contract, host: FeatureSet | None) -> Emission | None:
    """What --emit asks for: the arguments for the QEMU of --qemu, or of PATH, or without asking one.

    Raises UsageError where there is neither QEMU nor --machine, VmmFault, Blocked (QEMU would refuse).
    """
    if arguments.emit is None:
        return None
    from kvmneg.emit import qemu
    from kvmneg.errors import UsageError
    from kvmneg.host import qemu_probe

    path = arguments.qemu or qemu_probe.find()
    if path is None and arguments.machine is None:
        hint = "install qemu-system-x86, name one with --qemu, or its machine type with --machine"
        raise UsageError(f"there is no {qemu_probe.BINARY} to ask", hint=hint)
    build = qemu_probe.probe(path) if path else None
    machine = arguments.machine or (build.machine if build else "")
    known = build.properties if build else None
    return qemu.emit(contract, machine, known=known, host=host, accelerator=arguments.accel)


def show_contract(screen: Screen, contract: Contract) -> None:
    """A contract for people: the features by kind, the numbers that matter."""
    from kvmneg.features import catalog

    table = catalog.names(contract.architecture)
    kinds: dict[str, list[str]] = {"cpu": [], "kvm guest": [], "hyper-v": [], "msr": [], "vm": []}
    kinds["told of"] = []  # what the guest must know to be safe, not something it is given
    numbers = []
    for word, value in contract.words().items():
        for feature in table.at(word, value):
            if feature.width == 1:
                kinds["told of" if feature.rule == "or" else _kind(word)].append(feature.name)
            elif feature.name in ("phys-bits", "linear-bits", "guest-phys-bits"):
                numbers.append(f"{feature.name} {value >> feature.shift & (1 << feature.width) - 1}")
    screen.words("digest", [contract.digest])
    generation, _digest = contract.fence
    screen.words("fence", [f"generation {generation}" if generation else "none pinned"])
    total = sum(len(names) for kind, names in kinds.items() if kind != "told of")
    screen.words("grants", ", ".join([count(total, "feature"), *numbers]).split(" "))
    for kind, names in kinds.items():
        if names:
            screen.words(kind, names)


def _kind(word: str) -> str:
    if word.startswith("cpuid:0x4000"):
        return "kvm guest"
    prefix = word.partition(":")[0]
    return {"cpuid": "cpu", "hyperv": "hyper-v", "msr": "msr"}.get(prefix, "vm")


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
