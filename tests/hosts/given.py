# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inside an x86 host: gives contracts to vCPUs with KVM's own ioctls, and tells what became of them.

    python3 -m tests.hosts.given      reads *.contract, writes out/given.json

The twin of carried.py. The contract is read by its layout; the rest of each CPUID leaf is the host's, as a VMM has it.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
from pathlib import Path
from typing import Any

from kvmneg.host import ioctls

NUMBER = ioctls.kvm()
REGISTERS = ("eax", "ebx", "ecx", "edx")
ENTRIES = 256
SIGNIFICANT_INDEX = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
# What KVM takes and does not list before Linux 6.18, as a VMM has to give it: TSC_DEADLINE_TIMER, HYPERVISOR.
BY_VMM = {(0x1, 0, "ecx"): 1 << 24 | 1 << 31}
MCG_CAP = 0x179
_ENTRY = struct.Struct("<3I4I3I")  # struct kvm_cpuid_entry2
_HEADER = 160

Table = dict[tuple[int, int], list[int]]


def table(fd: int, request: str) -> tuple[Table, dict[int, int]]:
    """(leaf, subleaf) → registers, and each leaf's flags."""
    buffer = bytearray(8 + ENTRIES * _ENTRY.size)
    struct.pack_into("I", buffer, 0, ENTRIES)
    fcntl.ioctl(fd, NUMBER[request], buffer)
    found: Table = {}
    flags: dict[int, int] = {}
    for n in range(struct.unpack_from("I", buffer)[0]):
        leaf, subleaf, flag, *registers = _ENTRY.unpack_from(buffer, 8 + n * _ENTRY.size)[:7]
        # KVM_GET_CPUID2 of 6.1 leaves the number as it was given: what follows the last entry is empty
        found.setdefault((leaf, subleaf), registers)
        flags.setdefault(leaf, flag)
    return found, flags


def terms(binary: bytes) -> tuple[dict[tuple[int, int], tuple[list[int], list[int]]], list[tuple[int, ...]]]:
    """(leaf, subleaf) → values and masks; (index, value, mask) of each MSR."""
    counts = struct.unpack_from("<6I", binary, 104)
    leaves = {}
    for n in range(counts[0]):
        leaf, subleaf, space, _reserved, *rest = struct.unpack_from("<12I", binary, _HEADER + 48 * n)
        if space == 0:
            leaves[leaf, subleaf] = rest[:4], rest[4:]
    at = _HEADER + 48 * counts[0]
    rows = [struct.unpack_from("<IIQQ", binary, at + 24 * n) for n in range(counts[1])]
    return leaves, [(index, value, mask) for index, _reserved, value, mask in rows]


def give(kvm: int, binary: bytes) -> dict[str, Any]:
    """{"absent": {word: bits asked for that KVM does not offer}, "changed": {word: bits read back otherwise},
    "refused": [MSR words that cannot be set]}
    """
    leaves, msrs = terms(binary)
    offered, flags = table(kvm, "KVM_GET_SUPPORTED_CPUID")
    asked = {key: list(registers) for key, registers in offered.items()}
    found: dict[str, Any] = {"absent": {}, "changed": {}, "refused": []}
    for key, (values, masks) in leaves.items():
        own = offered.get(key, [0, 0, 0, 0])
        for place, name in enumerate(REGISTERS):
            given = own[place] | BY_VMM.get((*key, name), 0)
            if lacking := values[place] & ~given:
                found["absent"][f"cpuid:{key[0]:#x}.{key[1]}.{name}"] = lacking
        if key in asked or any(values):
            asked[key] = [now & ~mask | value for now, value, mask in zip(own, values, masks, strict=True)]
    vm = fcntl.ioctl(kvm, NUMBER["KVM_CREATE_VM"], 0)
    vcpu = fcntl.ioctl(vm, NUMBER["KVM_CREATE_VCPU"], 0)
    rows = b"".join(
        _ENTRY.pack(leaf, subleaf, flags.get(leaf, SIGNIFICANT_INDEX if subleaf else 0), *registers, 0, 0, 0)
        for (leaf, subleaf), registers in asked.items()
    )
    fcntl.ioctl(vcpu, NUMBER["KVM_SET_CPUID2"], bytearray(struct.pack("II", len(asked), 0) + rows))
    now, _ = table(vcpu, "KVM_GET_CPUID2")
    for key, (values, masks) in leaves.items():
        for place, name in enumerate(REGISTERS):
            shown = now.get(key, [0, 0, 0, 0])[place]
            if wrong := (shown ^ values[place]) & masks[place]:
                found["changed"][f"cpuid:{key[0]:#x}.{key[1]}.{name}"] = wrong
    found["refused"] = [
        f"msr:{index:#x}" for index, value, mask in msrs if not set_msr(vcpu, index, value, mask)
    ]
    os.close(vcpu)
    os.close(vm)
    return found


def set_msr(vcpu: int, index: int, value: int, mask: int) -> bool:
    """Whether KVM_SET_MSRS, or what there is in its place, takes the bits of the mask, and KVM_GET_MSRS shows them.

    One that is not there, and that is to be zero, is another vendor's.
    """
    now = get_msr(vcpu, index)
    if now is None and not value:
        return True
    wanted = (now or 0) & ~mask | value
    if index == MCG_CAP:
        try:
            fcntl.ioctl(vcpu, NUMBER["KVM_X86_SETUP_MCE"], struct.pack("Q", wanted))
        except OSError:  # more banks than there are, or none
            return False
        return ((get_msr(vcpu, index) or 0) ^ value) & mask == 0
    row = bytearray(struct.pack("IIIIQ", 1, 0, index, 0, wanted))  # of bytes, ioctl() would return bytes
    if fcntl.ioctl(vcpu, NUMBER["KVM_SET_MSRS"], row) != 1:
        return False
    return ((get_msr(vcpu, index) or 0) ^ value) & mask == 0


def get_msr(vcpu: int, index: int) -> int | None:
    row = bytearray(struct.pack("IIIIQ", 1, 0, index, 0, 0))
    return (
        int(struct.unpack_from("Q", row, 16)[0])
        if fcntl.ioctl(vcpu, NUMBER["KVM_GET_MSRS"], row) == 1
        else None
    )


def main() -> None:
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    found = {path.stem: give(kvm, path.read_bytes()) for path in sorted(Path().glob("*.contract"))}
    Path("out/given.json").write_text(json.dumps(found), "ascii")


if __name__ == "__main__":
    main()
