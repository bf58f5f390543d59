# SPDX-License-Identifier: LGPL-2.1-or-later
"""The CPUID instruction under affinity; /proc/cpuinfo is the kernel's own reading of it."""

from __future__ import annotations

import errno
import os
import struct
import threading
from pathlib import Path

import pytest

from kvmneg.errors import KvmFault
from kvmneg.host.kvm import raw_cpuid
from kvmneg.host.tables import CpuidEntry


def by_leaf(cpu: int) -> dict[tuple[int, int], CpuidEntry]:
    entries = raw_cpuid(cpu)
    found = {(entry.function, entry.index): entry for entry in entries}
    assert len(found) == len(entries)
    return found


def cpuinfo(cpu: int) -> dict[str, str]:
    for block in Path("/proc/cpuinfo").read_text("ascii").strip().split("\n\n"):
        rows = dict(map(str.strip, line.partition(":")[::2]) for line in block.splitlines())
        if rows["processor"] == str(cpu):
            return rows
    raise AssertionError(f"no CPU {cpu}")


@pytest.mark.parametrize("cpu", sorted(os.sched_getaffinity(0))[:4])
def test_identity(cpu: int) -> None:
    """Vendor, family, model, stepping and a few flags (Intel SDM vol. 2A CPUID leaves 0 and 1)."""
    leaves, info = by_leaf(cpu), cpuinfo(cpu)
    zero, one = leaves[0, 0], leaves[1, 0]
    assert struct.pack("<III", zero.ebx, zero.edx, zero.ecx).decode("ascii") == info["vendor_id"]
    family = one.eax >> 8 & 0xF
    model = one.eax >> 4 & 0xF | (one.eax >> 12 & 0xF0 if family in (6, 15) else 0)
    family += one.eax >> 20 & 0xFF if family == 15 else 0
    assert (family, model, one.eax & 0xF) == (
        int(info["cpu family"]),
        int(info["model"]),
        int(info["stepping"]),
    )
    flags = info["flags"].split()
    # Linux never shows a flag that CPUID lacks for these three.
    for flag, bit in (("cx8", 8), ("cmov", 15), ("fxsr", 24)):
        assert flag not in flags or one.edx >> bit & 1


def test_leaves_are_complete() -> None:
    """Each range from its base to the last leaf it names; subleaves where the leaf says they are."""
    leaves = by_leaf(min(os.sched_getaffinity(0)))
    for base in (0, 0x80000000):
        assert {leaf for leaf, _ in leaves if leaf >> 16 == base >> 16} == set(
            range(base, leaves[base, 0].eax + 1)
        )
    if (7, 0) in leaves:
        assert [sub for leaf, sub in leaves if leaf == 7] == list(range(leaves[7, 0].eax + 1))
    if (0xD, 1) in leaves:
        first, second = leaves[0xD, 0], leaves[0xD, 1]
        components = first.eax | first.edx << 32 | second.ecx | second.edx << 32
        expected = {0, 1} | {n for n in range(2, 64) if components >> n & 1}
        assert {sub for leaf, sub in leaves if leaf == 0xD} == expected


def test_affinity_comes_back() -> None:
    before = os.sched_getaffinity(0)
    for cpu in before:
        raw_cpuid(cpu)
        assert os.sched_getaffinity(0) == before


def test_affinity_of_a_narrow_thread() -> None:
    """A thread that is bound to one CPU reads another's and is bound to its own again."""
    cpus = sorted(os.sched_getaffinity(0))
    seen: list[set[int]] = []

    def work() -> None:
        os.sched_setaffinity(0, {cpus[0]})  # 0 is this thread only
        raw_cpuid(cpus[-1])
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [{cpus[0]}]
    assert os.sched_getaffinity(0) == set(cpus)


@pytest.mark.parametrize("cpu", [-1, -(2**40), 1023, 2**20, 2**31, 2**70])
def test_no_such_cpu(cpu: int) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(KvmFault) as fault:
        raw_cpuid(cpu)
    assert fault.value.fields["errno"] == errno.EINVAL
    assert os.sched_getaffinity(0) == before
