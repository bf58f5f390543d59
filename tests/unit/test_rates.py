# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pinned TSC rate, and state that a guest carries, from the request to the contract and to the next host."""

from __future__ import annotations

from typing import Any

import pytest

from kvmneg import limits
from kvmneg.emit import qemu
from kvmneg.errors import BadInput, Blocked, Breached, UsageError
from kvmneg.features.report import Report
from kvmneg.policy import pinning, pool
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.negotiation import below, check, negotiate
from kvmneg.policy.request import Request

INVTSC = "cpuid:0x80000007.0.edx"


def interval(low: int, high: int) -> int:
    return high << 32 | low


# 250 ppm about 2,400,001 and 2,400,003 kHz: two boots of one host; about 2,600,000: another CPU
BOOT, NEXT_BOOT = interval(2_399_400, 2_400_601), interval(2_399_402, 2_400_603)
FASTER = interval(2_599_350, 2_600_650)
SCALES = interval(1, 0x7FFF_FFFE)


def with_rates(report: Report, rates: int | None, host: str = "node7", **words: int) -> Report:
    """The host as it would be with these rates; None: its report does not say."""
    offer = {**report.offer_words, **words}
    offer.pop("tsc:khz", None)
    if rates is not None:
        offer["tsc:khz"] = rates
    return Report("x86_64", measured={"host": host}, combo={"kernel": "6.12"}, identity={}, offer=offer)


def without_state(report: Report) -> Report:
    offer = {
        word: value for word, value in report.offer_words.items() if not word.startswith(("state:", "tsc:"))
    }
    return Report("x86_64", measured={"host": "old"}, combo={"kernel": "6.1"}, identity={}, offer=offer)


PINNED = Request(level="x86-64-v2", require=("invtsc",), tsc_khz=2_400_000)


def pinned_contract(report: Report) -> Contract:
    return negotiate(PINNED, with_rates(report, BOOT)).contract


def test_an_invariant_tsc_comes_with_a_pinned_rate(intel: Report) -> None:
    contract = pinned_contract(intel)
    assert contract.words()[INVTSC] == 0x100
    assert contract.words()["tsc:khz"] == interval(2_400_000, 2_400_000)
    assert Contract.from_binary(contract.binary()).granted == contract.granted
    assert Contract.from_json(contract.to_json()).digest == contract.digest


def test_without_a_pin_a_contract_names_no_rate_and_fits_any_host(intel: Report) -> None:
    here = with_rates(intel, BOOT)
    for modes in ({"maximum": True}, {"level": "x86-64-v2"}, {"exact": ("fpu",)}):
        contract = negotiate(Request(**modes), here).contract  # type: ignore[arg-type]
        assert contract.words()["tsc:khz"] == 0
        assert not contract.words()[INVTSC]
        for rates in (BOOT, NEXT_BOOT, FASTER, 0, None):
            assert check(contract, with_rates(intel, rates)) == ()


def test_max_has_it_with_a_pin(intel: Report) -> None:
    granted = negotiate(Request(maximum=True, tsc_khz=2_400_000), with_rates(intel, BOOT)).contract.granted
    assert granted.field("invtsc") == 1


def test_through_qemu_too(intel: Report) -> None:
    wanted = Request(level="x86-64-v2", require=("invtsc",), tsc_khz=2_400_000, vmm="qemu-10.0")
    contract = negotiate(wanted, with_rates(intel, BOOT)).contract
    assert contract.words()[INVTSC] == 0x100
    cpu = qemu.emit(contract, "pc-q35-10.0").cpu.split(",")
    assert "invtsc=on" in cpu and "tsc-frequency=2400000000" in cpu
    with pytest.raises(Blocked):
        negotiate(Request(level="x86-64-v2", require=("invtsc",), vmm="qemu-10.0"), with_rates(intel, BOOT))


def test_no_tsc_frequency_without_a_pin(intel: Report) -> None:
    contract = negotiate(Request(level="x86-64-v2"), with_rates(intel, BOOT)).contract
    assert "tsc-frequency" not in qemu.emit(contract, "pc-q35-10.0").cpu


