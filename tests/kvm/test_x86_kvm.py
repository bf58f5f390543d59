# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every function of kvmneg.host.kvm on the real KVM, against the same ioctls made by fcntl."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from array import array
from typing import TYPE_CHECKING

import pytest

from kvmneg.errors import KvmFault
from kvmneg.host import ioctls
from kvmneg.host.capabilities import name
from kvmneg.host.kvm import Kvm
from kvmneg.host.tables import CpuidEntry, Probe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.kvm
NUMBER = ioctls.kvm()


def ask(fd: int, number: int) -> int:
    """KVM_CHECK_EXTENSION by fcntl; the negative errno where KVM refuses."""
    try:
        return fcntl.ioctl(fd, NUMBER["KVM_CHECK_EXTENSION"], number)
    except OSError as error:
        return -(error.errno or 0)


def cpuid_by_fcntl(fd: int, ioctl: str) -> list[CpuidEntry]:
    """One of the three CPUID tables by fcntl."""
    table = bytearray(8 + 40 * 256)
    struct.pack_into("I", table, 0, 256)
    fcntl.ioctl(fd, NUMBER[ioctl], table)
    count = struct.unpack_from("I", table)[0]
    return [CpuidEntry(*struct.unpack_from("7I", table, 8 + 40 * i)) for i in range(count)]


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_api_version(kvm: Kvm) -> None:
    assert kvm.api_version() == 12
    assert kvm.log == {("KVM_GET_API_VERSION", 0): 2}  # once by open()


def test_descriptors_are_private(kvm: Kvm) -> None:
    """No descriptor survives an exec."""
    with kvm.scratch() as scratch:
        assert not any(map(os.get_inheritable, (kvm.fd, scratch.vm, scratch.vcpu)))


def test_capabilities(kvm: Kvm) -> None:
    """All 256 numbers on both descriptors."""
    with kvm.scratch() as scratch:
        found = kvm.capabilities(scratch)
        answers = {name(n): (ask(kvm.fd, n), ask(scratch.vm, n)) for n in range(256)}
    assert found == {key: pair for key, pair in answers.items() if any(pair)}
    assert found["user-memory"] == (1, 1)  # no KVM is without (api.rst 4.35)
    assert sum(calls for (ioctl, _), calls in kvm.log.items() if ioctl == "KVM_CHECK_EXTENSION") == 512


def test_capabilities_make_their_own_vm(kvm: Kvm) -> None:
    before = open_descriptors()
    assert kvm.capabilities()["user-memory"] == (1, 1)
    assert open_descriptors() == before


def test_supported_cpuid(kvm: Kvm) -> None:
    found = kvm.supported_cpuid()
    assert found == cpuid_by_fcntl(kvm.fd, "KVM_GET_SUPPORTED_CPUID")
    keys = [(entry.function, entry.index) for entry in found]
    assert len(set(keys)) == len(keys)
    assert (0, 0) in keys


def test_supported_cpuid_grows(kvm: Kvm) -> None:
    """Room for one entry: E2BIG until there is enough, then the same table."""
    found = kvm.supported_cpuid(1)
    assert found == kvm.supported_cpuid()
    too_small = kvm.log["KVM_GET_SUPPORTED_CPUID", errno.E2BIG]
    assert 2 ** (too_small - 1) < len(found) <= 2**too_small


@pytest.mark.parametrize("hint", [4097, 2**32 - 1])
def test_hint_over_the_limit(kvm: Kvm, hint: int) -> None:
    for function in (kvm.supported_cpuid, kvm.emulated_cpuid, kvm.hyperv_cpuid, kvm.feature_msrs):
        with pytest.raises(KvmFault) as fault:
            function(hint)
        assert fault.value.fields == {"ioctl": "libkvmneg", "errno": errno.E2BIG}
    assert kvm.log == {("KVM_GET_API_VERSION", 0): 1}  # KVM was not asked


def test_emulated_cpuid(kvm: Kvm) -> None:
    assert kvm.emulated_cpuid(1) == cpuid_by_fcntl(kvm.fd, "KVM_GET_EMULATED_CPUID")


def test_hyperv_cpuid(kvm: Kvm) -> None:
    """The same table, or the same refusal, as by fcntl; with a vCPU where /dev/kvm cannot."""
    with kvm.scratch() as scratch:
        asked = kvm.fd if ask(kvm.fd, 191) > 0 else scratch.vcpu  # KVM_CAP_SYS_HYPERV_CPUID
        try:
            expected = cpuid_by_fcntl(asked, "KVM_GET_SUPPORTED_HV_CPUID")
        except OSError as refusal:
            with pytest.raises(KvmFault) as fault:
                kvm.hyperv_cpuid(scratch=scratch)
            assert fault.value.fields == {"ioctl": "KVM_GET_SUPPORTED_HV_CPUID", "errno": refusal.errno}
        else:
            assert kvm.hyperv_cpuid(1, scratch) == expected


