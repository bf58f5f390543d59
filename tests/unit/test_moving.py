# SPDX-License-Identifier: LGPL-2.1-or-later
"""May a guest move to another host: known answers, and what makes it an island there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arm64_reports as arm64
import pytest

from kvmneg.errors import UsageError
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.policy import moving, negotiation, rollback
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request

HOSTS = Path(__file__).parents[1] / "data/hosts"


def like(report: Report, host: str, **changes: int) -> Report:
    offer = {**report.offer_words, **{word.replace("__", ":"): value for word, value in changes.items()}}
    return Report("x86_64", measured={"host": host}, combo={}, identity={}, offer=offer)


def contract(report: Report) -> Contract:
    return negotiation.negotiate(Request(maximum=True), report).contract


def judge(guest: Contract, *rest: Any, **more: Any) -> moving.Move:
    return moving.judge(guest.granted, *rest, portable=guest.portable, **more)


def test_to_its_like(intel: Report) -> None:
    move = judge(contract(intel), like(intel, "node8"))
    assert move.allowed and move.above == () and move.to_json()["island"] is None
    assert any("node8" in line for line in move.scope if line.startswith("judged"))
    assert any("none was named" in line for line in move.scope)


def test_to_another_vendor(intel: Report, amd: Report) -> None:
    move = judge(contract(amd), intel)
    assert not move.allowed
    assert any(blocker.word.startswith("cpuid:0x0.0.") for blocker in move.blockers)


def test_a_bit_that_the_guest_was_not_told_of(intel: Report) -> None:
    """FDP_EXCPTN_ONLY (cpuid:0x7.0.ebx bit 6): a guest that counts on the other behaviour is at risk there."""
    word, bit = "cpuid:0x7.0.ebx", 1 << 6
    plain = like(intel, "old", **{word: intel.offer_words[word] & ~bit})
    odd = like(intel, "new", **{word: intel.offer_words[word] | bit})
    move = judge(contract(plain), odd)
    assert [blocker.feature for blocker in move.blockers] == ["fdp-excptn-only"]
    assert judge(contract(odd), plain).allowed
    refused = judge(contract(odd), plain, vmm="qemu")  # which enforces what it was started with
    assert ("fdp-excptn-only", "vmm") in [(one.feature, one.cause) for one in refused.blockers]


def test_an_island(intel: Report) -> None:
    """It may go, and has more than the target's new guests: from there it goes to few."""
    guest = contract(intel)
    values = dict(intel.offer.words)
    values["cpuid:0x7.0.ecx"] &= ~(1 << 22)
    fence = Fence(FeatureSet.of("x86_64", values), 4)
    move = judge(guest, like(intel, "node8"), fence)
    assert move.allowed
    assert move.to_json()["island"] == {"level": "fence generation 4", "above": ["rdpid"]}


def test_to_another_architecture(intel: Report) -> None:
    move = judge(contract(intel), arm64.new())
    assert not move.allowed and move.above == ()


def test_registers_that_arm64_carries() -> None:
    """Without a fence over both, a guest of 6.12 carries registers that 6.1 does not know."""
    old, new = (
        Report.loads((HOSTS / f"arm64-{line}.neoverse-n1.json").read_bytes()) for line in ("6.1", "6.12")
    )
    unknown = {f"arm64:{register:#x}" for register in set(new.registers) - set(old.registers)}
    move = judge(contract(new), old)
    assert unknown & {blocker.word for blocker in move.blockers}
    fence = rollback.judge(new, old).fence
    guest = negotiation.negotiate(Request(maximum=True), new, fence).contract
    assert judge(guest, old, fence).allowed
    # QEMU sends every register it has, and cannot leave one out
    assert not judge(guest, old, fence, vmm="qemu").allowed


def test_a_vmm_nobody_knows(intel: Report) -> None:
    with pytest.raises(UsageError, match="bhyve"):
        judge(contract(intel), intel, vmm="bhyve")
