# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libkvmneg's tables are in Python: named tuples, and how they are read out of C and written into it.

x86's are all here, and what both architectures have; kvm_arm64.py has arm64's.
"""

from __future__ import annotations

from functools import partial
from itertools import starmap
from operator import itemgetter
from struct import Struct, unpack

from kvmneg._libkvmneg import ffi, lib
from kvmneg.host.capabilities import name as capability_name
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

_ENTRY = Struct("=7I12x")  # struct kvmneg_cpuid_entry
_MSR = Struct("=IIQ")  # struct kvmneg_msr
_CAPABILITIES = Struct(f"={lib.KVMNEG_CAPABILITIES}i")
_CAPABILITY_NAMES = tuple(map(capability_name, range(lib.KVMNEG_CAPABILITIES)))
# a measurement asks for the same names each time
_chosen: dict[tuple[str, ...], itemgetter[tuple[int, ...]]] = {}
_CAPABILITY_NUMBERS = {name: number for number, name in enumerate(_CAPABILITY_NAMES)}


class CpuidEntry(NamedTuple):
    """One CPUID leaf and subleaf with its four 32-bit registers (struct kvm_cpuid_entry2)."""

    function: int
    index: int  # type: ignore[assignment]  # the kernel's name for the subleaf; hides tuple.index()
    flags: int  # 1: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, the leaf has subleaves
    eax: int
    ebx: int
    ecx: int
    edx: int


# CpuidEntry._make without its check of the length: there are sixty of them in each measurement
_cpuid_entry = partial(tuple.__new__, CpuidEntry)


class MsrShown(NamedTuple):
    """What a vCPU has of an MSR after KVM_SET_MSRS: its 64-bit value, 0 where KVM does not let it be read."""

    value: int
    unread: bool  # KVM refuses to read it
    unset: bool  # KVM refused the value it was given


class Tsc(NamedTuple):
    """TSC rates in kHz: the host's own, and the highest that KVM scales to, 0 where it does not scale."""

    khz: int
    max_khz: int


