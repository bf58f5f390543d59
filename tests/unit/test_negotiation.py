# SPDX-License-Identifier: LGPL-2.1-or-later
"""request + report (+ fence) → contract, or every blocker with its cause."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import AMD, ARCHITECTURE, CATALOG, INTEL, NAMES, POSSIBLE, feature_sets, raw

from kvmneg import limits
from kvmneg.errors import Blocked, Breached, Incompatible, KvmnegError, LimitExceeded, UsageError
from kvmneg.features import rules, words
from kvmneg.features.featureset import FeatureSet, fits, meet
from kvmneg.features.report import Report
from kvmneg.policy import definitions, negotiation, pinning, pool, vmm
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.negotiation import check, check_request, negotiate
from kvmneg.policy.request import Request

LEVELS = definitions.levels("x86_64")
# what can be asked for one by one; state comes along by itself
BITS = sorted(f.name for f in NAMES.by_name.values() if f.is_bit and not f.word.startswith("state:"))


def report_of(offer: dict[str, int], **others: Any) -> Report:
    others.setdefault("measured", {"host": "node7"})
    return Report(ARCHITECTURE, combo={"kernel": "6.12"}, identity={}, offer=offer, **others)


def without(report: Report, **bits: int) -> Report:
    """The report with bits of a word cleared: leaf_subleaf_register=mask."""
    offer = dict(report.offer_words)
    for name, mask in bits.items():
        word = f"cpuid:{name.replace('_', '.')}"
        offer[word] &= ~mask
    return report_of(offer, silicon=report.silicon_words)


def set_bits(granted: FeatureSet) -> set[str]:
    """The names of the single bits that a set grants."""
    return {name for name in BITS if granted.field(name)}


def with_bases(names: list[str]) -> list[str]:
    """The features and the bits that they are built on, also those that only a number between them needs."""
    found, queue = list(names), list(names)
    seen = set(names)
    for name in queue:
        for base, _least in NAMES.by_name[name].bases:
            if base not in seen:
                seen.add(base)
                queue.append(base)
                if NAMES.by_name[base].is_bit:
                    found.append(base)
    return found


# -- requests ----------------------------------------------------------------------------------------


def test_a_request_without_a_mode_is_the_lowest_level() -> None:
    assert Request().level == "x86-64-v1" and not Request().maximum and Request().exact is None
    assert Request(require=("avx",)).level == "x86-64-v1"
    assert Request(maximum=True).level is None and Request(exact=()).level is None


@pytest.mark.parametrize(
    "modes",
    [
        {"maximum": True, "level": "x86-64-v2"},
        {"maximum": True, "exact": ("fpu",)},
        {"level": "x86-64-v2", "exact": ()},
        {"exact": ("fpu",), "require": ("avx",)},
        {"exact": ("fpu",), "optional": ("avx",)},
        {"maximum": True, "optional": ("avx",)},
    ],
)
def test_modes_exclude_each_other(modes: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        Request(**modes)
    assert caught.value.hint


def test_a_request_names_a_limited_number_of_features() -> None:
    names = ("avx",) * limits.REQUEST_FEATURES
    assert len(Request(require=names).require) == limits.REQUEST_FEATURES
    for modes in (
        {"require": (*names, "avx")},
        {"exact": (*names, "avx")},
        {"require": names, "optional": ("avx",)},
    ):
        with pytest.raises(LimitExceeded, match="REQUEST_FEATURES") as caught:
            Request(**modes)  # type: ignore[arg-type]
        assert caught.value.fields == {"limit": "REQUEST_FEATURES", "allowed": limits.REQUEST_FEATURES}


@pytest.mark.parametrize(
    "request_",
    [
        Request(), Request(maximum=True), Request(maximum=True, require=("hv-relaxed",)), Request(exact=()),
        Request(exact=("fpu", "cx8")), Request(level="x86-64-v3", require=("aes",), optional=("avx512f", "vaes")),
    ],
)  # fmt: skip
def test_a_request_goes_over_the_wire(request_: Request) -> None:
    again = Request.from_json(request_.to_json())
    assert again.to_json() == request_.to_json()
    assert all(getattr(again, name) == getattr(request_, name) for name in Request.__slots__)


def test_null_is_absent() -> None:
    nulls = dict.fromkeys(("max", "level", "require", "optional", "exact"))
    assert Request.from_json(nulls).to_json() == Request().to_json()
    assert Request.from_json({"max": False, "exact": []}).exact == ()


@pytest.mark.parametrize(
    "document",
    [{"max": 1}, {"max": "yes"}, {"level": 3}, {"level": ["x"]}, {"require": "avx"}, {"require": [1]}, {"require": {}},
     {"optional": [None]}, {"exact": "fpu"}, {"exact": [["fpu"]]}, {"maximum": True},
     {"level": "v2", "guest": "linux"}],
)  # fmt: skip
def test_a_request_of_other_types_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Request.from_json(document)


# -- levels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_is_its_features_and_what_a_guest_boots_with(level: str, intel: Report) -> None:
    answer = negotiate(Request(level=level), intel)
    boot = definitions.Boot(ARCHITECTURE)
    wanted = {
        NAMES.feature(name).name
        for name in (*definitions.level(level, ARCHITECTURE), *boot.require, *boot.optional)
    }
    assert set_bits(answer.contract.granted) == {name for name in wanted if NAMES.by_name[name].is_bit}
    assert answer.not_granted == ()
    granted = answer.contract.granted
    for name in boot.carry:
        # 48 is what a guest without five-level paging has, and no level has la57
        expected = 48 if name == "linear-bits" else intel.offer.field(name)
        assert granted.field(name) == expected, name
    assert answer.contract.words()["cpuid:0x1.0.edx"] & 1 << 9  # APIC, a constant
    assert fits(granted, intel.offer) == ()


def test_a_level_on_amd_has_amds_copies(amd: Report) -> None:
    """APM vol. 3 appendix E.4.2: 0x80000001 EDX repeats bits of leaf 1 EDX; Intel leaves them zero."""
    granted = negotiate(Request(level="x86-64-v3"), amd).contract.granted
    leaf1, extended = granted.value("cpuid:0x1.0.edx"), granted.value("cpuid:0x80000001.0.edx")
    copied = 0x0183F3FF & ~(1 << 9 | 1 << 11)  # what APM repeats: 0-8, 12-17, 23, 24
    assert leaf1 & copied == extended & copied == copied
    assert extended & ~copied == 1 << 11 | 1 << 20 | 1 << 29  # SYSCALL, NX, LM
    assert granted.value("cpuid:0x80000000.0.ebx") == 0x68747541


def test_the_components_of_xsave_come_with_their_sizes(intel: Report) -> None:
    granted = negotiate(Request(level="x86-64-v4"), intel).contract.granted
    assert granted.value("cpuid:0xd.0.eax") == 0xE7
    assert [granted.value(f"cpuid:0xd.{at}.ebx") for at in (2, 5, 6, 7, 9)] == [0x240, 0x440, 0x480, 0x680, 0]
    assert negotiate(Request(level="x86-64-v2"), intel).contract.granted.value("cpuid:0xd.2.eax") == 0


def test_what_a_level_lacks_is_named_bit_by_bit_in_order(software: Report) -> None:
    with pytest.raises(Blocked) as caught:
        negotiate(Request(level="x86-64-v2"), software)
    found = [
        (blocker.feature, blocker.word, blocker.bit, blocker.wanted_by) for blocker in caught.value.blockers
    ]
    ecx = "cpuid:0x1.0.ecx"
    assert found == [
        ("pni", ecx, 0, "x86-64-v2"), ("ssse3", ecx, 9, "x86-64-v2"), ("sse4.1", ecx, 19, "x86-64-v2"),
        ("sse4.2", ecx, 20, "x86-64-v2"), ("popcnt", ecx, 23, "x86-64-v2"),
    ]  # fmt: skip
    assert "5 of the required features" in caught.value.message
    assert negotiate(Request(), software).contract.granted.field("sse2") == 1


def test_a_guest_cannot_start_without_address_bits_or_long_mode(intel: Report) -> None:
    bare = without(intel, **{"0x80000008_0_eax": 0xFFFF, "0x80000001_0_edx": 1 << 29})
    with pytest.raises(Blocked) as caught:
        negotiate(Request(), bare)
    found = {blocker.feature: blocker.wanted_by for blocker in caught.value.blockers}
    assert found == {"lm": "every guest", "phys-bits": "every guest", "linear-bits": "every guest"}
    with pytest.raises(Blocked):
        negotiate(Request(maximum=True), bare)


def test_unknown_levels_are_refused(intel: Report) -> None:
    for level in ("x86-64-v5", "", "../boot/x86_64"):
        with pytest.raises(UsageError, match="no level"):
            negotiate(Request(level=level), intel)


# -- require and optional ----------------------------------------------------------------------------


def test_require_adds_and_optional_adds_where_there_is_one(amd: Report) -> None:
    plain = set_bits(negotiate(Request(), amd).contract.granted)
    answer = negotiate(Request(require=("rdrand", "abm"), optional=("rdseed", "movdiri", "key-locker")), amd)
    assert set_bits(answer.contract.granted) - plain == {"rdrand", "abm", "rdseed"}
    assert [blocker.feature for blocker in answer.not_granted] == ["key-locker", "movdiri"]
    assert {blocker.wanted_by for blocker in answer.not_granted} == {"optional"}


def test_an_alias_is_the_same_feature(intel: Report) -> None:
    one = negotiate(Request(level="x86-64-v2", require=("sha_ni",)), intel).contract
    assert (
        one.digest
        == negotiate(Request(level="x86-64-v2", require=("sha-ni", "sha_ni")), intel).contract.digest
    )


def test_an_unknown_feature_says_what_is_near(intel: Report) -> None:
    for modes in ({"require": ("avx-2",)}, {"optional": ("avx-2",)}, {"exact": ("avx-2",)}):
        with pytest.raises(UsageError, match="no feature is called 'avx-2'") as caught:
            negotiate(Request(**modes), intel)  # type: ignore[arg-type]
        assert "did you mean" in caught.value.hint and "avx2" in caught.value.hint


def test_a_feature_without_its_base_is_a_mistake(intel: Report) -> None:
    with pytest.raises(UsageError, match="avx2 is built on avx") as caught:
        negotiate(Request(require=("avx2",)), intel)
    assert caught.value.fields == {"feature": "avx2", "base": "avx"}
    needed = caught.value.hint.removeprefix("require ").removesuffix(" too").split()
    assert set(needed) == {"avx", "xsave", "xcr0-avx", "xcr0-sse"}
    assert negotiate(Request(require=("avx2", *needed)), intel).contract.granted.field("avx2") == 1
    with pytest.raises(UsageError, match="built on"):
        negotiate(Request(exact=("sse2",)), intel)
    with pytest.raises(
        UsageError, match="vmx-invept is built on vmx, which"
    ):  # by the control words between them
        negotiate(Request(require=("vmx-invept",)), intel)
    answer = negotiate(Request(optional=("avx2",)), intel)
    assert [(b.feature, b.cause) for b in answer.not_granted] == [("avx2", "dependency")]
    assert "avx" in answer.not_granted[0].because


@pytest.mark.parametrize(
    "name", ["osxsave", "ht", "initial-apic-id", "xsave-size-enabled", "microcode-revision"]
)
def test_what_is_not_kvmnegs_cannot_be_asked_for(name: str, intel: Report) -> None:
    for modes in ({"require": (name,)}, {"optional": (name,)}, {"exact": (name,)}):
        with pytest.raises(UsageError, match=f"{name} cannot be asked for"):
            negotiate(Request(**modes), intel)  # type: ignore[arg-type]


def test_constants(intel: Report) -> None:
    with pytest.raises(UsageError, match="kvm-hint-dedicated cannot be asked for"):
        negotiate(Request(require=("kvm-hint-dedicated",)), intel)
    assert negotiate(Request(require=("apic", "arat")), intel).contract.words()["cpuid:0x6.0.eax"] == 4


def test_an_invariant_tsc_is_withheld(intel: Report) -> None:
    """True only while the TSC frequency is pinned, which these requests do not."""
    assert intel.offer.field("invtsc") == 1
    for modes in (
        {"require": ("invtsc",)},
        {"exact": ("invtsc",)},
        {"maximum": True, "require": ("invtsc",)},
    ):
        with pytest.raises(Blocked) as caught:
            negotiate(Request(**modes), intel)  # type: ignore[arg-type]
        (blocker,) = caught.value.blockers
        assert (blocker.feature, blocker.cause, blocker.missing_on) == ("invtsc", "policy", "kvmneg")
        assert "TSC frequency" in blocker.because
    answer = negotiate(Request(optional=("invtsc",)), intel)
    assert [(b.feature, b.cause) for b in answer.not_granted] == [("invtsc", "policy")]


def test_numbers_can_be_asked_for_by_name(intel: Report, amd: Report) -> None:
    granted = negotiate(Request(require=("pmu-version",)), intel).contract.granted
    assert granted.value("cpuid:0xa.0.eax") == 0x08300802  # with what is built on it
    with pytest.raises(Blocked) as caught:
        negotiate(Request(require=("pmu-version",)), amd)
    assert [(b.feature, b.bit) for b in caught.value.blockers] == [("pmu-version", None)]


# -- or-features -------------------------------------------------------------------------------------


def test_a_guest_is_told_of_or_features_whatever_it_asked_for(intel: Report) -> None:
    for request in (Request(), Request(exact=("fpu",)), Request(maximum=True)):
        contract = negotiate(request, intel).contract
        assert contract.words()["cpuid:0x7.0.edx"] & 1 << 10  # MD_CLEAR
        assert contract.words()["cpuid:0x7.0.ebx"] & (1 << 6 | 1 << 13) == 1 << 6 | 1 << 13


def test_an_or_feature_can_be_asked_for(intel: Report, amd: Report) -> None:
    assert negotiate(Request(require=("md-clear",)), intel).contract.granted.field("md-clear") == 1
    with pytest.raises(Blocked) as caught:
        negotiate(Request(require=("md-clear", "efer-lmsle-mbz")), amd)
    assert [b.feature for b in caught.value.blockers] == ["md-clear", "efer-lmsle-mbz"]
    with pytest.raises(UsageError, match="built on arch-capabilities"):
        negotiate(Request(require=("fb-clear",)), intel)
    assert (
        negotiate(Request(require=("fb-clear", "arch-capabilities")), intel).contract.granted.field(
            "fb-clear"
        )
        == 1
    )


def test_a_fence_that_lacks_a_hosts_or_feature_is_breached(intel: Report) -> None:
    words_ = {**intel.offer.words, "cpuid:0x7.0.edx": intel.offer.value("cpuid:0x7.0.edx") & ~(1 << 10)}
    fence = Fence(FeatureSet.of(ARCHITECTURE, words_), 4)
    with pytest.raises(Breached) as caught:
        negotiate(Request(), intel, fence)
    (blocker,) = caught.value.blockers
    assert (blocker.feature, blocker.word, blocker.bit) == ("md-clear", "cpuid:0x7.0.edx", 10)
    assert (blocker.wanted_by, blocker.cause) == ("the fence", "silicon")
    assert "at risk" in blocker.because


# -- exact -------------------------------------------------------------------------------------------


@given(st.data())
def test_exact_means_nothing_else(data: st.DataObject) -> None:
    report = report_of(data.draw(raw()))
    pool = sorted(set_bits(report.offer) - {"invtsc", "sme", "sev", "sme-coherent"}) or BITS
    names = data.draw(st.lists(st.sampled_from(pool), max_size=6, unique=True))
    names = with_bases(names)
    try:
        granted = negotiate(Request(exact=tuple(names)), report).contract.granted
    except Blocked:
        return
    twice = {
        name for name in BITS if any(name == f"{base}-{kind}" for base in names for kind in ("copy", "alias"))
    }
    assert set(names) <= set_bits(granted) <= set(names) | twice
    told = Contract(granted).words()
    for feature in NAMES.by_name.values():
        if feature.name in BITS and feature.name not in {*names, *twice}:
            assert not feature.of(told.get(feature.word, 0)), feature.name


def test_exact_carries_no_pmu_no_msr_and_no_hyperv(intel: Report) -> None:
    told = negotiate(Request(exact=("fpu", "cx8", "lm", "pae")), intel).contract.words()
    said = {word for word, value in told.items() if value}
    assert not {
        word for word in said if word.startswith(("cpuid:0xa.", "msr:", "hyperv:", "kvm:", "cpuid:0x4000"))
    }
    assert told["cpuid:0x80000008.0.eax"] == 0x3034 and told["cpuid:0x0.0.eax"] == 0x1B
    assert told["cpuid:0x1.0.edx"] == 1 | 1 << 6 | 1 << 8 | 1 << 9


def test_exact_of_nothing_is_a_contract(software: Report) -> None:
    assert set_bits(negotiate(Request(exact=()), software).contract.granted) == set()


# -- max ---------------------------------------------------------------------------------------------


def test_max_is_all_but_what_is_withheld_and_hyperv(intel: Report) -> None:
    answer = negotiate(Request(maximum=True), intel)
    granted, offer = answer.contract.granted, intel.offer
    for word in CATALOG.words:
        if word.startswith("hyperv:"):
            assert granted.value(word) == CATALOG.words[word].bottom
        elif word != "cpuid:0x80000007.0.edx":
            assert granted.value(word) == offer.value(word), word
    assert [(b.feature, b.cause, b.wanted_by) for b in answer.not_granted] == [("invtsc", "policy", "max")]


def test_hyperv_is_for_those_who_ask(intel: Report) -> None:
    granted = negotiate(Request(maximum=True, require=("hv-relaxed", "hv-vapic")), intel).contract.granted
    assert granted.value("hyperv:0x40000004.0.eax") == 1 << 5
    assert granted.value("hyperv:0x40000003.0.eax") == 1 << 4
    assert granted.value("hyperv:0x40000002.0.eax") == 0x3839  # its version comes with any of its features
    assert negotiate(Request(require=("hv-relaxed",)), intel).contract.granted.field("hv-relaxed") == 1
    with pytest.raises(UsageError, match="hv-synic is built on hv-vpindex"):
        negotiate(Request(maximum=True, require=("hv-synic",)), intel)


def test_max_and_require(software: Report) -> None:
    with pytest.raises(Blocked) as caught:
        negotiate(Request(maximum=True, require=("avx",)), software)
    assert [(b.feature, b.wanted_by) for b in caught.value.blockers] == [("avx", "the request")]


# -- causes ------------------------------------------------------------------------------------------


def cause_of(name: str, report: Report, fence: Fence | None = None) -> tuple[str, str, str]:
    (blocker,) = negotiate(Request(level="x86-64-v3", optional=(name,)), report, fence).not_granted
    assert blocker.feature == name
    return blocker.cause, blocker.missing_on, blocker.because


def test_causes(intel: Report, amd: Report) -> None:
    assert cause_of("monitor", intel)[:2] == ("kernel", "host node-intel")
    assert "the CPU has it; KVM of 6.12.107+deb13-amd64 does not" in cause_of("monitor", intel)[2]
    assert cause_of("movdiri", intel)[0] == "silicon"
    assert cause_of("movdiri", amd)[0] == "unknown"  # its silicon was not measured
    assert cause_of("kvm-migration-control", amd)[0] == "unknown"
    assert cause_of("split-lock-detect", intel)[0] == "kvm"  # an MSR of KVM's
    assert cause_of("avx512bw", intel)[0] == "dependency"  # avx512f was not asked for
    lower = FeatureSet.of(
        ARCHITECTURE,
        {**intel.offer.words, "cpuid:0x7.0.ebx": intel.offer.value("cpuid:0x7.0.ebx") & ~(1 << 18)},
    )
    assert cause_of("rdseed", intel, Fence(lower, 7))[:2] == ("fence", "fence generation 7")
    assert cause_of("invtsc", intel)[0] == "policy"


def test_what_kvm_offers_without_its_base_is_a_dependency(software: Report) -> None:
    """This KVM lists XCR0 components and has no XSAVE."""
    answer = negotiate(Request(optional=("xcr0-avx", "xcr0-sse", "xsave")), software)
    found = {blocker.feature: (blocker.cause, blocker.because) for blocker in answer.not_granted}
    assert found["xsave"][0] == "unknown"
    assert found["xcr0-sse"] == ("dependency", "KVM offers it without what it is built on: missing: xsave")


# -- fences ------------------------------------------------------------------------------------------


def test_a_host_below_its_fence_refuses_every_contract_and_names_the_features(intel: Report) -> None:
    fence = Fence(intel.offer, 9)
    weaker = without(intel, **{"0x1_0_ecx": 1 << 25, "0x7_0_ebx": 1 << 18, "0x80000008_0_eax": 0x06})
    for request in (Request(), Request(maximum=True), Request(exact=())):
        with pytest.raises(Breached) as caught:
            negotiate(request, weaker, fence)
        found = [(b.feature, b.bit, b.cause, b.wanted_by) for b in caught.value.blockers]
        assert found == [
            ("aes", 25, "kvm", "the fence"), ("rdseed", 18, "kvm", "the fence"),
            ("phys-bits", None, "kvm", "the fence"),
        ]  # fmt: skip
        assert "0x34 is needed" in caught.value.blockers[2].because
        assert "generation 9" in caught.value.message and caught.value.hint


def test_a_fence_of_another_vendor_is_breached(intel: Report, amd: Report) -> None:
    with pytest.raises(Breached) as caught:
        negotiate(Request(), intel, Fence(amd.offer, 1))
    vendor = [b for b in caught.value.blockers if b.word in CATALOG.equal_words]
    assert len(vendor) == 3 and {b.cause for b in vendor} == {"silicon"}
    assert "'Auth' is needed, host node-intel has 'Genu'" in vendor[0].because


def test_a_fence_from_the_host_changes_nothing_but_is_named(intel: Report) -> None:
    fence = Fence(intel.offer, 5)
    bounded, free = negotiate(Request(), intel, fence).contract, negotiate(Request(), intel).contract
    assert bounded.granted == free.granted and bounded.digest != free.digest
    assert (bounded.fence, free.fence) == ((5, fence.digest), (0, ""))


REQUESTS = st.one_of(
    st.just(Request(maximum=True)),
    st.builds(lambda level, names: Request(level=level, optional=tuple(names)),
              st.sampled_from(LEVELS), st.lists(st.sampled_from(BITS), max_size=5)),
    st.builds(lambda names: Request(require=tuple(names)), st.lists(st.sampled_from(BITS), max_size=4)),
    st.builds(lambda names: Request(exact=tuple(names)), st.lists(st.sampled_from(BITS), max_size=4)),
)  # fmt: skip


@given(raw(), feature_sets((INTEL, None)), REQUESTS)
def test_no_contract_exceeds_the_fence(offer: dict[str, int], other: FeatureSet, request_: Request) -> None:
    report = report_of(offer)
    fence = Fence(meet(report.offer, other), 1)
    try:
        granted = negotiate(request_, report, fence).contract.granted
    except UsageError:
        return
    except Blocked as error:
        assert not isinstance(error, Breached), "a fence below the offer is not breached"
        assert error.blockers
        return
    top = negotiation.ceiling(report, fence)
    assert fits(granted, top) == ()
    assert meet(granted, fence.granted) == granted
    for word, rule in CATALOG.words.items():  # bit by bit: no and-bit that the fence or the offer lacks
        allowed = fence.granted.value(word) & report.offer.value(word) & offer.get(word, 0)
        assert not granted.value(word) & rule.and_mask & ~allowed
        assert not fence.granted.value(word) & rule.or_mask & ~granted.value(word)


@given(raw((INTEL, AMD)), feature_sets((INTEL, AMD, None)), REQUESTS)
def test_any_fence_breaches_or_bounds(offer: dict[str, int], pinned: FeatureSet, request_: Request) -> None:
    report, fence = report_of(offer), Fence(pinned, 1)
    below = fence.unmet(vmm.reach(report), measured=offer)
    assert not below or fence.unmet(report.offer), "what no VMM gives either"
    try:
        granted = negotiate(request_, report, fence).contract.granted
    except Breached as error:
        assert (
            {blocker.feature for blocker in error.blockers} == {blocker.feature for blocker in below} != set()
        )
        return
    except (UsageError, Blocked):
        assert below == ()
        return
    assert below == ()
    assert fits(granted, report.offer) == () and Fence(granted).unmet(pinned) == ()


def test_a_fence_bounds_what_a_vmm_gives_and_may_name_it(intel: Report) -> None:
    """MSI_EXT_DEST_ID is the VMM's: KVM never offers it. A fence over the host names it, or hides it."""
    given_ = "kvm-msi-ext-dest-id"
    request_ = Request(level="x86-64-v2", optional=(given_,), vmm="qemu")
    assert not intel.offer.field(given_) and intel.offer_words["kvm:split-irqchip"]
    named, hidden = (Fence(pinning.to_pin(granted, intel), 1) for granted in (vmm.reach(intel), intel.offer))
    assert named.granted.field(given_) == 1 and hidden.granted.field(given_) == 0
    assert negotiate(request_, intel, named).contract.granted.field(given_) == 1
    (blocker,) = negotiate(request_, intel, hidden).not_granted
    assert (blocker.feature, blocker.cause) == (given_, "fence")
    # without a VMM it is nobody's to give, and the fence is not breached by that
    assert negotiate(Request(maximum=True), intel, named).contract.granted.field(given_) == 0
    # the host can no longer have it given: now it is less than the fence promises
    less = report_of({**intel.offer_words, "kvm:split-irqchip": 0}, silicon=intel.silicon_words)
    with pytest.raises(Breached) as caught:
        negotiate(request_, less, named)
    assert {blocker.feature for blocker in caught.value.blockers} == {given_, "cap-split-irqchip"}


