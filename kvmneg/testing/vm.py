# SPDX-License-Identifier: LGPL-2.1-or-later
"""A scratch VM under a contract, for tests: what a VMM does before it loads a guest.

Here Python is the VMM, which makes ioctls of its own: KVM_CREATE_VCPU, and arm64's vGIC and PMU. Everything that has to
do with the contract is libkvmneg's.
"""

from __future__ import annotations

import fcntl
import os
import struct
from array import array

from kvmneg.errors import KvmFault
from kvmneg.features.words import ARM64
from kvmneg.host import software
from kvmneg.host.apply import Applied
from kvmneg.host.kvm import Kvm
from kvmneg.host.measure import ARCHITECTURE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

_CREATE_VCPU = 0xAE41  # KVM_CREATE_VCPU (api.rst 4.7)
_CREATE_DEVICE = 0xC00CAEE0  # KVM_CREATE_DEVICE (api.rst 4.79)
_DEVICE = struct.Struct("=III")  # struct kvm_create_device: type, fd, flags
_VGIC_V3, _VGIC_V2 = 7, 5  # KVM_DEV_TYPE_ARM_VGIC_*
_SET_DEVICE_ATTR, _HAS_DEVICE_ATTR = 0x4018AEE1, 0x4018AEE3  # KVM_{SET,HAS}_DEVICE_ATTR (api.rst 4.80, 4.81)
_ATTRIBUTE = struct.Struct("=IIQQ")  # struct kvm_device_attr: flags, group, attr, addr
_PMU_V3_CTRL, _SET_PMU = 0, 3  # KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_SET_PMU (devices/vcpu.rst 1.4)
_PMUS = "/sys/bus/event_source/devices"
_ENXIO = 6


class AppliedVm:
    """A VM with one vCPU, number 0, that never ran; a context manager, which owns all of it.

    `vm` and `vcpu` are their descriptors, `kvm` is the open /dev/kvm, `contract` is what was applied. An arm64 VM has a
    vGIC (v3, else v2), without which its ID registers show none, and where its contract has a PMU the one of the CPUs
    that this thread may use: `pmu` is its type, -1 where none was chosen. `vgic` is the vGIC's descriptor, -1 on x86.
    Where it is, is the test's to say: once it is initialised, `contract.vgic(vgic)` gives it the contract's revision.
    """

    def __init__(self, path: str) -> None:
        """Applies the contract in the file `path`. Raises NoKvm, NotApplied, BadInput, KvmFault."""
        self.contract = Applied.open(path)
        self.kvm = Kvm.open()
        self.vm = self.vcpu = self.vgic = self.pmu = -1
        try:
            self._create()
        except BaseException:
            self.close()
            raise

    def _create(self) -> None:
        self.vm = self.kvm.create_vm()
        self.contract.vm(self.vm)
        self.vcpu = _ioctl("KVM_CREATE_VCPU", self.vm, _CREATE_VCPU, 0)
        self.contract.vcpu_init(self.vm, self.vcpu)
        if ARCHITECTURE == ARM64:
            self.vgic = _vgic(self.vm)
            self.pmu = _choose_pmu(self.vcpu)
        self.contract.vcpu(self.vcpu)

    def close(self) -> None:
        """The vCPU before its VM; a second time does nothing."""
        for fd in (self.vgic, self.vcpu, self.vm):
            if fd >= 0:
                os.close(fd)
        self.vm = self.vcpu = self.vgic = -1
        self.kvm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _vgic(vm: int) -> int:
    """The descriptor of a new vGIC, of the newer of the two models that this KVM has."""
    for model in (_VGIC_V3, _VGIC_V2):
        device = bytearray(_DEVICE.pack(model, 0, 0))
        try:
            _ioctl("KVM_CREATE_DEVICE", vm, _CREATE_DEVICE, device)
        except KvmFault:
            if model == _VGIC_V2:
                raise
        else:
            break
    return int(_DEVICE.unpack(device)[1])


def _choose_pmu(vcpu: int) -> int:
    """Choose a PMU for a vCPU that has one and may choose (Linux 5.19 and later), else -1.

    Left to itself KVM takes that of the CPU it happens to run on, and the guest may go to no other kind of CPU.
    Raises KvmFault.
    """
    try:
        _attribute("KVM_HAS_DEVICE_ATTR", vcpu, _HAS_DEVICE_ATTR, 0)
    except KvmFault:
        return -1
    allowed = os.sched_getaffinity(0)
    types = pmus()
    # rather one that all of our CPUs have: on the others KVM_RUN is refused
    for pmu in sorted(types, key=lambda one: -len(types[one] & allowed)):
        value = array("i", [pmu])
        try:
            _attribute("KVM_SET_DEVICE_ATTR", vcpu, _SET_DEVICE_ATTR, value.buffer_info()[0])
        except KvmFault as error:
            if error.fields["errno"] != _ENXIO:  # an interconnect's, a cache's: KVM has none of that number
                raise
        else:
            return pmu
    return -1


def pmus(folder: str = _PMUS) -> dict[int, set[int]]:
    """The event sources of CPUs: type → CPUs that have it, as sysfs lists them (sysfs-bus-event_source-devices)."""
    found: dict[int, set[int]] = {}
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        cpus, number = (software.read(f"{folder}/{name}/{file}") for file in ("cpus", "type"))
        if cpus and number:
            found[int(number)] = set(software.cpu_numbers(cpus))
    return found


def _attribute(name: str, fd: int, request: int, address: int) -> None:
    _ioctl(name, fd, request, bytearray(_ATTRIBUTE.pack(0, _PMU_V3_CTRL, _SET_PMU, address)))


def _ioctl(name: str, fd: int, request: int, argument: int | bytearray) -> int:
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise KvmFault(name, error.errno or 0) from None
