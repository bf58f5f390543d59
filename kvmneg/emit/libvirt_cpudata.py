# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading libvirt's CPU data (what its tests/cputestdata holds) as an ordinary report. Pure.

    <cpudata arch='x86'>
      <cpuid eax_in='0x00000001' ecx_in='0x00' eax='0x00050654' ebx='0x45400800' ecx='0x7ffefbff' edx='0xbfebfbff'/>
      <msr index='0x10a' edx='0x00000000' eax='0x00000048'/>
    </cpudata>

That is raw CPUID of one CPU, and the MSRs that were asked. Where libvirt wrote down what QEMU told it, a VMX
control MSR holds QEMU's feature word (the controls that a guest hypervisor may choose), until libvirt 11 in the
lower half. The parser is expat, which tells the line; a document type, and so every entity, is refused.
"""

from __future__ import annotations

from kvmneg.emit.imported import Measured, check_size, check_twice, hexadecimal, silicon_report
from kvmneg.errors import BadInput
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.catalog import controls
from kvmneg.features.words import REGISTERS, brief

TYPE_CHECKING = False
if TYPE_CHECKING:
    from xml.parsers.expat import XMLParserType

    from kvmneg.emit.imported import Leaves
    from kvmneg.features.report import Report

SOURCE = "libvirt-cpudata"
NOTE = "CPUID as the instruction answers it, and the MSRs that were asked: no KVM was"
_CPUID = ("eax_in", "ecx_in", *REGISTERS)
_MSR = ("index", "eax", "edx")
_DEPTH = 2  # elements within elements


def read(data: bytes, measured: Measured) -> Report:
    """The report of a <cpudata> document. Raises BadInput, naming file and line, for anything else."""
    check_size(data, measured.file)
    content = _Content(measured.file)
    content.parse(data)
    msrs = {index: _control_word(index, value) for index, value in content.msrs.items()}
    return silicon_report([content.leaves], tool=SOURCE, note=NOTE, measured=measured, msrs=msrs)


def _control_word(index: int, value: int) -> int:
    """The MSR's value, of whatever form it was: no CPU lacks a control of the default1 class, or has none at all."""
    table = catalogs.names(words.X86_64)
    default1 = table.default1.get(words.msr_word(index))
    if default1 is None or not value:
        return value
    upper, lower = value >> controls.HALF, value & (1 << controls.HALF) - 1
    if not upper:
        return controls.value_of(lower, default1)
    return value if upper & default1 == default1 else controls.value_of(upper, default1)


class _Content:
    """The leaves and MSRs of one document, filled while expat reads it."""

    def __init__(self, file: str) -> None:
        from xml.parsers import expat  # only for an import

        self.leaves: Leaves = {}
        self.msrs: dict[int, int] = {}
        self._file = file
        self._depth = 0
        self._expat = expat
        self._parser: XMLParserType = expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._doctype
        self._parser.CharacterDataHandler = self._text

    def parse(self, data: bytes) -> None:
        try:
            self._parser.Parse(data, True)
        except self._expat.ExpatError as error:
            what = self._expat.ErrorString(error.code)
            raise BadInput(f"not XML: {what}", file=self._file, line=error.lineno) from None
        except (LookupError, ValueError) as error:  # an encoding that it names and there is not
            raise BadInput(f"not XML: {error}", file=self._file) from None
        if not self.leaves:
            raise BadInput("no <cpuid> in it", file=self._file)

    def _wrong(self, what: str, hint: str = "") -> BadInput:
        return BadInput(what, file=self._file, line=self._parser.CurrentLineNumber, hint=hint)

    def _doctype(self, *_: object) -> None:
        raise self._wrong("has a document type, which is not read", "libvirt's CPU data has none")

    def _text(self, text: str) -> None:
        if text.strip():
            raise self._wrong(f"text where none belongs: {brief(text)}")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth == 1:
            if name != "cpudata" or attributes.get("arch") != "x86":
                raise self._wrong(f"<{name}> is not <cpudata arch='x86'>")
        elif self._depth == _DEPTH and name == "cpuid":
            leaf, subleaf, eax, ebx, ecx, edx = self._numbers(name, attributes, _CPUID)
            check_twice(self.leaves, leaf, subleaf, self._file, self._parser.CurrentLineNumber)
            self.leaves[leaf, subleaf] = eax, ebx, ecx, edx
        elif self._depth == _DEPTH and name == "msr":
            index, low, high = self._numbers(name, attributes, _MSR)
            if index in self.msrs:
                raise self._wrong(f"MSR {index:#x} is there twice")
            self.msrs[index] = high << 32 | low
        else:
            raise self._wrong(f"<{name[:40]}> does not belong there")

    def _end(self, _name: str) -> None:
        self._depth -= 1

    def _numbers(self, element: str, attributes: dict[str, str], names: tuple[str, ...]) -> list[int]:
        """The values of the attributes, which must be all and no more."""
        if attributes.keys() != set(names):
            raise self._wrong(f"<{element}> needs the attributes {', '.join(names)}, and no other")
        try:
            return [hexadecimal(attributes[name]) for name in names]
        except ValueError as error:
            raise self._wrong(
                f"<{element}>: {brief(str(error))} is not a 32-bit number like '0x01'"
            ) from None