def test_blockers_of_a_pin_say_who_holds_it_back(intel: Report) -> None:
    """The CPU has RDSEED, and KVM of this kernel does not offer it: nothing that a comparison alone would know."""
    narrow = without(intel, **{"0x7_0_ebx": 1 << 18})
    with pytest.raises(Blocked) as caught:
        pinning.to_pin(intel.offer, narrow)
    (blocker,) = caught.value.blockers
    assert (blocker.feature, blocker.wanted_by, blocker.cause) == ("rdseed", "the fence", "kvm")
    assert "the CPU has it" in blocker.because


def test_a_study_over_two_vendors_is_neither_pinned_nor_promised(intel: Report, amd: Report) -> None:
    study = pool.study([intel, amd])
    assert study.conflicts and study.field("avx2") == 1
    for refused in (Fence, Contract, lambda one: pinning.to_pin(one, intel)):
        with pytest.raises(Incompatible, match="without a common baseline"):
            refused(study)
    assert fits(study, intel.offer) and fits(study, amd.offer)
    assert pool.study([intel, intel]) == pool.baseline([intel])


@given(raw(), REQUESTS)
def test_answers_are_deterministic_and_hold_on_the_host(offer: dict[str, int], request_: Request) -> None:
    report = report_of(offer)
    try:
        answer = negotiate(request_, report)
    except KvmnegError:
        return
    assert (
        negotiate(request_, report_of(dict(reversed(offer.items())))).contract.digest
        == answer.contract.digest
    )
    assert check(answer.contract, report) == ()
    order = [(words.order(b.word), b.bit or 0) for b in answer.not_granted]
    assert order == sorted(order)


