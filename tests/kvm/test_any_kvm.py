# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every KVM has, whatever its architecture: versions, capabilities, a scratch VM. Against fcntl's ioctls."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import pytest

from kvmneg.host import ioctls
from kvmneg.host.capabilities import name

if TYPE_CHECKING:
    from kvmneg.host.kvm import Kvm

pytestmark = pytest.mark.kvm
NUMBER = ioctls.kvm()


def ask(fd: int, number: int) -> int:
    """KVM_CHECK_EXTENSION by fcntl; 0 where KVM refuses."""
    try:
        return fcntl.ioctl(fd, NUMBER["KVM_CHECK_EXTENSION"], number)
    except OSError:
        return 0


def test_version(kvm: Kvm) -> None:
    assert kvm.api_version() == fcntl.ioctl(kvm.fd, NUMBER["KVM_GET_API_VERSION"]) == 12  # api.rst 4.1


def test_capabilities_of_system_and_vm(kvm: Kvm) -> None:
    """KVM_CAP_USER_MEMORY (3) is everywhere, KVM_CAP_ONE_REG (70) on arm64; x86 has it from Linux 6.18."""
    with kvm.scratch() as scratch:
        found = kvm.capabilities(scratch)
        for number in (3, 9, 10, 66, 70, 136):
            expected = (ask(kvm.fd, number), ask(scratch.vm, number))
            assert found.get(name(number), (0, 0)) == expected
    assert found["user-memory"] == (1, 1)
    if os.uname().machine == "aarch64":
        assert found["one-reg"] == (1, 1)


def test_a_scratch_vm_leaves_nothing(kvm: Kvm) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with kvm.scratch():
        pass
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.only_on("aarch64")
def test_preferred_target(kvm: Kvm) -> None:
    """A vCPU can be made, and was asked for by the target that KVM prefers."""
    with kvm.scratch() as scratch:
        assert scratch.vcpu >= 0
    assert kvm.log["KVM_ARM_PREFERRED_TARGET", 0] >= 1
