# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every importer shares: from the leaves that a tool lists to an ordinary report. Pure.

What a tool lists is worth different things, and `measured.source` of the report says which, after the tool's
name: the silicon as the instruction answers it, a guest's view of it (CPUID says so itself, 1.ECX bit 31), or
what KVM supports there.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.featureset import FeatureSet, meet_all
from kvmneg.features.report import Report
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    # (leaf, subleaf) → eax, ebx, ecx, edx
    Leaves = dict[tuple[int, int], tuple[int, int, int, int]]

RAW = "raw silicon"
GUEST = "a guest's view"
SUPPORTED = "KVM-supported"

_KVM = b"KVMKVMKVM\0\0\0"
_HYPERV = b"Microsoft Hv"
_HYPERVISORS = range(0x4000_0000, 0x4001_0000, 0x100)
_HYPERVISOR_BIT = 1 << 31  # CPUID 1.ECX
_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")


class Measured(NamedTuple):
    """What goes into "measured": the file, who reads it and when (ISO 8601), and the host's name ("": the file's)."""

    file: str
    host: str = ""
    at: str = ""
    by: str = "kvmneg"

    def section(self, tool: str, worth: str, note: str) -> dict[str, str]:
        """The report's section of that name, empty entries left out."""
        found = {"at": self.at, "by": self.by, "host": self.host or self.file}
        found |= {"source": f"{tool}, {worth}", "note": note}
        return {key: value for key, value in found.items() if value}


def hexadecimal(text: str, digits: int = 8) -> int:
    """A number written 0x… with at most `digits` digits; raises ValueError otherwise."""
    if not text.startswith("0x"):
        raise ValueError(text)
    return bare_hexadecimal(text[2:], digits)


def bare_hexadecimal(text: str, digits: int = 8) -> int:
    """The same without 0x before it."""
    if not 1 <= len(text) <= digits or not _HEXADECIMAL.issuperset(text):
        raise ValueError(text)
    return int(text, 16)


def check_size(data: bytes, file: str) -> None:
    """Raises BadInput where a file is larger than a report may be."""
    if len(data) > limits.REPORT_BYTES:
        raise BadInput(f"larger than {limits.REPORT_BYTES} bytes", file=file)


def check_twice(leaves: Leaves, leaf: int, subleaf: int, file: str, line: int) -> None:
    """Raises BadInput where a CPU lists a leaf a second time, or more leaves than a report holds."""
    if (leaf, subleaf) in leaves:
        raise BadInput(f"leaf {leaf:#x} {subleaf:#x} is there twice", file=file, line=line)
    if (len(leaves) + 1) * 4 > limits.WORDS:
        raise BadInput(f"more than {limits.WORDS} words for one CPU", file=file, line=line)


def silicon_report(
    cpus: Sequence[Leaves],
    *,
    tool: str,
    note: str,
    measured: Measured,
    msrs: Mapping[int, int] | None = None,
) -> Report:
    """The report of what CPUs themselves answer: one map of leaves a CPU, and MSRs by index.

    CPUs that differ are met: the report offers what every CPU has. Raises BadInput for CPUs of two vendors.
    In a guest the CPUs' answers are a hypervisor's, so they are an offer without silicon.
    """
    offer = merged([placed(leaves) for leaves in cpus], measured.file)
    offer |= {words.msr_word(index): value for index, value in (msrs or {}).items()}
    inside = offer.get("cpuid:0x1.0.ecx", 0) & _HYPERVISOR_BIT
    silicon = {} if inside else {word: value for word, value in offer.items() if _of_silicon(word)}
    return Report(
        words.X86_64,
        measured=measured.section(tool, GUEST if inside else RAW, note),
        combo={},
        identity={**identity(offer), "cpus": len(cpus)},
        offer=offer,
        silicon=silicon,
    )


def _of_silicon(word: str) -> bool:
    return word.startswith("msr:") or (word.startswith("cpuid:") and not word.startswith("cpuid:0x4000"))


def placed(leaves: Leaves) -> dict[str, int]:
    """The words of one CPU, hypervisor leaves where this project keeps them.

    KVM's are found by their signature and written as based at 0x40000000; Hyper-V's (or KVM's imitation of
    them) get their own kind. What another hypervisor put there is left out: its bits mean something else.
    """
    bases = {base: _signature(leaves[base, 0]) for base in _HYPERVISORS if (base, 0) in leaves}
    found: dict[str, int] = {}
    for (leaf, subleaf), registers in leaves.items():
        kind, shown = "cpuid", leaf
        if leaf in range(_HYPERVISORS.start, _HYPERVISORS.stop):
            base = leaf & ~0xFF
            signature = bases.get(base, b"")
            if signature == _KVM:
                shown = leaf - base + _HYPERVISORS.start
            elif signature == _HYPERV and base == _HYPERVISORS.start:
                kind = "hyperv"
            else:
                continue
        for register, value in zip(words.REGISTERS, registers, strict=True):
            found.setdefault(words.cpuid_word(shown, subleaf, register, kind), value)
    return found


def _signature(registers: tuple[int, int, int, int]) -> bytes:
    return b"".join(value.to_bytes(4, "little") for value in registers[1:])


def merged(cpus: Sequence[dict[str, int]], file: str) -> dict[str, int]:
    """What every CPU has: the first one's words where all agree in what is judged, else the meet of the kinds."""
    kinds = {FeatureSet.of(words.X86_64, cpu): cpu for cpu in reversed(cpus)}
    if len(kinds) == 1:
        return cpus[0]
    met = meet_all(kinds)
    if met.conflicts:
        clash = "; ".join(conflict.describe() for conflict in met.conflicts)
        raise BadInput(f"its CPUs have nothing in common: {clash}", file=file)
    judged = catalogs.load(words.X86_64).words
    common = set.intersection(*(set(cpu) for cpu in cpus))
    return {
        word: met.value(word) if word in judged else value
        for word, value in cpus[0].items()
        if word in common
    }


def identity(offer: Mapping[str, int]) -> dict[str, object]:
    """Vendor and signature, as a measured report has them."""
    letters = b"".join(
        offer.get(f"cpuid:0x0.0.{name}", 0).to_bytes(4, "little") for name in ("ebx", "edx", "ecx")
    )
    signature = words.text_value("cpuid:0x1.0.eax", offer.get("cpuid:0x1.0.eax", 0))
    vendor = letters.decode("latin-1").rstrip("\0")
    return {"vendor": vendor if vendor.isprintable() else repr(vendor), "signature": signature}