@given(raw(), st.lists(st.sampled_from(BITS), min_size=1, max_size=8, unique=True))
def test_every_missing_feature_is_a_blocker(offer: dict[str, int], names: list[str]) -> None:
    report = report_of(offer)
    names = with_bases(names)
    withheld = {name for name, feature in NAMES.by_name.items() if feature.withheld}
    missing = {name for name in names if not report.offer.field(name) or withheld & set(with_bases([name]))}
    try:
        negotiate(Request(exact=tuple(names)), report)
    except Blocked as error:
        assert {blocker.feature for blocker in error.blockers} == missing
        assert all(blocker.cause and blocker.because and blocker.missing_on for blocker in error.blockers)
    else:
        assert missing == set()


# -- check -------------------------------------------------------------------------------------------


def test_check_judges_what_the_host_accepts(intel: Report) -> None:
    contract = negotiate(Request(level="x86-64-v3"), intel).contract
    weaker = without(intel, **{"0x1_0_ecx": 1 << 12})
    (blocker,) = check(contract, weaker)
    assert (blocker.feature, blocker.wanted_by, blocker.cause) == ("fma", "the contract", "kvm")
    ecx = "cpuid:0x1.0.ecx"
    accepting = report_of(weaker.offer_words, accept={ecx: intel.offer_words[ecx]})
    assert check(contract, accepting) == ()
    with pytest.raises(Blocked):
        negotiate(Request(level="x86-64-v3"), accepting)
    assert check_request(Request(level="x86-64-v3"), accepting).contract.granted == contract.granted


