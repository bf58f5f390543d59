# SPDX-License-Identifier: LGPL-2.1-or-later
"""A KVM that does not answer: which call it was that a measurement waits in, as /proc shows it."""

from __future__ import annotations

import os

from kvmneg.errors import NoKvm

# linux/kvm.h, KVMIO and the numbers of what a measurement asks
_KVMIO = 0xAE
_NAMES = {
    0x00: "KVM_GET_API_VERSION", 0x01: "KVM_CREATE_VM", 0x02: "KVM_GET_MSR_INDEX_LIST", 0x03: "KVM_CHECK_EXTENSION",
    0x04: "KVM_GET_VCPU_MMAP_SIZE", 0x05: "KVM_GET_SUPPORTED_CPUID", 0x09: "KVM_GET_EMULATED_CPUID",
    0x0A: "KVM_GET_MSR_FEATURE_INDEX_LIST", 0x41: "KVM_CREATE_VCPU", 0x60: "KVM_CREATE_IRQCHIP", 0x80: "KVM_RUN",
    0x88: "KVM_GET_MSRS", 0x89: "KVM_SET_MSRS", 0x90: "KVM_SET_CPUID2", 0x91: "KVM_GET_CPUID2",
    0xA3: "KVM_ENABLE_CAP", 0xAB: "KVM_GET_ONE_REG", 0xAC: "KVM_SET_ONE_REG", 0xAE: "KVM_ARM_VCPU_INIT",
    0xAF: "KVM_ARM_PREFERRED_TARGET", 0xB0: "KVM_GET_REG_LIST", 0xC1: "KVM_GET_SUPPORTED_HV_CPUID",
    0xE0: "KVM_CREATE_DEVICE",
}  # fmt: skip
_IOCTL = 29 if os.uname().machine == "aarch64" else 16  # the system call's number


def fault(seconds: float, pid: int | str = "self") -> NoKvm:
    """Of a measurement that did not end in time, made by the process `pid`."""
    call = waits_in(pid)
    return NoKvm(
        f"measuring this host did not end in {seconds:g} seconds: its KVM does not answer {call}".rstrip(),
        hint="the kernel's log may say why; it is tried again by itself",
        cause="wedged",
    )


def waits_in(pid: int | str) -> str:
    """The ioctl of KVM that a thread of the process is in; "" for none, or where that is not to be seen."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return ""
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/syscall", encoding="ascii") as file:
                call = named(file.read())
        except OSError:
            continue  # it has ended, or is not ours to see
        if call:
            return call
    return ""


def named(line: str) -> str:
    """A line of /proc/PID/syscall (proc_pid_syscall(5)): the number, the arguments, stack and program counter."""
    words = line.split()
    if len(words) < 3 or words[0] != str(_IOCTL):
        return ""
    request = int(words[2], 16)
    if request >> 8 & 0xFF != _KVMIO:
        return ""
    return _NAMES.get(request & 0xFF, f"ioctl {request:#x}")
