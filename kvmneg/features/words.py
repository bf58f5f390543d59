# SPDX-License-Identifier: LGPL-2.1-or-later
"""How a word is addressed and written.

A word is one register value as KVM addresses it:

    cpuid:0x7.0.ebx            leaf, subleaf (decimal), register: 32 bits (KVM_GET_SUPPORTED_CPUID)
    hyperv:0x40000003.0.eax    the same of KVM_GET_SUPPORTED_HV_CPUID, which shares leaves with KVM's own
    msr:0x10a                  a feature MSR: 64 bits (KVM_GET_MSR_FEATURE_INDEX_LIST)
    kvm:exit-hypercall         what KVM_CHECK_EXTENSION(KVM_CAP_EXIT_HYPERCALL) answers: 32 bits
    tap:features, vhost-net:features   masks of /dev/net/tun and /dev/vhost-net: 64 bits
    tsc:khz                    the TSC rates a guest can be given in kHz, the lowest in the low half, the
                               highest in the high half (KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ): 64 bits
    state:msrs                 state that can be carried over to another host, a bit for each class:
                               MSRs of KVM_GET_MSR_INDEX_LIST, what vCPU ioctls read and write: 64 bits
    arm64:0x6030000000160000   a KVM_GET_ONE_REG id: 64 bits
    arm:vcpu-features          what KVM_ARM_VCPU_INIT, the vGIC and the SMCCC filter take: 64 bits

KVM's own paravirtual leaf is always written as based at 0x40000000: a guest that has Hyper-V's leaves
besides finds it at 0x40000100, a reader of guest CPUID finds its base by the signature.
"""

from __future__ import annotations

from functools import lru_cache

from kvmneg.errors import BadInput

X86_64 = "x86_64"
ARM64 = "arm64"
ARCHITECTURES = (X86_64, ARM64)

REGISTERS = ("eax", "ebx", "ecx", "edx")
_WIDTHS = dict.fromkeys(("cpuid", "hyperv", "kvm"), 32)
_WIDTHS |= dict.fromkeys(("msr", "tap", "vhost-net", "tsc", "state", "arm64", "arm"), 64)
KINDS = tuple(_WIDTHS)
_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")
_NAME_CHARACTERS = 40  # what the binary contract has room for, kind included
_HEXADECIMAL = frozenset("0123456789abcdef")
_ORDERED = 1024  # words whose place is remembered: more than the catalogues have

_SHOWN_CHARACTERS = 80


def brief(value: object) -> str:
    """A value from elsewhere as a message shows it: escaped, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def width(word: str) -> int:
    """Bits of a word, by its kind: 32 or 64."""
    return _WIDTHS[word.partition(":")[0]]


def cpuid_word(leaf: int, subleaf: int, register: str, kind: str = "cpuid") -> str:
    """The address of one CPUID register; `register` is one of REGISTERS."""
    return f"{kind}:{leaf:#x}.{subleaf}.{register}"


def msr_word(index: int) -> str:
    """The address of one MSR."""
    return f"msr:{index:#x}"


def _hexadecimal(text: str) -> int | None:
    """The number of a minimal lower-case hexadecimal text, else None: one word has one spelling."""
    if not text.startswith("0x"):
        return None
    try:
        number = int(text, 16)
    except ValueError:
        return None
    return number if text == f"{number:#x}" else None


def parse_cpuid(word: str) -> tuple[int, int, str]:
    """Leaf, subleaf and register of a cpuid: or hyperv: word. Raises ValueError on anything else."""
    kind, _, rest = word.partition(":")
    parts = rest.split(".")
    if kind in ("cpuid", "hyperv") and len(parts) == 3 and parts[2] in REGISTERS:
        leaf = _hexadecimal(parts[0])
        subleaf = int(parts[1]) if parts[1].isdecimal() and len(parts[1]) <= 10 else -1
        if leaf is not None and leaf < 1 << 32 and str(subleaf) == parts[1] and 0 <= subleaf < 1 << 32:
            return leaf, subleaf, parts[2]
    raise ValueError(f"not a CPUID word: {word!r}")


def parse_msr(word: str) -> int:
    """Index of an msr: word. Raises ValueError on anything else."""
    kind, _, rest = word.partition(":")
    index = _hexadecimal(rest)
    if kind != "msr" or index is None or index >= 1 << 32:
        raise ValueError(f"not an MSR word: {word!r}")
    return index


def register_word(register: int) -> str:
    """The address of one arm64 register, by its id of KVM_GET_ONE_REG."""
    return f"arm64:{register:#x}"


def parse_register(text: object) -> int:
    """A register's id from a document, like "0x6030000000160000". Raises ValueError on anything else."""
    register = _hexadecimal(text) if isinstance(text, str) else None
    if register is None or register >= 1 << 64:
        raise ValueError(f"{brief(text)} is no register's id")
    return register


def check(word: str) -> str:
    """The word itself where its address is well formed and minimal; raises BadInput otherwise."""
    kind, _, rest = word.partition(":")
    try:
        if kind in ("cpuid", "hyperv"):
            parse_cpuid(word)
            return word
        if kind == "msr":
            parse_msr(word)
            return word
        if kind == "arm64":
            register = _hexadecimal(rest)
            if register is not None and register < 1 << 64:
                return word
        elif kind in _WIDTHS and rest and len(word) <= _NAME_CHARACTERS and _NAME.issuperset(rest):
            return word
    except ValueError:
        pass
    raise BadInput(
        f"{brief(word)} is no word's address",
        hint="like cpuid:0x7.0.ebx, msr:0x10a, kvm:exit-hypercall, arm64:0x6030000000160000",
    )


def text_value(word: str, value: int) -> str:
    """A value as documents carry it: lower-case hexadecimal of the register's full width."""
    return f"0x{value:08x}" if width(word) == 32 else f"0x{value:016x}"


def parse_value(word: str, text: object) -> int:
    """A value from a document: "0x" and lower-case digits, no more than the word has. Raises BadInput."""
    if isinstance(text, str) and text.startswith("0x") and 3 <= len(text) <= width(word) // 4 + 2:
        digits = text[2:]
        if _HEXADECIMAL.issuperset(digits):
            return int(digits, 16)
    raise BadInput(f"{word}: {brief(text)} is not a {width(word)}-bit value like {text_value(word, 0)!r}")


@lru_cache(_ORDERED)
def order(word: str) -> tuple[int, int, int, str]:
    """Sort key: kinds in their table's order, CPUID by leaf and register, MSRs by index."""
    kind, _, rest = word.partition(":")
    place = KINDS.index(kind)
    if kind in ("cpuid", "hyperv"):
        leaf, subleaf, register = parse_cpuid(word)
        return place, leaf, subleaf, register
    if kind in ("msr", "arm64"):
        return place, int(rest, 16), 0, ""
    return place, 0, 0, rest