def test_check_names_numbers_and_vendors(intel: Report, amd: Report) -> None:
    contract = negotiate(Request(), intel).contract
    narrow = without(intel, **{"0x80000008_0_eax": 0x04})
    (blocker,) = check(contract, narrow)
    assert (blocker.feature, blocker.bit) == ("phys-bits", None) and "0x34" in blocker.because
    assert set(CATALOG.equal_words) <= {b.word for b in check(contract, amd)}


def test_a_contract_read_back_is_judged_the_same(intel: Report, amd: Report, software: Report) -> None:
    for one in (intel, amd, software):
        contract = negotiate(Request(maximum=True), one).contract
        again = Contract.from_binary(contract.binary())
        for host in (intel, amd, software):
            assert check(again, host) == check(contract, host)


# -- where fences come from --------------------------------------------------------------------------


def test_sources(intel: Report) -> None:
    assert pinning.source("host", intel) == vmm.reach(intel)
    assert meet(vmm.reach(intel), intel.offer) == intel.offer
    assert pinning.source("baseline", intel) == intel.offer
    level = negotiate(Request(level="x86-64-v2"), intel).contract.granted
    assert pinning.source("level:x86-64-v2", intel) == level
    assert negotiate(Request(level="x86-64-v2"), intel, Fence(level, 1)).contract.granted == level


