# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recorded arm64 hosts (tests/data/hosts, see tests/hosts/recording.py): what each kernel was measured to be by hand
before this code was there, what can be set of it, and what pools and rollbacks of them must give.

`max` is QEMU 7.2's, or QEMU 10.0's, which has nested virtualisation too: the measurements were made with it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from kvmneg.features import catalog as catalogs
from kvmneg.features.featureset import fits, meet_all
from kvmneg.features.report import Report
from kvmneg.policy import levelling, negotiation, pool, rollback
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request

FOLDER = Path(__file__).parents[1] / "data/hosts"
MAX = tuple(f"{line}.max" for line in ("5.10", "6.1", "6.12", "6.16", "6.18", "newest"))
NESTED = tuple(f"{line}.max.qemu-10.0" for line in ("6.1", "6.12", "6.18", "newest"))
N1 = tuple(f"{line}.neoverse-n1" for line in ("6.1", "6.12", "newest"))
A57 = "6.12.cortex-a57"
ALL = (*MAX, *NESTED, *N1, A57)

PSCI, VLS, PMCR = "arm64:0x6030000000140000", "arm64:0x606000000015ffff", "arm64:0x603000000013dce0"
BITMAPS = tuple(f"arm64:0x603000000016000{n}" for n in range(4))
CLIDR, MMFR2 = "arm64:0x603000000013c801", "arm64:0x603000000013c03a"
PFR0, DFR0 = "arm64:0x603000000013c020", "arm64:0x603000000013c028"
CCSIDR = tuple(f"arm64:{0x6020_0000_0011_0000 + n:#x}" for n in range(14))
TIMER = {"13df01", "13df11", "13df12"}  # CNTPCT, CNTP_CTL, CNTP_CVAL of EL0


class Kernel(NamedTuple):
    """A kernel with `-cpu max`: registers of a full vCPU, PSCI, hypercall bitmaps (those that it does not show at
    first too), whether values can be pinned by it, whether it has the SMCCC filter."""

    registers: int
    psci: int
    bitmaps: tuple[int, ...]
    writable: bool


KERNELS = {
    "5.10": Kernel(341, 0x10000, (), False),
    "6.1": Kernel(345, 0x10001, (1, 1, 3), False),
    "6.12": Kernel(362, 0x10001, (1, 1, 3), True),
    "6.16": Kernel(360, 0x10003, (1, 1, 3, 3), True),
    "6.18": Kernel(360, 0x10003, (1, 1, 3, 3), True),
    "7.3": Kernel(361, 0x10003, (1, 1, 3, 3), True),
}


@cache
def report(name: str) -> Report:
    return Report.loads((FOLDER / f"arm64-{name}.json").read_bytes(), file=name)


def kernel(name: str) -> Kernel:
    release = str(report(name).combo["kernel"])
    return KERNELS[".".join(release.split(".")[:2])]


def low(word: str) -> str:
    """The part of a register's id that differs."""
    return word[-6:]


@pytest.mark.parametrize("name", ALL)
def test_each_says_what_it_is(name: str) -> None:
    found = report(name)
    assert found.measured["source"] == "recorded"
    assert "not a CPU of that name" in found.measured["by"]
    assert found.architecture == "arm64"
    assert list(found.registers) == sorted(set(found.registers))
    assert len({report(other).host for other in ALL}) == len(ALL)


@pytest.mark.parametrize("name", [*MAX, *NESTED])
def test_a_kernel_offers_what_was_measured_by_hand(name: str) -> None:
    found, expected = report(name), kernel(name)
    assert len(found.registers) == expected.registers
    assert found.offer_words[PSCI] == expected.psci
    assert tuple(found.offer_words[word] for word in BITMAPS if word in found.offer_words) == expected.bitmaps
    assert found.offer_words["arm:smccc-filter"] == expected.writable
    assert found.offer_words["arm:vgic-models"] == 0b110
    assert found.offer_words["arm:vcpu-features"] & 0x7F == 0x7F


@pytest.mark.parametrize("name", NESTED)
def test_nested_virtualisation(name: str) -> None:
    """MMFR2.NV is 0 from 6.16 on, and there a write of the old value is taken and ignored."""
    found = report(name)
    newer = len(kernel(name).bitmaps) == 4
    assert found.offer_words[MMFR2] >> 24 & 0xF == (0 if newer else 2)
    assert found.dropped_words.get(MMFR2, 0) >> 24 & 0xF == (0xF if newer else 0)
    assert not found.settable_words.get(MMFR2, 0) >> 24 & 0xF


@pytest.mark.parametrize("name", ALL)
def test_fields_can_be_set_as_wholes(name: str) -> None:
    """A field is a number: half of it cannot be settable. Vector lengths, each a bit, are set up to a largest."""
    found = report(name)
    names = catalogs.names("arm64")
    for word, bits in found.settable_words.items():
        assert bits
        for feature in names.at(word, bits):
            assert feature.rule == "prefix" or not feature.mask & ~bits, feature.name


@pytest.mark.parametrize("name", ALL)
def test_what_can_be_set(name: str) -> None:
    settable, expected = report(name).settable_words, kernel(name)
    assert settable[PSCI] == 0xFFFF_FFFF
    assert tuple(settable[word] for word in BITMAPS if word in settable) == expected.bitmaps
    assert settable[PMCR] == 0x1F << 11
    assert set(CCSIDR) <= settable.keys() if expected.writable else not set(CCSIDR) & settable.keys()
    if expected.writable:
        assert {settable[word] for word in CCSIDR} == {0xFFFF_FFFF}
        assert settable[CLIDR] == (1 << 47) - 1  # Ctype1 to Ttype7
        version = report(name).offer_words[DFR0] & 0xF  # DebugVer: KVM takes nothing below 6, Armv8
        assert settable[DFR0] & 0xF0F == (0xF0F if version > 6 else 0xF00)  # PMUVer too
    else:
        assert CLIDR not in settable
        assert settable.get(DFR0, 0) == 0
    if report(name).offer_words["arm:vcpu-features"] & 1 << 4:
        assert settable[VLS] == report(name).offer_words[VLS] & ~1


