# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkvmneg when KVM fails half-way, lies, or memory runs out: tests/kvm/faults.c makes it so, no KVM needed.

The contract judged here is kvmneg.h's: a negative errno, ret_ parameters untouched on failure, nothing
leaked, the ioctl that failed named in the trace.
"""

from __future__ import annotations

import errno
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = {"x86_64": "arm64", "aarch64": "x86"}
WRAP = tuple(f"-Wl,--wrap={name}" for name in ("ioctl", "calloc", "free"))
OPTIONAL = {  # parts a KVM may lack: kvmneg_probe() goes on without them
    "KVM_GET_EMULATED_CPUID",
    "KVM_GET_SUPPORTED_HV_CPUID",
    "KVM_GET_MSR_FEATURE_INDEX_LIST",
    "KVM_GET_MSRS",
    "KVM_GET_DEVICE_ATTR",
    "KVM_GET_MSR_INDEX_LIST",
    "KVM_X86_GET_MCE_CAP_SUPPORTED",
    "KVM_X86_SETUP_MCE",
    "KVM_GET_TSC_KHZ",
    "KVM_SET_TSC_KHZ",
}
# kvmneg.h: a host whose TSC is not stable answers EIO to the question for its rate, and has everything else
UNSTABLE_TSC = ("probe", "KVM_GET_TSC_KHZ", -errno.EIO), ("probe", "KVM_SET_TSC_KHZ", -errno.EIO)


class Run(NamedTuple):
    """One line of faults.c."""

    scenario: str
    kind: str
    nth: int
    result: int
    touched: bool
    descriptors: int
    allocations: int
    ioctls: int
    failed: str


def runs(command: list[str]) -> list[Run]:
    """What the program printed."""
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in text.splitlines())
    return [
        Run(row[0], row[1], int(row[2]), int(row[3]), row[4] == "1", *map(int, row[5:8]), row[8])
        for row in rows
    ]


@pytest.fixture(scope="module")
def faults(compile_c: Callable[..., Path]) -> Path:
    """The program for this machine."""
    foreign = FOREIGN[platform.machine()]
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.[cS]")) if not path.name.startswith(foreign)]
    return compile_c("faults", ROOT / "tests/kvm/faults.c", *sources, *WRAP)


def check_contract(all_runs: list[Run]) -> None:
    """What holds for every run, whatever the fault."""
    assert len(all_runs) > 500  # two descriptors with 256 capabilities each, at least
    for run in all_runs:
        assert (run.descriptors, run.allocations) == (0, 0), run
        assert run.touched == (run.result == 0), run
        assert run.result <= 0, run
        if run.kind == "none":
            assert run.result == 0, run
        if run.kind == "allocation":
            assert run.result == -errno.ENOMEM, run


@pytest.mark.parametrize("error", [errno.EIO, errno.EBADF, errno.EFAULT, errno.ENOMEM])
def test_nth_ioctl_fails(faults: Path, error: int) -> None:
    """An error that no ioctl may give is returned as it is, at every point, and names its ioctl."""
    found = runs([str(faults), "sweep", str(error)])
    check_contract(found)
    for run in found:
        if run.kind == "error":
            unstable = (run.scenario, run.failed, -error) in UNSTABLE_TSC
            assert run.result == (0 if unstable else -error), run
            assert run.failed.startswith("KVM_"), run
            assert run.ioctls == run.nth, run  # and nothing more was asked


@pytest.mark.only_on("x86_64")
@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENXIO, errno.EOPNOTSUPP])
def test_absent_parts(faults: Path, error: int) -> None:
    """An ioctl that this KVM does not know is an answer in a probe, and a failure when asked for alone."""
    found = runs([str(faults), "sweep", str(error)])
    check_contract(found)
    for run in (run for run in found if run.kind == "error"):
        answer = run.failed == "KVM_CHECK_EXTENSION" or (run.scenario == "probe" and run.failed in OPTIONAL)
        # "This rate is too high" is what looking for the highest one asks for.
        if run.scenario == "tsc" and run.failed == "KVM_SET_TSC_KHZ" and error == errno.EINVAL:
            assert run.result in (0, -error), run
            continue
        # The Hyper-V scenario's first ioctl fails by itself: it finds its vCPU either way.
        if run.scenario == "hyperv" and run.nth == 1:
            answer = True
        assert run.result == (0 if answer else -error), run


@pytest.mark.only_on("x86_64")
def test_too_small(faults: Path) -> None:
    """E2BIG makes a table grow and is asked again; anywhere else it is an error."""
    found = runs([str(faults), "sweep", str(errno.E2BIG)])
    check_contract(found)
    for run in (run for run in found if run.kind == "error"):
        if run.failed.endswith("_CPUID"):
            assert run.result == 0, run
        elif run.failed in (
            "KVM_CHECK_EXTENSION",
            "KVM_CREATE_VM",
            "KVM_CREATE_VCPU",
            "KVM_GET_MSRS",
            "KVM_SET_CPUID2",
            "KVM_GET_TSC_KHZ",
            "KVM_SET_TSC_KHZ",
            "KVM_X86_GET_MCE_CAP_SUPPORTED",
            "KVM_X86_SETUP_MCE",
        ):
            assert run.result == -errno.E2BIG, run


def test_interrupted(faults: Path) -> None:
    """KVM_CREATE_VM that a signal interrupts is tried again."""
    found = runs([str(faults), "sweep", str(errno.EINTR)])
    check_contract(found)
    interrupted = [run for run in found if run.kind == "error" and run.failed == "KVM_CREATE_VM"]
    # an arm64 probe makes VMs of its own
    probing = {"probe", "machine"} if platform.machine() == "aarch64" else set()
    assert {run.scenario for run in interrupted} == {"create_vm", "scratch"} | probing
    assert {run.result for run in interrupted} == {0}


def test_stubborn(faults: Path) -> None:
    """A fault that never ends does end here; a KVM that answers nonsense is not believed."""
    found = runs([str(faults), "stubborn"])
    by_name = {(run.kind, run.scenario): run for run in found}
    for run in found:
        assert (run.descriptors, run.allocations) == (0, 0), run
        assert run.touched == (run.result == 0), run
    assert by_name["always", "create_vm"].result == -errno.EINTR
    assert by_name["always", "list"].result == -errno.E2BIG
    assert by_name["lie", "open"].result == -errno.EPROTONOSUPPORT
    assert by_name["lie", "list"].result == -errno.E2BIG  # four thousand million entries were not allocated
    assert by_name["lie", "list"].ioctls == 1
    if platform.machine() == "x86_64":
        assert by_name["always", "supported"].result == -errno.E2BIG
        assert by_name["always", "supported"].ioctls == 13  # 1, 2, 4 … 4096 entries
        assert by_name["lie", "supported"].result == -errno.EPROTO
        assert by_name["lie", "try_cpuid"].result == -errno.EPROTO
        assert by_name["lie", "try_msrs"].result == -errno.EPROTO


def test_null_and_negative(faults: Path) -> None:
    """Cleanup takes NULL and -1; open() names what it did not like and leaves the descriptor alone."""
    lines = subprocess.run(
        [faults, "null"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()
    assert lines[0] == "-1 1 1 1"
    assert lines[1] == f"{-errno.ENOENT} {-errno.EISDIR}"
    assert lines[2:] == [str(-errno.ENOTTY), "-1"]
