# SPDX-License-Identifier: LGPL-2.1-or-later
"""One handle on /dev/kvm: the Python face of libkvmneg (csrc/kvmneg.h), which makes every ioctl.

The only module that makes calls into the extension, besides kvm_arm64.py for what is arm64's and guest_x86.py for proof
guests. A call releases the interpreter's lock while it is in C. Masks and registers are ints, tables are lists of named
tuples (tables.py); nothing here interprets them.
"""

from __future__ import annotations

import os

from kvmneg._libkvmneg import ffi, lib
from kvmneg.errors import KvmFault
from kvmneg.host import tables
from kvmneg.host.nokvm import busy, explain
from kvmneg.host.tables import Capabilities
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Any, Self

    from kvmneg.host.tables import CpuidEntry, MsrShown, Probe

_EPERM, _E2BIG, _EBUSY, _EINVAL = 1, 7, 16, 22


class Scratch(NamedTuple):
    """A VM with one vCPU, which runs nothing but proof guests; descriptors, which Kvm.scratch() owns."""

    vm: int
    vcpu: int


def raw_cpuid(cpu: int) -> list[CpuidEntry]:
    """What the CPUID instruction says on logical CPU `cpu`, all leaves and subleaves; needs no KVM.

    The calling thread visits that CPU and gets its affinity back. Raises KvmFault with EINVAL for a CPU that
    does not exist or that this process may not use.
    """
    table = ffi.new("struct kvmneg_cpuid **")
    if not -(1 << 31) <= cpu < 1 << 31:
        raise KvmFault("sched_setaffinity", 22, f"CPU {cpu}")
    r = lib.kvmneg_get_raw_cpuid(cpu, table)
    if r < 0:
        raise KvmFault("sched_setaffinity", -r, f"CPU {cpu}")
    try:
        return tables.entries(table[0])
    finally:
        lib.kvmneg_free(table[0])


