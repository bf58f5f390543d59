# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkvmneg's own reader of contracts, and what it does with one (csrc/kvmneg.h, "giving a VM what a contract says").

KVM answers EIO to any process but the one that made the VM. The order, on either architecture:

    held = Applied.of(contract.binary())
    held.vm(vm_fd)                       before the first vCPU
    held.vcpu_init(vm_fd, vcpu_fd)       each vCPU; on arm64 then the vGIC and KVM_ARM_VCPU_PMU_V3_SET_PMU
    held.vcpu(vcpu_fd, cpuid)            each vCPU; `cpuid` is the VMM's own table, of x86
    held.vgic(vgic_fd)                   of arm64, after KVM_DEV_ARM_VGIC_CTRL_INIT
    held.verify(vcpu_fd)                 now, and after the first run

Each raises NotApplied at the first word that fails. A vCPU that is plugged in later gets the same calls.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg._libkvmneg import ffi, lib
from kvmneg.errors import BadInput, NotApplied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from kvmneg.host.tables import CpuidEntry

STAGES = (
    "", "vm", "init", "pmu", "id", "cache", "firmware", "vgic", "verify",
    "check", "xsave", "tsc", "cpuid", "msr", "enforce", "state",
)  # fmt: skip
"""KVMNEG_STAGE_*, by number."""
REASONS = ("", "refused", "missing", "too late", "dropped", "differs", "failed", "outside", "unknown")
"""KVMNEG_REFUSED and the others, by number."""


def call(function: Callable[..., int], *arguments: Any) -> int:
    """Call one of libkvmneg's functions that end in a failure and a trace. Raises NotApplied with what failed.

    Its fields: word ("" where KVM does not say which), register (arm64's id; of x86 the MSR, or the leaf and subleaf),
    asked, mask, got, stage (one of STAGES), why (one of REASONS), ioctl (its name, or ""), errno.
    """
    failure, trace = ffi.new("struct kvmneg_failure *"), ffi.new("struct kvmneg_trace *")
    r = function(*arguments, failure, trace)
    if r >= 0:
        return r
    import os  # only here

    stage, why = STAGES[failure.stage], REASONS[failure.why] or "failed"
    word = ffi.string(failure.word).decode()
    name = lib.kvmneg_ioctl_name(failure.request) if failure.request else ffi.NULL
    raise NotApplied(
        f"{word or 'the whole'}: {why} ({stage or 'arguments'}): asked {failure.asked:#x} under {failure.mask:#x}, "
        f"has {failure.got:#x}: {os.strerror(-r)}",
        word=word,
        register=failure.id,
        asked=failure.asked,
        mask=failure.mask,
        got=failure.got,
        stage=stage,
        why=why,
        ioctl=ffi.string(name).decode() if name != ffi.NULL else "",
        errno=-r,
    )


