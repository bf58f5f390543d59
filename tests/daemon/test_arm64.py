# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon of an arm64 host, from end to end: what it offers, pins and grants, and what it refuses by name.

The report is made by hand: a Neoverse N1 under Linux 6.18, with one under 6.1 as the way back.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.errors import Blocked, UsageError
from kvmneg.policy import rollback
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence

from .conftest import Daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from kvmneg.features.report import Report

VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
PSCI, STD = "arm64:0x6030000000140000", "arm64:0x6030000000160000"
ISAR0, CLIDR, VENDOR_2 = "arm64:0x603000000013c030", "arm64:0x603000000013c801", "arm64:0x6030000000160003"


def _reports() -> ModuleType:
    """tests/unit/arm64_reports.py, which is no module of this package."""
    path = Path(__file__).parents[1] / "unit" / "arm64_reports.py"
    spec = importlib.util.spec_from_file_location("arm64_reports_of_unit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOSTS = _reports()


def started(folder: Path, report: Report) -> Daemon:
    file = folder / "report.json"
    file.write_text(json.dumps(report.to_json()), "utf-8")
    return Daemon(folder, "--report", str(file)).start()


@pytest.fixture
def new(tmp_path: Path) -> Iterator[Daemon]:
    daemon = started(tmp_path, HOSTS.new())
    yield daemon
    daemon.end()


@pytest.fixture
def fence() -> Fence:
    found = rollback.judge(HOSTS.new(), HOSTS.old()).fence
    assert found is not None
    return found


def call(daemon: Daemon, method: str, **parameters: Any) -> dict[str, Any]:
    with daemon.client() as client:
        answer: dict[str, Any] = client.call(f"org.kvmneg.{method}", parameters)
    return answer


def test_it_offers_registers_and_says_what_they_are_for(new: Daemon) -> None:
    host = call(new, "GetHost")["host"]
    assert host["architecture"] == "arm64" and host["settable"][CLIDR] == "0xffffffffffffffff"
    answer = call(new, "Negotiate", request={})
    contract = answer["contract"]
    assert int(contract["words"][PSCI], 16) == 0x1_0003 and contract["init"] == ["psci"]
    assert contract["portable"][VENDOR_2] == "carry"
    assert any("ID and firmware registers" in line for line in answer["scope"])
    assert any("report is recorded" in line for line in answer["scope"])


def test_under_a_fence_a_guest_is_granted_started_and_ended(new: Daemon, fence: Fence) -> None:
    pinned = call(new, "Fence.Pin", text=fence.text(), reason="a way back to 6.1")
    assert Fence.parse(pinned["text"]).granted == fence.granted
    shown = call(new, "Fence.Get")
    assert (
        shown["pinned"]
        and shown["state"] == "pinned"
        and Fence.parse(shown["text"]).registers == fence.registers
    )
    answer = call(new, "Negotiate", request={})
    contract = answer["contract"]
    assert int(contract["words"][PSCI], 16) == 0x1_0001 and int(contract["words"][CLIDR], 16) == 0x8200_0023
    assert contract["portable"][VENDOR_2] == "drop-if 0x0"
    begun = call(new, "Begin", digest=answer["digest"], vm=VM)
    data = Path(begun["path"]).read_bytes()
    made = Contract.from_binary(data)
    assert made.digest == answer["digest"] and made.granted.value(PSCI) == 0x1_0001
    assert {one.word(): one.text() for one in made.portable}[VENDOR_2] == "drop-if 0x0"
    call(new, "Started", vm=VM)
    assert call(new, "GetContract", digest=answer["digest"])["state"] == "granted"
    call(new, "End", vm=VM)
    assert call(new, "Check", digest=answer["digest"])["fits"]


def test_the_guest_goes_back_to_a_daemon_under_the_old_kernel(
    new: Daemon, fence: Fence, tmp_path: Path
) -> None:
    unfenced = call(new, "Negotiate", request={})["contract"]
    call(new, "Fence.Pin", text=fence.text(), reason="a way back to 6.1")
    fenced = call(new, "Negotiate", request={})["contract"]
    old = HOSTS.old()
    from kvmneg.policy import negotiation

    contracts = [Contract.from_json(document) for document in (fenced, unfenced)]
    assert negotiation.check(contracts[0], old) == ()
    names = {blocker.feature for blocker in negotiation.check(contracts[1], old)}
    assert {"psci-version", "aa64dfr0-debugver", "clidr-loc", VENDOR_2} <= names


def test_a_level_is_granted_and_pinned(new: Daemon) -> None:
    answer = call(new, "Negotiate", request={"level": "armv8.1-a"})
    assert int(answer["contract"]["words"][ISAR0], 16) == 0x1021_0000
    assert call(new, "Check", request={"level": "armv8.2-a"})["fits"]
    no = call(new, "Check", request={"level": "armv8.4-a"})
    assert not no["fits"] and "aa64pfr0-dit" in {row["feature"] for row in no["blockers"]}
    pinned = call(new, "Fence.Pin", **{"from": "level:armv8.1-a"}, reason="a smaller pool")
    assert Fence.parse(pinned["text"]).granted.value(ISAR0) == 0x1021_0000
    with pytest.raises(UsageError):
        call(new, "Negotiate", request={"level": "x86-64-v2"})


def test_a_vmm_that_cannot_set_registers_is_named(new: Daemon, fence: Fence) -> None:
    assert call(new, "Negotiate", request={"vmm": "qemu-10.2"})["digest"]
    call(new, "Fence.Pin", text=fence.text(), reason="a way back to 6.1")
    with pytest.raises(Blocked) as no:
        call(new, "Negotiate", request={"vmm": "qemu-10.2"})
    assert {blocker.cause for blocker in no.value.blockers} == {"vmm"}
    assert "psci-version" in {blocker.feature for blocker in no.value.blockers}
    with pytest.raises(Blocked, match="cannot be given") as no:
        call(new, "Negotiate", request={"vmm": "firecracker"})
    assert {blocker.feature.partition(":")[0] for blocker in no.value.blockers} == {"arm64"}, (
        "registers alone"
    )
    assert call(new, "Negotiate", request={"vmm": "generic"})["digest"]


def test_an_imported_report_says_where_settable_fields_are_from(tmp_path: Path) -> None:
    report = HOSTS.report("n1", HOSTS.OLD, kernel="6.1.172", settable={})
    daemon = started(tmp_path, report)
    try:
        answer = call(daemon, "Negotiate", request={})
        line = "not measured: which fields can be set on n1; it is taken from upstream Linux 6.1"
        assert line in answer["scope"] and line in call(daemon, "Check", request={})["scope"]
        with pytest.raises(Blocked, match="less than this fence promises"):
            call(daemon, "Fence.Pin", text=Fence(HOSTS.new().offer).text(), reason="too high")
    finally:
        daemon.end()
