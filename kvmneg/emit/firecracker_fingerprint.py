# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading a Firecracker fingerprint (`cpu-template-helper fingerprint dump`) as an ordinary report. Pure.

A fingerprint holds the CPUID and MSRs of a microVM's vCPU, and the kernel, microcode and BIOS it was taken
under. So it is what KVM supports there, after Firecracker's own normalization (topology, cache and brand
leaves, a few bits). Most of the MSRs are a guest's state; those that the catalogue has rules for are features.
Format: Firecracker's docs/cpu_templates/cpu-template-helper.md; published ones are compressed (gzip).
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.emit.elements import Element
from kvmneg.emit.imported import SUPPORTED, Measured, check_twice, hexadecimal, identity, placed
from kvmneg.errors import BadInput
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.report import Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.emit.imported import Leaves

SOURCE = "firecracker-fingerprint"
NOTE = (
    "what KVM supports for a Firecracker guest, after Firecracker's normalization: capabilities are not in it"
)
_GZIP = b"\x1f\x8b"
_MAKE = "make it with `cpu-template-helper fingerprint dump`"


def read(data: bytes, measured: Measured) -> Report:
    """The report of a fingerprint, compressed or not.

    Raises BadInput, naming file and line, for an element that is not a fingerprint's.
    """
    document = Element.loads(_unpacked(data, measured.file), measured.file)
    config = document.find("guest_cpu_config")
    if config is None:
        raise document.wrong("no fingerprint: it has no 'guest_cpu_config'", _MAKE)
    if config.find("reg_modifiers") is not None:
        from kvmneg.emit import firecracker_arm64

        return firecracker_arm64.report(config, _combo(document), measured)
    offer = placed(_leaves(config.member("cpuid_modifiers"), measured.file))
    offer |= _msrs(config.member("msr_modifiers"))
    return Report(
        words.X86_64,
        measured=measured.section(SOURCE, SUPPORTED, NOTE),
        combo=_combo(document),
        identity=identity(offer),
        offer=offer,
    )


def _unpacked(data: bytes, file: str) -> bytes:
    """The document's bytes, at most one more than a report may have."""
    if not data.startswith(_GZIP):
        return data
    import zlib  # most fingerprints at hand are unpacked already

    unpacker = zlib.decompressobj(wbits=31)  # a gzip header
    try:
        unpacked = unpacker.decompress(data, limits.REPORT_BYTES + 1)
    except zlib.error as error:
        raise BadInput(f"not gzip: {error}", file=file) from None
    if not unpacker.eof and len(unpacked) <= limits.REPORT_BYTES:
        raise BadInput("not gzip: cut short", file=file)
    return unpacked


def _combo(document: Element) -> dict[str, object]:
    """What the fingerprint says it was taken under, by the names of a measured combo."""
    found = {
        name: document.find(f"{name}_version") for name in ("kernel", "microcode", "bios", "firecracker")
    }
    texts = {name: element.text() for name, element in found.items() if element is not None}
    revision = document.find("bios_revision")
    if revision is not None:
        texts["bios"] = f"{texts.get('bios', '')} {revision.text()}".strip()
    vmm = texts.pop("firecracker", "")
    return {**texts, **({"vmms": [{"name": "firecracker", "version": vmm}]} if vmm else {})}


def _leaves(modifiers: Element, file: str) -> Leaves:
    found: Leaves = {}
    for modifier in modifiers.items():
        leaf, subleaf = (_address(modifier.member(name)) for name in ("leaf", "subleaf"))
        registers = {
            row.member("register").text(): row.member("bitmap").bitmap(32)
            for row in modifier.member("modifiers").items()
        }
        if sorted(registers) != sorted(words.REGISTERS):
            raise modifier.wrong(f"not the registers {', '.join(words.REGISTERS)}, each once")
        if (leaf, subleaf) in found:
            raise modifier.wrong(f"leaf {leaf:#x} {subleaf:#x} is there twice")
        check_twice(found, leaf, subleaf, file, 0)
        eax, ebx, ecx, edx = (registers[name] for name in words.REGISTERS)
        found[leaf, subleaf] = eax, ebx, ecx, edx
    if not found:
        raise modifiers.wrong("no leaf in it")
    return found


def _msrs(modifiers: Element) -> dict[str, int]:
    """The feature MSRs: those that the catalogue has rules for. The others are a guest's state."""
    known = catalogs.load(words.X86_64).words
    found: dict[str, int] = {}
    for modifier in modifiers.items():
        word = words.msr_word(_address(modifier.member("addr")))
        value = modifier.member("bitmap").bitmap(64)
        if word in found:
            raise modifier.wrong(f"{word} is there twice")
        if word in known:
            found[word] = value
    return found


def _address(element: Element) -> int:
    try:
        return hexadecimal(element.text())
    except ValueError:
        raise element.wrong(f"{element.value!r} is not a 32-bit number like '0x1'") from None
