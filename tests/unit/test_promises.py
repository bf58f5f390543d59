# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers that were once a yes too many, or a no too many, on reports of emulated hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmneg.errors import Blocked, Breached
from kvmneg.features.featureset import meet_all
from kvmneg.features.report import Report
from kvmneg.policy import negotiation, portable, rollback
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request

HOSTS = Path(__file__).resolve().parents[1] / "data" / "hosts"
N1, TIGER_LAKE, AMD = "arm64-newest.neoverse-n1", "intel-6.12.tigerlake", "amd-6.12.max"
VENDOR_HYP_2 = 0x6030_0000_0016_0003
STD = 0x6030_0000_0016_0000
NESTED = "state:nested"


def host(name: str, **offer: int) -> Report:
    """A recorded host; `offer` overwrites words, ":" written as "__"."""
    report = Report.loads((HOSTS / f"{name}.json").read_bytes())
    report.offer_words.update({word.replace("__", ":"): value for word, value in offer.items()})
    return report


def without(report: Report, register: int) -> Report:
    kept = tuple(one for one in report.registers if one != register)
    return Report(
        report.architecture, measured=report.measured, combo=report.combo, identity=report.identity,
        offer=report.offer_words, settable=report.settable_words, registers=kept,
    )  # fmt: skip


def test_another_architecture_is_one_reason() -> None:
    guest = negotiation.negotiate(Request(maximum=True), host(N1)).contract
    for vmm in (None, "qemu"):
        (only,) = negotiation.check(guest, host(TIGER_LAKE), vmm)
        assert (only.word, only.feature) == ("", "architecture arm64")


def test_a_vmm_that_drops_no_register_starts_no_guest_that_could_not_move() -> None:
    """traps.md 12: QEMU fails on a register that the other host does not know."""
    here = host(N1)
    fence = Fence(here.offer, registers=tuple(one for one in here.registers if one != VENDOR_HYP_2))
    negotiation.negotiate(Request(maximum=True), here, fence)  # by contract it can be left out
    with pytest.raises(Blocked) as caught:
        negotiation.negotiate(Request(maximum=True, vmm="qemu"), here, fence)
    stuck = [one for one in caught.value.blockers if one.cause == "vmm" and "not every host" in one.because]
    assert [one.word for one in stuck] == [f"arm64:{VENDOR_HYP_2:#x}"]


def test_a_host_without_a_register_of_the_fence_is_below_it() -> None:
    here = host(N1)
    state = next(
        one
        for one in here.registers
        if one >> 16 & 0xFFF == 0x13 and f"arm64:{one:#x}" not in here.offer_words
    )
    fence = Fence(here.offer, registers=here.registers)
    assert negotiation.below(here, fence) == ()
    other = without(here, state)
    assert [one.word for one in negotiation.below(other, fence)] == [f"arm64:{state:#x}"]
    with pytest.raises(Breached):
        negotiation.negotiate(Request(maximum=True), other, fence)


def test_no_common_nested_format_no_nested_guests() -> None:
    """traps.md 13: two kernels whose formats differ have none in common; svm alone would promise a move."""
    one, other = (host(AMD, state__nested=size << 32, state__msrs=7) for size in (4224, 4352))
    wants = Request(maximum=True, require=("svm",))
    assert negotiation.negotiate(wants, one).contract.granted.field("svm") == 1
    shared = meet_all([one.offer, other.offer])
    assert shared.field("svm")
    assert not shared.field("state-nested-svm")
    with pytest.raises(Blocked) as caught:
        negotiation.negotiate(wants, one, Fence(shared))
    assert {blocker.feature for blocker in caught.value.blockers} == {"svm"}
    same = Fence(one.offer)
    assert negotiation.negotiate(wants, one, same).contract.granted.field("svm") == 1


def test_a_rate_that_nobody_pinned_and_state_that_nobody_measured_are_no_obstacle() -> None:
    new = host(TIGER_LAKE, tsc__khz=2_100_000 << 32 | 2_100_000, state__msrs=7)
    old = host(TIGER_LAKE, tsc__khz=2_100_002 << 32 | 2_100_002, state__msrs=7)
    assert rollback.judge(new, old).unfenced == ()
    unknown = host(TIGER_LAKE)
    for word in [word for word in unknown.offer_words if word.startswith(("state:", "tsc:"))]:
        del unknown.offer_words[word]
    assert rollback.judge(new, unknown).unfenced == ()
    less = host(TIGER_LAKE, tsc__khz=2_100_000 << 32 | 2_100_000, state__msrs=3)
    assert [one.feature for one in rollback.judge(new, less).unfenced] == ["state-sysenter-eip"]


def test_an_unknown_kernel_is_not_an_old_one() -> None:
    """STD_BMAP at 0 may be left out on the way to a kernel that has no such calls; which one this is nobody says."""
    here = host(N1)
    rules = portable.entries((STD,), frozenset({STD}), meet_all([here.offer]))
    target = without(here, STD)
    for kernel, reason in (("5.10.223", ""), ("5.14.0", "answers"), ("", "may answer")):
        target.combo["kernel"] = kernel
        found = portable.unknown(
            [one._replace(rule=portable.DROP_IF, value=0) for one in rules], target, None
        )
        assert [reason in one.because for one in found] == ([True] if reason else []), kernel
