# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an arm64 pool can be levelled to: three verdicts, by hand-written pools (Linux' measured behaviour)."""

from __future__ import annotations

import arm64_reports as hosts
import pytest

from kvmneg.errors import Blocked, Incompatible, UsageError
from kvmneg.features.featureset import FeatureSet, meet_all
from kvmneg.features.report import Report
from kvmneg.policy import levelling, negotiation, pinning, pool, portable
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request

MAX = Request(maximum=True)


def verdicts(*reports: Report) -> dict[str, str]:
    levelled = levelling.level(meet_all(report.offer for report in reports), reports)
    return {one.feature: one.verdict for one in levelled.verdicts}


def test_what_every_member_can_set_is_levelled() -> None:
    one, other = hosts.new("a", ISAR0=0x1000_1021_1120), hosts.new("b", ISAR0=0x1021_1120)
    assert verdicts(one, other) == {"aa64isar0-dp": "levelled"}
    assert pool.baseline([one, other]).field("aa64isar0-dp") == 0


def test_what_one_kernel_cannot_set_must_match() -> None:
    older = hosts.report(
        "b", {**hosts.NEW, hosts.ISAR0: 0x1000_1021_1120}, kernel="6.1.176", settable=hosts.WRITABLE_6_1
    )
    newer = hosts.new("a", ISAR0=0x1021_1120)
    assert verdicts(newer, older) == {"aa64isar0-dp": "must-match"}
    with pytest.raises(Incompatible, match="aa64isar0-dp") as no:
        pool.baseline([newer, older])
    (blocker,) = no.value.blockers
    assert blocker.missing_on == "b" and "6.1.176" in blocker.because and "must-match" in blocker.because
    # the other way round the older has less, and the newer is set to it
    less = hosts.report("b", {**hosts.NEW, hosts.ISAR0: 0x1021_1120}, settable={hosts.PSCI: 1})
    assert verdicts(hosts.new(ISAR0=0x1000_1021_1120), less) == {"aa64isar0-dp": "levelled"}


def test_what_no_kernel_sets_cannot_be_levelled() -> None:
    """Published: MMFR2.EVT, FWB and IDS of Neoverse N1 and V1, and nested virtualization (always 0 since 6.16)."""
    v1 = 1 << 56 | 1 << 40 | 1 << 36 | 0x1011
    found = verdicts(hosts.new("n1", MMFR2=0x1011), hosts.new("v1", MMFR2=v1))
    assert found == dict.fromkeys(("aa64mmfr2-ids", "aa64mmfr2-fwb", "aa64mmfr2-evt"), "cannot-be-levelled")
    assert verdicts(hosts.new("a", MMFR2=2 << 24), hosts.new("b", MMFR2=0)) == {
        "aa64mmfr2-nv": "cannot-be-levelled"
    }


def test_the_cpu_and_the_workarounds_are_never_levelled() -> None:
    assert verdicts(hosts.new("a", WORKAROUND_1=2), hosts.new("b", WORKAROUND_1=1)) == {
        "arch-workaround-1": "cannot-be-levelled"
    }
    every = {**hosts.WRITABLE, hosts.WORKAROUND_1: hosts.EVERY, hosts.MIDR: hosts.EVERY}
    told = [
        hosts.report(name, {**hosts.NEW, hosts.WORKAROUND_1: n, hosts.MIDR: n}, settable=every)
        for n, name in enumerate("ab", 1)
    ]
    assert verdicts(*told) == {"arch-workaround-1": "cannot-be-levelled", "midr": "must-match"}


def test_the_published_template_of_n1_and_v1() -> None:
    """Instruction sets as KVM shows them: Neoverse N1 and, by its manual, V1; the result is Firecracker's V1N1."""
    n1 = hosts.new("n1")
    v1 = hosts.new("v1", ISAR0=0x0221_1111_1021_2120, ISAR1=0x0011_0000_0021_1002, MIDR=hosts.N1[hosts.MIDR])
    granted = levelling.level(meet_all([n1.offer, v1.offer]), [n1, v1]).granted
    assert hex(granted.value(hosts.ISAR0)) == "0x100010211120"
    assert hex(granted.value(hosts.ISAR1)) == "0x100001"


