# SPDX-License-Identifier: LGPL-2.1-or-later
"""The installed QEMU starts, paused, with what a contract of this host leads to; enforce=on makes that a proof."""

import pytest

from kvmneg.emit import qemu
from kvmneg.errors import VmmFault
from kvmneg.features.report import Report
from kvmneg.host import qemu_probe
from kvmneg.host.qemu_probe import Build
from kvmneg.policy.negotiation import negotiate
from kvmneg.policy.request import Request


@pytest.fixture(scope="module")
def build() -> Build:
    path = qemu_probe.find()
    if path is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    return qemu_probe.probe(path)


def test_the_build_says_what_it_knows(build: Build) -> None:
    assert {"fpu", "enforce", "phys-bits"} <= build.properties
    assert build.machine.startswith("pc-q35-")
    newest = tuple(map(int, build.machine.removeprefix("pc-q35-").split(".")))
    assert newest[:1] == tuple(map(int, build.version.split(".")))[:1]


@pytest.mark.kvm(level="x86-64-v1")  # less gives no guest a start
@pytest.mark.parametrize("request_", [Request(level="x86-64-v1"), Request(maximum=True)], ids=["v1", "max"])
def test_qemu_starts_with_a_contract_of_this_host(
    build: Build, kvm_report: Report, request_: Request
) -> None:
    contract = negotiate(request_, kvm_report).contract
    emitted = qemu.emit(contract, build.machine, known=build.properties, host=kvm_report.offer)
    assert qemu_probe.start_paused(build.path, emitted.arguments) == "prelaunch"


@pytest.mark.kvm(level="x86-64-v1")
def test_qemu_refuses_what_the_host_does_not_offer(build: Build, kvm_report: Report) -> None:
    """Without this the test above could pass on a QEMU that drops features in silence."""
    lacking = [
        name
        for name in ("avx512-4fmaps", "xop", "fma4", "tbm", "3dnow")
        if name in build.properties and not kvm_report.offer.field(name)
    ]
    assert lacking, "no CPU has all of them"
    with pytest.raises(VmmFault, match="doesn't support requested feature"):
        qemu_probe.start_paused(
            build.path,
            ["-accel", "kvm", "-machine", build.machine, "-cpu", f"base,{lacking[0]}=on,enforce=on"],
        )


def test_a_program_that_is_no_qemu_is_told_from_one(tmp_path: object) -> None:
    with pytest.raises(VmmFault, match="does not start"):
        qemu_probe.probe("/bin/false")


def test_a_missing_program_is_named() -> None:
    with pytest.raises(VmmFault, match="cannot start /nonexistent"):
        qemu_probe.probe("/nonexistent")


def test_a_silent_program_is_not_waited_for(tmp_path) -> None:  # type: ignore[no-untyped-def]
    program = tmp_path / "silent"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    with pytest.raises(VmmFault, match="in time"):
        qemu_probe.probe(str(program), timeout=0.2)


def test_what_does_not_speak_qmp_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    program = tmp_path / "chatty"
    program.write_text("#!/bin/sh\necho hello\nexec sleep 60\n")
    program.chmod(0o755)
    with pytest.raises(VmmFault, match="does not speak QMP"):
        qemu_probe.probe(str(program), timeout=5)
