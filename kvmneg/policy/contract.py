# SPDX-License-Identifier: LGPL-2.1-or-later
"""The explicit answer: every word, its digest, and the binary form that libkvmneg applies.

The binary form, version 1, is flat and little-endian; JSON is a view of it. The digest is the SHA-256 of the
whole with the digest field zeroed.

    header, 160 bytes
      0  magic "KVMNEGC\\0"        8  u32 version 1        12  u32 architecture: 1 x86_64, 2 arm64
     16  u32 total size           20  u32 header size     24  u32 grade: 0 unverified, 1 partial, 2 enforced
     28  u32 reserved, 0          32  digest (32 bytes)
     64  u64 fence generation, 0: no fence was pinned
     72  digest of the fence (32 bytes, zero without one)
    104  u32 counts: CPUID, MSR, arm64 register, capability, portable state, initialisation flag
    128  reserved, 0 (32 bytes)
    CPUID entry, 48 bytes: u32 function, index, space (0 KVM_GET_SUPPORTED_CPUID, 1 Hyper-V), reserved 0,
                           u32 values[4], u32 masks[4] of eax ebx ecx edx
    MSR entry, 24 bytes: u32 index, reserved 0, u64 value, u64 mask
    arm64 register, 24 bytes: u64 id, u64 value, u64 mask, in the order of application
    capability, 64 bytes: name (NUL padded, 40 bytes), u32 action (0 check, 1 enable), reserved 0,
                          u64 value, u64 mask
                          kvm:NAME, tap:NAME, vhost-net:NAME  what KVM and devices have to answer
                          tsc:khz    the guest's TSC rate in both halves (KVM_SET_TSC_KHZ), 0: it is not pinned
                          state:NAME what the guest carries and each host has to take, a bit a class: x86's
                                     portable state. Bits are numbered in kvmneg's catalogue
    portable state of arm64, 24 bytes: u32 kind, u32 rule, u64 id, u64 value
    initialisation flag, 4 bytes: u32 number of a KVM_ARM_VCPU_* bit

A mask has a one where the contract binds the bit; where it has a zero the bit is the VMM's (topology), the
guest's (OSXSAVE), recomputed (XSAVE sizes), or in a register that this guest is not shown. Values are zero
outside their mask, an entry binds at least one bit, entries are sorted by their address (CPUID: space,
function, index; MSR: index; capability: name), and reserved fields are zero. No section has more entries than
limits.CONTRACT_ENTRIES. csrc/contract-check.c reads the same.
"""

from __future__ import annotations

import struct
from itertools import pairwise

from kvmneg import limits
from kvmneg.errors import BadInput, Incompatible
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy import contract_arm64 as arm64
from kvmneg.policy import contract_json as json_view
from kvmneg.policy.scope import scope
from kvmneg.sha import sha256

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Mapping
    from typing import Any

    from kvmneg.policy.portable import Entry

FORMAT = "kvmneg.contract/1"
MAGIC = b"KVMNEGC\0"
VERSION = 1
GRADES = ("unverified", "partial", "enforced")
_ARCHITECTURES = {1: words.X86_64, 2: words.ARM64}
_ARCHITECTURE_NUMBERS = {name: number for number, name in _ARCHITECTURES.items()}
_HEADER = struct.Struct("<8sIIIIII32sQ32s6I32s")
_CPUID = struct.Struct("<4I4I4I")
_MSR = struct.Struct("<IIQQ")
_CAPABILITY = struct.Struct("<40sIIQQ")
_SECTIONS = (_CPUID, _MSR, arm64.REGISTER, _CAPABILITY, arm64.PORTABLE, arm64.FLAG)
_DIGEST_AT = slice(32, 64)
_SPACES = ("cpuid", "hyperv")
# arm64 registers that a vCPU has with the feature they are built on only: SVE_VLS, PMCR_EL0, PSCI_VERSION
_LISTED_WITH = ("arm64:0x606000000015ffff", "arm64:0x603000000013dce0", "arm64:0x6030000000140000")
_MCG_CAP, _BANKS = "msr:0x179", 0xFF
_CAPABILITIES = ("kvm:", "tap:", "vhost-net:", "tsc:", "state:", "arm:")