def msr_by_fcntl(fd: int, index: int) -> int | None:
    """One feature MSR by fcntl; None where KVM refuses it."""
    data = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
    return struct.unpack_from("<Q", data, 16)[0] if fcntl.ioctl(fd, NUMBER["KVM_GET_MSRS"], data) else None


def test_feature_msrs(kvm: Kvm) -> None:
    table = bytearray(4 + 4 * 1024)
    struct.pack_into("I", table, 0, 1024)
    fcntl.ioctl(kvm.fd, NUMBER["KVM_GET_MSR_FEATURE_INDEX_LIST"], table)
    count = struct.unpack_from("I", table)[0]
    listed = struct.unpack_from(f"{count}I", table, 4)
    values, refused = kvm.feature_msrs(1)
    by_fcntl = {index: msr_by_fcntl(kvm.fd, index) for index in listed}
    assert values == {index: value for index, value in by_fcntl.items() if value is not None}
    assert refused == tuple(index for index, value in by_fcntl.items() if value is None)


def test_xcomp_guest_supp(kvm: Kvm) -> None:
    """By fcntl where KVM announces system attributes (KVM_CAP_SYS_ATTRIBUTES), else refused."""
    if ask(kvm.fd, 209) > 0:
        components = array("Q", [0])
        attribute = struct.pack("<IIQQ", 0, 0, 0, components.buffer_info()[0])  # struct kvm_device_attr
        fcntl.ioctl(kvm.fd, NUMBER["KVM_GET_DEVICE_ATTR"], attribute)
        assert kvm.xcomp_guest_supp() == components[0]
    else:
        with pytest.raises(KvmFault) as fault:
            kvm.xcomp_guest_supp()
        assert fault.value.fields["errno"] in (errno.EINVAL, errno.ENOTTY, errno.ENXIO)


def asked_alone(call: Callable[[], object]) -> object:
    """What a method returns, or None where this KVM does not have it."""
    try:
        return call()
    except KvmFault as fault:
        assert fault.fields["errno"] in (errno.EINVAL, errno.ENOTTY, errno.ENXIO, errno.EOPNOTSUPP)
        return None


def test_probe_is_its_parts(kvm: Kvm) -> None:
    with kvm.scratch() as scratch:
        probe = kvm.probe(scratch)
        assert probe.capabilities.known() == kvm.capabilities(scratch)
        assert probe.supported == kvm.supported_cpuid()
        assert probe.emulated == asked_alone(kvm.emulated_cpuid)
        assert probe.hyperv == asked_alone(lambda: kvm.hyperv_cpuid(scratch=scratch))
        assert (probe.feature_msrs, probe.refused_msrs) == (asked_alone(kvm.feature_msrs) or ({}, ()))
        assert probe.xcomp_guest_supp == asked_alone(kvm.xcomp_guest_supp)
    absent = {part for part in ("emulated", "hyperv", "xcomp_guest_supp") if getattr(probe, part) is None}
    assert set(probe.missing) - {"feature_msrs"} == absent


def test_nothing_leaks(kvm: Kvm) -> None:
    before = open_descriptors()
    for _ in range(5):
        kvm.probe()
    assert open_descriptors() == before


CALLS = {
    "KVM_GET_API_VERSION": Kvm.api_version,
    "KVM_CREATE_VM": Kvm.probe,
    "KVM_GET_SUPPORTED_CPUID": Kvm.supported_cpuid,
    "KVM_GET_EMULATED_CPUID": Kvm.emulated_cpuid,
    "KVM_GET_SUPPORTED_HV_CPUID": Kvm.hyperv_cpuid,
    "KVM_GET_MSR_FEATURE_INDEX_LIST": Kvm.feature_msrs,
    "KVM_GET_DEVICE_ATTR": Kvm.xcomp_guest_supp,
}


@pytest.mark.parametrize("ioctl", CALLS)
def test_closed_handle(ioctl: str, kvm: Kvm) -> None:
    """EBADF by name, not another descriptor that took the number."""
    kvm.close()
    kvm.close()
    assert kvm.fd == -1
    with pytest.raises(KvmFault) as fault:
        CALLS[ioctl](kvm)
    assert fault.value.fields == {"ioctl": ioctl, "errno": errno.EBADF}


@pytest.mark.parametrize("ioctl", CALLS)
def test_plain_file(ioctl: str, tmp_path: Path) -> None:
    """A descriptor of something else answers ENOTTY."""
    path = tmp_path / "plain"
    path.write_bytes(b"")
    with Kvm(os.open(path, os.O_RDWR | os.O_CLOEXEC), str(path)) as plain:
        with pytest.raises(KvmFault) as fault:
            CALLS[ioctl](plain)
        assert fault.value.fields == {"ioctl": ioctl, "errno": errno.ENOTTY}
        assert str(path) in str(fault.value)


def test_probe_type(kvm: Kvm) -> None:
    assert isinstance(kvm.probe(), Probe)