class Capabilities:
    """What KVM_CHECK_EXTENSION answered, by name: (on /dev/kvm, on a VM); (0, 0) for a capability it lacks.

    A measurement asks for a few dozen of 256, so the answers stay as they came until somebody asks.
    """

    __slots__ = ("_packed", "_vm")

    def __init__(self, answers: Any) -> None:
        """Copies a struct kvmneg_capabilities."""
        self._packed = ffi.buffer(answers.system)[:]  # asked for where the VM refuses, and by people
        self._vm = _CAPABILITIES.unpack(ffi.buffer(answers.vm))

    def get(self, name: str, default: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """The two answers for one name, `default` for a name no kernel has."""
        number = _CAPABILITY_NUMBERS.get(name)
        return default if number is None else (self._system()[number], self._vm[number])

    def _system(self) -> tuple[int, ...]:
        return _CAPABILITIES.unpack(self._packed)

    def binding(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """The answers that count, of two or more names: the VM's, and /dev/kvm's where the VM refuses to answer.

        Negative where both refuse. Raises KeyError for a name no kernel has.
        """
        chosen = _chosen.get(names)
        if chosen is None:
            chosen = _chosen[names] = itemgetter(*(_CAPABILITY_NUMBERS[name] for name in names))
        found: tuple[int, ...] = chosen(self._vm)
        if min(found) < 0:
            pairs = zip(found, chosen(self._system()), strict=True)
            found = tuple(vm if vm >= 0 else system for vm, system in pairs)
        return found

    def known(self) -> dict[str, tuple[int, int]]:
        """Those that did not answer 0 twice."""
        rows = zip(_CAPABILITY_NAMES, self._system(), self._vm, strict=True)
        return {name: (system, vm) for name, system, vm in rows if system or vm}


class Probe(NamedTuple):
    """All that one x86 KVM offers, from one call.

    A part that this KVM does not have is None (xcomp_guest_supp, hyperv, emulated, and what has a default) or
    empty (feature_msrs), and `missing` has the errno with which it said so. `state_msrs` are the indices of
    KVM_GET_MSR_INDEX_LIST; `mce_cap` is KVM_X86_GET_MCE_CAP_SUPPORTED, as MSR 0x179 without its number of banks.
    """

    capabilities: Capabilities
    supported: list[CpuidEntry]
    emulated: list[CpuidEntry] | None
    hyperv: list[CpuidEntry] | None
    feature_msrs: dict[int, int]
    refused_msrs: tuple[int, ...]
    xcomp_guest_supp: int | None
    missing: dict[str, int]
    state_msrs: tuple[int, ...] | None = None
    mce_cap: int | None = None
    tsc: Tsc | None = None


def entries(table: Any) -> list[CpuidEntry]:
    """struct kvmneg_cpuid as a list."""
    data = ffi.buffer(table.entries, table.count * _ENTRY.size)
    return list(map(_cpuid_entry, _ENTRY.iter_unpack(data)))


def msrs(table: Any) -> tuple[dict[int, int], tuple[int, ...]]:
    """struct kvmneg_msrs: index → value of those read, and the indices of those refused."""
    rows = list(_MSR.iter_unpack(ffi.buffer(table.entries, table.count * _MSR.size)))
    values = {index: value for index, refused, value in rows if not refused}
    return values, tuple(index for index, refused, _ in rows if refused)


def _indices(table: Any) -> tuple[int, ...]:
    """struct kvmneg_indices."""
    return unpack(f"={table.count}I", ffi.buffer(table.entries, table.count * 4))


def shown_msrs(table: Any) -> dict[int, MsrShown]:
    """struct kvmneg_msrs of MSRs that were tried."""
    data = ffi.buffer(table.entries, table.count * _MSR.size)
    return {
        index: MsrShown(value, bool(how & lib.KVMNEG_MSR_UNREAD), bool(how & lib.KVMNEG_MSR_UNSET))
        for index, how, value in _MSR.iter_unpack(data)
    }


def cpuid_table(rows: Sequence[CpuidEntry]) -> Any:
    """struct kvmneg_cpuid of a table; it lives as long as what is returned."""
    table = ffi.new("struct kvmneg_cpuid *", {"count": len(rows), "entries": len(rows)})
    data = b"".join(starmap(_ENTRY.pack, rows))
    ffi.buffer(table.entries, len(data))[:] = data
    return table


def msr_table(values: Mapping[int, int]) -> Any:
    """struct kvmneg_msrs of values by index; it lives as long as what is returned."""
    table = ffi.new("struct kvmneg_msrs *", {"count": len(values), "entries": len(values)})
    data = b"".join(_MSR.pack(index, 0, value) for index, value in values.items())
    ffi.buffer(table.entries, len(data))[:] = data
    return table


def decode(probe: Any) -> Probe:
    """struct kvmneg_probe of x86."""
    values, refused = msrs(probe.feature_msrs) if probe.feature_msrs else ({}, ())
    missing = {
        "emulated": -probe.emulated_error,
        "hyperv": -probe.hyperv_error,
        "feature_msrs": -probe.feature_msrs_error,
        "xcomp_guest_supp": -probe.xcomp_error,
        "state_msrs": -probe.state_msrs_error,
        "mce_cap": -probe.mce_error,
        "tsc": -probe.tsc_error,
    }
    tsc = probe.tsc
    return Probe(
        Capabilities(probe.capabilities),
        entries(probe.supported),
        entries(probe.emulated) if probe.emulated else None,
        entries(probe.hyperv) if probe.hyperv else None,
        values,
        refused,
        None if missing["xcomp_guest_supp"] else int(probe.xcomp_guest_supp),
        {part: error for part, error in missing.items() if error},
        _indices(probe.state_msrs) if probe.state_msrs else None,
        None if missing["mce_cap"] else int(probe.mce_cap),
        None if missing["tsc"] else Tsc(tsc.khz, tsc.max_khz),
    )