@pytest.mark.parametrize("khz", [2_399_399, 2_400_602, 1, limits.TSC_KHZ])
def test_a_rate_that_the_host_cannot_give_is_refused_with_both_rates(intel: Report, khz: int) -> None:
    with pytest.raises(Blocked) as caught:
        negotiate(Request(tsc_khz=khz), with_rates(intel, BOOT))
    (blocker,) = caught.value.blockers
    assert (blocker.feature, blocker.word, blocker.cause) == ("tsc-khz", "tsc:khz", "kvm")
    assert f"{khz} kHz" in blocker.because and "2399400 to 2400601 kHz" in blocker.because


def test_a_host_that_scales_gives_any_rate(intel: Report) -> None:
    here = with_rates(intel, SCALES, **{"kvm:tsc-control": 1})
    for khz in (1, 2_400_000, 0x7FFF_FFFE):
        assert negotiate(Request(tsc_khz=khz), here).contract.words()["tsc:khz"] == interval(khz, khz)


def test_a_report_without_rates_is_not_known(intel: Report) -> None:
    with pytest.raises(Blocked) as caught:
        negotiate(PINNED, with_rates(intel, None))
    assert [(b.feature, b.cause) for b in caught.value.blockers] == [("tsc-khz", "unknown")]
    (blocker,) = check(pinned_contract(intel), with_rates(intel, None))
    assert (blocker.feature, blocker.cause) == ("tsc-khz", "unknown")  # no proof that the clock stays right


def test_a_pinned_guest_moves_where_its_rate_can_be_given(intel: Report) -> None:
    contract = pinned_contract(intel)
    assert check(contract, with_rates(intel, NEXT_BOOT)) == ()
    assert check(contract, with_rates(intel, SCALES)) == ()
    (blocker,) = check(contract, with_rates(intel, FASTER, host="node9"))
    assert blocker.feature == "tsc-khz"
    assert "2400000 kHz" in blocker.because and "2599350 to 2600650 kHz" in blocker.because


def test_a_pool_that_does_not_agree_names_both_hosts(intel: Report) -> None:
    hosts = [with_rates(intel, BOOT, "node7"), with_rates(intel, FASTER, "node9")]
    common = pool.baseline(hosts)
    assert common.value("tsc:khz") == 0
    held = {holder.feature: holder.hosts for holder in pool.holders(hosts, common)}
    assert set(held["tsc-khz"]) == {"node7", "node9"}
    fence = Fence(pinning.to_pin(common, hosts[0]), 3)
    with pytest.raises(Blocked) as caught:
        negotiate(PINNED, hosts[0], fence)
    (blocker,) = [b for b in caught.value.blockers if b.feature == "tsc-khz"]
    assert blocker.cause == "fence" and "no rate" in blocker.because


def test_a_fence_holds_over_the_next_boot(intel: Report) -> None:
    fence = Fence(pinning.source("host", with_rates(intel, BOOT)), 1)
    again = with_rates(intel, NEXT_BOOT)
    assert below(again, fence) == ()
    assert negotiate(PINNED, again, fence).contract.words()["tsc:khz"] == interval(2_400_000, 2_400_000)
    with pytest.raises(Breached) as caught:
        negotiate(Request(), with_rates(intel, FASTER), fence)
    assert [b.feature for b in caught.value.blockers] == ["tsc-khz"]


def test_a_fence_without_an_invariant_tsc_holds_on_any_rate(intel: Report) -> None:
    plain = with_rates(intel, BOOT, **{INVTSC: 0})
    fence = Fence(pinning.source("host", plain), 1)
    assert below(with_rates(plain, FASTER), fence) == ()


def test_a_fence_is_written_with_its_rates(intel: Report) -> None:
    fence = Fence(with_rates(intel, BOOT).offer, 1)
    assert "tsc:khz.tsc-khz = 2399400-2400601" in fence.text()
    assert Fence.parse(fence.text()).granted == fence.granted
    for text in ("2400601-2399400", "2400000", "0x1-0x2", "1-", "-1-5", "1-4294967296"):
        with pytest.raises(BadInput, match="number"):
            Fence.parse(f"architecture x86_64\ntsc:khz.tsc-khz = {text}\n")