class Kvm:
    """An open /dev/kvm. A context manager; one thread at a time.

    Methods raise KvmFault, which names the ioctl and the errno, when KVM fails in a way it must not.
    """

    __slots__ = ("_trace", "fd", "path")

    def __init__(self, fd: int, path: str = "/dev/kvm") -> None:
        """Takes over `fd`, an open KVM descriptor."""
        self.fd = fd
        self.path = path
        self._trace = ffi.new("struct kvmneg_trace *")

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> Self:
        """Opens KVM and checks its API version. Raises NoKvm with the exact cause and what to do about it."""
        kvm = cls(-1, path)
        fd = ffi.new("int *")
        r = lib.kvmneg_open(os.fsencode(path), fd, kvm._trace)
        if r < 0:
            raise explain(path, -r)
        kvm.fd = fd[0]
        return kvm

    def close(self) -> None:
        """Closes the descriptor; a second time does nothing."""
        self.fd = lib.kvmneg_close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def log(self) -> dict[tuple[str, int], int]:
        """How often each ioctl was made through this handle: (kernel's name, errno or 0) → calls."""
        rows = self._trace.rows[0 : self._trace.count]
        return {(_ioctl_name(row.request), row.error): row.calls for row in rows}

    def _call(self, function: Callable[..., int], *arguments: Any) -> None:
        """Calls into libkvmneg; raises what went wrong, by the name of the ioctl that failed."""
        self._trace.failed = 0
        r = function(*arguments, self._trace)
        if r >= 0:
            return
        # Memory can run out, or an answer make no sense, between two ioctls: none of them failed like this.
        failed = self._trace.failed and self._trace.failed_error == -r
        ioctl = _ioctl_name(self._trace.failed) if failed else "libkvmneg"
        if ioctl == "KVM_CREATE_VM" and -r == _EBUSY:
            raise busy(self.path)
        raise KvmFault(ioctl, -r, self.path)

    def api_version(self) -> int:
        """KVM_GET_API_VERSION (api.rst 4.1)."""
        version = ffi.new("int *")
        self._call(lib.kvmneg_api_version, self.fd, version)
        return int(version[0])

    def create_vm(self) -> int:
        """KVM_CREATE_VM (api.rst 4.2): the descriptor of a new VM, which is the caller's."""
        fd = ffi.new("int *")
        self._call(lib.kvmneg_create_vm, self.fd, fd)
        return int(fd[0])

    def scratch(self) -> _ScratchContext:
        """`with kvm.scratch() as scratch:` makes a VM and a vCPU that never run, and closes them."""
        return _ScratchContext(self)

    def capabilities(self, scratch: Scratch | None = None) -> dict[str, tuple[int, int]]:
        """Every KVM_CHECK_EXTENSION (api.rst 4.4): name → (answer on /dev/kvm, answer on a VM).

        A name that is not there answered 0 on both. A negative number is the errno with which KVM refused the
        question on that kind of descriptor. Makes a VM of its own for the call when none is given.
        """
        if scratch is None:
            with self.scratch() as own:
                return self.capabilities(own)
        answers = ffi.new("struct kvmneg_capabilities *")
        self._call(lib.kvmneg_get_capabilities, self.fd, scratch.vm, answers)
        return Capabilities(answers).known()

    def probe(self, scratch: Scratch | None = None) -> Probe:
        """The whole offer of an x86 KVM in one call; with a VM of its own when none is given."""
        if scratch is None:
            with self.scratch() as own:
                return self.probe(own)
        found = ffi.new("struct kvmneg_probe **")
        self._call(lib.kvmneg_probe, self.fd, scratch.vm, scratch.vcpu, found)
        try:
            return tables.decode(found[0])
        finally:
            lib.kvmneg_probe_free(found[0])

    def supported_cpuid(self, hint: int = 0) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID (api.rst 4.46); begins with room for `hint` entries and grows."""
        return self._cpuid(lib.kvmneg_get_supported_cpuid, self.fd, hint)

    def emulated_cpuid(self, hint: int = 0) -> list[CpuidEntry]:
        """KVM_GET_EMULATED_CPUID (api.rst 4.88): what KVM emulates slowly; never part of an offer."""
        return self._cpuid(lib.kvmneg_get_emulated_cpuid, self.fd, hint)

    def hyperv_cpuid(self, hint: int = 0, scratch: Scratch | None = None) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_HV_CPUID (api.rst 4.118): what Hyper-V's leaves can be.

        The scratch vCPU is asked where /dev/kvm does not know it. KvmFault with EINVAL: KVM has no Hyper-V.
        """
        return self._cpuid(lib.kvmneg_get_hyperv_cpuid, self.fd, scratch.vcpu if scratch else -1, hint)

    def _cpuid(self, function: Callable[..., int], *arguments: Any) -> list[CpuidEntry]:
        table = ffi.new("struct kvmneg_cpuid **")
        self._call(function, *arguments, table)
        try:
            return tables.entries(table[0])
        finally:
            lib.kvmneg_free(table[0])

    def feature_msrs(self, hint: int = 0) -> tuple[dict[int, int], tuple[int, ...]]:
        """Feature MSRs (api.rst 4.3, 4.18): index → 64-bit value, and the indices KVM lists but refuses."""
        table = ffi.new("struct kvmneg_msrs **")
        self._call(lib.kvmneg_get_feature_msrs, self.fd, hint, table)
        try:
            return tables.msrs(table[0])
        finally:
            lib.kvmneg_free(table[0])

    def try_cpuid(self, scratch: Scratch, entries: Sequence[CpuidEntry]) -> list[CpuidEntry] | None:
        """What a vCPU that never ran shows of a table it is given (KVM_SET_CPUID2, KVM_GET_CPUID2).

        None where KVM refuses the table (EINVAL, E2BIG, EPERM).
        """
        given = tables.cpuid_table(entries)
        try:
            return self._cpuid(lib.kvmneg_try_cpuid, scratch.vcpu, given)
        except KvmFault as error:
            fault = error.fields["ioctl"], error.fields["errno"]
            if fault[0] == "KVM_SET_CPUID2" and fault[1] in (_EINVAL, _E2BIG, _EPERM):
                return None
            raise

    def try_msrs(self, scratch: Scratch, values: Mapping[int, int]) -> dict[int, MsrShown]:
        """What a vCPU has of MSRs it is given, by index (KVM_SET_MSRS, KVM_GET_MSRS; api.rst 4.19, 4.18)."""
        given = tables.msr_table(values)
        table = ffi.new("struct kvmneg_msrs **")
        self._call(lib.kvmneg_try_msrs, scratch.vcpu, given, table)
        try:
            return tables.shown_msrs(table[0])
        finally:
            lib.kvmneg_free(table[0])

    def try_mce(self, scratch: Scratch, capabilities: int) -> int | None:
        """MSR 0x179 of a vCPU that is given these machine checks (api.rst 4.105); None where KVM refuses them."""
        shown = ffi.new("uint64_t *")
        try:
            self._call(lib.kvmneg_try_mce, scratch.vcpu, capabilities, shown)
        except KvmFault as error:
            if error.fields["ioctl"] == "KVM_X86_SETUP_MCE" and error.fields["errno"] == _EINVAL:
                return None
            raise
        return int(shown[0])

    def xcomp_guest_supp(self) -> int:
        """KVM_X86_XCOMP_GUEST_SUPP (api.rst 4.80): XSAVE components a guest may have, bits as in XCR0."""
        components = ffi.new("uint64_t *")
        self._call(lib.kvmneg_get_xcomp_guest_supp, self.fd, components)
        return int(components[0])


class _ScratchContext:
    """Owns the descriptors of a scratch VM and its vCPU."""

    __slots__ = ("_kvm", "_scratch")

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self._scratch = Scratch(-1, -1)

    def __enter__(self) -> Scratch:
        vm, vcpu = ffi.new("int *"), ffi.new("int *")
        self._kvm._call(lib.kvmneg_create_scratch, self._kvm.fd, vm, vcpu)
        self._scratch = Scratch(vm[0], vcpu[0])
        return self._scratch

    def __exit__(self, *_: object) -> None:
        lib.kvmneg_close(self._scratch.vcpu)
        lib.kvmneg_close(self._scratch.vm)
        self._scratch = Scratch(-1, -1)


def _ioctl_name(request: int) -> str:
    """The kernel's name of an ioctl that libkvmneg makes, else its number."""
    name = lib.kvmneg_ioctl_name(request)
    return ffi.string(name).decode("ascii") if name else f"{request:#x}"