class Contract:
    """What one guest may see. `fence` is (generation, digest), (0, "") without one; `grade` one of GRADES.

    Raises Incompatible where the set is a study over several vendors: no host could hold it.

    Of arm64 besides: `portable`, what becomes of each register when the guest moves (kvmneg.policy.portable). A
    register that the host does not have (`present` are its words) is not in the contract.
    """

    __slots__ = ("_binary", "digest", "fence", "grade", "granted", "portable")

    def __init__(
        self,
        granted: FeatureSet,
        fence: tuple[int, str] = (0, ""),
        grade: str = "unverified",
        *,
        binary: bytes | None = None,
        present: Container[str] | None = None,
        portable: tuple[Entry, ...] = (),
    ) -> None:
        if granted.conflicts:
            blockers = [Blocker.of_conflict(conflict, "the pool") for conflict in granted.conflicts]
            raise Incompatible("there is no contract over hosts without a common baseline", blockers)
        self.portable = portable
        self.granted = granted
        self.fence = fence
        self.grade = grade
        self._binary = binary or _encode(
            granted.architecture, _bound(granted, present), fence, grade, portable
        )
        self.digest = "sha256:" + self._binary[_DIGEST_AT].hex()

    @property
    def architecture(self) -> str:
        return self.granted.architecture

    def binary(self) -> bytes:
        """The binary form, digest filled in."""
        return self._binary

    def bound(self) -> dict[str, tuple[int, int]]:
        """(value, mask) of every word it binds, in the order of addresses."""
        found = _decode_words(self._binary)
        return {word: found[word] for word in sorted(found, key=words.order)}

    def words(self) -> dict[str, int]:
        """Every word it binds with its value, constants of policy included, in the order of addresses."""
        return {word: value for word, (value, _mask) in self.bound().items()}

    def to_json(self) -> dict[str, Any]:
        """The document (kvmneg.contract/1). A word that is not among its masks binds every bit."""
        generation, digest = self.fence
        bound = _decode_words(self._binary)
        values, masks = {}, {}
        for word in sorted(bound, key=words.order):
            value, mask = bound[word]
            values[word] = words.text_value(word, value)
            if mask != json_view.every_bit(word):
                masks[word] = words.text_value(word, mask)
        return {
            "format": FORMAT,
            "digest": self.digest,
            "architecture": self.architecture,
            "fence": {"generation": generation, "digest": digest} if generation else None,
            "words": values,
            **({"masks": masks} if masks else {}),
            **arm64.to_json(self.granted, self.portable),
            "grade": self.grade,
            "scope": scope(bool(generation), self.architecture),
        }

    @classmethod
    def from_json(cls, document: object, *, file: str = "contract") -> Contract:
        """Read the document back. Raises BadInput where it is not the view of one binary form, digest included.

        Fields that this version does not know are ignored: they are not in the digest either.
        """
        found = json_view.fields(document, file)
        if found.get("format") != FORMAT:
            raise BadInput(f"format is {words.brief(found.get('format'))}, not {FORMAT!r}", file=file)
        architecture, grade = found.get("architecture"), found.get("grade", GRADES[0])
        if architecture not in catalogs.available() or grade not in GRADES:
            raise BadInput("not a contract: its architecture or grade is unknown here", file=file)
        try:
            bound = json_view.bound(found.get("words"), found.get("masks"))
            portable = arm64.portable_of_json(found.get("portable"), limits.REGISTERS)
            fence = json_view.fence(found.get("fence"))
            binary = _encode(str(architecture), bound, fence, str(grade), portable)
        except ValueError as error:
            raise BadInput(f"not a contract: {error}", file=file) from None
        except BadInput as error:
            raise BadInput(error.message, file=file, hint=error.hint) from None
        if "sha256:" + binary[_DIGEST_AT].hex() != found.get("digest"):
            hint = "give the binary contract, or the file as kvmneg wrote it"
            raise BadInput("altered: its digest does not fit what it says", file=file, hint=hint)
        return cls.from_binary(binary, file=file)

    @classmethod
    def from_binary(cls, data: bytes, *, file: str = "contract") -> Contract:
        """Read a binary contract back. Raises BadInput where any byte is not what this version writes."""
        header = _checked_header(data, file)
        generation, fence = header[8:10]
        try:
            bound = _decode_words(data)
            portable = _decode_arm64(data, bound)
        except ValueError as error:
            raise BadInput(str(error), file=file) from None
        if header[5] >= len(GRADES) or (not generation and any(fence)):
            raise BadInput("the header is not one that this version writes", file=file)
        granted = _granted(_ARCHITECTURES[header[2]], bound)
        # the bytes as they were given: a newer catalogue must not change a contract that somebody runs under
        pinned = (generation, f"sha256:{fence.hex()}") if generation else (0, "")
        return cls(granted, pinned, GRADES[header[5]], binary=bytes(data), portable=portable)