def test_an_older_fence_and_an_older_report_still_go_together(intel: Report) -> None:
    """Neither names state or rates: nothing is broken, and nobody is refused for what was not known."""
    old = without_state(intel)
    fence = Fence.parse(Fence(old.offer, 1).text(), generation=1)
    assert fence.granted.field("invtsc") == 1
    for host in (old, intel, with_rates(intel, FASTER)):
        contract = negotiate(Request(level="x86-64-v2"), host, fence).contract
        assert not any(value for word, value in contract.words().items() if word.startswith("state:"))
        assert check(contract, old) == check(contract, intel) == ()
    today = Fence(with_rates(intel, BOOT).offer, 2)
    assert negotiate(Request(level="x86-64-v2"), old, today).contract.granted.value("state:msrs") == 0
    assert check(negotiate(Request(level="x86-64-v2"), intel).contract, old) == ()


CARRYING = {"state:msrs": 0x17FF, "state:msrs-kvm": 0x3FF, "state:vcpu": 0x3F, "state:nested": 0}


def test_a_contract_names_the_state_that_its_features_bring(intel: Report) -> None:
    here = with_rates(intel, BOOT, **CARRYING)
    plain = negotiate(Request(level="x86-64-v2"), here).contract
    assert plain.granted.field("state-sysenter-cs") == 1
    assert plain.granted.field("state-kvm-steal-time") == 0
    clock = negotiate(Request(level="x86-64-v2", require=("kvm-steal-time",)), here).contract
    assert clock.granted.field("state-kvm-steal-time") == 1
    assert Contract.from_binary(clock.binary()).granted == clock.granted


def test_a_vmm_without_a_name_for_state_carries_it(intel: Report) -> None:
    wanted = Request(level="x86-64-v2", require=("kvm-steal-time",), vmm="qemu-10.0")
    contract = negotiate(wanted, with_rates(intel, BOOT, **CARRYING)).contract
    assert contract.granted.field("state-kvm-steal-time") == contract.granted.field("state-pat") == 1
    lost = {row.feature for row in qemu.emit(contract, "pc-q35-10.0").lost()}
    assert not [name for name in lost if name.startswith(("state-", "tsc-khz"))]


def test_a_move_is_judged_on_the_state_that_a_guest_carries(intel: Report) -> None:
    here = with_rates(intel, BOOT, **CARRYING)
    there = with_rates(intel, BOOT, "node9", **CARRYING | {"state:msrs-kvm": 0x3FF & ~0x20})
    clock = negotiate(Request(level="x86-64-v2", require=("kvm-steal-time",)), here).contract
    assert [b.feature for b in check(clock, there)] == ["state-kvm-steal-time"]
    assert check(negotiate(Request(level="x86-64-v2"), here).contract, there) == ()
    fence = Fence(here.offer, 1)
    assert [b.feature for b in fence.unmet(there.offer)] == ["state-kvm-steal-time"]


@pytest.mark.parametrize("name", ["tsc-khz", "state-pat"])
def test_rates_and_state_are_not_features_to_ask_for(intel: Report, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be asked for"):
        negotiate(Request(require=(name,)), intel)


def test_the_rate_of_a_request() -> None:
    assert Request.from_json({"tscKhz": 2_400_000}).to_json()["tscKhz"] == 2_400_000
    assert Request.from_json({"tscKhz": None}).tsc_khz is None
    wrong: list[Any] = [0, -1, limits.TSC_KHZ + 1, True, "2400000", 2.4]
    for khz in wrong:
        with pytest.raises(UsageError):
            Request.from_json({"tscKhz": khz})


def test_hiding_a_feature_in_a_fence_hides_its_state(intel: Report) -> None:
    here = with_rates(intel, BOOT, **CARRYING)
    text = Fence(here.offer, 1).text()
    assert here.offer.field("state-tsc-adjust") == 0 and here.offer.field("state-kvm-steal-time") == 1
    rows = [row for row in text.splitlines() if not row.startswith("cpuid:0x40000001.0.eax ")]
    edited = Fence.parse("\n".join(rows))
    assert edited.granted.value("state:msrs-kvm") == 0
    assert edited.granted.value("state:msrs") == here.offer.value("state:msrs")
    assert Fence.parse(edited.text()).digest == edited.digest
