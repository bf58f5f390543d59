# SPDX-License-Identifier: LGPL-2.1-or-later
"""Gives an arm64 VM the registers of a contract, on its VMM's own descriptors (csrc/kvmneg.h, "giving a VM").

KVM answers EIO to any process but the one that made the VM. The order, with the same registers each time:

    apply_vm(vm, registers)                      after KVM_CREATE_VM
    init_vcpu(vm, vcpu, features, registers)     each vCPU; then the vGIC, KVM_ARM_VCPU_PMU_V3_SET_PMU
    apply_vcpu(vcpu, registers)                  each vCPU
    apply_vgic(vgic, revision)                   after KVM_DEV_ARM_VGIC_CTRL_INIT
    verify_vcpu(vcpu, registers)                 now, and after the first run
    verify_vgic(vgic, revision)                  the same

A vCPU that is plugged in later gets the same calls; init_vcpu resets one that ran. Each raises NotApplied at the first
register that fails.
"""

from __future__ import annotations

from struct import Struct

from kvmneg._libkvmneg import ffi, lib
from kvmneg.host.apply import call
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_REGISTER = Struct("=3Q")  # struct kvmneg_register


class Register(NamedTuple):
    """What a contract says of one register: the bits of `mask` are bound."""

    id: int
    value: int
    mask: int


def _array(registers: Sequence[Register]) -> tuple[Any, int]:
    """struct kvmneg_register[], and how many."""
    rows = b"".join(_REGISTER.pack(*register) for register in registers)
    array = ffi.new("struct kvmneg_register[]", max(len(registers), 1))
    ffi.buffer(array, len(rows))[:] = rows
    return array, len(registers)


def apply_vm(vm: int, registers: Sequence[Register]) -> None:
    """Lets MIDR, REVIDR and AIDR be written where they are among the registers (kvmneg_arm_vm_apply)."""
    call(lib.kvmneg_arm_vm_apply, vm, *_array(registers))


def init_vcpu(vm: int, vcpu: int, features: int, registers: Sequence[Register]) -> None:
    """KVM_ARM_VCPU_INIT with `features` (bit n: number n), SVE lengths, KVM_ARM_VCPU_FINALIZE."""
    call(lib.kvmneg_arm_vcpu_init, vm, vcpu, features, *_array(registers))


def apply_vcpu(vcpu: int, registers: Sequence[Register]) -> None:
    """Everything else that a vCPU gets, read back at the end (kvmneg_arm_vcpu_apply)."""
    call(lib.kvmneg_arm_vcpu_apply, vcpu, *_array(registers))


def apply_vgic(vgic: int, revision: int) -> None:
    """GICD_IIDR.Revision of an initialised vGIC (kvmneg_arm_vgic_apply)."""
    call(lib.kvmneg_arm_vgic_apply, vgic, revision)


def verify_vcpu(vcpu: int, registers: Sequence[Register]) -> None:
    """Reads everything back and writes nothing (kvmneg_arm_vcpu_verify)."""
    call(lib.kvmneg_arm_vcpu_verify, vcpu, *_array(registers))


def verify_vgic(vgic: int, revision: int) -> None:
    """Reads GICD_IIDR.Revision and writes nothing (kvmneg_arm_vgic_verify)."""
    call(lib.kvmneg_arm_vgic_verify, vgic, revision)
