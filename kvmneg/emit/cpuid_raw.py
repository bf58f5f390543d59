# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading what `cpuid -r` prints (Todd Allen's cpuid, packaged everywhere) as an ordinary report. Pure.

    CPU 0:
       0x00000001 0x00: eax=0x000a0671 ebx=0x01020800 ecx=0xfffa3203 edx=0x1f8bfbff

That is what the instruction answers: the silicon under an operating system, or a guest's view, not what a KVM
would offer. The report says so (source "cpuid-raw" and a note); a fence should not be pinned on it.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.featureset import FeatureSet, meet_all
from kvmneg.features.report import Report

SOURCE = "cpuid-raw"
NOTE = "CPUID as the instruction answers it: no KVM, its MSRs or capabilities were asked"
_KVM = b"KVMKVMKVM\0\0\0"
_HYPERV = b"Microsoft Hv"
_HYPERVISORS = range(0x4000_0000, 0x4001_0000, 0x100)
_HYPERVISOR_BIT = 1 << 31  # CPUID 1.ECX
_LINE = "like `0x00000001 0x00: eax=0x… ebx=0x… ecx=0x… edx=0x…`"

# (leaf, subleaf) → eax, ebx, ecx, edx
_Leaves = dict[tuple[int, int], tuple[int, int, int, int]]


def read(data: bytes, *, file: str, host: str = "", at: str = "", by: str = "kvmneg") -> Report:
    """The report of a `cpuid -r` output.

    `host`, `at` (ISO 8601) and `by` go into "measured". CPUs that differ are met: the report offers what
    every CPU has. Raises BadInput, naming file and line, for a line that is not cpuid's, and for CPUs of two
    vendors.
    """
    cpus = [_placed(leaves) for leaves in _parse(data, file)]
    offer = _merged(cpus, file)
    ecx = offer.get("cpuid:0x1.0.ecx", 0)
    silicon = (
        {} if ecx & _HYPERVISOR_BIT else {word: value for word, value in offer.items() if _silicon(word)}
    )
    measured = {"at": at, "by": by, "host": host or file, "source": SOURCE, "note": NOTE}
    return Report(
        words.X86_64,
        measured={key: value for key, value in measured.items() if value},
        combo={},
        identity=_identity(offer, len(cpus)),
        offer=offer,
        silicon=silicon,
    )


def _silicon(word: str) -> bool:
    return word.startswith("cpuid:") and not word.startswith("cpuid:0x4000")


def _parse(data: bytes, file: str) -> list[_Leaves]:
    """The leaves of each CPU, in the order of the file."""
    if len(data) > limits.REPORT_BYTES:
        raise BadInput(f"larger than {limits.REPORT_BYTES} bytes", file=file)
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadInput("not text", file=file, line=line, hint="make it with `cpuid -r`") from None
    cpus: list[_Leaves] = []
    for number, row in enumerate(text.splitlines(), 1):
        content = row.strip()
        if not content:
            continue
        if content.startswith("CPU") and content.endswith(":"):
            cpus.append({})
            continue
        leaf, subleaf, registers = _line(content, file, number)
        if not cpus:
            raise BadInput("a leaf before the first `CPU …:`", file=file, line=number)
        if (leaf, subleaf) in cpus[-1]:
            raise BadInput(f"leaf {leaf:#x} {subleaf:#x} is there twice", file=file, line=number)
        cpus[-1][leaf, subleaf] = registers
        if len(cpus[-1]) * 4 > limits.WORDS:
            raise BadInput(f"more than {limits.WORDS} words for one CPU", file=file, line=number)
    if not any(cpus):
        raise BadInput("no CPU in it", file=file, hint="make it with `cpuid -r`")
    if not all(cpus):
        raise BadInput("a CPU without a leaf", file=file, hint="was it cut short?")
    return cpus


def _line(content: str, file: str, number: int) -> tuple[int, int, tuple[int, int, int, int]]:
    address, colon, rest = content.partition(":")
    try:
        leaf, subleaf = (_hexadecimal(part) for part in address.split(" "))
        names, values = zip(*(part.split("=") for part in rest.split()), strict=True)
        if colon and names == words.REGISTERS:
            eax, ebx, ecx, edx = (_hexadecimal(value) for value in values)
            return leaf, subleaf, (eax, ebx, ecx, edx)
    except ValueError:
        pass
    raise BadInput(f"{content[:60]!r} is no line of `cpuid -r`", file=file, line=number, hint=_LINE)


def _hexadecimal(text: str) -> int:
    """A 32-bit number written 0x…; raises ValueError otherwise."""
    if not text.startswith("0x") or len(text) > 10 or not set(text[2:]) <= set("0123456789abcdefABCDEF"):
        raise ValueError(text)
    return int(text, 16)


def _placed(leaves: _Leaves) -> dict[str, int]:
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


def _merged(cpus: list[dict[str, int]], file: str) -> dict[str, int]:
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


def _identity(offer: dict[str, int], cpus: int) -> dict[str, object]:
    letters = b"".join(
        offer.get(f"cpuid:0x0.0.{name}", 0).to_bytes(4, "little") for name in ("ebx", "edx", "ecx")
    )
    signature = words.text_value("cpuid:0x1.0.eax", offer.get("cpuid:0x1.0.eax", 0))
    return {"vendor": letters.decode("latin-1"), "signature": signature, "cpus": cpus}
