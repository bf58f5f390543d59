# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the KVM of an upstream kernel can pass to guests: a table that explains, and grants nothing.

The table (kvmneg/data/x86_kvm_masks.json) is read the first time that a feature is missing somewhere: 36 KiB of
JSON, which no start and no yes pays for.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FILE = os.path.join(os.path.dirname(__file__), os.pardir, "data", "x86_kvm_masks.json")

# Words that KVM zeroes as long as its table does not name them. Others that a table lacks (0x8000000a, whose bits the
# vendor module set before 7.2) are no evidence.
_ZEROED = frozenset(
    (
        "cpuid:0x7.1.ecx", "cpuid:0x7.1.edx", "cpuid:0x7.2.edx", "cpuid:0x12.0.eax", "cpuid:0x1e.1.eax",
        "cpuid:0x24.0.ebx", "cpuid:0x24.1.ecx", "cpuid:0x80000021.0.ecx", "cpuid:0x80000022.0.eax",
    )
)  # fmt: skip

# Words whose bits /proc/cpuinfo has always shown where KVM of 5.10 passed them, but for those that it shows by other
# names (Linux 5.10 arch/x86/include/asm/cpufeatures.h: a comment that begins with "" hides a flag).
_SHOWN = frozenset(
    (
        "cpuid:0x1.0.ecx", "cpuid:0x1.0.edx", "cpuid:0x7.0.ebx", "cpuid:0x7.0.ecx", "cpuid:0x7.0.edx",
        "cpuid:0x7.1.eax", "cpuid:0xd.1.eax", "cpuid:0x80000001.0.ecx",
    )
)  # fmt: skip
_HIDDEN = {"cpuid:0x7.0.edx": 1 << 26 | 1 << 27 | 1 << 31}  # SPEC_CTRL, INTEL_STIBP, SPEC_CTRL_SSBD
_FIRST = "5.10"
_BY_VENDOR_MODULES = {"cpuid:0x7.0.ebx": 1 << 10}  # INVPCID in 5.10 (vmx_set_cpu_caps)

_tables: dict[str, dict[str, dict[str, int]]] = {}  # kernel → word → kind → mask


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, for comparing: "6.12.107+deb13-amd64" is (6, 12, 107)."""
    found: list[int] = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits.isascii() or not 0 < len(digits) < 10:
            break
        found.append(int(digits))
        if digits != part:
            break
    return tuple(found)


def tables() -> dict[str, dict[str, dict[str, int]]]:
    """Kernel ("6.12") → word → kind ("hardware", "emulated", …) → mask."""
    if not _tables:
        import json  # see above

        with open(_FILE, "rb") as file:
            document: dict[str, Any] = json.load(file)
        for kernel, words in document.items():
            if isinstance(words, dict):
                _tables[kernel] = {
                    word: {kind: int(bits["mask"], 16) for kind, bits in kinds.items()}
                    for word, kinds in words.items()
                }
    return _tables


def nearest(release: str) -> tuple[str | None, str | None]:
    """The tables of the newest kernel up to this release, and of the oldest after it; None where there is none."""
    wanted = numbers(release)
    ordered = sorted(tables(), key=numbers)
    below = [kernel for kernel in ordered if numbers(kernel) <= wanted]
    above = [kernel for kernel in ordered if numbers(kernel) > wanted]
    return (below[-1], above[0] if above else None) if wanted and below else (None, None)


def knows(kernel: str, word: str, mask: int) -> bool | None:
    """Whether upstream's KVM of a table's kernel has these bits in any way; None where the table does not say."""
    kinds = tables()[kernel].get(word)
    if kinds is None:
        return False if word in _ZEROED else None
    if any(bits & mask for bits in kinds.values()):
        return True
    return None if "vendor" not in kinds and _vendors(word) & mask else False


def _vendors(word: str) -> int:
    """The bits that are the vendor module's to set: before 7.2 that was done outside of what the tables show."""
    found = _BY_VENDOR_MODULES.get(word, 0)
    for words in tables().values():
        found |= words.get(word, {}).get("vendor", 0)
    return found


def shown(word: str, mask: int) -> bool:
    """Whether every kernel since 5.10 shows a flag in /proc/cpuinfo where it uses the feature."""
    known = tables()[_FIRST].get(word, {}).get("hardware", 0) & ~_HIDDEN.get(word, 0)
    return word in _SHOWN and bool(known & mask)
