# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg_clamp_cpuid: which bits of a VMM's table a contract binds, which stay the VMM's, by the catalogue's rules."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmneg.features import catalog, rules, words
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.host import enforcement, measure
from kvmneg.host.apply import Applied
from kvmneg.host.capabilities import NAMES
from kvmneg.host.tables import CpuidEntry
from kvmneg.policy.contract import Contract

pytestmark = pytest.mark.skipif(measure.ARCHITECTURE != "x86_64", reason="CPUID is x86's")

ROOT = Path(__file__).resolve().parents[2]
EVERY = (1 << 32) - 1
KEPT_RULES = {rules.TOPOLOGY, rules.DERIVED, rules.DYNAMIC}
KVM = CpuidEntry(0x4000_0000, 0, 0, 0x4000_0001, 0x4B4D_564B, 0x564B_4D56, 0x4D)
HYPERV = [
    CpuidEntry(0x4000_0000, 0, 0, 0x4000_0082, 1, 2, 3),
    CpuidEntry(0x4000_0001, 0, 0, 0x3123_7648, 0, 0, 0),
]
XSAVE = {(0xD, 0, 1), (0xD, 0, 2), (0xD, 1, 1)}  # leaf, subleaf, register: sizes that are computed
INDEXED = {4, 7, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x17, 0x18, 0x1B, 0x1D, 0x1E, 0x1F, 0x20, 0x23, 0x24,
           0x8000_001D, 0x8000_0020, 0x8000_0026}  # fmt: skip


def contract() -> Contract:
    """Of a recorded AMD host."""
    path = ROOT / "tests/data/hosts/amd-6.12.max.json"
    return Contract(Report.loads(path.read_bytes(), file=path.name).offer)


@pytest.fixture(scope="module")
def held() -> Applied:
    return Applied.of(contract().binary())


def kept(word: str) -> int:
    """The bits of a word that no contract binds, and that are the VMM's, KVM's or the guest's."""
    known = catalog.load(words.X86_64)
    if word not in known.words and known.leaf_rule(word) in KEPT_RULES:
        return EVERY
    found = 0
    for feature in catalog.names(words.X86_64).at(word, EVERY):
        if feature.rule in KEPT_RULES:
            found |= feature.mask
    return found


def bound(held: Applied) -> dict[str, tuple[int, int]]:
    return {word: (value, mask) for word, value, mask in held.words()}


def leaves() -> list[tuple[int, int]]:
    """Every leaf of the catalogue, and some that nobody knows."""
    known = catalog.load(words.X86_64)
    found = {(0x22, 0), (0x99, 0), (0x8000_00FF, 0), (0x7, 9), (0xD, 40), (0x12, 2)}
    for word in (*known.words, *known.leaves):
        kind, _, rest = word.partition(":")
        if kind == "cpuid":
            leaf, subleaf = [*rest.split("."), "0"][:2]
            found.add((int(leaf, 16), int(subleaf)))
    return sorted(row for row in found if not 0x4000_0000 <= row[0] < 0x4001_0000)


@pytest.mark.parametrize("filler", [EVERY, 0, 0xA5A5_5A5A])
def test_each_bit_is_bound_or_the_vmms_or_zero(held: Applied, filler: int) -> None:
    """Every register of every leaf, as the catalogue's rules have it; nothing is added to a table that has them all."""
    table = [CpuidEntry(leaf, sub, leaf in INDEXED, *[filler] * 4) for leaf, sub in leaves()]
    rows = held.clamp(table)
    assert [row[:3] for row in rows] == [entry[:3] for entry in table]
    contracts = bound(held)
    for row in rows:
        for place, register in enumerate(words.REGISTERS):
            if (row[0], row[1], place) in XSAVE:
                continue
            word = words.cpuid_word(row[0], row[1], register)
            value, mask = contracts.get(word, (0, 0))
            expected = value | filler & kept(word) & ~mask
            assert row[3 + place] == expected, f"{word}: {row[3 + place]:#x}, not {expected:#x}"


def test_sizes_of_xsave_areas_are_those_of_the_components_left(held: Applied) -> None:
    """Intel SDM vol. 1, 13.4: the end of the last component, or the header's."""
    words_ = bound(held)
    components = words_["cpuid:0xd.0.eax"][0] | words_["cpuid:0xd.0.edx"][0] << 32
    ends = [576]
    for n in range(2, 63):
        if components >> n & 1:
            ends.append(words_[f"cpuid:0xd.{n}.eax"][0] + words_[f"cpuid:0xd.{n}.ebx"][0])
    assert len(ends) > 1
    for table in ([], [CpuidEntry(0xD, 0, 1, EVERY, 9999, 9999, EVERY)]):
        row = next(row for row in held.clamp(table) if row[:2] == (0xD, 0))
        assert (row[4], row[5]) == (576, max(ends))
    compacted = bool(words_["cpuid:0xd.1.eax"][0] & 0b1010)  # XSAVEC, XSAVES
    (row,) = held.clamp([CpuidEntry(0xD, 1, 1, EVERY, 9999, 0, 0)])[:1]
    assert row[4] == (9999 if compacted else 0)