def test_a_platform_bounds_the_words_it_names_only(intel: Report) -> None:
    pv = "cpuid:0x40000001.0.eax"
    newer = report_of({**intel.offer_words, pv: 0x0103FEFB})
    old, new = (pinning.source(f"platform:linux-{version}", newer) for version in ("5.10", "5.15"))
    assert old.value(pv) == 0x0100FEFB and new.value(pv) == 0x0103FEFB
    for word in CATALOG.words:
        if word != pv:
            assert old.value(word) == newer.offer.value(word)


@given(
    raw(),
    st.sampled_from(("host", "baseline", "level:x86-64-v1", "platform:linux-5.10", "platform:linux-5.15")),
)
def test_no_source_exceeds_the_host(offer: dict[str, int], source: str) -> None:
    report = report_of(offer)
    try:
        granted = pinning.source(source, report)
    except Blocked:
        assert source.startswith("level:")
        return
    most = vmm.reach(report) if source == "host" else report.offer
    assert meet(granted, most) == granted
    assert negotiation.below(report, Fence(granted)) == ()


def test_what_is_pinned_names_its_vendor_and_no_more_than_the_host_has(intel: Report, amd: Report) -> None:
    by_hand = Fence.parse(f"architecture x86_64\ncpuid:0x1.0.edx 0b{1:032b}\n").granted
    for report, vendor in ((intel, INTEL), (amd, AMD)):
        pinned = pinning.to_pin(by_hand, report)
        assert tuple(pinned.value(word) for word in CATALOG.equal_words) == vendor
        assert set_bits(pinned) == {"fpu"}
        assert pinning.to_pin(report.offer, report) == report.offer
        assert negotiate(Request(exact=("fpu",)), report, Fence(pinned, 1)).contract.granted.field("fpu") == 1
    narrow = without(intel, **{"0x7_0_ebx": 1 << 18})
    with pytest.raises(Blocked) as caught:
        pinning.to_pin(intel.offer, narrow)
    assert [(b.feature, b.missing_on) for b in caught.value.blockers] == [("rdseed", "host node7")]
    with pytest.raises(Blocked) as caught:
        pinning.to_pin(amd.offer, intel)
    assert set(CATALOG.equal_words) <= {b.word for b in caught.value.blockers}


