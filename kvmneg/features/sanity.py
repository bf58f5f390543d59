# SPDX-License-Identifier: LGPL-2.1-or-later
"""Words that no CPU can have: found in a report, told to people, and kept out of every offer. Pure.

A report stays as it was measured. Its offer is made of `sane(words)`, in which what contradicts itself is at
its rule's bottom; what is built on it goes with it when the set is closed. Only x86 has such checks.

Not here: bits that nobody has classified (Report.unclassified). A later CPU may have them, so they are not
impossible, and they are never offered either.

Sources: Intel SDM vol. 1 chapter 13 (XSAVE), vol. 2A CPUID, vol. 3D appendix A (VMX); AMD APM vol. 3 appendix E;
Linux Documentation/virt/kvm/api.rst, KVM_CAP_XSAVE2.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words as addresses
from kvmneg.features.words import X86_64
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmneg.features.report import Report

    # a word that holds a highest leaf or subleaf, which of both, and (number, word, judged bits, bottom) of the
    # words it bounds, last one first
    _Bounded = tuple[str, str, list[tuple[int, str, int, int]]]

_made: list[_Bounded] = []
_ALL = (1 << 64) - 1

_XCR0, _XCR0_HIGH = "cpuid:0xd.0.eax", "cpuid:0xd.0.edx"
_XSS = "cpuid:0xd.1.ecx"
_XSAVE_ENABLED, _XSAVE_AREA = "cpuid:0xd.0.ebx", "cpuid:0xd.0.ecx"
_XSAVE_LEGACY = 576  # the legacy region and the header: no component begins below
_XSAVE_FLAGS = 0b111  # ECX of a component: supervisor, aligned, with a disable bit; the rest is reserved
_XSAVE2_LEAST = 4096
_SUPERVISOR = 1 << 8 | 0x7F << 10  # components of IA32_XSS, for which XCR0 has no bits

_PHYSICAL_BITS = 52
_LINEAR_BITS = (0, 48, 57)

_VMX_BASIC = "msr:0x480"
_VMX_BASIC_RESERVED = 1 << 31 | 0b111 << 45
_VMCS_BYTES = 4096
_VMX_CONTROLS = ("msr:0x48b", "msr:0x48d", "msr:0x48e", "msr:0x48f", "msr:0x490")
_VMX_FIXED = (("msr:0x486", "msr:0x487", "CR0"), ("msr:0x488", "msr:0x489", "CR4"))

# (word that holds a highest leaf, the first and last leaf it is about)
_HIGHEST = (
    ("cpuid:0x0.0.eax", 0x1, 0x3FFF_FFFF),
    ("cpuid:0x80000000.0.eax", 0x8000_0001, 0x8FFF_FFFF),
    ("cpuid:0xc0000000.0.eax", 0xC000_0001, 0xCFFF_FFFF),
)


class Finding(NamedTuple):
    """One impossibility: the word, what is wrong with it, and what goes for it.

    `dropped` holds (word, mask): the bits that are put at their bottom; none where the word is never offered.
    """

    word: str
    what: str
    dropped: tuple[tuple[str, int], ...]

    def describe(self) -> str:
        return f"{self.word}: {self.what}"


def findings(report: Report) -> tuple[Finding, ...]:
    """What is impossible in a report: in what it offers, then in what it accepts besides."""
    offered = impossible(report.architecture, report.offer_words)
    if not report.accept_words:
        return offered
    accepted = impossible(report.architecture, {**report.offer_words, **report.accept_words})
    return tuple(dict.fromkeys((*offered, *accepted)))


def sane(architecture: str, words: Mapping[str, int]) -> Mapping[str, int]:
    """The words with what is impossible at its rule's bottom; they themselves where nothing is."""
    found = impossible(architecture, words)
    if not found:
        return words
    rule_of = catalogs.load(architecture).words
    kept = dict(words)
    for finding in found:
        for word, mask in finding.dropped:
            kept[word] = kept.get(word, 0) & ~mask | rule_of[word].bottom & mask
    return kept


def impossible(architecture: str, words: Mapping[str, int]) -> tuple[Finding, ...]:
    """The findings of raw words. A word that is absent was not measured and contradicts nothing."""
    if architecture != X86_64:
        return ()
    return tuple(finding for check in _CHECKS for finding in check(words))