def test_caches_are_told_as_the_member_has_them_that_cannot_be_told() -> None:
    granted = pool.baseline([hosts.new(), hosts.old()])
    assert granted.value(hosts.CLIDR) == hosts.OLD[hosts.CLIDR]
    assert [hex(granted.value(hosts.ccsidr(n))) for n in range(4)] == [
        "0x701fe01a",
        "0x201fe01a",
        "0x70ffe03a",
        "0x2",
    ]
    other = hosts.old("other", CLIDR=0x8200_0022)
    assert "must-match" in verdicts(hosts.new(), hosts.old(), other).values()  # two that cannot change theirs


def test_caches_without_unification_need_a_coherent_cpu() -> None:
    one, other = hosts.new("a"), hosts.new("b", CTR=0xA444_C004)  # IDC on one alone
    assert verdicts(one, other)["clidr-loc"] == "must-match"
    unified = 0x0800_0000 | 0x0020_0000 | 0x300_0123
    assert "clidr-loc" not in verdicts(
        hosts.new("a", CLIDR=unified), hosts.new("b", CTR=0xA444_C004, CLIDR=unified)
    )


def test_vcpu_features_switch_their_fields_off() -> None:
    """SVE on one host only, and pointers signed by two algorithms: neither field can be written."""
    sve = {"PFR0": 0x1101_0001_1111_1112, "VLS": 0b11, "ZFR0": 1, "INIT": 0b10100}
    granted = pool.baseline([hosts.new("a", **sve), hosts.new("b", PFR0=0x1101_0000_1111_1112)])
    assert granted.field("aa64pfr0-sve") == granted.field("vcpu-sve") == granted.value(hosts.ZFR0) == 0
    one, other = (
        hosts.new("a", ISAR1=0x10_0011, INIT=0b1100100),
        hosts.new("b", ISAR1=0x10_0101, INIT=0b1100100),
    )
    assert pool.baseline([one, other]).value(hosts.INIT) == 0b100
    assert pool.baseline([one, one]).value(hosts.INIT) == 0b1100100


def test_some_values_are_too_low_for_kvm() -> None:
    """DebugVer is 6 or more, PerfMon 0 or 3 and more, the PSCI version 0.2 or later."""
    for word, value, fine in (
        (hosts.DFR0, 0x1030_5006, True),
        (hosts.DFR0, 0x1030_5005, False),
        (hosts.PSCI, 2, True),
        (hosts.PSCI, 1, False),
    ):
        lower = FeatureSet.of("arm64", {**hosts.NEW, word: value})
        found = [blocker for blocker in levelling.unreachable(lower, hosts.new()) if blocker.word == word]
        assert (found == []) is fine, (word, value)


def test_without_a_measurement_upstreams_table_tells() -> None:
    lower = FeatureSet.of("arm64", {**hosts.NEW, hosts.ISAR0: 0x1021_1120})
    for kernel, reached in (("6.12.107", True), ("6.1.176", False), ("", False), ("nonsense", False)):
        imported = hosts.report("box", hosts.NEW, kernel=kernel, settable={})
        assert levelling.by_table(imported)
        assert (levelling.unreachable(lower, imported) == []) is reached
    assert not levelling.by_table(hosts.new())


def test_a_fence_that_a_host_cannot_show_is_refused() -> None:
    below = FeatureSet.of("arm64", {**hosts.OLD, hosts.ISAR0: 0x1021_1120})
    host = hosts.old()
    with pytest.raises(Blocked) as no:
        negotiation.negotiate(MAX, host, Fence(below, 3))
    assert [blocker.feature for blocker in no.value.blockers] == ["aa64isar0-dp"]
    assert no.value.blockers[0].wanted_by == "the fence"
    with pytest.raises(Blocked):
        pinning.to_pin(below, host)
    granted = negotiation.negotiate(
        MAX, hosts.new(), Fence(pool.baseline([hosts.new(), host]), 3)
    ).contract.granted
    assert granted.field("psci-version") == 0x1_0001 and granted.value(hosts.CLIDR) == hosts.OLD[hosts.CLIDR]


