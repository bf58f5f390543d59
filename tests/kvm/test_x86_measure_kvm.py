# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measuring this machine's own KVM, whatever kind it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg.features import catalog
from kvmneg.features.report import Report
from kvmneg.host import measure
from kvmneg.host.kvm import Kvm
from kvmneg.host.software import Roots

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kvm


@pytest.fixture
def measurer() -> Iterator[measure.Measurer]:
    with measure.Measurer.open() as found:
        yield found


def test_the_report_is_a_document(measurer: measure.Measurer) -> None:
    report = measurer.measure()
    again = Report.loads(json.dumps(report.to_json()).encode())
    assert again.digest() == report.digest()
    assert again.offer == report.offer


def test_registers_are_what_kvm_said(measurer: measure.Measurer) -> None:
    """Every register of leaves 1, 7 and 0x80000001, but for what VMMs give and the CPU's own number."""
    offer = measurer.measure().offer_words
    with Kvm.open() as kvm:
        entries = {entry[:2]: entry for entry in kvm.supported_cpuid()}
    for leaf in ((0x7, 0), (0x80000001, 0)):
        for place, register in enumerate(("eax", "ebx", "ecx", "edx"), 3):
            said = entries[leaf][place]
            assert offer.get(f"cpuid:{leaf[0]:#x}.{leaf[1]}.{register}", 0) == said
    assert offer["cpuid:0x1.0.edx"] == entries[1, 0].edx
    given = 1 << 31 | 1 << 24
    assert offer["cpuid:0x1.0.ecx"] & ~given == entries[1, 0].ecx & ~given
    assert offer["cpuid:0x1.0.ecx"] & 1 << 31


def test_feature_msrs_are_what_kvm_said(measurer: measure.Measurer) -> None:
    offer = measurer.measure().offer_words
    with Kvm.open() as kvm:
        values, refused = kvm.feature_msrs()
    found = {word: value for word, value in offer.items() if word.startswith("msr:")}
    found.pop("msr:0x179", 0)  # no feature MSR: KVM_X86_GET_MCE_CAP_SUPPORTED
    assert found == {f"msr:{index:#x}": value for index, value in values.items()}
    assert not {f"msr:{index:#x}" for index in refused} & offer.keys()


def test_state_is_what_kvm_lists(measurer: measure.Measurer) -> None:
    """Each index of KVM_GET_MSR_INDEX_LIST is a bit, of the catalogue or of its own, and there is no other."""
    offer = measurer.measure().offer_words
    with Kvm.open() as kvm:
        listed = kvm.probe().state_msrs
    assert listed
    bits = sum(value.bit_count() for word, value in offer.items() if word.startswith("state:msr"))
    assert bits == len(set(listed))
    assert offer["state:msrs"] & 7 == 7  # SYSENTER's three: any KVM on any CPU


def test_machine_checks_are_what_kvm_said(measurer: measure.Measurer) -> None:
    offer = measurer.measure().offer_words
    with Kvm.open() as kvm, kvm.scratch() as scratch:
        told = kvm.probe(scratch).mce_cap
        assert (told or 0) & ~(kvm.probe().mce_cap or 0) == 0, "a vCPU keeps no more than KVM has"
        shown = kvm.try_mce(scratch, offer["msr:0x179"])
    said = (told or 0) | offer["kvm:mce"] & 0xFF
    amd = offer["cpuid:0x0.0.ebx"] in (0x68747541, 0x6F677948)  # there KVM gives no more than nine bits
    assert offer["msr:0x179"] == said
    if amd:
        assert not said & ~0x1FF
    assert shown == offer["msr:0x179"]


def test_the_tsc_is_the_rate_of_a_fresh_vcpu(measurer: measure.Measurer) -> None:
    """And asking for it leaves the vCPU as it was."""
    offer = measurer.measure().offer_words
    with Kvm.open() as kvm, kvm.scratch() as scratch:
        first, second = kvm.probe(scratch).tsc, kvm.probe(scratch).tsc
    assert first == second
    if first is None:  # a host whose TSC is not stable
        assert "tsc:khz" not in offer
        return
    low, high = offer["tsc:khz"] & 0xFFFF_FFFF, offer["tsc:khz"] >> 32
    assert low <= first.khz <= high
    assert (first.max_khz > 0) == (offer["kvm:tsc-control"] > 0)