def test_an_empty_table_gets_the_contracts_leaves(held: Applied) -> None:
    """And KVM's signature; of leaves that are all zero none is needed."""
    rows = {row[:2]: row for row in held.clamp([])}
    assert rows[KVM[:2]] == KVM
    shown = {
        words.parse_cpuid(word)[:2]
        for word, (value, _) in bound(held).items()
        if value and word[:6] == "cpuid:"
    }
    assert set(rows) == shown | {KVM[:2]}
    for row in rows.values():
        assert row[2] == (row[0] in INDEXED)


def test_kvms_leaf_is_found_by_its_signature(held: Applied) -> None:
    features = bound(held)["cpuid:0x40000001.0.eax"][0]
    assert features
    plain = {row[0]: row for row in held.clamp([KVM])}
    assert plain[0x4000_0001][3] == features
    beside = [
        *HYPERV,
        KVM._replace(function=0x4000_0100),
        CpuidEntry(0x4000_0101, 0, 0, EVERY, EVERY, EVERY, EVERY),
    ]
    rows = {row[0]: row for row in held.clamp(beside)}
    assert rows[0x4000_0101][3:] == (features, 0, 0, 0)
    assert [rows[entry[0]] for entry in HYPERV] == HYPERV
    for word, (value, _mask) in bound(held).items():
        if word.startswith("hyperv:") and value:
            leaf, _sub, register = words.parse_cpuid(word)
            assert rows[leaf][3 + words.REGISTERS.index(register)] == value
    hidden = {row[0] for row in held.clamp([CpuidEntry(0x8000_0002, 0, 0, 1, 2, 3, 4)])}
    assert not any(0x4000_0000 <= leaf < 0x4001_0000 for leaf in hidden), (
        "without a signature it is not shown"
    )


def test_another_hypervisors_leaves_stay(held: Applied) -> None:
    xen = [CpuidEntry(0x4000_0000 + n, 0, 0, n, 0x566E_6558, EVERY, EVERY) for n in range(3)]
    rows = {row[0]: row for row in held.clamp([*xen, KVM._replace(function=0x4000_0100)])}
    assert [rows[entry[0]] for entry in xen] == xen
    assert 0x4000_0101 in rows


def test_a_leaf_with_subleaves_says_so(held: Applied) -> None:
    """Else leaf 7 would be read for each of its subleaves."""
    rows = {row[:2]: row for row in held.clamp([CpuidEntry(7, 0, 0, 5, EVERY, EVERY, EVERY)])}
    assert rows[7, 0][2] == 1


def test_too_small_and_too_large(held: Applied) -> None:
    with pytest.raises(OSError, match="space") as caught:
        held.clamp([], 3)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="long") as caught:
        held.clamp([CpuidEntry(n, 0, 0, 0, 0, 0, 0) for n in range(257)])
    assert caught.value.errno == errno.E2BIG
    arm64 = Contract(FeatureSet.of("arm64", {}))
    with pytest.raises(OSError, match="format") as caught:
        Applied.of(arm64.binary()).clamp([])
    assert caught.value.errno == errno.ENOEXEC


ENTRY = st.builds(
    CpuidEntry,
    st.sampled_from([row[0] for row in leaves()] + [0x4000_0000, 0x4000_0001, 0x4000_0100, 0x4000_0101]),
    st.integers(0, 20),
    st.integers(0, 1),
    *[st.integers(0, EVERY)] * 4,
)


@given(st.lists(ENTRY, max_size=40))
def test_again_changes_nothing(table: list[CpuidEntry]) -> None:
    held = Applied.of(contract().binary())
    once = held.clamp(table)
    assert held.clamp([CpuidEntry(*row) for row in once]) == once


@pytest.mark.parametrize(("prefix", "architecture"), [("x86", words.X86_64), ("arm64", words.ARM64)])
def test_capabilities_are_the_catalogues(prefix: str, architecture: str) -> None:
    """csrc/*-capabilities.c has every kvm: word with the kernel's number, and how it compares."""
    text = (ROOT / f"csrc/{prefix}-capabilities.c").read_text("ascii")
    found = {
        name: (int(number), how) for name, number, how in re.findall(r'\{ "([\w-]+)", +(\d+), (\w+) \}', text)
    }
    known = catalog.load(architecture).words
    numbers = {name: number for number, name in NAMES.items()}
    expected = {
        word[4:]: (numbers[word[4:]], "MINIMUM" if rule.fields else "BITS")
        for word, rule in known.items()
        if word.startswith("kvm:")
    }
    assert found == expected
    assert all(field.rule == "minimum" for word in expected for field in known[f"kvm:{word}"].fields)
    assert not any(known[f"kvm:{word}"].or_mask for word in expected)


def test_what_is_kvms_own_is_the_same_in_c_and_in_python() -> None:
    """csrc/x86-leaves.c, kvm_bits, and enforcement.KVMS_OWN: what KVM writes into a guest's CPUID by itself."""
    source = (ROOT / "csrc" / "x86-leaves.c").read_text("utf-8")
    table = source.split("kvm_bits[] = {")[1].split("};")[0]
    rows = re.findall(r"\{ (0x[0-9a-f]+), (\d+), (E[A-D]X), (0x[0-9a-f]+|UINT32_MAX) \}", table)
    found = {
        f"cpuid:{leaf}.{subleaf}.{register.lower()}": 0xFFFF_FFFF if mask == "UINT32_MAX" else int(mask, 16)
        for leaf, subleaf, register, mask in rows
    }
    assert len(found) == table.count("{ 0x")
    assert found == enforcement.KVMS_OWN
