# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg_clamp_cpuid and kvmneg_vcpu_verify over the tables of CPUID that there can be: laws, without a KVM.

What a guest reads is KVM's rule, written here a second time: the first entry of the leaf whose index is the one asked
for, or does not count (kvm_find_cpuid_entry_index() in arch/x86/kvm/cpuid.c).
"""

from __future__ import annotations

import ctypes
import errno
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvmneg._libkvmneg import ffi, lib

from kvmneg.features import words
from kvmneg.features.report import Report
from kvmneg.host import enforcement, measure
from kvmneg.host.apply import Applied
from kvmneg.host.tables import CpuidEntry
from kvmneg.policy import contract as contracts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.skipif(measure.ARCHITECTURE != "x86_64", reason="CPUID is x86's")

ROOT = Path(__file__).resolve().parents[2]
EVERY = (1 << 32) - 1
KVM = (0x4B4D_564B, 0x564B_4D56, 0x4D)
HV1 = 0x3123_7648
PLAIN = (0x0, 0x1, 0x6, 0x15, 0x19, 0x4000_0001, 0x8000_0001, 0x8000_0007, 0x8000_0008, 0x8000_0021)
VMMS = [
    *(f"cpuid:{leaf:#x}.0.eax" for leaf in (0x2, 0x4, 0x5, 0xB, 0x18, 0x1A, 0x1F, 0x4000_0000, 0x4000_0010)),
    *(f"cpuid:{leaf:#x}.0.ebx" for leaf in (0x8000_0002, 0x8000_0003, 0x8000_0004, 0x8000_0005, 0x8000_0006)),
    *(f"cpuid:{leaf:#x}.0.ecx" for leaf in (0x8000_0019, 0x8000_001D, 0x8000_001E, 0x8000_0026)),
    *(
        f"hyperv:{leaf:#x}.0.edx"
        for leaf in (0x4000_0000, 0x4000_0001, 0x4000_0010, 0x4000_0080, 0x4000_0081)
    ),
    *("cpuid:0x12.2.eax", "cpuid:0xd.0.ebx", "cpuid:0xd.0.ecx", "cpuid:0xd.1.ebx"),
    # where no table has a leaf that a contract could mean
    *("cpuid:0x1.1.eax", "hyperv:0x5.0.eax", "hyperv:0x40000003.1.eax", "cpuid:0x40000100.0.eax"),
]

Row = tuple[int, ...]


class Failure(NamedTuple):
    """struct kvmneg_failure."""

    id: int
    asked: int
    mask: int
    got: int
    error: int
    stage: int
    why: int
    request: int
    word: bytes


def cpuid_words() -> dict[str, tuple[int, int]]:
    """CPUID and Hyper-V of a recorded AMD host, without what needs other ioctls."""
    path = ROOT / "tests/data/hosts/amd-6.12.max.json"
    whole = contracts.Contract(Report.loads(path.read_bytes(), file=path.name).offer).binary()
    return {
        word: row for word, row in contracts._decode_words(whole).items() if word.startswith(("cpuid", "hyp"))
    }


def applied(bound: dict[str, tuple[int, int]]) -> Applied:
    return Applied.of(contracts._encode("x86_64", bound, (0, ""), "unverified", ()))


BOUND = cpuid_words()


def table_of(rows: Sequence[Row], capacity: int = 256) -> ffi.CData:
    table = ffi.new("struct kvmneg_cpuid *", {"entries": capacity})
    table.count = len(rows)
    for place, row in zip(table.entries[0 : len(rows)], rows, strict=True):
        place.function, place.index, place.flags, place.eax, place.ebx, place.ecx, place.edx = row
    return table


def rows_of(table: ffi.CData) -> list[Row]:
    entries = table.entries[0 : table.count]
    return [(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx) for e in entries]


def clamped(held: Applied, rows: Sequence[Row]) -> tuple[int, list[Row]]:
    """What the function returned, and the table."""
    table = table_of(rows)
    return lib.kvmneg_clamp_cpuid(held._held, table, 256), rows_of(table)


def read(rows: Sequence[Row], function: int, index: int) -> tuple[int, int, int, int]:
    """CPUID, executed by a guest with this table."""
    for row in rows:
        if row[0] == function and (row[1] == index or not row[2] & 1):
            return row[3], row[4], row[5], row[6]
    return 0, 0, 0, 0


def breaks(rows: Sequence[Row]) -> bool:
    """Whether a guest with this table, and without hypervisors' leaves, reads another value in a bound bit."""
    for word, (value, mask) in BOUND.items():
        leaf, subleaf, register = words.parse_cpuid(word)
        if leaf & 0xFFFF_0000 == 0x4000_0000:
            continue
        got = read(rows, leaf, subleaf)[words.REGISTERS.index(register)]
        if (got ^ value) & mask & ~enforcement.KVMS_OWN.get(word, 0):
            return True
    return False


