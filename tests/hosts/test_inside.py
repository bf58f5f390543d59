# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tests of the KVM layer, run inside hosts whose KVM is the kernel's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvmneg.features.report import Report
from tests.conftest import MINIMUM_ARM64, MINIMUM_X86
from tests.hosts import catalogue, inside, recording, userspace, vmm
from tests.packages.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.hosts.catalogue import Host
    from tests.summary import Part

pytestmark = pytest.mark.hosts
LEAST = {"arm64": 50, "x86": 30}  # tests for that architecture only; fewer, and a file is lost
MINIMUM = {"arm64": MINIMUM_ARM64, "amd64": MINIMUM_X86}
SUITE = ("-m", "kvm", "tests/kvm", "tests/plugin")
# Each boot takes minutes: test_kvm_suite_on_intel, and test_moves.py, measure theirs too.
BOOTED_ELSEWHERE = (catalogue.find("intel-6.1").cpu, "corei7_sandy_bridge_2600k")


def run(
    host: Host, *words: str, extra: Callable[[], dict[str, bytes]] = dict, report: bool = False
) -> inside.Inside:
    """Runs them; skips where the mirror is needed and not there."""
    try:
        return inside.run(host, *words, extra=extra(), report=report)
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")


def passed(host: Host, found: inside.Inside, summary_parts: list[Part]) -> None:
    """All of tests/kvm that needs a KVM passes there, on that kernel, and made the ioctls that it must.

    So does what our pytest plugin gives to others' tests: a contract, and a VM that keeps it.
    """
    assert found.part is not None, found.tail()
    summary_parts.append(found.part)
    assert found.result.status == 0, found.tail()
    assert not found.part.problem
    assert host.kernel in found.part.kind
    assert not set(MINIMUM[host.architecture]) - found.part.succeeded()
    assert "failed" not in found.part.outcomes
    ran = {
        kind: sum(count for file, count in found.part.files.items() if f"/test_{kind}_" in file)
        for kind in ("arm64", "x86")
    }
    own, other = ("arm64", "x86") if host.architecture == "arm64" else ("x86", "arm64")
    assert ran[own] >= LEAST[own]
    assert ran[other] == 0


def measured(host: Host, found: Report) -> None:
    """It is an Intel host with VMX, and what its recorded report says is what it says."""
    assert found.identity["vendor"] == "GenuineIntel"
    assert found.offer_words["cpuid:0x1.0.ecx"] & 1 << 5  # VMX
    assert {
        f"msr:{index:#x}" for index in (0x480, 0x48B, 0x48D, 0x48E, 0x48F, 0x490)
    } <= found.offer_words.keys()
    assert not recording.path(host).exists() or recording.unlike(host, found) == {}


def test_kvm_suite(qemu_host: Host, summary_parts: list[Part]) -> None:
    passed(qemu_host, run(qemu_host, *SUITE), summary_parts)


@pytest.mark.every_host
@pytest.mark.parametrize("line", catalogue.INTEL_LINES)
def test_kvm_suite_on_intel(line: str, summary_parts: list[Part]) -> None:
    host = catalogue.find(f"intel-{line}")
    found = run(host, *SUITE, report=True)
    passed(host, found, summary_parts)
    measured(host, Report.loads(found.result.files["report.json"]))


@pytest.mark.every_host
@pytest.mark.parametrize("name", ["amd-6.1", "amd-6.12", "amd-newest"])
def test_a_qemu_inside(name: str, summary_parts: list[Part]) -> None:
    """A real QEMU starts there, on a KVM that keeps its word, with what contracts of that host lead to."""
    found = run(
        catalogue.find(name),
        "tests/kvm/test_x86_qemu_emit.py",
        extra=lambda: vmm.qemu("7.2", userspace.suite()),
    )
    assert found.part is not None, found.tail()
    summary_parts.append(found.part._replace(name=f"{name} with QEMU 7.2"))
    assert found.result.status == 0, found.tail()
    assert set(found.part.outcomes) == {"passed"}, found.tail()


@pytest.mark.every_host
@pytest.mark.parametrize("line", catalogue.INTEL_LINES)
@pytest.mark.parametrize(
    "model", [model for model in catalogue.INTEL_MODELS if model not in BOOTED_ELSEWHERE]
)
def test_intel(model: str, line: str) -> None:
    host = catalogue.find(f"intel-{line}", model)
    try:
        found = Report.loads(json.dumps(recording.record(host)).encode())
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")
    measured(host, found)
