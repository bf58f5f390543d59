# SPDX-License-Identifier: LGPL-2.1-or-later
"""Addresses and values of words: one spelling each, and nothing else is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmneg.errors import BadInput
from kvmneg.features import words

GOOD = [
    "cpuid:0x0.0.eax", "cpuid:0x7.0.ebx", "cpuid:0xd.13.ecx", "cpuid:0x80000008.0.edx",
    "cpuid:0xffffffff.4294967295.eax",
    "hyperv:0x40000003.0.eax", "msr:0x10a", "msr:0xc0011029", "msr:0xffffffff", "kvm:exit-hypercall", "kvm:xsave2",
    "tap:features", "vhost-net:features", "arm64:0x6030000000160000",
]  # fmt: skip
BAD = [
    "", "cpuid", "cpuid:", "cpuid:0x7", "cpuid:0x7.0", "cpuid:0x7.0.efx", "cpuid:0x7.0.ebx ", " cpuid:0x7.0.ebx",
    "cpuid:0x07.0.ebx", "cpuid:0X7.0.ebx", "cpuid:7.0.ebx", "cpuid:0xA.0.eax", "cpuid:0x7.00.ebx", "cpuid:0x7.-1.ebx",
    "cpuid:0x7.0x0.ebx", "cpuid:0x7.٣.ebx", "cpuid:0x7.².ebx", "cpuid:0x100000000.0.eax", "cpuid:0x7.4294967296.ebx",
    "cpuid:0x7." + "9" * 5000 + ".ebx", "cpuid:0x-7.0.ebx", "cpuid:0x_7.0.ebx", "CPUID:0x7.0.ebx", "cpuid:0x7.0.EBX",
    "msr:0x", "msr:10a", "msr:0x10A", "msr:0x010a", "msr:0x100000000", "msr:0x10a.0", "kvm:", "kvm:Exit",
    "kvm:exit_hypercall",
    "kvm:" + "a" * 60, "tap:\n", "arm64:0x10000000000000000", "arm64:1", "sgx:0x1", "\ud800:0x1",
]  # fmt: skip


@pytest.mark.parametrize("word", GOOD)
def test_good_addresses(word: str) -> None:
    assert words.check(word) == word


@pytest.mark.parametrize("word", BAD)
def test_bad_addresses(word: str) -> None:
    with pytest.raises(BadInput, match="no word's address") as caught:
        words.check(word)
    assert caught.value.hint


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.sampled_from(words.REGISTERS))
def test_cpuid_addresses_round_trip(leaf: int, subleaf: int, register: str) -> None:
    for kind in ("cpuid", "hyperv"):
        word = words.cpuid_word(leaf, subleaf, register, kind)
        assert words.check(word) == word
        assert words.parse_cpuid(word) == (leaf, subleaf, register)
    with pytest.raises(ValueError, match="not an MSR"):
        words.parse_msr(word)


@given(st.integers(0, 2**32 - 1))
def test_msr_addresses_round_trip(index: int) -> None:
    assert words.parse_msr(words.check(words.msr_word(index))) == index
    with pytest.raises(ValueError, match="not a CPUID"):
        words.parse_cpuid(words.msr_word(index))


@given(st.text(max_size=40) | st.text("cpuidmsr:x0123456789abcdef.", max_size=30))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        words.check(text)
    except BadInput:
        return
    assert words.width(text) in (32, 64)
    assert words.order(text)[0] < len(words.KINDS)


@pytest.mark.parametrize(
    ("word", "value", "text"),
    [
        ("cpuid:0x1.0.ecx", 0x81202000, "0x81202000"),
        ("cpuid:0x1.0.ecx", 5, "0x00000005"),
        ("msr:0x10a", 0xC00E16D, "0x000000000c00e16d"),
        ("kvm:exit-hypercall", 0, "0x00000000"),
        ("tap:features", 0x67, "0x0000000000000067"),
    ],
)
def test_values_have_the_registers_full_width(word: str, value: int, text: str) -> None:
    assert words.text_value(word, value) == text
    assert words.parse_value(word, text) == value


def test_a_shorter_value_is_read() -> None:
    assert words.parse_value("kvm:exit-hypercall", "0x0") == 0


@pytest.mark.parametrize(
    "text",
    ["", "0x", "1", "0X1", "0xA", "0x1_0", "0x-1", "0x+1", " 0x1", "0x1 ", "0x100000000", "0x" + "0" * 9, "0b1",
     "0x" + "f" * 1000, "0x٣", 1, 1.0, None, True, [], {}, b"0x1"],
)  # fmt: skip
def test_bad_values(text: object) -> None:
    with pytest.raises(BadInput, match="is not a 32-bit value"):
        words.parse_value("cpuid:0x1.0.ecx", text)


def test_order_is_by_address_not_by_spelling() -> None:
    mixed = ["msr:0x10a", "msr:0x8b", "cpuid:0x80000000.0.eax", "cpuid:0xd.10.eax", "cpuid:0xd.2.ebx",
             "cpuid:0xd.2.eax", "cpuid:0x7.0.ebx", "kvm:b", "kvm:a", "hyperv:0x40000003.0.eax"]  # fmt: skip
    assert sorted(mixed, key=words.order) == [
        "cpuid:0x7.0.ebx", "cpuid:0xd.2.eax", "cpuid:0xd.2.ebx", "cpuid:0xd.10.eax", "cpuid:0x80000000.0.eax",
        "hyperv:0x40000003.0.eax", "kvm:a", "kvm:b", "msr:0x8b", "msr:0x10a",
    ]  # fmt: skip
