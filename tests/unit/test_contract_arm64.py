# SPDX-License-Identifier: LGPL-2.1-or-later
"""arm64 contracts: the order of application, portable state, flags; what no version writes is refused."""

from __future__ import annotations

import struct
from hashlib import sha256

import arm64_reports as hosts
import pytest

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy import contract_arm64, negotiation, pool, portable
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.portable import Entry
from kvmneg.policy.request import Request

SVE = {"PFR0": 0x1101_0001_1111_1112, "VLS": 0b11, "ZFR0": 1, "INIT": 0b10100}
HEADER = 160


def fenced() -> Contract:
    """Of a host with SVE and a newer kernel, under a fence over an older one."""
    new, old = hosts.new(**SVE), hosts.new("old", PSCI=0x1_0001, **SVE)
    fence = Fence(pool.baseline([new, old]), 4, registers=tuple(old.registers[:-2]))
    return negotiation.negotiate(Request(maximum=True), new, fence).contract


def sections(binary: bytes) -> tuple[list[int], list[tuple[int, ...]], list[tuple[int, ...]], list[int]]:
    """Counts, registers, portable state and flags, read by hand from the layout in kvmneg.policy.contract."""
    counts = list(struct.unpack_from("<6I", binary, 104))
    at = HEADER
    registers = [struct.unpack_from("<QQQ", binary, at + 24 * n) for n in range(counts[2])]
    at += 24 * counts[2] + 64 * counts[3]
    state = [struct.unpack_from("<IIQQ", binary, at + 24 * n) for n in range(counts[4])]
    at += 24 * counts[4]
    flags = list(struct.unpack_from(f"<{counts[5]}I", binary, at))
    assert at + 4 * counts[5] == len(binary)
    return counts, registers, state, flags


def sealed(binary: bytes) -> bytes:
    zeroed = bytearray(binary)
    zeroed[32:64] = bytes(32)
    zeroed[32:64] = sha256(zeroed).digest()
    return bytes(zeroed)


def test_registers_stand_in_the_order_in_which_a_vmm_sets_them() -> None:
    counts, registers, _state, flags = sections(fenced().binary())
    assert counts[:2] == [0, 0]
    ids = [row[0] for row in registers]
    order = [0x6060_0000_0015_FFFF, 0x6030_0000_0013_D801, 0x6030_0000_0013_C801, 0x6030_0000_0013_C020,
             0x6030_0000_0014_0001, 0x6030_0000_0014_0000, 0x6030_0000_0016_0000]  # fmt: skip
    assert [ids.index(register) for register in order] == sorted(ids.index(register) for register in order)
    assert ids[0] == order[0] and ids[-1] == 0x6030_0000_0016_0003
    assert flags == [2, 4]  # KVM_ARM_VCPU_PSCI_0_2 and KVM_ARM_VCPU_SVE
    assert (0x6030_0000_0014_0000, 0x1_0001, 0xFFFF_FFFF) in registers


def test_every_register_of_the_host_has_its_rule() -> None:
    contract = fenced()
    _counts, _registers, state, _flags = sections(contract.binary())
    assert [row[2] for row in state] == list(hosts.new(**SVE).registers)
    by_id = {register: (kind, rule, value) for kind, rule, register, value in state}
    assert by_id[0x6030_0000_0013_C020] == (1, 1, 0)
    assert by_id[0x6030_0000_0016_0003] == (1, 2, 0)  # the two that the fence does not list
    assert by_id[0x6060_0000_0015_FFFF] == (1, 4, 0)
    assert contract.to_json()["portable"]["arm64:0x6030000000160003"] == "drop-if 0x0"
    assert contract.to_json()["init"] == ["psci", "sve"]


def test_a_register_that_the_host_does_not_have_is_not_bound() -> None:
    words = negotiation.negotiate(Request(maximum=True), hosts.old()).contract.words()
    assert hosts.VENDOR_2 not in words and hosts.ccsidr(3) not in words and hosts.VLS not in words
    assert words[hosts.STD] == 1


@pytest.mark.parametrize(
    "contract", [fenced(), negotiation.negotiate(Request(maximum=True), hosts.old()).contract]
)
def test_both_forms_are_read_back(contract: Contract) -> None:
    for again in (Contract.from_binary(contract.binary()), Contract.from_json(contract.to_json())):
        assert again.binary() == contract.binary()
        assert again.portable == contract.portable and again.words() == contract.words()
        assert again.architecture == "arm64" and again.digest == contract.digest