class Applied:
    """A contract that libkvmneg read and found good. Immutable; any thread may use it."""

    __slots__ = ("_held",)

    def __init__(self, held: Any) -> None:
        self._held = ffi.gc(held, lib.kvmneg_contract_free)

    @classmethod
    def of(cls, binary: bytes, *, file: str = "contract") -> Applied:
        """From the binary form. Raises BadInput with `offset`, the first byte at fault."""
        return cls._opened(lib.kvmneg_contract_open_memory, ffi.from_buffer(binary), len(binary), file=file)

    @classmethod
    def open(cls, path: str) -> Applied:
        """From a file. Raises BadInput with `offset`, and OSError."""
        return cls._opened(lib.kvmneg_contract_open, path.encode(), file=path)

    @classmethod
    def open_fd(cls, fd: int, *, file: str = "contract") -> Applied:
        """From what is left to read of a descriptor, which stays the caller's. Raises as `open` does."""
        return cls._opened(lib.kvmneg_contract_open_fd, fd, file=file)

    @classmethod
    def _opened(cls, function: Callable[..., int], *arguments: Any, file: str) -> Applied:
        held, error = ffi.new("struct kvmneg_contract **"), ffi.new("struct kvmneg_contract_error *")
        r = function(*arguments, held, error)
        if r == 0:
            return cls(held[0])
        if error.what != ffi.NULL:
            what = ffi.string(error.what).decode()
            bad = BadInput(f"no contract: {what}, at byte {error.offset}", file=file)
            bad.fields["offset"] = error.offset
            raise bad
        import os  # only here

        raise OSError(-r, os.strerror(-r), file)

    def info(self) -> dict[str, Any]:
        """struct kvmneg_contract_info: digests as bytes, everything else as numbers."""
        info = ffi.new("struct kvmneg_contract_info *")
        lib.kvmneg_contract_describe(self._held, info)
        found: dict[str, Any] = {}
        for name, field in ffi.typeof("struct kvmneg_contract_info").fields:
            value = getattr(info, name)
            found[name] = value if field.type.kind == "primitive" else bytes(value)
        return found

    def binary(self) -> bytes:
        """The bytes it was read from."""
        size = ffi.new("uint64_t *")
        return bytes(ffi.buffer(lib.kvmneg_contract_bytes(self._held, size), size[0]))

    def words(self) -> Iterator[tuple[str, int, int]]:
        """(word, value, mask) of each word that it binds, in the order of the file."""
        row, i = ffi.new("struct kvmneg_bound_word *"), 0
        while lib.kvmneg_contract_word(self._held, i, row) == 0:
            yield ffi.string(row.word).decode(), row.value, row.mask
            i += 1

    def portable(self) -> list[tuple[int, int, int]]:
        """(register, KVMNEG_CARRY or another rule, value) of each entry of arm64's portable state."""
        count = ffi.new("uint32_t *")
        rows = lib.kvmneg_contract_portable(self._held, count)
        return [(rows[i].id, rows[i].rule, rows[i].value) for i in range(count[0])]

    def vm(
        self,
        vm_fd: int,
        *,
        disable_quirks: int = 0,
        x2apic_api: int = 0,
        disable_exits: int = 0,
        exit_hypercall: int = 0,
    ) -> None:
        """kvmneg_vm_apply; the others are what the VMM wants besides, of x86."""
        choices = ffi.new(
            "struct kvmneg_choices *", (disable_quirks, x2apic_api, disable_exits, exit_hypercall)
        )
        call(lib.kvmneg_vm_apply, self._held, vm_fd, choices)

    def vcpu_init(self, vm_fd: int, vcpu_fd: int) -> None:
        """kvmneg_vcpu_init."""
        call(lib.kvmneg_vcpu_init, self._held, vm_fd, vcpu_fd)

    def vcpu(self, vcpu_fd: int, cpuid: Sequence[CpuidEntry] | None = None) -> None:
        """kvmneg_vcpu_apply."""
        table = ffi.NULL if cpuid is None else _table(cpuid, len(cpuid))
        call(lib.kvmneg_vcpu_apply, self._held, vcpu_fd, table)

    def verify(self, vcpu_fd: int) -> None:
        """kvmneg_vcpu_verify."""
        call(lib.kvmneg_vcpu_verify, self._held, vcpu_fd)

    def vgic(self, vgic_fd: int) -> None:
        """kvmneg_vgic_apply, of arm64."""
        call(lib.kvmneg_vgic_apply, self._held, vgic_fd)

    def verify_vgic(self, vgic_fd: int) -> None:
        """kvmneg_vgic_verify, of arm64."""
        call(lib.kvmneg_vgic_verify, self._held, vgic_fd)

    def takes(self, register: int, value: int, *, timer_control: int, listed: bool) -> bool:
        """Whether a register of an arm64 guest that comes here is set, or left out (kvmneg_judge_register).

        Raises NotApplied where it is neither. Works on any host.
        """

        def judge(*given: Any) -> int:
            return int(lib.kvmneg_judge_register(*given[:-1]))  # no ioctl, so no trace

        return call(judge, self._held, register, value, timer_control, listed) == 1

    def clamp(
        self, cpuid: Sequence[CpuidEntry], capacity: int = limits.CPUID_ENTRIES
    ) -> list[tuple[int, ...]]:
        """kvmneg_clamp_cpuid, of x86: the rows (function, index, flags, eax, ebx, ecx, edx). Raises OSError."""
        table = _table(cpuid, max(capacity, len(cpuid)))
        r = lib.kvmneg_clamp_cpuid(self._held, table, capacity)
        if r < 0:
            import os  # only here

            raise OSError(-r, os.strerror(-r))
        rows = table.entries[0 : table.count]
        return [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in rows]


def _table(cpuid: Sequence[CpuidEntry], capacity: int) -> Any:
    """struct kvmneg_cpuid with room for `capacity` entries."""
    table = ffi.new("struct kvmneg_cpuid *", {"entries": capacity})
    table.count = len(cpuid)
    for place, row in zip(table.entries[0 : len(cpuid)], cpuid, strict=True):
        place.function, place.index, place.flags, place.eax, place.ebx, place.ecx, place.edx = row
    return table
