# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proof guests while calls of the system fail one after the other: nothing is left behind, and the vCPU is of use."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "system.c", "x86.c", "x86-cpuid.c", "x86-state.c", "proof/deadline.c", "proof/guest.c",
    "proof/x86-machine.c", "proof/x86-proof.c", "proof/x86-guest.S",
)  # fmt: skip
WRAPPED = ("ioctl", "mmap", "munmap", "calloc", "timer_create")
EXIST = 17


class Run(NamedTuple):
    kind: str
    nth: int
    result: int
    touched: int
    mappings: int
    signals: int
    later: int


@pytest.mark.kvm
def test_nothing_is_left_behind(compile_c: Callable[..., Path]) -> None:
    """Whatever fails, the result is its errno, or the answer where the library could do without."""
    program = compile_c(
        "guest_faults",
        ROOT / "tests/kvm/guest_faults.c",
        *(ROOT / "csrc" / source for source in SOURCES),
        *(f"-Wl,--wrap={name}" for name in WRAPPED),
    )
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    runs = [Run(row[0], *map(int, row[1:])) for row in (line.split() for line in text.splitlines())]
    assert [run.result for run in runs if run.kind == "none"] == [0, 0]
    many = Counter(run.kind for run in runs)
    # 3 rows in 2 runs make more than fifteen ioctls; the last run of each kind met no fault
    assert many["ioctl"] > 15 and many["mmap"] == 3 and many["calloc"] == 2 and many["timer"] == 2
    for run in runs:
        assert run.touched == (run.result == 0), run
        assert (run.mappings, run.signals) == (0, 0), run
        assert run.result in {"ioctl": (0, -5), "mmap": (0, -12), "calloc": (0, -12), "timer": (0, -11)}.get(
            run.kind, (0,)
        ), run
        # a slot that KVM did not let go of is in the way of the next
        assert run.later in (0, -EXIST), run
    assert sum(run.later != 0 for run in runs) <= 1