def _swapped(binary: bytes, size: int, at: int) -> bytes:
    return binary[:at] + binary[at + size : at + 2 * size] + binary[at : at + size] + binary[at + 2 * size :]


def test_what_no_version_writes_is_refused() -> None:
    binary = fenced().binary()
    counts = sections(binary)[0]
    state = HEADER + 24 * counts[2] + 64 * counts[3]
    flags = state + 24 * counts[4]
    for what, changed in {
        "at its place": _swapped(binary, 24, HEADER + 24),
        "or binds nothing": binary[: HEADER + 16] + bytes(8) + binary[HEADER + 24 :],
        "portable state is not": _swapped(binary, 24, state),
        "entry of the portable": binary[: state + 4] + b"\x05" + binary[state + 5 :],
        "without use": binary[: state + 16] + b"\x01" + binary[state + 17 :],
        "initialisation flags": binary[:flags] + b"\x03" + binary[flags + 1 :],
        "sections that x86_64": binary[:12] + b"\x01" + binary[13:],
    }.items():
        with pytest.raises(BadInput, match=what):
            Contract.from_binary(sealed(changed))


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("arm64:0x6030000000160003", "drop-if"),
        ("arm64:0x6030000000160003", "drop-if 0"),
        ("arm64:0x6030000000160003", "carry 0x1"),
        ("arm64:0x6030000000160003", "keep"),
        ("arm64:0x6030000000160003", None),
        ("6030000000160003", "carry"),
        ("msr:0x10a", "carry"),
        ("arm64:0x06030000000160003", "carry"),
    ],
)
def test_a_rule_that_is_written_otherwise_is_refused(word: str, rule: object) -> None:
    document = fenced().to_json()
    document["portable"] = {word: rule}
    with pytest.raises(BadInput, match=r"no rule for a register|register's id"):
        Contract.from_json(document)


def test_a_contract_has_no_more_registers_than_a_report() -> None:
    document = fenced().to_json()
    document["portable"] = {f"arm64:{n:#x}": "carry" for n in range(limits.REGISTERS + 1)}
    with pytest.raises(BadInput, match=str(limits.REGISTERS)):
        Contract.from_json(document)


def test_a_changed_rule_changes_the_digest() -> None:
    document = fenced().to_json()
    document["portable"]["arm64:0x6030000000160003"] = "carry"
    with pytest.raises(BadInput, match="digest"):
        Contract.from_json(document)


def test_other_state_is_refused_by_every_rule() -> None:
    """What is dropped has a rule; nothing else is."""
    granted = FeatureSet.of("arm64", hosts.NEW)
    assert portable.drop_rule(0x6030_0000_0013_C4F6) == Entry(0x6030_0000_0013_C4F6, "drop-if", 0)
    assert portable.drop_rule(0x6020_0000_0011_0005, granted).text() == "drop-if 0x2"
    assert portable.drop_rule(0x6030_0000_0013_C080).text() == "refuse"  # SCTLR_EL1
    assert [contract_arm64.place(0x6030_0000_0010_0000)[0]] == [6]  # core registers after everything


# -- fences ------------------------------------------------------------------------------------------


def test_a_fence_keeps_the_registers_of_its_members() -> None:
    reports = [hosts.new(), hosts.old()]
    fence = Fence(pool.baseline(reports), registers=portable.common(reports))
    again = Fence.parse(fence.text())
    assert again.registers == fence.registers == hosts.old().registers
    assert again.text() == fence.text() and again.digest == fence.digest
    assert Fence(fence.granted).digest != fence.digest
    assert Fence(fence.granted).digest == fence.granted.digest()


HEAD = "architecture arm64\n"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        (HEAD + "registers 0x2 0x1\n", 2, "order"),
        (HEAD + "registers 0x1\nregisters 0x1\n", 3, "order"),
        (HEAD + "registers 1\n", 2, "register's id"),
        (HEAD + "registers 0x10000000000000000\n", 2, "register's id"),
        ("architecture x86_64\nregisters 0x1\n", 2, "no registers"),
        (HEAD + "registers " + " ".join(hex(n) for n in range(limits.REGISTERS + 1)) + "\n", 2, "more than"),
    ],
)
def test_registers_written_wrongly_are_refused_with_their_line(text: str, line: int, what: str) -> None:
    with pytest.raises(BadInput, match=what) as error:
        Fence.parse(text)
    assert error.value.fields["line"] == line


def test_no_common_registers_where_one_list_is_missing() -> None:
    assert portable.common([hosts.new(), hosts.report("b", hosts.NEW, registers=())]) == ()
    assert portable.common([]) == ()