def _leaves(words: Mapping[str, int]) -> Iterator[Finding]:
    """What lies above the highest leaf is not there: a guest that looks reads another leaf."""
    for highest, kind, rows in _rows():
        most = words.get(highest)
        if most is None:
            continue
        beyond = []
        for number, word, judged, bottom in rows:
            if number <= most:
                break
            value = words.get(word, 0) & judged
            if value and value != bottom:
                beyond.append(word)
        if beyond:
            more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
            what = f"the highest {kind} is {most:#x}, yet {beyond[-1]}{more} above it is not zero"
            yield Finding(highest, what, tuple((word, _ALL) for word in beyond))


def _rows() -> list[_Bounded]:
    """What each highest leaf, and leaf 7's highest subleaf, bounds; made once."""
    if not _made:
        places = [
            (*addresses.parse_cpuid(word)[:2], word, rule.judged, rule.bottom)
            for word, rule in catalogs.load(X86_64).words.items()
            if word.startswith("cpuid:") and rule.judged
        ]
        for highest, first, last in _HIGHEST:
            leaves = [(leaf, *rest) for leaf, _, *rest in places if first <= leaf <= last]
            _made.append((highest, "leaf", sorted(leaves, reverse=True)))
        subleaves = [(subleaf, *rest) for leaf, subleaf, *rest in places if leaf == 7]
        _made.append(("cpuid:0x7.0.eax", "subleaf", sorted(subleaves, reverse=True)))
    return _made


def _address_bits(words: Mapping[str, int]) -> Iterator[Finding]:
    """CPUID 0x80000008 EAX: x86-64 has at most 52 physical bits, and 4- or 5-level paging."""
    word = "cpuid:0x80000008.0.eax"
    value = words.get(word, 0)
    physical, linear, guest = value & 0xFF, value >> 8 & 0xFF, value >> 16 & 0xFF
    if max(physical, guest) > _PHYSICAL_BITS:
        # both: the bottom of the guest's bits alone would be a limit of 1 bit
        what = f"{max(physical, guest)} physical address bits, where {_PHYSICAL_BITS} are the most"
        yield Finding(word, what, ((word, 0xFF_00FF),))
    if linear not in _LINEAR_BITS:
        yield Finding(word, f"{linear} linear address bits, neither 48 nor 57", ((word, 0xFF00),))


def _counters(words: Mapping[str, int]) -> Iterator[Finding]:
    """CPUID 0xA: EBX has 32 events, IA32_PERF_GLOBAL_CTRL 32 general counters, a counter 64 bits at most."""
    eax, edx = words.get("cpuid:0xa.0.eax", 0), words.get("cpuid:0xa.0.edx", 0)
    for word, many, most, what in (
        ("cpuid:0xa.0.eax", eax >> 8 & 0xFF, 32, "general-purpose counters"),
        ("cpuid:0xa.0.eax", eax >> 16 & 0xFF, 64, "bits of a counter"),
        ("cpuid:0xa.0.eax", eax >> 24, 32, "events told about in the 32 bits of EBX"),
        ("cpuid:0xa.0.edx", edx >> 5 & 0xFF, 64, "bits of a fixed counter"),
    ):
        if many > most:
            yield Finding(word, f"{many} {what}", ((word, _ALL),))


def _vmx(words: Mapping[str, int]) -> Iterator[Finding]:
    """VMX capability MSRs; what drops one of them drops nested VMX, which needs all."""
    basic = words.get(_VMX_BASIC, 0)
    if basic & _VMX_BASIC_RESERVED:
        what = f"reserved bits {basic & _VMX_BASIC_RESERVED:#x} are set"
        yield Finding(_VMX_BASIC, what, ((_VMX_BASIC, _ALL),))
    size = basic >> 32 & 0x1FFF
    if basic and not 0 < size <= _VMCS_BYTES:
        yield Finding(_VMX_BASIC, f"a VMCS region of {size} bytes", ((_VMX_BASIC, _ALL),))
    for word in _VMX_CONTROLS:
        value = words.get(word, 0)
        clash = value & ~(value >> 32) & 0xFFFF_FFFF
        if clash:
            yield Finding(word, f"controls {clash:#x} must be 1 and may not be", ((word, _ALL),))
    for fixed0, fixed1, register in _VMX_FIXED:
        clash = words.get(fixed0, 0) & ~words[fixed1] if words.get(fixed1) else 0
        if clash:
            what = f"{register} bits {clash:#x} must be 1, and by {fixed1} must be 0"
            yield Finding(fixed0, what, ((fixed0, _ALL), (_VMX_BASIC, _ALL)))


