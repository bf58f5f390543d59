# SPDX-License-Identifier: LGPL-2.1-or-later
"""May a host go back to a combo: known answers of synthetic hosts, and of one host recorded under two kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import arm64_reports as arm64
import pytest

from kvmneg.features.featureset import FeatureSet, meet
from kvmneg.features.report import Report
from kvmneg.policy import negotiation, prediction, roll, rollback
from kvmneg.policy.combos import Asked
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.leases import Holding
from kvmneg.policy.request import Request

HOSTS = Path(__file__).parents[1] / "data/hosts"
AVX2, RDPID = ("cpuid:0x7.0.ebx", 1 << 5), ("cpuid:0x7.0.ecx", 1 << 22)
VM, OTHER = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11", "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"


def recorded(name: str) -> Report:
    return Report.loads((HOSTS / f"{name}.json").read_bytes())


def without(report: Report, *places: tuple[str, int], kernel: str = "6.1.0-50-amd64") -> Report:
    """The same host under an older kernel, whose KVM lacks these bits."""
    offer = dict(report.offer_words)
    for word, bits in places:
        offer[word] &= ~bits
    measured = {"host": "old"}
    return Report(report.architecture, measured=measured, combo={"kernel": kernel}, identity={}, offer=offer)


def held(granted: FeatureSet | None, *vms: str, digest: str = "sha256:1") -> list[Holding]:
    return [Holding(vm, digest, granted, "running", 0) for vm in vms]


def names(blockers: Any) -> list[str]:
    return [blocker.feature for blocker in blockers]


def test_allowed_where_it_holds_the_fence_and_every_guest(intel: Report) -> None:
    old = without(intel, RDPID)
    low = meet(intel.offer, old.offer)
    answer = roll.judge(old, Fence(low, 7), roll.Guests(held(low, VM, OTHER)))
    assert answer.allowed and answer.measured and answer.combo == old.combo_digest()
    assert any(line.startswith("judged") for line in answer.scope)
    assert any(line.startswith("not judged") for line in answer.scope)
    assert not any("no fence is pinned" in line for line in answer.scope)


def test_before_the_fence_you_cannot_go_back(intel: Report) -> None:
    """A guest that was started without one saw all that the new kernel offers."""
    old = without(intel, RDPID)
    answer = roll.judge(old, None, roll.Guests(held(intel.offer, VM)))
    assert not answer.allowed and answer.blockers == ()
    ((digest, vms, blockers),) = answer.guests
    assert (digest, vms, names(blockers)) == ("sha256:1", (VM,), ["rdpid"])


def test_without_a_fence_a_yes_is_of_the_guests_there_are(intel: Report) -> None:
    answer = roll.judge(without(intel, RDPID), None, roll.Guests(()))
    assert answer.allowed
    assert any("no fence is pinned, and the next may hold more" in line for line in answer.scope)
    assert not any(line.startswith("judged") and "fence" in line for line in answer.scope)


def test_features_of_the_fence_that_it_lacks(intel: Report) -> None:
    old = without(intel, RDPID, AVX2)
    answer = roll.judge(old, Fence(intel.offer, 7), roll.Guests(()))
    assert not answer.allowed
    assert {"avx2", "rdpid"} <= set(names(answer.blockers))
    assert {blocker.wanted_by for blocker in answer.blockers} == {"the fence"}
    assert {blocker.missing_on for blocker in answer.blockers} == {"host old"}


def test_the_accept_set_counts_for_guests_and_the_offer_for_the_fence(intel: Report) -> None:
    """An old kernel that takes what it does not offer: guests may come back, new ones would breach the fence."""
    old = without(intel, RDPID)
    word, bit = RDPID
    old.accept_words = {word: old.offer_words[word] | bit}
    guests = roll.Guests(held(intel.offer, VM))
    assert roll.judge(old, None, guests).allowed
    answer = roll.judge(old, Fence(intel.offer, 1), guests)
    assert names(answer.blockers) == ["rdpid"] and answer.guests == ()


def test_what_a_guest_must_be_told_of_counts_the_other_way_round(amd: Report) -> None:
    """RSBA (msr:0x10a bit 2): a guest that was not told is at risk on a kernel that has it."""
    told = dict(amd.offer_words)
    told["msr:0x10a"] = told.get("msr:0x10a", 0) | 4
    untold = {**told, "msr:0x10a": told["msr:0x10a"] & ~4}
    guest = FeatureSet.of("x86_64", untold)
    there = Report("x86_64", measured={"host": "old"}, combo={}, identity={}, offer=told)
    ((_, vms, blockers),) = roll.judge(there, None, roll.Guests(held(guest, VM))).guests
    assert vms == (VM,) and "rsba" in names(blockers)
    assert "at risk" in blockers[0].because
    back = Report("x86_64", measured={"host": "old"}, combo={}, identity={}, offer=untold)
    assert roll.judge(back, None, roll.Guests(held(there.offer, VM))).allowed


def test_a_guest_nobody_knows_blocks(intel: Report) -> None:
    guests = roll.Guests([*held(None, VM), *held(intel.offer, OTHER)], unknown=("pid 4711",))
    answer = roll.judge(intel, Fence(intel.offer, 1), guests)
    assert answer.unknown == (VM, "pid 4711") and answer.guests == ()
    assert not answer.allowed
    assert roll.Guests(()).unknown == ()


def test_cpus_that_were_not_measured_block(intel: Report) -> None:
    old = without(intel)
    old.combo["unvisited"] = [{"cpus": "4-7", "because": "no affinity"}]
    answer = roll.judge(old, None, roll.Guests(held(old.offer, VM)))
    assert names(answer.blockers) == ["cpus"] and not answer.allowed
    assert roll.survey([("x", old)], None, roll.Guests(()))[0].allowed is False


def test_state_that_a_guest_carries_counts(intel: Report) -> None:
    """STAR (state:msrs bit 3): a word of the set. Of a report that names no state nothing is known: none is refused."""
    new = without(intel)
    new.offer_words["state:msrs"] = 0b1111
    guests = roll.Guests(held(new.offer, VM))
    old = without(new)
    old.offer_words["state:msrs"] = 0b0111
    ((_, _, blockers),) = roll.judge(old, None, guests).guests
    assert names(blockers) == ["state-star"]
    assert roll.judge(without(intel), None, guests).allowed


def test_equal_guests_are_judged_once(intel: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    old, judged = without(intel, RDPID), []
    accepts = negotiation.accepts

    def counted(granted: FeatureSet, *rest: Any, **more: Any) -> Any:
        judged.append(granted)
        return accepts(granted, *rest, **more)

    monkeypatch.setattr(negotiation, "accepts", counted)
    low = meet(intel.offer, old.offer)
    many = [f"vm{number}" for number in range(1000)]
    guests = roll.Guests([*held(intel.offer, *many), *held(low, VM, digest="sha256:2")])
    answer = roll.judge(old, None, guests)
    assert [(one.digest, len(one.vms)) for one in answer.guests] == [("sha256:1", 1000)]
    assert judged == [intel.offer]
    assert roll.survey([("a", old), ("b", intel)], None, guests) == [("a", 0, 1000), ("b", 0, 0)]
    assert judged == [intel.offer]  # a survey needs no reasons


# -- one host under two kernels, as recorded ----------------------------------------------------------

PAIRS = [("amd-6.1.max", "amd-6.12.max"), ("arm64-6.1.neoverse-n1", "arm64-6.12.neoverse-n1")]


@pytest.fixture(params=PAIRS, ids=["amd", "arm64"])
def pair(request: pytest.FixtureRequest) -> tuple[Report, Report]:
    """The same host under Linux 6.1 and under 6.12."""
    old, new = request.param
    return recorded(old), recorded(new)


def guest_of(report: Report, fence: Fence | None) -> roll.Guests:
    contract = negotiation.negotiate(Request(maximum=True), report, fence).contract
    holdings = held(contract.granted, VM, digest=contract.digest)
    return roll.Guests(holdings, registers={contract.digest: contract.portable})


def test_before_and_after_the_fence(pair: tuple[Report, Report]) -> None:
    """Before the fence there is no way back; once it is pinned, guests started under it go either way."""
    old, new = pair
    answer = roll.judge(old, None, guest_of(new, None))
    assert not answer.allowed and [held.vms for held in answer.guests] == [(VM,)]
    fence = rollback.judge(new, old).fence
    assert fence is not None
    for started in (old, new):
        for there in (old, new):
            answer = roll.judge(there, fence, guest_of(started, fence))
            assert answer.allowed, (answer.blockers, answer.guests)


def test_a_fence_over_the_new_kernel_alone_forbids_the_old_one(pair: tuple[Report, Report]) -> None:
    old, new = pair
    fence = Fence(new.offer, 1, registers=new.registers)
    answer = roll.judge(old, fence, roll.Guests(()))
    assert not answer.allowed and answer.blockers
    assert roll.judge(new, fence, roll.Guests(())).allowed


def test_the_recorded_combo_is_found_by_its_kernel(pair: tuple[Report, Report]) -> None:
    old, new = pair
    rows = [roll.Recorded(one.combo_digest(), one.combo, "", "") for one in (new, old)]
    found, nearest, differs = roll.find(new.combo, Asked(kernel=old.combo["kernel"]), rows)
    assert ([one.digest for one in found], nearest, differs) == ([old.combo_digest()], None, [])
    newer = {**new.combo, "cmdline": new.combo["cmdline"] + " mitigations=off"}
    found, nearest, differs = roll.find(newer, Asked(kernel="6.1.0"), rows)
    assert found == [] and nearest is not None and nearest.digest == old.combo_digest()
    assert [one.name for one in differs] == ["cmdline"]


def test_what_was_never_measured_is_refused_and_how_to_measure_it(pair: tuple[Report, Report]) -> None:
    old, new = pair
    rows = [roll.Recorded(one.combo_digest(), one.combo, "", "") for one in (new, old)]
    asked = Asked(kernel="5.10.0-32-amd64")
    found, nearest, differs = roll.find(new.combo, asked, rows)
    assert found == [] and "kernel" in [one.name for one in differs]
    guests = roll.Guests(())
    told = prediction.predict(new, asked, "5.10.0-32-amd64", None, guests)
    answer = roll.refuse(asked, nearest, differs, guests, told)
    assert not answer.allowed and not answer.measured
    assert "CANDIDATE" in answer.how
    assert told.blockers == () and told.guests == ()  # a prediction without a reason is still no yes
    assert answer.prediction is told


def test_a_vmm_that_was_never_measured() -> None:
    asked = Asked(vmms=("qemu-11.0",))
    new = recorded("amd-6.12.max")
    _, nearest, differs = roll.find(new.combo, asked, [roll.Recorded("x", new.combo, "", "")])
    answer = roll.refuse(asked, nearest, differs, roll.Guests(()))
    assert [one.name for one in answer.differs] == ["vmms.qemu.version"]
    assert "install that VMM build" in answer.how


def test_nothing_was_ever_recorded() -> None:
    assert roll.find({"kernel": "6.1"}, Asked(), []) == ([], None, [])
    answer = roll.refuse(Asked(kernel="6.1"), None, [], roll.Guests(()))
    assert (answer.allowed, answer.nearest) == (False, "")


# -- predictions ----------------------------------------------------------------------------------------


def test_x86_is_predicted_from_what_upstream_passes_on(intel: Report) -> None:
    """AVX-VNNI came with 5.12 (Linux commit 1085a6b585d7): 5.10 does not know it, 6.1 does."""
    word, bit = "cpuid:0x7.1.eax", 1 << 4
    offer = {**intel.offer_words, word: intel.offer_words.get(word, 0) | bit}
    running = Report("x86_64", measured={"host": "n7"}, combo={"kernel": "6.12.1"}, identity={}, offer=offer)
    guests = roll.Guests(held(running.offer, VM))
    told = prediction.predict(running, Asked(kernel="5.10.1"), "5.10.1", Fence(running.offer, 3), guests)
    assert "avx-vnni" in told.lost and told.gained == ()
    assert "avx-vnni" in names(told.blockers)
    assert "avx-vnni" in names(told.guests[0].blockers)
    assert "5.10" in told.source
    assert told.to_json()["label"] == "PREDICTION, not a measurement"
    assert "avx-vnni" not in prediction.predict(running, Asked(kernel="6.1.1"), "6.1.1", None, guests).lost


def test_what_a_newer_kernel_passes_on_is_gained(intel: Report) -> None:
    word, bit = "cpuid:0x7.1.eax", 1 << 4
    offer = {**intel.offer_words, word: intel.offer_words.get(word, 0) & ~bit}
    silicon = {**intel.silicon_words, word: bit}
    running = Report(
        "x86_64", measured={}, combo={"kernel": "5.10.1"}, identity={}, offer=offer, silicon=silicon
    )
    told = prediction.predict(running, Asked(kernel="6.1.1"), "6.1.1", None, roll.Guests(()))
    assert "avx-vnni" in told.gained


def test_a_kernel_older_than_every_table(intel: Report) -> None:
    told = prediction.predict(intel, Asked(kernel="4.19.1"), "4.19.1", None, roll.Guests(()))
    assert (told.source, told.lost) == ("", ())
    assert any("no table is as old" in note for note in told.notes)


def test_arm64_is_predicted_from_what_can_be_set() -> None:
    """A fence below the host's own pointer authentication and atomics: 6.1 takes no write to ISAR0."""
    new = arm64.new()
    low = FeatureSet.of("arm64", {**new.offer.words, arm64.ISAR0: 0x1000_1011_1120})
    fence = Fence(low, 2, registers=new.registers)
    assert roll.below(new, fence) == ()
    told = prediction.predict(new, Asked(kernel="6.1.176"), "6.1.176", fence, roll.Guests(()))
    assert {blocker.word for blocker in told.blockers} >= {arm64.ISAR0}
    assert "6.1.176" in told.source


def test_other_dimensions_are_not_predicted(intel: Report) -> None:
    asked = Asked(others=(("microcode", "0x1"),))
    told = prediction.predict(intel, asked, str(intel.combo.get("kernel") or ""), None, roll.Guests(()))
    assert told.source == "" and told.notes == ("microcode is not predicted: no table tells what it changes",)
