# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measuring, on stand-ins for KVM and for the machine's files; and the report that the project ships."""

from __future__ import annotations

import json
import os
import threading
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from kvmneg.errors import KvmFault, NoKvm
from kvmneg.features.report import Report
from kvmneg.host import ioctls, measure, network
from kvmneg.host.software import Roots
from kvmneg.host.tables import CpuidEntry, MsrShown, Probe
from kvmneg.policy.definitions import level


class TestNetwork:
    def test_numbers(self) -> None:
        """ioctl-opt computes them from the layout of their arguments."""
        numbers = ioctls.network()
        assert numbers["TUNGETFEATURES"] == network.TUNGETFEATURES
        assert numbers["VHOST_GET_FEATURES"] == network.VHOST_GET_FEATURES

    def test_no_devices(self, tmp_path: Path) -> None:
        assert network.masks(str(tmp_path)) == {}

    def test_other_devices(self, tmp_path: Path) -> None:
        (tmp_path / "net").mkdir()
        (tmp_path / "net/tun").symlink_to("/dev/null")
        (tmp_path / "vhost-net").write_text("a file")
        assert network.masks(str(tmp_path)) == {}

    def test_the_real_tun(self) -> None:
        """IFF_TUN, IFF_TAP and IFF_VNET_HDR are in every kernel's answer since 2.6.27 (linux/if_tun.h)."""
        if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            pytest.skip("no usable /dev/net/tun")
        wanted = 0x0001 | 0x0002 | 0x4000
        assert network.masks()["tap:features"] & wanted == wanted


class FakeKvm:
    """Answers like KVM, as a function of the CPU that asks."""

    log: list[frozenset[int]] = []  # noqa: RUF012 (emptied by the fixture)

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> FakeKvm:
        return cls(path)

    def close(self) -> None:
        pass

    def __enter__(self) -> FakeKvm:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def scratch(self) -> FakeKvm:
        return self

    def feature_msrs(self) -> dict[int, int]:
        return {0x10A: 1}

    def try_cpuid(self, scratch: object, entries: list[CpuidEntry]) -> list[CpuidEntry]:
        return entries  # keeps to everything

    def try_msrs(self, scratch: object, values: dict[int, int]) -> dict[int, MsrShown]:
        return {}

    def probe(self, scratch: object) -> Probe:
        cpus = os.sched_getaffinity(0)
        self.log.append(frozenset(cpus))
        signature = 0xF10 + (min(cpus) if len(cpus) == 1 else 0)
        return Probe({}, [CpuidEntry(1, 0, 0, signature, 0, 0, 0)], None, None, {}, (), None, {})


def cpuinfo(*models: int) -> str:
    rows = (f"processor\t: {n}\nvendor_id\t: X\nmodel\t\t: {model}\n" for n, model in enumerate(models))
    return "\n".join(rows)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    monkeypatch.setattr(measure, "Kvm", FakeKvm)
    monkeypatch.setattr(measure, "ARCHITECTURE", "x86_64")
    monkeypatch.setattr(FakeKvm, "log", [])
    monkeypatch.setattr(measure, "raw_cpuid", lambda cpu: [CpuidEntry(1, 0, 0, cpu + 1, 0, 0, 0)])
    for folder in ("proc/sys/kernel", "sys", "dev"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/hostname").write_text("node7\n")
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo(1, 1))
    return Roots(str(tmp_path / "sys"), str(tmp_path / "proc"), str(tmp_path / "dev"))


def test_a_report(machine: Roots) -> None:
    vmms = [{"name": "qemu", "path": "/q", "version": "1.0", "build": "sha256:0"}]
    report = measure.measure(roots=machine, vmms=vmms)
    assert report.measured.keys() == {"at", "by", "host", "source"}
    assert (report.measured["host"], report.measured["source"]) == ("node7", "kvm")
    assert report.combo["vmms"] == vmms
    assert report.identity["signature"] == "0x00000f10"
    assert report.silicon_words == {"cpuid:0x1.0.eax": min(os.sched_getaffinity(0)) + 1}
    again = Report.loads(json.dumps(report.to_json()).encode())
    assert again.to_json() == report.to_json()