@pytest.mark.parametrize(
    "source", ["", "hosts", "level:", "level", "platform:", "platform", "level:x86-64-v9", "platform:linux-2.4",
               "host:x", "baseline:", "level:../boot/x86_64", "platform:/etc/passwd"],
)  # fmt: skip
def test_other_sources_are_refused(source: str, intel: Report) -> None:
    with pytest.raises(UsageError) as caught:
        pinning.source(source, intel)
    assert caught.value.hint


def test_a_level_that_the_host_does_not_reach_is_blocked(software: Report) -> None:
    with pytest.raises(Blocked):
        pinning.source("level:x86-64-v2", software)


def test_the_full_set_is_granted_by_max() -> None:
    """Every rule goes through a negotiation: nothing but what is withheld, and Hyper-V, is lost."""
    report = report_of(POSSIBLE)
    granted = negotiate(Request(maximum=True), report).contract.granted
    lost = {
        f.name
        for f in NAMES.by_name.values()
        if f.rule in rules.RULES and granted.field(f.name) != report.offer.field(f.name)
    }
    withheld = {f.name for f in NAMES.by_name.values() if f.withheld} | {"tsc-khz"}
    built = {name for name in lost if any(base in lost for base, _least in NAMES.by_name[name].bases)}
    assert {
        name for name in lost - withheld - built if not NAMES.by_name[name].word.startswith("hyperv:")
    } == set()


def test_a_guest_without_la57_has_48_linear_bits(software: Report) -> None:
    """Intel SDM vol. 3, 5.5: 57 linear-address bits are there with five-level paging only."""
    assert software.offer.field("linear-bits") == 57
    level = negotiate(Request(level="x86-64-v1"), software).contract.granted
    assert (level.field("la57"), level.field("linear-bits")) == (0, 48)
    everything = negotiate(Request(maximum=True), software).contract.granted
    assert (everything.field("la57"), everything.field("linear-bits")) == (1, 57)
