# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading a CPUID dump of the InstLatX64 collection (AIDA64's text) as an ordinary report. Pure.

    CPUID 00000007: 00000000-029C6FBB-00000000-00000000 [SL 00]

Leaf, EAX-EBX-ECX-EDX, and the subleaf. Older dumps do not say the subleaf: their repeated leaves count up, and
in leaf 0xD, which lists the XSAVE components that there are, they go by the bits of XCR0 and XSS. Leaf 0 begins
the next CPU. Everything else in such a file is prose about the machine and is not read.
"""

from __future__ import annotations

from kvmneg.emit.imported import Measured, bare_hexadecimal, check_size, check_twice, silicon_report
from kvmneg.errors import BadInput

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.emit.imported import Leaves
    from kvmneg.features.report import Report

SOURCE = "instlatx64"
NOTE = "CPUID as the instruction answers it: no KVM, its MSRs or capabilities were asked"
_LINE = "like `CPUID 00000007: 00000000-029C6FBB-00000000-00000000 [SL 00]`"
_XSAVE = 0xD


def read(data: bytes, measured: Measured) -> Report:
    """The report of a dump; CPUs that differ are met.

    Raises BadInput, naming file and line, for a register line that is not one, and for CPUs of two vendors.
    """
    return silicon_report(_parse(data, measured.file), tool=SOURCE, note=NOTE, measured=measured)


def _parse(data: bytes, file: str) -> list[Leaves]:
    check_size(data, file)
    cpus: list[Leaves] = []
    # Latin-1: the prose of these files has brand names with ® and µ; register lines are ASCII
    for number, row in enumerate(data.decode("latin-1").split("\n"), 1):
        content = row.strip()
        if not _of_registers(content):
            continue
        leaf, said, registers = _line(content, file, number)
        if leaf == 0 and not said:
            cpus.append({})
        if not cpus:
            raise BadInput("a leaf before leaf 0", file=file, line=number)
        subleaf = _following(cpus[-1], leaf, file, number) if said is None else said
        check_twice(cpus[-1], leaf, subleaf, file, number)
        cpus[-1][leaf, subleaf] = registers
    if not cpus:
        raise BadInput("no line of CPUID registers in it", file=file, hint=_LINE)
    return cpus


def _of_registers(content: str) -> bool:
    """Whether a line is meant to list registers: "CPUID" and a number; "CPUID Manufacturer" is prose."""
    name, _, rest = content.partition(" ")
    address = rest.strip().partition(" ")[0]
    return name == "CPUID" and (address[:1].isdigit() or (len(address) == 9 and address.endswith(":")))


def _line(content: str, file: str, number: int) -> tuple[int, int | None, tuple[int, int, int, int]]:
    """Leaf, subleaf (None where it is not said) and registers. Raises BadInput."""
    parts = content.split()
    try:
        if len(parts[1]) == 9 and parts[1].endswith(":"):
            leaf = bare_hexadecimal(parts[1][:-1])
            values = parts[2].split("-")
            if len(values) == 4 and all(len(value) == 8 for value in values):
                eax, ebx, ecx, edx = (bare_hexadecimal(value) for value in values)
                return leaf, _said(parts[3:]), (eax, ebx, ecx, edx)
    except (ValueError, IndexError):
        pass
    raise BadInput(f"{content[:70]!r} is no line of CPUID registers", file=file, line=number, hint=_LINE)


def _said(rest: list[str]) -> int | None:
    """The subleaf of `[SL nn]`, hexadecimal. Raises ValueError for anything else that is not nothing."""
    if not rest:
        return None
    if len(rest) == 2 and rest[0] == "[SL" and rest[1].endswith("]"):
        return bare_hexadecimal(rest[1][:-1])
    raise ValueError(rest)


def _following(leaves: Leaves, leaf: int, file: str, number: int) -> int:
    """The subleaf of a line that does not say it: the next one of its leaf."""
    seen = [subleaf for there, subleaf in leaves if there == leaf]
    if not seen:
        return 0
    after = max(seen) + 1
    if leaf != _XSAVE or after < 2:
        return after
    low, _, _, high = leaves.get((_XSAVE, 0), (0, 0, 0, 0))
    _, _, system_low, system_high = leaves.get((_XSAVE, 1), (0, 0, 0, 0))
    components = (high | system_high) << 32 | low | system_low  # XCR0 and IA32_XSS (Intel SDM vol. 1, 13.2)
    for component in range(after, 63):
        if components >> component & 1:
            return component
    raise BadInput("an XSAVE component that neither XCR0 nor XSS has", file=file, line=number)