class Rollback(NamedTuple):
    """`fails` are the registers (the end of their ids) that the older kernel refuses or does not know; measured."""

    newer: str
    older: str
    fails: set[str]
    no_fence: set[str]


CACHES = {low(word) for word in CCSIDR} | {"13c801"}
ROLLBACKS = [
    Rollback("newest.neoverse-n1", "6.12.neoverse-n1", {"140000", "160003", "13c4f6"}, set()),
    Rollback(
        *("newest.neoverse-n1", "6.1.neoverse-n1"),
        *({"140000", "160003", "13c4f6", "13c028", *CACHES, *TIMER}, set()),
    ),
    Rollback(
        *("6.12.neoverse-n1", "6.1.neoverse-n1"),
        *({"13c103", "13c512", "13c513", "13c028", *CACHES, *TIMER}, set()),
    ),
    Rollback(
        *("6.18.max.qemu-10.0", "6.12.max.qemu-10.0"),
        *({"140000", "160003", "13c03a"}, {"aa64mmfr2-nv"}),
    ),
    Rollback(
        *("newest.max.qemu-10.0", "6.1.max.qemu-10.0"),
        {*("140000", "160003", "13c00a", "13c028", "13c031", "13c032", "13c039", "13c03a", "13c4f6"), *CACHES, *TIMER},
        {"aa64mmfr2-nv"},
    ),
    Rollback(
        *("6.12.max.qemu-10.0", "6.1.max.qemu-10.0"),
        {*("13c00a", "13c028", "13c031", "13c032", "13c039", "13c103", "13c512", "13c513"), *CACHES, *TIMER},
        {"aa64mmfr1-hcx"},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", ROLLBACKS, ids=lambda case: f"{case.newer}-{case.older}")
def test_rollback(case: Rollback) -> None:
    """Every register that fails without a fence is named, and no other; a fence where there is one, else its fields."""
    answer = rollback.judge(report(case.newer), report(case.older))
    assert {low(one.word) for one in answer.unfenced if one.word.startswith("arm64:")} == case.fails
    assert {blocker.feature for blocker in answer.blockers} == case.no_fence
    assert (answer.fence is None) == bool(case.no_fence)
    assert all(report(case.newer).host in str(one.to_json()) or report(case.older).host in str(one.to_json())
               for one in answer.blockers)  # fmt: skip


@pytest.mark.parametrize(
    "case", [case for case in ROLLBACKS if not case.no_fence], ids=lambda case: case.older
)
def test_a_contract_under_the_fence_of_a_rollback(case: Rollback) -> None:
    """It may go to both, and binds the older kernel's values; what the older one does not list may be dropped."""
    newer, older = report(case.newer), report(case.older)
    answer = rollback.judge(newer, older)
    assert answer.fence is not None
    fence = Fence(answer.fence.granted, 1, registers=answer.fence.registers)
    contract = negotiation.negotiate(Request(maximum=True), newer, fence).contract
    assert negotiation.check(contract, newer) == negotiation.check(contract, older) == ()
    bound = contract.words()
    for word in (PSCI, CLIDR, *CCSIDR[:3], DFR0, PFR0):
        mask = int(contract.to_json().get("masks", {}).get(word, "0xffffffffffffffff"), 16)
        assert bound[word] == older.offer_words[word] & mask, word
    lacking = set(newer.registers) - set(older.registers)
    assert {one.register for one in contract.portable if one.rule.startswith("drop")} == lacking


def verdicts(*names: str) -> dict[str, str]:
    """Field → verdict of a pool."""
    members = [report(name) for name in names]
    found = levelling.level(meet_all(member.offer for member in members), members)
    return {one.feature: one.verdict for one in found.verdicts}


def test_three_verdicts() -> None:
    """PSCI is set everywhere, HCX not by 6.12 (from 6.18 on it can be), NV by none."""
    found = verdicts(*NESTED)
    assert found["psci-version"] == found["aa64dfr0-debugver"] == found["clidr-ctype1"] == "levelled"
    assert {name for name, verdict in found.items() if verdict == "must-match"} == {"aa64mmfr1-hcx"}
    assert {name for name, verdict in found.items() if verdict == "cannot-be-levelled"} == {"aa64mmfr2-nv"}
    assert set(verdicts(*N1).values()) == {"levelled"}
    assert set(verdicts(*MAX[2:]).values()) == {"levelled"}


def test_two_cpus() -> None:
    """A Cortex-A57 with a Neoverse N1: MIDR must match before 6.16, workarounds never level, atomics do."""
    found = verdicts("6.12.cortex-a57", "6.12.neoverse-n1")
    assert found["midr"] == "must-match"
    assert found["arch-workaround-1"] == "cannot-be-levelled"
    assert found["aa64isar0-atomic"] == "levelled"


@pytest.mark.parametrize("names", [N1, MAX[2:], *((name,) for name in ALL)], ids="+".join)
def test_a_baseline_fits_each_member(names: tuple[str, ...]) -> None:
    members = [report(name) for name in names]
    met = pool.baseline(members)
    assert [fits(met, member.offer) for member in members] == [()] * len(members)
    assert [levelling.unreachable(met, member) for member in members] == [[]] * len(members)