def _checked_header(data: bytes, file: str) -> tuple[Any, ...]:
    """The header's fields in the order of _HEADER, sizes and digest checked."""
    if len(data) < _HEADER.size:
        raise BadInput("shorter than a contract's header", file=file, hint="was it cut short?")
    if len(data) > limits.CONTRACT_BYTES:
        raise BadInput(f"larger than {limits.CONTRACT_BYTES} bytes", file=file)
    header = _HEADER.unpack_from(data)
    magic, version, architecture, total, size, _grade, reserved, digest = header[:8]
    counts, tail = header[10:16], header[16]
    if magic != MAGIC or version != VERSION:
        raise BadInput("not a contract of this version", file=file)
    if size != _HEADER.size or architecture not in _ARCHITECTURES or reserved or any(tail):
        raise BadInput("the header is not one that this version writes", file=file)
    foreign = counts[:2] if _ARCHITECTURES[architecture] == words.ARM64 else (counts[2], *counts[4:])
    if any(foreign):
        raise BadInput(f"has sections that {_ARCHITECTURES[architecture]} does not have", file=file)
    if any(count > limit for count, limit in zip(counts, limits.CONTRACT_ENTRIES, strict=True)):
        raise BadInput(f"more entries than {limits.CONTRACT_ENTRIES}, section by section", file=file)
    expected = size + sum(count * section.size for count, section in zip(counts, _SECTIONS, strict=True))
    if not total == len(data) == expected:
        raise BadInput(
            f"is {len(data)} bytes, its header says {expected}", file=file, hint="was it cut short?"
        )
    zeroed = bytearray(data)
    zeroed[_DIGEST_AT] = bytes(32)
    if sha256(zeroed).digest() != digest:
        raise BadInput("altered or damaged: its digest does not fit its content", file=file)
    return header


def _explicit(granted: FeatureSet) -> dict[str, int]:
    values = granted.explicit()
    for word, _mask, constant in catalogs.load(granted.architecture).policy:
        values[word] = values.get(word, 0) | constant
    return values


def binding_mask(granted: FeatureSet, word: str) -> int:
    """The bits of a word that a contract binds, 0 for a word that the guest is not shown at all.

    Bits of a register that is hidden from the guest are left out: in an MSR those without the CPUID bit that
    announces them, in a CPUID leaf beyond the highest the or-bits at 1. Nobody can read them, and neither KVM
    nor a VMM takes a bit that the host has not. So is the number of machine check banks where the set has none (of a
    report or a fence that does not name them): KVM makes no vCPU without, and how many there are is the VMM's then.
    """
    catalog = catalogs.load(granted.architecture)
    rule = catalog.words[word]
    if word in _LISTED_WITH and not all(
        catalogs.is_met(need, granted.value(need[2])) for need in catalog.requirements[word]
    ):
        return 0
    mask = rule.judged
    mask |= sum(constant for name, constant, _value in catalog.policy if name == word)
    hidden = rule.judged if word.startswith("msr:") else rule.or_mask
    if rule.or_mask and word.startswith("cpuid:") and _beyond_highest(granted, word):
        mask &= ~(granted.value(word) & rule.or_mask)
    for need in catalog.requirements.get(word, ()):
        needing, _bottom, base, *_ = need
        if needing & hidden and not catalogs.is_met(need, granted.value(base)):
            mask &= ~(needing & hidden)
    return mask & ~_BANKS if word == _MCG_CAP and not granted.value(word) & _BANKS else mask


def _beyond_highest(granted: FeatureSet, word: str) -> bool:
    leaf = words.parse_cpuid(word)[0]
    highest = granted.value(f"cpuid:{leaf & 0xC000_0000:#x}.0.eax")
    return 0 < highest < leaf


def _bound(granted: FeatureSet, present: Container[str] | None) -> dict[str, tuple[int, int]]:
    """(value, mask) of each word that a contract over this set binds."""
    bound = {}
    for word, value in _explicit(granted).items():
        if present is not None and word not in present:
            continue
        mask = binding_mask(granted, word)
        if mask:
            bound[word] = value & mask, mask
    return bound


def _encode(
    architecture: str,
    bound: Mapping[str, tuple[int, int]],
    fence: tuple[int, str],
    grade: str,
    portable: tuple[Entry, ...],
) -> bytes:
    sections = (
        _cpuid_section(bound),
        _msr_section(bound),
        arm64.registers(bound),
        _capability_section(bound),
        arm64.portable_section(portable),
        arm64.flags(bound),
    )
    body = b"".join(row for section in sections for row in section)
    generation, fence_digest = fence
    header = _HEADER.pack(
        MAGIC,
        VERSION,
        _ARCHITECTURE_NUMBERS[architecture],
        _HEADER.size + len(body),
        _HEADER.size,
        GRADES.index(grade),
        0,
        bytes(32),
        generation,
        bytes.fromhex(fence_digest.removeprefix("sha256:")) if generation else bytes(32),
        *map(len, sections),
        bytes(32),
    )
    binary = bytearray(header + body)
    binary[_DIGEST_AT] = sha256(binary).digest()
    return bytes(binary)


