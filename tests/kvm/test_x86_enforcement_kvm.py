# SPDX-License-Identifier: LGPL-2.1-or-later
"""Grades of this machine's own KVM, whatever kind it is, against tables tried here by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmneg.features import catalog, words
from kvmneg.host import enforcement, measure, x86
from kvmneg.host.kvm import Kvm, Scratch
from kvmneg.host.tables import CpuidEntry

pytestmark = [
    pytest.mark.kvm,
]


def shown(kvm: Kvm, scratch: Scratch, table: list[CpuidEntry]) -> dict[str, int]:
    """What the vCPU shows of a table, by word, without the registers that are zero."""
    found = kvm.try_cpuid(scratch, table)
    assert found is not None
    return registers(found)


def registers(table: list[CpuidEntry]) -> dict[str, int]:
    return {
        words.cpuid_word(entry.function, entry.index, name): value
        for entry in table
        for name, value in zip(words.REGISTERS, entry[3:], strict=True)
        if value
    }


def test_a_word_that_is_not_graded_is_kept(kvm: Kvm) -> None:
    """Bits of features, where KVM does not own them: all of them when offered, none when not."""
    with kvm.scratch() as scratch:
        probe = kvm.probe(scratch)
        graded = enforcement.grades(kvm, scratch, probe, x86.decoder().offer(probe))
    empty = [entry._replace(eax=0, ebx=0, ecx=0, edx=0) for entry in probe.supported]
    with kvm.scratch() as scratch:
        full, none = shown(kvm, scratch, probe.supported), shown(kvm, scratch, empty)
    owned = {"cpuid:0x1.0.ecx": 1 << 27 | 1 << 3, "cpuid:0x7.0.ecx": 1 << 4, "cpuid:0x40000001.0.eax": 1 << 7}
    offered = registers(probe.supported)
    compared = 0
    for word, rule in catalog.load("x86_64").words.items():
        if word.startswith("cpuid:") and word not in graded:
            bits = rule.and_mask & ~owned.get(word, 0)
            assert full.get(word, 0) & bits == offered.get(word, 0) & bits, word
            assert none.get(word, 0) & bits == 0, word
            compared += 1
    assert compared > 10


def test_a_word_that_is_replaced_differs(kvm: Kvm) -> None:
    with kvm.scratch() as scratch:
        probe = kvm.probe(scratch)
        graded = enforcement.grades(kvm, scratch, probe, x86.decoder().offer(probe))
    replaced = {word for word, why in graded.items() if word.startswith("cpuid:") and why == "replaced"}
    empty = [entry._replace(eax=0, ebx=0, ecx=0, edx=0) for entry in probe.supported]
    with kvm.scratch() as scratch:
        full, none = shown(kvm, scratch, probe.supported), shown(kvm, scratch, empty)
    offered = registers(probe.supported)
    differing = {word for word in full | offered if full.get(word, 0) != offered.get(word, 0)} | set(none)
    assert replaced <= differing


@pytest.mark.skipif(not Path("/sys/module/kvm_pvm").exists(), reason="another kind of KVM")
def test_kvm_pvm_is_found_out(kvm: Kvm) -> None:
    """It forces leaves 1, 7 and 0xD."""
    report = measure.measure()
    replaced = {word for word, why in report.enforcement.items() if why == "replaced"}
    assert {words.parse_cpuid(word)[0] for word in replaced} == {0x1, 0x7, 0xD}
    assert {"cpuid:0x1.0.ecx", "cpuid:0x1.0.edx", "cpuid:0x7.0.ebx", "cpuid:0xd.0.eax"} <= replaced


def test_msrs_are_given_and_read(kvm: Kvm) -> None:
    """A feature MSR is taken with the value that KVM lists; one that no CPU has is refused."""
    values, _refused = kvm.feature_msrs()
    with kvm.scratch() as scratch:
        assert kvm.try_cpuid(scratch, kvm.supported_cpuid()) is not None
        tried = kvm.try_msrs(scratch, {**values, 0x12345678: 1})
    assert tried[0x12345678].unset or tried[0x12345678].value == 0  # kvm.ignore_msrs takes it, and drops it
    if 0x8B in values:  # the microcode revision may be anything
        assert tried[0x8B] == (values[0x8B], False, False)


def test_a_table_that_is_too_long_is_refused(kvm: Kvm) -> None:
    """KVM_MAX_CPUID_ENTRIES is 256, 80 before Linux 5.11."""
    with kvm.scratch() as scratch:
        assert kvm.try_cpuid(scratch, [CpuidEntry(1, 0, 0, 0, 0, 0, 0)] * 257) is None
        assert kvm.try_cpuid(scratch, []) == []
