# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading what `cpuid -r` prints (Todd Allen's cpuid, packaged everywhere) as an ordinary report. Pure.

    CPU 0:
       0x00000001 0x00: eax=0x000a0671 ebx=0x01020800 ecx=0xfffa3203 edx=0x1f8bfbff

That is what the instruction answers: the silicon under an operating system, or a guest's view, not what a KVM
would offer. The report says so (its source and a note); a fence should not be pinned on it.
"""

from __future__ import annotations

from kvmneg.emit.imported import Measured, check_size, check_twice, hexadecimal, silicon_report
from kvmneg.errors import BadInput
from kvmneg.features import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.emit.imported import Leaves
    from kvmneg.features.report import Report

SOURCE = "cpuid-raw"
NOTE = "CPUID as the instruction answers it: no KVM, its MSRs or capabilities were asked"
_LINE = "like `0x00000001 0x00: eax=0x… ebx=0x… ecx=0x… edx=0x…`"


def read(data: bytes, measured: Measured) -> Report:
    """The report of a `cpuid -r` output; CPUs that differ are met.

    Raises BadInput, naming file and line, for a line that is not cpuid's, and for CPUs of two vendors.
    """
    return silicon_report(_parse(data, measured.file), tool=SOURCE, note=NOTE, measured=measured)


def _parse(data: bytes, file: str) -> list[Leaves]:
    """The leaves of each CPU, in the order of the file."""
    check_size(data, file)
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadInput("not text", file=file, line=line, hint="make it with `cpuid -r`") from None
    cpus: list[Leaves] = []
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
        check_twice(cpus[-1], leaf, subleaf, file, number)
        cpus[-1][leaf, subleaf] = registers
    if not any(cpus):
        raise BadInput("no CPU in it", file=file, hint="make it with `cpuid -r`")
    if not all(cpus):
        raise BadInput("a CPU without a leaf", file=file, hint="was it cut short?")
    return cpus


def _line(content: str, file: str, number: int) -> tuple[int, int, tuple[int, int, int, int]]:
    address, colon, rest = content.partition(":")
    try:
        leaf, subleaf = (hexadecimal(part) for part in address.split(" "))
        names, values = zip(*(part.split("=") for part in rest.split()), strict=True)
        if colon and names == words.REGISTERS:
            eax, ebx, ecx, edx = (hexadecimal(value) for value in values)
            return leaf, subleaf, (eax, ebx, ecx, edx)
    except ValueError:
        pass
    raise BadInput(f"{content[:60]!r} is no line of `cpuid -r`", file=file, line=number, hint=_LINE)