def _cpuid_section(bound: Mapping[str, tuple[int, int]]) -> list[bytes]:
    entries: dict[tuple[int, int, int], list[int]] = {}
    for word, (value, mask) in bound.items():
        kind = word.partition(":")[0]
        if kind in _SPACES:
            leaf, subleaf, register = words.parse_cpuid(word)
            row = entries.setdefault((_SPACES.index(kind), leaf, subleaf), [0] * 8)
            place = words.REGISTERS.index(register)
            row[place], row[place + 4] = value, mask
    return [
        _CPUID.pack(leaf, subleaf, space, 0, *row) for (space, leaf, subleaf), row in sorted(entries.items())
    ]


def _msr_section(bound: Mapping[str, tuple[int, int]]) -> list[bytes]:
    rows = sorted((words.parse_msr(word), *bound[word]) for word in bound if word.startswith("msr:"))
    return [_MSR.pack(index, 0, value, mask) for index, value, mask in rows]


def _capability_section(bound: Mapping[str, tuple[int, int]]) -> list[bytes]:
    names = sorted(word for word in bound if word.startswith(_CAPABILITIES))
    return [_CAPABILITY.pack(word.encode(), 0, 0, *bound[word]) for word in names]


def _granted(architecture: str, bound: Mapping[str, tuple[int, int]]) -> FeatureSet:
    """The set that a contract was made of: or-bits of a shown word that it does not bind are at 1."""
    known = catalogs.load(architecture).words
    return FeatureSet.of(
        architecture,
        {word: value | known[word].or_mask & ~mask for word, (value, mask) in bound.items() if word in known},
    )


def _decode_words(data: bytes) -> dict[str, tuple[int, int]]:
    """(value, mask) of each word that a contract binds. Raises ValueError on what is never written."""
    counts = _HEADER.unpack_from(data)[10:16]
    bound: dict[str, tuple[int, int]] = {}
    at, end = _HEADER.size, _HEADER.size + counts[0] * _CPUID.size
    _check_order([(row[2], row[0], row[1]) for row in _CPUID.iter_unpack(data[at:end])])
    for leaf, subleaf, space, reserved, *row in _CPUID.iter_unpack(data[at:end]):
        if space >= len(_SPACES) or reserved or not any(row[4:]):
            raise ValueError("a CPUID entry is not one that this version writes")
        for register, value, mask in zip(words.REGISTERS, row[:4], row[4:], strict=True):
            _bind(bound, words.cpuid_word(leaf, subleaf, register, _SPACES[space]), value, mask)
    at, end = end, end + counts[1] * _MSR.size
    _check_order([row[0] for row in _MSR.iter_unpack(data[at:end])])
    for index, reserved, value, mask in _MSR.iter_unpack(data[at:end]):
        if reserved or not mask:
            raise ValueError("an MSR entry is not one that this version writes")
        _bind(bound, words.msr_word(index), value, mask)
    at, end = end, end + counts[2] * arm64.REGISTER.size
    for word, value, mask in arm64.decode_registers(data[at:end]):
        _bind(bound, word, value, mask)
    at, end = end, end + counts[3] * _CAPABILITY.size
    _check_order([row[0] for row in _CAPABILITY.iter_unpack(data[at:end])])
    for name, action, reserved, value, mask in _CAPABILITY.iter_unpack(data[at:end]):
        word = name.rstrip(b"\0").decode("ascii")
        if action or reserved or not mask or not word.startswith(_CAPABILITIES):
            raise ValueError("a capability entry is not one that this version writes")
        _bind(bound, words.check(word), value, mask)
    return bound


def _decode_arm64(data: bytes, bound: Mapping[str, tuple[int, int]]) -> tuple[Entry, ...]:
    """The portable state. Raises ValueError on what is never written, also where flags are not those of the words."""
    flags = b"".join(arm64.flags(bound))
    end = len(data) - _HEADER.unpack_from(data)[15] * arm64.FLAG.size
    if data[end:] != flags:
        raise ValueError(f"the initialisation flags are not those of {arm64.INIT}")
    return arm64.decode_portable(data[end - _HEADER.unpack_from(data)[14] * arm64.PORTABLE.size : end])


def _check_order(keys: list[Any]) -> None:
    if any(before >= after for before, after in pairwise(keys)):
        raise ValueError("its entries are not in their order")


def _bind(bound: dict[str, tuple[int, int]], word: str, value: int, mask: int) -> None:
    if value & ~mask or mask >> words.width(word):
        raise ValueError(f"{word} has bits that it does not bind")
    if mask:
        bound[word] = value, mask