def test_every_catalogued_capability_is_there(measurer: measure.Measurer) -> None:
    offer = measurer.measure().offer_words
    assert {word for word in catalog.load("x86_64").words if word.startswith("kvm:")} <= offer.keys()
    assert offer["kvm:max-vcpus"] >= 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU to run on")
def test_it_does_not_matter_on_which_cpu(measurer: measure.Measurer) -> None:
    before = os.sched_getaffinity(0)
    digests = set()
    try:
        for cpu in sorted(before)[:8]:
            os.sched_setaffinity(0, {cpu})
            digests.add(measurer.measure().digest())
    finally:
        os.sched_setaffinity(0, before)
    assert len(digests) == 1


def _kinds(tmp_path: Path, others: dict[int, str]) -> Roots:
    """This machine, with some of its CPUs of another model in /proc/cpuinfo."""
    blocks = [
        f"processor\t: {cpu}\nvendor_id\t: X\nmodel\t\t: {others.get(cpu, '1')}\n"
        for cpu in range(max(os.sched_getaffinity(0)) + 1)
    ]
    (tmp_path / "cpuinfo").write_text("\n".join(blocks))
    return Roots(proc=str(tmp_path))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU to run on")
def test_each_kind_of_cpu_is_measured_on_itself(tmp_path: Path, measurer: measure.Measurer) -> None:
    """Two kinds by name, one CPU in truth: what is asked and tried twice must come out as if asked once."""
    alone = measurer.measure()
    before = os.sched_getaffinity(0)
    second = sorted(before)[1]
    report = measure.measure(roots=_kinds(tmp_path, {second: "2"}))
    assert report.offer_words == alone.offer_words
    assert report.silicon_words == alone.silicon_words
    assert report.enforcement == alone.enforcement != {}
    assert [row["cpus"] for row in report.identity["kinds"]][1] == str(second)
    assert {row["signature"] for row in report.identity["kinds"]} == {alone.identity["signature"]}
    assert "unvisited" not in report.combo
    assert os.sched_getaffinity(0) == before


_CONFINED = """
import json, os, sys
from kvmneg.host.measure import Measurer
from kvmneg.host.software import Roots
os.sched_setaffinity(0, {int(sys.argv[2])})
with Measurer.open(roots=Roots(proc=sys.argv[1])) as measurer:
    confined = measurer.measure()
    still = measurer.changed(fresh=True)
    os.sched_setaffinity(0, {int(sys.argv[2]), int(sys.argv[3])})  # as a cpuset that is widened from outside
    changed = measurer.changed(fresh=True)
    whole = measurer.measure()
print(json.dumps([confined.combo.get("unvisited"), still, changed, whole.combo.get("unvisited")]))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU to run on")
def test_a_process_that_is_kept_from_a_kind_of_cpu_says_so(tmp_path: Path) -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    roots = _kinds(tmp_path, {second: "2"})
    command = [sys.executable, "-P", "-c", _CONFINED, roots.proc, str(first), str(second)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    unvisited, still, changed, whole = json.loads(done.stdout)
    assert [(row["cpus"], row["kind"]["model"]) for row in unvisited] == [(str(second), "2")]
    assert not still
    assert changed and whole is None


def test_nothing_stays_open(measurer: measure.Measurer) -> None:
    """A daemon that held /dev/kvm open would keep an administrator from reloading KVM's modules."""
    before = sorted(os.listdir("/proc/self/fd"))
    measurer.measure()
    measurer.changed(fresh=True)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_nothing_changes_by_itself(measurer: measure.Measurer) -> None:
    assert measurer.changed()
    first = measurer.measure()
    assert not measurer.changed(fresh=True)
    assert measurer.measure().digest() == first.digest()


def test_silicon_explains(measurer: measure.Measurer) -> None:
    """The CPU's own vendor, and long mode (0x80000001 EDX 29), as this code runs in it."""
    report = measurer.measure()
    assert report.silicon_words["cpuid:0x80000001.0.edx"] & 1 << 29
    vendor = b"".join(
        report.silicon_words[f"cpuid:0x0.0.{register}"].to_bytes(4, "little")
        for register in ("ebx", "edx", "ecx")
    )
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        assert f"vendor_id\t: {vendor.decode()}\n" in file.read()