def test_alike_cpus_are_asked_wherever_we_are(machine: Roots) -> None:
    measure.measure(roots=machine)
    assert FakeKvm.log == [frozenset(os.sched_getaffinity(0))]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU to run on")
def test_each_kind_of_cpu_is_asked_on_itself(machine: Roots) -> None:
    before = os.sched_getaffinity(0)
    first, second = sorted(before)[:2]
    models = [1 if cpu == first else 2 for cpu in range(second + 1)]
    (Path(machine.proc) / "cpuinfo").write_text(cpuinfo(*models))
    report = measure.measure(roots=machine)
    assert frozenset({first}) in FakeKvm.log
    assert len(FakeKvm.log) == 2
    assert os.sched_getaffinity(0) == before
    assert report.offer_words["cpuid:0x1.0.eax"] == 0xF10 + first, "the lowest signature of the kinds"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU to run on")
def test_each_kind_of_cpu_is_tried_on_itself(machine: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that one kind does not keep to is not kept to; each is tried with what both offer."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    tried: dict[frozenset[int], int] = {}

    def try_cpuid(self: FakeKvm, scratch: object, entries: list[CpuidEntry]) -> list[CpuidEntry]:
        here = frozenset(os.sched_getaffinity(0))
        tried.setdefault(here, entries[0].eax)
        return [entry._replace(edx=1) for entry in entries] if here == {second} else entries

    monkeypatch.setattr(FakeKvm, "try_cpuid", try_cpuid)
    monkeypatch.setattr(FakeKvm, "capabilities", {}, raising=False)
    (Path(machine.proc) / "cpuinfo").write_text(cpuinfo(*[1] * second, 2))
    report = measure.measure(roots=machine)
    assert "unvisited" not in report.combo
    assert tried == {frozenset({first}): 0xF10 + first, frozenset({second}): 0xF10 + first}
    assert report.enforcement["cpuid:0x1.0.edx"] == "replaced"
    assert [row["signature"] for row in report.identity["kinds"]] == [
        f"{0xF10 + cpu:#010x}" for cpu in (first, second)
    ]


def test_this_thread_keeps_its_affinity_as_it_was_given(
    machine: Roots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set back, it would be this thread's own choice, and CPUs that come later would not be among it."""
    elsewhere: list[bool] = []
    here = threading.get_ident()
    pin = os.sched_setaffinity

    def recorded(pid: int, cpus: set[int]) -> None:
        elsewhere.append(threading.get_ident() != here)
        pin(pid, cpus)

    def raw_cpuid(cpu: int) -> list[CpuidEntry]:
        elsewhere.append(threading.get_ident() != here)
        return []

    monkeypatch.setattr(os, "sched_setaffinity", recorded)
    monkeypatch.setattr(measure, "raw_cpuid", raw_cpuid)
    last = max(os.sched_getaffinity(0))
    (Path(machine.proc) / "cpuinfo").write_text(cpuinfo(*range(last + 1)))
    measure.measure(roots=machine)
    assert elsewhere and all(elsewhere)


def test_a_kind_of_cpu_that_may_not_be_visited_is_told(machine: Roots) -> None:
    last = max(os.sched_getaffinity(0))
    (Path(machine.proc) / "cpuinfo").write_text(cpuinfo(*[1] * (last + 1), 2, 2))
    report = measure.measure(roots=machine)
    (row,) = report.combo["unvisited"]
    assert row["cpus"] == f"{last + 1}-{last + 2}"
    assert row["kind"] == {"vendor": "X", "model": "2"}
    assert "affinity or cpuset" in row["because"]
    assert report.offer_words["cpuid:0x1.0.eax"] == 0xF10
    whole = Report.from_json({**report.to_json(), "combo": {**report.combo, "unvisited": []}})
    assert whole.combo_digest() != report.combo_digest()


def test_cpus_that_are_offline_are_told(machine: Roots) -> None:
    folder = Path(machine.sys) / "devices/system/cpu"
    folder.mkdir(parents=True)
    (folder / "present").write_text("0-3,8\n")
    (folder / "online").write_text("0-1,3\n")
    report = measure.measure(roots=machine)
    assert report.measured["offline"] == "2,8"
    assert "unvisited" not in report.combo
    (folder / "online").write_text("0-3,8\n")
    assert "offline" not in measure.measure(roots=machine).measured


def test_a_cpu_that_comes_online_is_a_change(machine: Roots) -> None:
    """Of another kind too: what was measured without it is no more."""
    last = max(os.sched_getaffinity(0))
    folder = Path(machine.sys) / "devices/system/cpu"
    folder.mkdir(parents=True)
    (folder / "present").write_text(f"0-{last + 1}\n")
    (folder / "online").write_text(f"0-{last}\n")
    (Path(machine.proc) / "cpuinfo").write_text(cpuinfo(*[1] * (last + 1)))
    measurer = measure.Measurer.open(roots=machine)
    before = measurer.measure()
    assert not measurer.changed(fresh=True)
    (folder / "online").write_text(f"0-{last + 1}\n")
    (Path(machine.proc) / "cpuinfo").write_text(cpuinfo(*[1] * (last + 1), 2))
    assert measurer.changed(fresh=True)
    after = measurer.measure()
    assert after.digest() != before.digest() and after.combo["unvisited"]
    assert not measurer.changed(fresh=True)


def test_raw_cpuid_is_read_again_when_cpus_change(machine: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def raw_cpuid(cpu: int) -> list[CpuidEntry]:
        read.append(cpu)
        return []

    monkeypatch.setattr(measure, "raw_cpuid", raw_cpuid)
    with measure.Measurer.open(roots=machine) as measurer:
        measurer.measure()
        measurer.measure()
        assert len(read) == 1
        (Path(machine.proc) / "cpuinfo").write_text(cpuinfo(3, 3))
        measurer.measure()
        assert len(read) == 2


def test_changed(machine: Roots) -> None:
    measurer = measure.Measurer.open(roots=machine)
    assert measurer.changed(), "nothing measured yet"
    measurer.measure()
    assert not measurer.changed(fresh=True)
    online = Path(machine.sys) / "devices/system/cpu/online"
    online.parent.mkdir(parents=True)
    online.write_text("0-1")
    assert measurer.changed(fresh=True)
    measurer.measure()
    assert not measurer.changed(fresh=True)


def test_a_measurement_that_failed_is_no_measurement(machine: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    measurer = measure.Measurer.open(roots=machine)
    measurer.measure()

    def fail(self: FakeKvm, scratch: object) -> Probe:
        raise KvmFault("KVM_GET_SUPPORTED_CPUID", 14)

    monkeypatch.setattr(FakeKvm, "probe", fail)
    with pytest.raises(KvmFault):
        measurer.measure()
    assert measurer.changed(fresh=True)


@pytest.mark.parametrize("path", ["/nonexistent/kvm", "/dev/null"])
def test_no_kvm(path: str) -> None:
    with pytest.raises(NoKvm):
        measure.Measurer.open(path)
    with pytest.raises(NoKvm):
        measure.measure(path)


class TestRecordedReport:
    """kvmneg/data/recorded-host.json: what `make run` shows where there is no KVM."""

    @pytest.fixture
    def data(self) -> bytes:
        return resources.files("kvmneg").joinpath("data/recorded-host.json").read_bytes()

    def test_it_says_what_it_is(self, data: bytes) -> None:
        report = Report.loads(data)
        assert report.measured["source"] == "recorded"
        assert "-accel tcg" in report.measured["by"]
        assert report.identity["vendor"] == "AuthenticAMD"

    @pytest.mark.parametrize("name", ["x86-64-v1", "x86-64-v2", "x86-64-v3"])
    def test_levels_it_has(self, data: bytes, name: str) -> None:
        offer = Report.loads(data).offer
        assert not [feature for feature in level(name, "x86_64") if not offer.field(feature)]

    def test_a_level_it_lacks(self, data: bytes) -> None:
        """What the psABI adds at x86-64-v4."""
        offer = Report.loads(data).offer
        lacking = {feature for feature in level("x86-64-v4", "x86_64") if not offer.field(feature)}
        assert lacking >= {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

    def test_it_is_complete(self, data: bytes) -> None:
        document: dict[str, Any] = json.loads(data)
        assert document["combo"]["kernel"].startswith("6.1.")
        assert document["combo"]["modules"]["kvm_amd.nested"] == "1"
        assert document["offer"]["vhost-net:features"] == "0x000000033d008000"  # 6.1; 6.12 adds bit 36
