# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inside an arm64 host: what a VMM does that takes a guest from one host to another, register by register.

    python3 -m tests.hosts.carried dump       runs a tiny guest and writes all its registers to out/dump.json
    python3 -m tests.hosts.carried restore    gives those of dump.json to a VM of this host, writes out/restored.json

With a contract.bin libkvmneg gives it to the VM first, on both hosts, and what the contract says of each register is
followed. The contract is read here by its layout, as a VMM of another project would.
"""

from __future__ import annotations

import ctypes
import errno
import json
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvmneg.host.apply_arm64 import Register, apply_vcpu, apply_vgic, apply_vm, init_vcpu, verify_vcpu
from kvmneg.host.kvm import Kvm
from tests.kvm import arm64_guest as guest

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTRACT, DUMP, OUT = Path("contract.bin"), Path("dump.json"), Path("out")
PSCI_VERSION_CALL = 0x84000000
FEATURES = (guest.PSCI_0_2, guest.PMU_V3, guest.SVE, guest.PTRAUTH)
CNTP_CTL = guest.sysreg(3, 3, 14, 2, 1)  # KVM's id of it, which is the architecture's
DROP_IF, DROP_IF_TIMER_OFF = 2, 3
_HEADER = 160


class Terms(NamedTuple):
    """What of a contract is a VMM's to do; by register."""

    registers: list[Register]
    rules: dict[int, tuple[int, int]]  # id → rule, value
    features: int
    revision: int | None  # of the vGIC


def terms(binary: bytes) -> Terms:
    """A binary contract, by the layout in kvmneg.policy.contract."""
    counts = struct.unpack_from("<6I", binary, 104)
    assert counts[:2] == (0, 0)
    at = _HEADER
    registers = [Register(*struct.unpack_from("<3Q", binary, at + 24 * n)) for n in range(counts[2])]
    at += 24 * counts[2]
    capabilities = dict(_capability(binary, at + 64 * n) for n in range(counts[3]))
    at += 64 * counts[3]
    state = [struct.unpack_from("<IIQQ", binary, at + 24 * n) for n in range(counts[4])]
    at += 24 * counts[4]
    flags = struct.unpack_from(f"<{counts[5]}I", binary, at)
    return Terms(
        registers,
        {register: (rule, value) for _kind, rule, register, value in state},
        sum(1 << flag for flag in flags),
        capabilities.get("arm:vgic-revision"),
    )


def _capability(binary: bytes, at: int) -> tuple[str, int]:
    name, _action, _reserved, value, _mask = struct.unpack_from("<40sIIQQ", binary, at)
    return name.rstrip(b"\0").decode(), value


def features_here(kvm: Kvm) -> int:
    """All of FEATURES that this KVM takes."""
    found = 0
    for feature in FEATURES:
        with guest.Vm(kvm.fd) as vm:
            vcpu = vm.vcpu(None)
            found |= feature if vcpu.init(guest.PSCI_0_2 | feature) == 0 else 0
    return found


def machine(vm: guest.Vm, agreed: Terms | None, features: int, lengths: bytes | None) -> guest.Vcpu:
    """A VM with a vGIC and a vCPU, up to where its first run, or its registers, may come.

    `lengths` are the vectors' of a dump, None for the host's own.
    """
    registers = agreed.registers if agreed else []
    apply_vm(vm.fd, registers)
    vcpu = vm.vcpu(None)
    if agreed:
        init_vcpu(vm.fd, vcpu.fd, features, registers)
    else:
        assert vcpu.init(features) == 0
        if features & guest.SVE:
            assert lengths is None or write(vcpu, guest.SVE_VLS, lengths) == 0
            assert vcpu.finalize() == 0
    vcpu.features = features
    vgic = vm.vgic()
    if agreed:
        apply_vcpu(vcpu.fd, registers)
    vm.load(guest.CALLS)  # which initialises vGIC and PMU
    if agreed and agreed.revision is not None:
        apply_vgic(vgic, agreed.revision)
    return vcpu


