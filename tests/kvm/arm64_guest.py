# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tiny arm64 guests on the real KVM, made by fcntl alone: an oracle beside libkvmneg.

    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        vm.load(CALLS)
        assert vcpu.call(0x84000000) == (0x10001, 0, 0, 0)      # HVC with x0 = PSCI_VERSION: x0 to x3

A guest runs with its MMU off, has some words of code at CODE, and gives its results by storing them where no
memory is, which KVM hands to us (KVM_EXIT_MMIO, api.rst section 5). Its code is written before it runs and not
changed afterwards, so that nothing depends on caches. Every run ends by itself or by an alarm.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
from typing import TYPE_CHECKING, NamedTuple, Self

from kvmneg.host import ioctls

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

NUMBER = ioctls.kvm()
KVM_RUN = 0xAE80
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_SET_USER_MEMORY_REGION = 0x4020AE46

# KVM_ARM_VCPU_* (asm/kvm.h)
POWER_OFF, EL1_32BIT, PSCI_0_2, PMU_V3, SVE, PTRAUTH_ADDRESS, PTRAUTH_GENERIC = (1 << n for n in range(7))
PTRAUTH = PTRAUTH_ADDRESS | PTRAUTH_GENERIC

U32, U64 = 0x6020000000000000, 0x6030000000000000
PSCI_VERSION = U64 | 0x140000
WORKAROUND_1, WORKAROUND_2, WORKAROUND_3 = (U64 | 0x140000 | n for n in (1, 2, 3))
STD, STD_HYP, VENDOR_HYP, VENDOR_HYP_2 = BITMAPS = tuple(U64 | 0x160000 | n for n in range(4))
SVE_VLS = 0x606000000015FFFF
SVE_LENGTH_WORDS = 8
MPIDR, MIDR, REVIDR, AIDR = (U64 | 0x130000 | n for n in (0xC005, 0xC000, 0xC006, 0xC807))
PMCR = U64 | 0x13DCE0
PC = U64 | 0x100040  # KVM_REG_ARM_CORE_REG(regs.pc), in words of 32 bits

CODE = 0x4000_0000
RESULTS = 0x0900_0000  # no memory there
END = 0xF8
MEMORY_BYTES = 64 * 1024
RUN_SECONDS = 20.0  # of a guest of a few instructions, under emulation

EXIT_MMIO, EXIT_SYSTEM_EVENT = 6, 24
VGIC_V3 = 7


