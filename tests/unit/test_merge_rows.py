# SPDX-License-Identifier: LGPL-2.1-or-later
"""How x86 hosts merge, row by row, against vectors written by hand (vectors/x86_merge_rows.toml)."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from kvmneg.features import catalog, rules
from kvmneg.features.featureset import FeatureSet, fits, meet

TABLE = tomllib.loads((Path(__file__).parent / "vectors" / "x86_merge_rows.toml").read_text("utf-8"))
VECTORS: list[dict[str, Any]] = TABLE["vector"]
FITS: list[dict[str, Any]] = TABLE["fit"]

# Every kind of word that two hosts have to agree on: a kind without a vector is a rule that nobody checked.
ROWS = frozenset({
    "0 EAX", "0 EBX, ECX, EDX", "1 EAX", "1 EBX", "1 ECX, EDX", "2, 4, 5, 80000005, 80000006, 8000001D",
    "6 EAX[2] ARAT", "7.0 EAX", "7.0 EBX", "7.0 EBX HLE and RTM", "7.0 ECX, EDX",
    "7.0 EDX RTM_ALWAYS_ABORT(11)", "7.0 EDX ARCH_CAPABILITIES(29)", "7.1", "7.2 EDX", "0xA EAX, EDX",
    "0xA EBX", "0xA ECX", "0xB, 0x1F, 8000001E, 80000026", "0xD.0", "0xD.1", "0xD.n", "0x12", "0x14",
    "0x15, 0x16", "0x1C EAX", "0x1D, 0x1E", "0x24", "40000001 EAX", "40000001 EDX",
    "40000003, 40000004, 4000000A", "40000004[18]", "4000000A low half", "40000002", "40000005", "80000000",
    "80000001 ECX, EDX", "80000001 EDX copies", "80000007", "80000008 EAX", "80000008 EBX", "80000008 ECX",
    "8000000A", "8000001F", "80000021 EAX", "80000021 EBX, ECX", "80000022", "C0000001 EDX", "0x10a and",
    "0x10a or", "0x10a reserved", "0xcf", "0x345", "0x48b, 0x48d-0x490", "0x481-0x484", "0x480", "0x485",
    "0x486, 0x488", "0x487, 0x489", "0x48a", "0x48c", "0x491", "0xc0011029", "0xce bit 31", "0x8b",
    "capabilities: TSC_CONTROL, GET_TSC_KHZ", "capabilities: TSC rates",
    "capabilities: X86_USER_SPACE_MSR", "capabilities: XSAVE", "state: MSRs",
    "state: what is no MSR", "state: nested", "capabilities: X2APIC_API", "capabilities: XSAVE2",
    "capabilities: MAX_VCPUS, MAX_VCPU_ID", "capabilities: MCE, MCG_CAP", "capabilities: NESTED_STATE",
    "capabilities: HYPERV_*", "capabilities: VM_TYPES", "capabilities: DISABLE_QUIRKS2",
    "capabilities: PMU_CAPABILITY", "capabilities: ENFORCE_PV_FEATURE_CPUID, SPLIT_IRQCHIP, X86_SMM",
    "dependencies: AVX, AVX2, AVX-512", "dependencies: PCID, INVPCID", "dependencies: SVM, VMX",
})  # fmt: skip


def _words(*tables: dict[str, str]) -> dict[str, int]:
    return {word: int(text, 16) for table in tables for word, text in table.items()}


def _host(row: dict[str, Any], side: str) -> FeatureSet:
    return FeatureSet.of("x86_64", _words(row.get("common", {}), row[side]))


def _name(row: dict[str, Any]) -> str:
    return f"{row.get('row') or row['rule']}: {row['source']}"


@pytest.mark.parametrize("vector", VECTORS, ids=_name)
def test_two_hosts_merge_as_the_manual_says(vector: dict[str, Any]) -> None:
    a, b = _host(vector, "a"), _host(vector, "b")
    for merged in (meet(a, b), meet(b, a)):
        assert sorted(conflict.word for conflict in merged.conflicts) == vector.get("incompatible", [])
        expected = _words(vector.get("result", {}))
        assert {word: hex(merged.value(word)) for word in expected} == {
            w: hex(v) for w, v in expected.items()
        }


@pytest.mark.parametrize("vector", [v for v in VECTORS if "incompatible" not in v], ids=_name)
def test_the_merge_fits_both_hosts(vector: dict[str, Any]) -> None:
    a, b = _host(vector, "a"), _host(vector, "b")
    assert fits(meet(a, b), a) == ()
    assert fits(meet(a, b), b) == ()


@pytest.mark.parametrize("vector", [v for v in VECTORS if "constant" in v], ids=_name)
def test_constants_do_not_depend_on_hosts(vector: dict[str, Any]) -> None:
    for word, (mask, value) in vector["constant"].items():
        assert (word, int(mask, 16), int(value, 16)) in catalog.load("x86_64").policy


@pytest.mark.parametrize("vector", [v for v in VECTORS if "withheld" in v], ids=_name)
def test_some_features_are_granted_by_name_only(vector: dict[str, Any]) -> None:
    assert all(catalog.names("x86_64").feature(name).withheld for name in vector["withheld"])


def test_every_row_has_a_vector_and_every_vector_says_something() -> None:
    assert {vector["row"] for vector in VECTORS} == ROWS
    assert all(vector.get("result") or vector.get("incompatible") for vector in VECTORS)
    assert all(vector["source"] for vector in VECTORS)


@pytest.mark.parametrize("row", FITS, ids=_name)
def test_a_guest_fits_a_host_in_the_order_of_the_rule(row: dict[str, Any]) -> None:
    blockers = fits(_host(row, "guest"), _host(row, "host"))
    assert [blocker.feature for blocker in blockers] == row["blocked"]


def test_every_rule_that_merges_has_its_order_checked() -> None:
    used = {feature.rule for feature in catalog.names("x86_64").by_name.values()}
    assert {row["rule"] for row in FITS} == set(rules.RULES) & used
