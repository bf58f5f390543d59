# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg_judge_register: what becomes of one register of an arm64 guest that moves, on any host."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmneg.errors import NotApplied
from kvmneg.features.featureset import FeatureSet
from kvmneg.host.apply import Applied
from kvmneg.policy import portable
from kvmneg.policy.contract import Contract
from kvmneg.policy.portable import CARRY, DROP_IF, DROP_IF_TIMER_OFF, REFUSE, Entry

CARRIED, REFUSED, VENDOR_HYP_2, CCSIDR = (
    0x6030000000100000,
    0x603000000013C4FF,
    0x6030000000160003,
    0x602000000011000D,
)
CNTP_CVAL, UNHEARD_OF = 0x603000000013DF12, 0x603000000013C200
RULES = (
    Entry(CCSIDR, DROP_IF, 0x701FE01A),
    Entry(CARRIED, CARRY, 0),
    Entry(REFUSED, REFUSE, 0),
    Entry(CNTP_CVAL, DROP_IF_TIMER_OFF, 0),
    Entry(VENDOR_HYP_2, DROP_IF, 0),
)
OFF, ON, ON_AND_MASKED, MASKED = 0, 1, 3, 2


def held(*rules: Entry, architecture: str = "arm64") -> Applied:
    return Applied.of(Contract(FeatureSet.of(architecture, {}), portable=rules).binary())


@pytest.mark.parametrize("register", [*(rule.register for rule in RULES), UNHEARD_OF])
def test_what_is_listed_is_set_whatever_its_rule(register: int) -> None:
    assert held(*RULES).takes(register, 7, timer_control=ON, listed=True)


@pytest.mark.parametrize(
    ("register", "value", "timer"),
    [
        (VENDOR_HYP_2, 0, ON),
        (CCSIDR, 0x701FE01A, ON),
        (CNTP_CVAL, 7, OFF),
        (CNTP_CVAL, 7, MASKED),
        (UNHEARD_OF, 7, ON),
    ],
)
def test_left_out(register: int, value: int, timer: int) -> None:
    assert not held(*RULES).takes(register, value, timer_control=timer, listed=False)


@pytest.mark.parametrize(
    ("register", "value", "timer", "error", "got"),
    [
        (VENDOR_HYP_2, 1, OFF, errno.EBADE, 0),
        (VENDOR_HYP_2, 1 << 63, OFF, errno.EBADE, 0),
        (CCSIDR, 2, OFF, errno.EBADE, 0x701FE01A),
        (CNTP_CVAL, 0, ON, errno.EBADE, 0),
        (CNTP_CVAL, 0, ON_AND_MASKED, errno.EBADE, 0),
        (CARRIED, 0, OFF, errno.ENOENT, 0),
        (REFUSED, 0, OFF, errno.ENOENT, 0),
    ],
)
def test_refused(register: int, value: int, timer: int, error: int, got: int) -> None:
    with pytest.raises(NotApplied) as told:
        held(*RULES).takes(register, value, timer_control=timer, listed=False)
    expected = {
        "word": f"arm64:{register:#x}", "register": register, "asked": value, "mask": (1 << 64) - 1, "got": got,
        "stage": "state", "why": "missing", "ioctl": "", "errno": error,
    }  # fmt: skip
    assert told.value.fields == expected


def test_a_contract_without_portable_state_lets_nothing_go() -> None:
    with pytest.raises(NotApplied):
        held().takes(VENDOR_HYP_2, 0, timer_control=OFF, listed=False)


def test_of_x86_there_is_nothing_to_judge() -> None:
    with pytest.raises(NotApplied) as told:
        held(architecture="x86_64").takes(CARRIED, 0, timer_control=OFF, listed=True)
    assert told.value.fields["errno"] == errno.ENOEXEC


entries = st.builds(
    lambda register, rule, value: Entry(register, rule, value if rule == DROP_IF else 0),
    st.integers(0x6030000000130000, 0x6030000000130040),
    st.sampled_from(portable.RULES),
    st.integers(0, 3),
)


@given(
    st.lists(entries, max_size=20, unique_by=lambda entry: entry.register),
    st.integers(0x602FFFFFFFFFFFFF, 0x6030000000130041),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_each_rule_is_found(rules: list[Entry], register: int, value: int, timer: int) -> None:
    rule = next((one for one in rules if one.register == register), None)
    expected = rules != [] and (
        rule is None
        or (rule.rule == DROP_IF and value == rule.value)
        or (rule.rule == DROP_IF_TIMER_OFF and not timer & 1)
    )
    contract = held(*sorted(rules))
    if expected:
        assert not contract.takes(register, value, timer_control=timer, listed=False)
    else:
        with pytest.raises(NotApplied):
            contract.takes(register, value, timer_control=timer, listed=False)