def read(vcpu: guest.Vcpu, register: int) -> bytes | None:
    """A register of any size; None where KVM lists it and does not read it."""
    buffer = ctypes.create_string_buffer(1 << (register >> 52 & 15))
    one = struct.pack("QQ", register, ctypes.addressof(buffer))
    return None if guest.tried(vcpu.fd, guest.NUMBER["KVM_GET_ONE_REG"], one) else buffer.raw


def write(vcpu: guest.Vcpu, register: int, content: bytes) -> int:
    """The errno of KVM_SET_ONE_REG."""
    buffer = ctypes.create_string_buffer(content, len(content))
    one = struct.pack("QQ", register, ctypes.addressof(buffer))
    return guest.tried(vcpu.fd, guest.NUMBER["KVM_SET_ONE_REG"], one)


def dump(kvm: Kvm, agreed: Terms | None) -> dict[str, Any]:
    """{"features", "answer": what the guest was told, "registers": {id: hexadecimal bytes}} of a guest that ran."""
    features = agreed.features if agreed else features_here(kvm)
    with guest.Vm(kvm.fd) as vm:
        vcpu = machine(vm, agreed, features, None)
        answer = vcpu.call(PSCI_VERSION_CALL)
        if agreed:
            verify_vcpu(vcpu.fd, agreed.registers)
        found = {register: read(vcpu, register) for register in vcpu.registers()}
        kept = {hex(register): content.hex() for register, content in found.items() if content is not None}
        return {"features": features, "answer": list(answer), "registers": kept}


def restore(kvm: Kvm, agreed: Terms | None, dumped: dict[str, Any]) -> dict[str, Any]:
    """What became of each register, by its id: {"failed": {id: errno's name}, "dropped": [id],
    "differ": {id: read back}, "answer"}. `answer` is what the guest is told when it goes on here, None where it cannot.
    """
    content = {int(word, 16): bytes.fromhex(text) for word, text in dumped["registers"].items()}
    found: dict[str, Any] = {"failed": {}, "dropped": [], "differ": {}, "answer": None}
    with guest.Vm(kvm.fd) as vm:
        vcpu = machine(vm, agreed, dumped["features"], content.pop(guest.SVE_VLS, None))
        listed = frozenset(vcpu.registers())
        left_out = set(_left_out(agreed, content, listed))
        for register, value in content.items():
            if register in left_out:
                found["dropped"].append(hex(register))
            elif error := write(vcpu, register, value):
                found["failed"][hex(register)] = errno.errorcode[error]
        if agreed:
            verify_vcpu(vcpu.fd, agreed.registers)
            for register in content.keys() & listed - left_out:
                now = read(vcpu, register)
                if now != content[register]:
                    found["differ"][hex(register)] = now.hex() if now else None
        if not found["failed"]:
            vcpu.run()  # the store in which it was stopped comes to its end
            found["answer"] = list(vcpu.call(PSCI_VERSION_CALL))
            if agreed:
                verify_vcpu(vcpu.fd, agreed.registers)
    return found


def _left_out(agreed: Terms | None, content: dict[int, bytes], listed: frozenset[int]) -> Iterator[int]:
    """The registers that this host does not list and that the contract lets go with the value they have."""
    for register, value in content.items():
        rule, number = agreed.rules.get(register, (0, 0)) if agreed else (0, 0)
        if register in listed:
            continue
        timer_off = not content.get(CNTP_CTL, b"\1")[0] & 1
        if (rule == DROP_IF and int.from_bytes(value, "little") == number) or (
            rule == DROP_IF_TIMER_OFF and timer_off
        ):
            yield register


def main() -> None:
    agreed = terms(CONTRACT.read_bytes()) if CONTRACT.exists() else None
    with Kvm.open() as kvm:
        if sys.argv[1] == "dump":
            name, found = "dump.json", dump(kvm, agreed)
        else:
            name, found = "restored.json", restore(kvm, agreed, json.loads(DUMP.read_bytes()))
    (OUT / name).write_text(json.dumps(found), "ascii")


if __name__ == "__main__":
    main()
