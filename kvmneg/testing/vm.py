# SPDX-License-Identifier: LGPL-2.1-or-later
"""A scratch VM under a contract, for tests: what a VMM does before it loads a guest.

Here Python is the VMM, which makes ioctls of its own: KVM_CREATE_VCPU, and arm64's vGIC. Everything that has to do with
the contract is libkvmneg's.
"""

from __future__ import annotations

import fcntl
import os
import struct

from kvmneg.errors import KvmFault
from kvmneg.features.words import ARM64
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


class AppliedVm:
    """A VM with one vCPU, number 0, that never ran; a context manager, which owns all of it.

    `vm` and `vcpu` are their descriptors, `kvm` is the open /dev/kvm, `contract` is what was applied. An arm64 VM has a
    vGIC (v3, else v2), without which its ID registers show none.
    """

    def __init__(self, path: str) -> None:
        """Applies the contract in the file `path`. Raises NoKvm, NotApplied, BadInput, KvmFault."""
        self.contract = Applied.open(path)
        self.kvm = Kvm.open()
        self.vm = self.vcpu = self._vgic = -1
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
            self._vgic = _vgic(self.vm)
        self.contract.vcpu(self.vcpu)

    def close(self) -> None:
        """The vCPU before its VM; a second time does nothing."""
        for fd in (self._vgic, self.vcpu, self.vm):
            if fd >= 0:
                os.close(fd)
        self.vm = self.vcpu = self._vgic = -1
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


def _ioctl(name: str, fd: int, request: int, argument: int | bytearray) -> int:
    try:
        return fcntl.ioctl(fd, request, argument)
    except OSError as error:
        raise KvmFault(name, error.errno or 0) from None