def test_a_contract_comes_where_its_values_can_be_shown() -> None:
    contract = negotiation.negotiate(MAX, hosts.new()).contract
    found = {blocker.feature for blocker in negotiation.check(contract, hosts.old())}
    assert {"psci-version", "aa64dfr0-debugver", "clidr-loc", "ccsidr-0"} <= found
    fence = Fence(
        pool.baseline([hosts.new(), hosts.old()]), registers=portable.common((hosts.new(), hosts.old()))
    )
    fenced = negotiation.negotiate(MAX, hosts.new(), fence).contract
    assert negotiation.check(fenced, hosts.old()) == ()
    unlisted = {blocker.word for blocker in negotiation.check(fenced, hosts.old(), None)}
    assert unlisted == set()
    assert {one.word(): one.text() for one in fenced.portable if one.rule != "carry"} == {
        hosts.VENDOR_2: "drop-if 0x0", **{hosts.ccsidr(n): "drop-if 0x2" for n in range(3, 14)}
    }  # fmt: skip


def test_discovery_of_implementations_is_given_by_name_only() -> None:
    assert negotiation.negotiate(MAX, hosts.new()).contract.granted.value(hosts.VENDOR_2) == 0


def test_a_request_is_answered_whole() -> None:
    answer = negotiation.negotiate(Request(require=("aes", "fp")), hosts.new())
    assert answer.contract.granted.value(hosts.ISAR0) == hosts.NEW[hosts.ISAR0]
    with pytest.raises(Blocked, match="sve"):
        negotiation.negotiate(Request(require=("sve",)), hosts.new())
    with pytest.raises(Blocked, match="fp"):
        negotiation.negotiate(Request(require=("fp",)), hosts.new(PFR0=0x1100_0000_11FF_1112))
    with pytest.raises(UsageError, match="x86-64-v1"):
        negotiation.negotiate(Request(level="x86-64-v1"), hosts.new())


def test_what_kvm_accepted_and_dropped_is_not_settable() -> None:
    """The probe leaves such bits out of what can be set; the report keeps them apart."""
    host = hosts.report("a", {**hosts.NEW, hosts.MMFR2: 2 << 24}, dropped={hosts.MMFR2: 0xF << 24})
    blockers = levelling.unreachable(FeatureSet.of("arm64", {**hosts.NEW, hosts.MMFR2: 0}), host)
    assert [blocker.feature for blocker in blockers] == ["aa64mmfr2-nv"]


def test_caches_are_told_as_a_member_has_them_that_must_clean_them() -> None:
    """set_clidr refuses a hierarchy without a level of unification where the host's CTR_EL0.IDC is 0."""
    idc = 1 << 28
    clean = hosts.report(
        "clean", {**hosts.NEW, hosts.CTR: hosts.N1[hosts.CTR] | idc, hosts.CLIDR: 0x200_0023}, kernel="6.12.1"
    )
    dirty = hosts.report(
        "dirty",
        {**hosts.NEW, hosts.CTR: hosts.N1[hosts.CTR] & ~idc, hosts.CLIDR: 0x920_0023},
        kernel="6.18.1",
    )
    for pool_ in ([clean, dirty], [dirty, clean]):
        granted = pool.baseline(pool_)
        assert granted.value(hosts.CLIDR) == 0x920_0023 and not granted.field("ctr-idc")
    # a member that cannot be told is the one that decides, and then there is none
    stuck = hosts.report("stuck", clean.offer_words, kernel="6.1.1", settable=hosts.WRITABLE_6_1)
    assert "clidr-loc" in verdicts(stuck, dirty)


def test_why_a_cpu_is_not_renamed() -> None:
    """KVM takes another MIDR since 6.15; a guest given one would have to be given the list of real CPUs too."""
    every = {**hosts.WRITABLE, hosts.MIDR: hosts.EVERY}
    one, other = (
        hosts.report(name, {**hosts.NEW, hosts.MIDR: value}, settable=every)
        for name, value in (("a", 0x413F_D0C1), ("b", 0x411F_D401))
    )
    with pytest.raises(Incompatible, match="midr") as no:
        pool.baseline([one, other])
    assert "errata" in no.value.blockers[0].because
    (blocker,) = levelling.unreachable(other.offer, one)
    assert blocker.feature == "midr" and "errata" in blocker.because