def sysreg(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The id of a system register (api.rst 4.68)."""
    return U64 | 0x130000 | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


def x(number: int) -> int:
    """The id of a general register."""
    return U64 | 0x100000 | number * 2


# Instructions (Arm ARM, C6.2). x20 holds RESULTS.
def store(register: int, offset: int) -> int:
    """STR Xregister, [x20, #offset]"""
    return 0xF9000000 | offset // 8 << 10 | 20 << 5 | register


def read_register(id_: int, into: int = 0) -> int:
    """MRS X<into>, the system register of that id"""
    return 0xD5300000 | (id_ >> 14 & 1) << 19 | (id_ & 0x3FFF) << 5 | into


HVC = 0xD4000002
STORE_FOUR = [store(n, 8 * n) for n in range(4)]
CALLS = [HVC, *STORE_FOUR, store(31, END), 0x14000000 | (-6 & 0x3FFFFFF)]  # …, B to the HVC


def reads(*registers: int) -> list[int]:
    """A program that stores the values of system registers, once."""
    code = []
    for place, register in enumerate(registers):
        code += [read_register(register), store(0, 8 * place)]
    return [*code, store(31, END)]


class Stopped(NamedTuple):
    """Why a guest stopped before its end: KVM_EXIT_SYSTEM_EVENT with its type, else another exit."""

    reason: int
    type: int


class GuestError(AssertionError):
    """A guest did something that no test asks it to do."""


def _call(fd: int, request: int, argument: int | bytes | bytearray = 0) -> int:
    return fcntl.ioctl(fd, request, argument)


def tried(fd: int, request: int, argument: int | bytes | bytearray = 0) -> int:
    """The errno of an ioctl, 0 where it succeeds."""
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        return error.errno or 0
    return 0


class Vm:
    """A VM and what is in it; a context manager."""

    def __init__(self, kvm_fd: int, *, capability: int = 0) -> None:
        """`capability` is enabled before the first vCPU."""
        self._kvm_fd = kvm_fd
        self.fd = _call(kvm_fd, NUMBER["KVM_CREATE_VM"])
        self._vcpus: list[Vcpu] = []
        self._memory: mmap.mmap | None = None
        self._devices: list[int] = []
        self.capability_error = 0
        if capability:
            self.capability_error = tried(
                self.fd, NUMBER["KVM_ENABLE_CAP"], struct.pack("II32x64x", capability, 0)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for vcpu in self._vcpus:
            vcpu.close()
        for device in self._devices:
            os.close(device)
        os.close(self.fd)

    @property
    def has_vgic(self) -> bool:
        """Whether `vgic` was called."""
        return bool(self._devices)

    def target(self) -> int:
        """KVM_ARM_PREFERRED_TARGET."""
        init = bytearray(32)
        fcntl.ioctl(self.fd, NUMBER["KVM_ARM_PREFERRED_TARGET"], init)
        return int(struct.unpack_from("I", init)[0])

    def vcpu(self, features: int | None = None, *, finalize: bool = True) -> Vcpu:
        """The next vCPU; initialised, and with SVE finalised, unless `features` is None."""
        vcpu = Vcpu(self, len(self._vcpus), _call(self._kvm_fd, KVM_GET_VCPU_MMAP_SIZE))
        self._vcpus.append(vcpu)
        if features is not None:
            assert vcpu.init(features) == 0
            if features & SVE and finalize:
                assert vcpu.finalize() == 0
        return vcpu

    def vgic(self) -> int:
        """A GICv3 in its place, not yet initialised; its descriptor."""
        device = bytearray(struct.pack("III", VGIC_V3, 0, 0))
        fcntl.ioctl(self.fd, NUMBER["KVM_CREATE_DEVICE"], device)
        fd = int(struct.unpack("III", device)[1])
        self._devices.append(fd)
        for kind, address in ((2, 0x0800_0000), (3, 0x080A_0000)):  # KVM_VGIC_V3_ADDR_TYPE_DIST, _REDIST
            assert set_attribute(fd, 0, kind, struct.pack("Q", address)) == 0
        return fd

    def load(self, code: Sequence[int]) -> None:
        """Memory with the code at its beginning, where all vCPUs start; the vGIC takes no more vCPUs from now on."""
        for device in self._devices:
            assert set_attribute(device, 4, 0) == 0  # KVM_DEV_ARM_VGIC_CTRL_INIT
        for vcpu in self._vcpus:
            if vcpu.features & PMU_V3:
                vcpu.pmu()
        self._memory = mmap.mmap(-1, MEMORY_BYTES)
        words = (ctypes.c_uint32 * len(code)).from_buffer(self._memory)
        for place, word in enumerate(code):
            # One by one: a long copy is SVE's, after which QEMU 7.2's TCG forgets to drop what it has translated
            # of the page when it was another guest's.
            words[place] = word
        address = ctypes.addressof(words)
        region = struct.pack("IIQQQ", 0, 0, CODE, MEMORY_BYTES, address)
        _call(self.fd, KVM_SET_USER_MEMORY_REGION, region)
        for vcpu in self._vcpus:
            vcpu.start()


def set_attribute(fd: int, group: int, attribute: int, content: bytes = b"") -> int:
    """The errno of KVM_SET_DEVICE_ATTR."""
    buffer = ctypes.create_string_buffer(content, max(len(content), 1))
    request = struct.pack("IIQQ", 0, group, attribute, ctypes.addressof(buffer) if content else 0)
    return tried(fd, NUMBER["KVM_SET_DEVICE_ATTR"], request)


def get_attribute(fd: int, group: int, attribute: int, size: int) -> bytes:
    """KVM_GET_DEVICE_ATTR."""
    buffer = ctypes.create_string_buffer(size)
    _call(
        fd, NUMBER["KVM_GET_DEVICE_ATTR"], struct.pack("IIQQ", 0, group, attribute, ctypes.addressof(buffer))
    )
    return buffer.raw


class Vcpu:
    """A vCPU; its VM owns it."""

    def __init__(self, vm: Vm, number: int, run_bytes: int) -> None:
        self.vm = vm
        self.fd = _call(vm.fd, NUMBER["KVM_CREATE_VCPU"], number)
        self.features = 0
        self._run = mmap.mmap(self.fd, run_bytes)

    def close(self) -> None:
        self._run.close()
        os.close(self.fd)

    def init(self, features: int) -> int:
        """The errno of KVM_ARM_VCPU_INIT."""
        init = struct.pack("8I", self.vm.target(), features, *6 * [0])
        error = tried(self.fd, NUMBER["KVM_ARM_VCPU_INIT"], init)
        self.features = features if error == 0 else self.features
        return error

    def finalize(self) -> int:
        """The errno of KVM_ARM_VCPU_FINALIZE of SVE."""
        return tried(self.fd, NUMBER["KVM_ARM_VCPU_FINALIZE"], struct.pack("i", 4))

    def pmu(self) -> None:
        """What a vCPU with a PMU needs before it runs: an interrupt, and KVM_ARM_VCPU_PMU_V3_INIT."""
        if self.vm.has_vgic:
            assert set_attribute(self.fd, 0, 0, struct.pack("i", 23)) == 0
        assert set_attribute(self.fd, 0, 1) == 0

    def _one(self, ioctl: str, register: int, content: bytes) -> tuple[int, bytes]:
        buffer = ctypes.create_string_buffer(content, len(content))
        error = tried(self.fd, NUMBER[ioctl], struct.pack("QQ", register, ctypes.addressof(buffer)))
        return error, buffer.raw

    def get(self, register: int) -> int:
        """A register's value; the negative errno where KVM refuses."""
        error, content = self._one("KVM_GET_ONE_REG", register, bytes(_size(register)))
        return -error if error else int.from_bytes(content[:8], "little")

    def set(self, register: int, value: int) -> int:
        """The errno of KVM_SET_ONE_REG."""
        return self._one("KVM_SET_ONE_REG", register, value.to_bytes(_size(register), "little"))[0]

    def registers(self) -> list[int]:
        """KVM_GET_REG_LIST."""
        table = bytearray(8 + 8 * 2000)
        struct.pack_into("Q", table, 0, 2000)
        fcntl.ioctl(self.fd, NUMBER["KVM_GET_REG_LIST"], table)
        count = struct.unpack_from("Q", table)[0]
        return list(struct.unpack_from(f"{count}Q", table, 8))

    def start(self) -> None:
        """At the beginning of its VM's code."""
        assert self.set(PC, CODE) == 0
        assert self.set(x(20), RESULTS) == 0

    def run(self) -> list[int] | Stopped:
        """Until the guest stores to END: what it stored before, in its order; or why it stopped before."""
        found: list[int] = []
        while True:
            self._enter()
            reason = struct.unpack_from("I", self._run, 8)[0]
            if reason != EXIT_MMIO:
                return Stopped(reason, struct.unpack_from("I", self._run, 32)[0])
            address, value, size, is_write = struct.unpack_from("QQIB", self._run, 32)
            if not is_write or size != 8:
                raise GuestError(f"the guest read, or wrote {size} bytes, at {address:#x}")
            if address == RESULTS + END:
                return found
            found.append(value)

    def complete(self) -> None:
        """Bring the exit that is pending to its end, and run no instruction (immediate_exit, api.rst section 5)."""
        self._run[1] = 1
        assert tried(self.fd, KVM_RUN) == errno.EINTR
        self._run[1] = 0

    def _enter(self) -> None:
        """KVM_RUN, for a limited time."""

        def late(_number: int, _frame: FrameType | None) -> None:
            raise GuestError("the guest does not come to its end")

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, RUN_SECONDS)
        try:
            _call(self.fd, KVM_RUN)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def call(self, function: int, *arguments: int) -> tuple[int, ...] | Stopped:
        """HVC with a function and arguments (SMCCC, Arm DEN 0028): x0 to x3 as the guest gets them back.

        For a VM that has CALLS loaded, as often as wanted.
        """
        for number in range(4):
            value = (function, *arguments, 0, 0, 0)[number]
            assert self.set(x(number), value) == 0
        found = self.run()
        return tuple(found) if isinstance(found, list) else found


def _size(register: int) -> int:
    return 8 * SVE_LENGTH_WORDS if register == SVE_VLS else 1 << (register >> 52 & 15)