def _xsave(words: Mapping[str, int]) -> Iterator[Finding]:
    """CPUID 0xD: components lie apart from each other, behind the header, within the area's size."""
    enabled, area = words.get(_XSAVE_ENABLED, 0), words.get(_XSAVE_AREA, 0)
    if area and enabled > area:
        yield Finding(_XSAVE_ENABLED, f"{enabled} bytes in use of an area of {area}", ())
    if 0 < words.get("kvm:xsave2", _XSAVE2_LEAST) < _XSAVE2_LEAST:
        what = f"{words['kvm:xsave2']} bytes, less than struct kvm_xsave"
        yield Finding("kvm:xsave2", what, (("kvm:xsave2", _ALL),))
    xcr0 = words.get(_XCR0, 0) | words.get(_XCR0_HIGH, 0) << 32
    if xcr0 and not xcr0 & 1:
        what = "XCR0 without x87 state, which cannot be disabled"
        yield Finding(_XCR0, what, ((_XCR0, _ALL), (_XCR0_HIGH, _ALL)))
        xcr0 = 0
    if xcr0 & _SUPERVISOR:
        what = f"XCR0 bits {xcr0 & _SUPERVISOR:#x} of supervisor components"
        yield Finding(_XCR0, what, ((_XCR0, _SUPERVISOR),))
    yield from _user_components(words, xcr0 & ~_SUPERVISOR & ~0b11, area)
    for number in _bits(words.get(_XSS, 0)):
        size, _, flags = _component(words, number)
        if size and (flags & ~_XSAVE_FLAGS or not flags & 1):
            yield _component_finding(number, f"flags {flags:#x} of a supervisor component")


def _user_components(words: Mapping[str, int], user: int, area: int) -> Iterator[Finding]:
    """Components 2 to 62 of XCR0, which have their places in the area that is not compacted."""
    placed = []
    for number in _bits(user):
        if f"cpuid:0xd.{number}.eax" not in words and f"cpuid:0xd.{number}.ebx" not in words:
            continue  # not measured
        size, offset, flags = _component(words, number)
        end = offset + size
        what = ""
        if not size or offset < _XSAVE_LEGACY:
            what = f"{size} bytes at {offset}"
        elif area and end > area:
            what = f"ends at {end}, beyond the {area} bytes of the area"
        elif flags & ~_XSAVE_FLAGS or flags & 1:
            what = f"flags {flags:#x} of a user component"
        if what:
            yield _component_finding(number, what)
        else:
            placed.append((offset, end, number))
    yield from _overlaps(sorted(placed))


def _overlaps(placed: list[tuple[int, int, int]]) -> Iterator[Finding]:
    """Of components sorted by offset: each that begins before one ahead of it has ended, with that one."""
    end, last = 0, 0
    for offset, own_end, number in placed:
        if offset < end:
            for one, other in ((number, last), (last, number)):
                yield _component_finding(one, f"overlaps component {other}")
        if own_end > end:
            end, last = own_end, number


def _bits(mask: int) -> Iterator[int]:
    return (number for number in range(mask.bit_length()) if mask >> number & 1)


def _component(words: Mapping[str, int], number: int) -> tuple[int, int, int]:
    """(bytes, offset, flags)"""
    get, leaf = words.get, f"cpuid:0xd.{number}."
    return get(leaf + "eax", 0), get(leaf + "ebx", 0), get(leaf + "ecx", 0)


def _component_finding(number: int, what: str) -> Finding:
    size, offset = f"cpuid:0xd.{number}.eax", f"cpuid:0xd.{number}.ebx"
    rule_of = catalogs.load(X86_64).words
    dropped = tuple((word, _ALL) for word in (size, offset) if word in rule_of)
    return Finding(size, f"XSAVE component {number}: {what}", dropped)


_CHECKS = (_leaves, _address_bits, _counters, _vmx, _xsave)