@pytest.fixture(scope="module")
def verify(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Applied, Sequence[Row]], tuple[int, Failure]]:
    """verify(contract, rows) → what kvmneg_vcpu_verify returns on a vCPU that shows these rows, and its failure."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    library = tmp_path_factory.mktemp("shown") / "shown.so"
    sources = [path for path in (ROOT / "csrc").glob("*.c") if not path.name.startswith("arm64")]
    flags = ["-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-Wl,--wrap=ioctl", "-Wl,-Bsymbolic"]
    command = ["gcc", *flags, "-I", ROOT / "csrc", "-o", library, ROOT / "tests/unit/shown.c", *sources]
    subprocess.run(command, check=True)
    code = ctypes.CDLL(str(library))
    code.kvmneg_contract_open_memory.argtypes = [
        ctypes.c_char_p,
        ctypes.c_uint64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    code.kvmneg_contract_free.argtypes, code.kvmneg_contract_free.restype = [ctypes.c_void_p], ctypes.c_void_p
    return lambda held, rows: _verified(code, held, rows)


def _verified(code: ctypes.CDLL, held: Applied, rows: Sequence[Row]) -> tuple[int, Failure]:
    raw, table, failure = held.binary(), bytes(ffi.buffer(table_of(rows))), ctypes.create_string_buffer(96)
    contract = ctypes.c_void_p()
    assert code.kvmneg_contract_open_memory(raw, len(raw), ctypes.byref(contract), None) == 0
    r = code.verify_shown(contract, table, failure)
    code.kvmneg_contract_free(contract)
    return r, Failure(*struct.unpack("4Qi3I48s", failure.raw))


def leaf_numbers() -> list[int]:
    found = {words.parse_cpuid(word)[0] for word in BOUND}
    return sorted(
        found | {0x4, 0xB, 0x22, 0x8000_0002, 0x8000_0005, 0x8000_001D, 0x4000_0000, 0x4000_0100, 0x4000_0101}
    )


REGISTER = st.sampled_from([0, EVERY]) | st.integers(0, EVERY)
ANY = st.tuples(
    st.sampled_from(leaf_numbers()),
    st.integers(0, 3),
    st.integers(0, 1),
    REGISTER,
    REGISTER,
    REGISTER,
    REGISTER,
)
SIGNATURE = st.builds(
    lambda base, index, flags: (base, index, flags, base + 1, *KVM),
    st.sampled_from([0x4000_0000, 0x4000_0100, 0x4000_0200]),
    st.integers(0, 1),
    st.integers(0, 1),
)
HYPERV = st.builds(
    lambda index, flags: (0x4000_0001, index, flags, HV1, 0, 0, 0), st.integers(0, 1), st.integers(0, 1)
)
TABLES = st.lists(ANY | SIGNATURE | HYPERV, max_size=30)


@given(TABLES)
def test_clamping_again_changes_nothing_and_says_so(rows: list[Row]) -> None:
    """And the first time it says how many entries it changed or added."""
    held = applied(BOUND)
    count, once = clamped(held, rows)
    assert count == sum(row != before for row, before in zip(once, rows, strict=False)) + len(once) - len(
        rows
    )
    assert clamped(held, once) == (0, once)


@given(TABLES)
def test_a_guest_of_a_clamped_table_reads_the_contract(rows: list[Row]) -> None:
    """Whatever indices and flags the VMM's entries had."""
    assert not breaks(clamped(applied(BOUND), rows)[1])


def test_what_was_clamped_verifies(verify: Callable[[Applied, Sequence[Row]], tuple[int, Failure]]) -> None:
    @given(TABLES)
    def check(rows: list[Row]) -> None:
        held = applied(BOUND)
        assert verify(held, clamped(held, rows)[1])[0] == 0

    check()


def test_what_verifies_is_what_a_guest_reads(
    verify: Callable[[Applied, Sequence[Row]], tuple[int, Failure]],
) -> None:
    """A clamped table with an entry changed, moved, or shadowed by another one: refused where a guest could tell."""
    held = applied(BOUND)
    base = clamped(held, [])[1]

    @given(
        st.integers(0, len(base) - 1),
        st.integers(0, len(base)),
        st.sets(st.integers(0, 6)),
        st.integers(0, 31),
    )
    def check(at: int, to: int, changed: set[int], bit: int) -> None:
        row = list(base[at])
        for place in changed:
            row[place] ^= 1 << (0 if place == 2 else bit)
        rows = list(base)
        if bit % 2:
            rows.pop(at)
        rows.insert(to, tuple(row))
        r, failure = verify(held, rows)
        if breaks(rows):
            assert r == -errno.EBADE
            assert failure.word.rstrip(b"\0").decode() in BOUND

    check()


@pytest.mark.parametrize("leaf", PLAIN)
def test_a_leaf_without_subleaves_has_no_index(leaf: int) -> None:
    """Its first entry is what a guest reads, whichever index it was given."""
    given_ = [(0x4000_0000, 0, 0, 0x4000_0001, *KVM), (leaf, 3, leaf % 2, *[EVERY] * 4)]
    rows = clamped(applied(BOUND), given_)[1]
    assert [row[1:3] for row in rows if row[0] == leaf] == [(0, 0)]
    assert not breaks(rows)


@pytest.mark.parametrize("word", VMMS)
def test_a_contract_binds_nothing_that_is_the_vmms(
    word: str, verify: Callable[[Applied, Sequence[Row]], tuple[int, Failure]]
) -> None:
    """kvmneg writes no such contract. One that does is refused, not kept by half: no word is dropped in silence."""
    held = applied(BOUND | {word: (1, 3)})
    rows = [(0x4000_0000, 0, 0, 0x4000_0001, *KVM)]
    assert clamped(held, rows) == (-errno.EOPNOTSUPP, rows)
    r, failure = verify(held, clamped(applied(BOUND), rows)[1])
    assert (r, failure.word.rstrip(b"\0").decode()) == (-errno.EOPNOTSUPP, word)
    assert (failure.why, failure.asked, failure.mask) == (lib.KVMNEG_UNKNOWN, 1, 3)


def test_the_python_face_clamps_the_same() -> None:
    rows = [CpuidEntry(0x1, 0, 0, *[EVERY] * 4)]
    assert applied(BOUND).clamp(rows) == clamped(applied(BOUND), rows)[1]
