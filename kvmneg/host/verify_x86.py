# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole proof of an x86 host: under a contract, or under what the host offers and the same without its bits.

    prove(kvm)                 the host: what it offers, and nothing of it
    prove(kvm, bound)          a contract: {word: (value, mask)}, kvmneg.policy.contract
    mark_of(kvm, feature)      whether one feature is trapped where it is hidden

Each table has a VM of its own, for KVM freezes CPUID at the first KVM_RUN (Linux 5.16 and later).
"""

from __future__ import annotations

import os

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.host import enforcement, hidden_x86, hyperv_x86, proof_x86, x86
from kvmneg.host.guest_x86 import MODE_NAMES
from kvmneg.host.instructions_x86 import BASES, CODE
from kvmneg.host.kvm import raw_cpuid
from kvmneg.host.proof_x86 import Table
from kvmneg.host.sight import Proof, Standing
from kvmneg.host.tables import CpuidEntry

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmneg.host.kvm import Kvm
    from kvmneg.host.tables import Probe

    Bound = Mapping[str, tuple[int, int]]

_SHOWN = ("cpuid:", "hyperv:", "msr:")  # to guests; capabilities are for VMMs
_HYPERVISORS = ("hyperv:", "cpuid:0x4")  # what is otherwise with Hyper-V in the table
_BANKS = 0xFF  # of MCG_CAP
_LONG_MODE = 1 << 29  # CPUID leaf 0x80000001 EDX
_SUBLEAVES = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX


def prove(kvm: Kvm, bound: Bound | None = None) -> Proof:
    """Run the guests, on the CPU that this thread may use. Raises KvmFault."""
    probe = kvm.probe()
    offer, offered, silicon = _offered(probe)
    if bound is None:
        return _prove_host(kvm, probe, offered, silicon, mce=offer.get(enforcement.MCG_CAP, 0))
    if probe.hyperv is not None and hyperv_x86.wanted(bound):
        offered = hyperv_x86.beside(offered, probe.hyperv)
    entries = contract_entries(offered, bound)
    table = Table(
        entries, contract_msrs(probe.feature_msrs, bound), {word: row[1] for word, row in bound.items()}
    )
    sights = proof_x86.sights(kvm, table, offered)
    hidden = [
        feature
        for feature, word, mask in _instructions()
        if (offer.get(word, 0) | silicon.get(word, 0)) & mask and not bound.get(word, (0, 0))[0] & mask
    ]
    return Proof(
        MODE_NAMES,
        {"contract": {word: sights[word] for word in sorted(sights, key=words.order) if word in bound}},
        _standings(kvm, probe, entries),
        proof_x86.instructions(kvm, offered, entries, hidden),
        [
            word
            for word, (value, _mask) in bound.items()
            if value and word not in sights and word.startswith(_SHOWN)
        ],
    )


def _offered(probe: Probe) -> tuple[dict[str, int], list[CpuidEntry], dict[str, int]]:
    """The offer by word and as a table, and what the CPU itself has."""
    offer = x86.decoder().offer(probe)
    offered = [enforcement.offered_entry(entry, offer) for entry in probe.supported]
    return offer, offered, x86.decoder().silicon(raw_cpuid(min(os.sched_getaffinity(0))))


def mark_of(kvm: Kvm, feature: str) -> str | None:
    """What becomes of a feature's instruction where only that feature is hidden; None where nothing can show it.

    Raises KvmFault.
    """
    _offer, offered, silicon = _offered(kvm.probe())
    return _hidden_alone(kvm, offered, silicon, only=feature).get(feature)


def _prove_host(
    kvm: Kvm, probe: Probe, offered: Sequence[CpuidEntry], silicon: Mapping[str, int], *, mce: int
) -> Proof:
    emptied = emptied_table(offered)
    values = dict(probe.feature_msrs)
    if probe.mce_cap is not None:
        values[words.parse_msr(enforcement.MCG_CAP)] = mce
    msrs, lowered = (_msrs(values, lowered=lowered) for lowered in (False, True))
    none = dict(proof_x86.sights(kvm, Table(emptied, {}), offered))
    # KVM takes VMX's MSRs only with VMX in CPUID: without their bits under everything else
    few = proof_x86.sights(kvm, Table(list(offered), lowered), offered)
    none.update((word, sight) for word, sight in few.items() if word.startswith("msr:"))
    sights = {"offer": proof_x86.sights(kvm, Table(list(offered), msrs), offered), "emptied": none}
    tables = _hyperv_tables(probe, offered, emptied)
    for name, table in tables.items():
        each = proof_x86.sights(kvm, Table(table, {}), table)
        sights[name] = {word: sight for word, sight in each.items() if word.startswith(_HYPERVISORS)}
    standings = hidden_x86.paravirtual(kvm, emptied)
    if tables:
        standings.update(hidden_x86.enlightened(kvm, tables["hyperv-emptied"]))
    return Proof(MODE_NAMES, sights, standings, _hidden_alone(kvm, offered, silicon))


def _hyperv_tables(
    probe: Probe, offered: Sequence[CpuidEntry], emptied: Sequence[CpuidEntry]
) -> dict[str, list[CpuidEntry]]:
    """With all that this KVM has of Hyper-V, and with Hyper-V and none of its features; empty where it has none."""
    if probe.hyperv is None:
        return {}
    both = hyperv_x86.beside(offered, probe.hyperv)
    named = hyperv_x86.named(both)
    lowered = [enforcement.lowered_entry(entry, named) for entry in probe.hyperv]
    return {"hyperv": both, "hyperv-emptied": hyperv_x86.beside(emptied, lowered)}


def _standings(kvm: Kvm, probe: Probe, entries: Sequence[CpuidEntry]) -> dict[str, Standing]:
    """Of the MSRs of KVM's own features, and of Hyper-V's where this KVM has it."""
    found = hidden_x86.paravirtual(kvm, entries)
    return found if probe.hyperv is None else {**found, **hidden_x86.enlightened(kvm, entries)}


def emptied_table(offered: Sequence[CpuidEntry]) -> list[CpuidEntry]:
    """What is offered without its bits, but for long mode: Linux 7 lets no guest be in it that is not shown it."""
    lowered = [enforcement.lowered_entry(entry) for entry in offered]
    return [
        low._replace(edx=low.edx | entry.edx & _LONG_MODE) if low[:2] == (0x80000001, 0) else low
        for low, entry in zip(lowered, offered, strict=True)
    ]


def _msrs(values: Mapping[int, int], *, lowered: bool) -> dict[int, int]:
    """Feature MSRs that are compared at all, as they are or without their bits."""
    found = {}
    for index, value in values.items():
        row = enforcement.register(words.msr_word(index))
        if row[1]:
            found[index] = enforcement.lowered_msr(row, value) if lowered else value
    return found


def _instructions() -> list[tuple[str, str, int]]:
    """Each feature that an instruction shows, with the place of its bit."""
    names = catalogs.names(words.X86_64)
    return [(feature, names.feature(feature).word, names.feature(feature).mask) for feature in CODE]


def _hidden_alone(
    kvm: Kvm, offered: Sequence[CpuidEntry], silicon: Mapping[str, int], *, only: str = ""
) -> dict[str, str]:
    """The marks of all instructions that this CPU has: their bits cleared, and everything that they need there."""
    offer = {
        word: value
        for entry in offered
        for (word, _, _), value in zip(enforcement.registers[entry[:2]], entry[3:], strict=True)
    }
    has = [
        row
        for row in _instructions()
        if only in ("", row[0]) and (offer.get(row[1], 0) | silicon.get(row[1], 0)) & row[2]
    ]
    found: dict[str, str] = {}
    for base in (False, True):
        rows = [row for row in has if (row[0] in BASES) is base]
        if rows:
            cleared: dict[str, int] = {}
            for _feature, word, mask in rows:
                cleared[word] = cleared.get(word, 0) | mask
            hidden = [_cleared(entry, cleared) for entry in offered]
            found.update(proof_x86.instructions(kvm, offered, hidden, [row[0] for row in rows]))
    return found


def _cleared(entry: CpuidEntry, bits: Mapping[str, int]) -> CpuidEntry:
    eax, ebx, ecx, edx = (
        value & ~bits.get(word, 0)
        for (word, _, _), value in zip(enforcement.registers[entry[:2]], entry[3:], strict=True)
    )
    return entry._replace(eax=eax, ebx=ebx, ecx=ecx, edx=edx)


def contract_entries(offered: Sequence[CpuidEntry], bound: Bound) -> list[CpuidEntry]:
    """The CPUID of a guest under a contract on this host: what it binds, and what is the VMM's as KVM offers it.

    Bits that nobody promised are clear. `offered` with Hyper-V's leaves gives a guest both hypervisors.
    """
    rows = {entry[:2]: entry for entry in offered}
    both, named = hyperv_x86.shown(offered), hyperv_x86.named(offered)
    for word in bound:
        if word.startswith(("cpuid:", hyperv_x86.SPACE) if both else "cpuid:"):
            leaf, subleaf = hyperv_x86.place(word, both=both)
            has = subleaf or any(key[0] == leaf and key[1] for key in rows)
            rows.setdefault((leaf, subleaf), CpuidEntry(leaf, subleaf, _SUBLEAVES if has else 0, 0, 0, 0, 0))
    found = []
    for key in sorted(rows):
        eax, ebx, ecx, edx = (
            _under(word, value, bound) for (word, _, _), value in zip(named[key], rows[key][3:], strict=True)
        )
        found.append(rows[key]._replace(eax=eax, ebx=ebx, ecx=ecx, edx=edx))
    return found


def contract_msrs(values: Mapping[int, int], bound: Bound) -> dict[int, int]:
    """The MSRs that a contract binds and that are set like this, by index.

    One that KVM does not list, and that is to be zero, is not there to be set: it is another vendor's. There is one
    machine check bank where the contract leaves their number to the VMM.
    """
    found = {}
    for word, (promised, mask) in bound.items():
        if word.startswith("msr:"):
            index = words.parse_msr(word)
            if promised or index in values or word == enforcement.MCG_CAP:
                found[index] = _under(word, values.get(index, 0), bound)
                if word == enforcement.MCG_CAP and not mask & _BANKS:
                    found[index] |= 1
    return found


def _under(word: str, value: int, bound: Bound) -> int:
    """A register under a contract: what no rule judges stays as it is."""
    catalog = catalogs.load(words.X86_64)
    rule = catalog.words.get(word)
    promised, mask = bound.get(word, (0, 0))
    every = value if catalog.leaf_rule(word) else 0  # of a whole leaf that is the VMM's
    left = every if rule is None else value & rule.known & ~rule.judged
    return promised | left & ~mask
