# SPDX-License-Identifier: LGPL-2.1-or-later
"""Impossible words: kept as measured, told, and never in an offer, whatever was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FULL, NAMES, POSSIBLE, raw

from kvmneg import cli
from kvmneg.errors import Blocked
from kvmneg.features import rules, words
from kvmneg.features.featureset import FeatureSet, fits
from kvmneg.features.report import Report
from kvmneg.features.sanity import findings, impossible, sane
from kvmneg.policy import pool
from kvmneg.policy.negotiation import negotiate
from kvmneg.policy.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping

ARCHITECTURE = "x86_64"
EAX, BASIC = "cpuid:0x80000008.0.eax", "msr:0x480"


def altered(report: Report, **changes: int) -> Report:
    """The report with other words: names as cpuid_0x7_0_eax."""
    offer = report.offer_words | {named(name): value for name, value in changes.items()}
    return Report(
        report.architecture, measured=report.measured, combo={}, identity=report.identity, offer=offer
    )


def named(name: str) -> str:
    kind, _, rest = name.partition("_")
    return f"{kind}:{rest.replace('_', '.')}"


# What is wrong, the words that say so, the word that is told, features that go with it, one that stays.
CASES = [
    ("level", {"cpuid_0x0_0_eax": 6}, "cpuid:0x0.0.eax", ("avx2", "xcr0-sse", "avx", "pmu-version"), "sse2"),
    ("subleaf", {"cpuid_0x7_0_eax": 1}, "cpuid:0x7.0.eax", ("intel-psfd",), "avx2"),
    ("extended level", {"cpuid_0x80000000_0_eax": 0x80000001}, "cpuid:0x80000000.0.eax", ("wbnoinvd",), "lm"),
    ("physical bits", {"cpuid_0x80000008_0_eax": 0x003935}, EAX, ("phys-bits",), "linear-bits"),
    ("guest bits", {"cpuid_0x80000008_0_eax": 0x353934}, EAX, ("phys-bits",), "linear-bits"),
    ("linear bits", {"cpuid_0x80000008_0_eax": 0x003534}, EAX, ("linear-bits",), "phys-bits"),
    ("event length", {"cpuid_0xa_0_eax": 0x21300802}, "cpuid:0xa.0.eax", ("pmu-version",), "avx"),
    ("counters", {"cpuid_0xa_0_eax": 0x08302102}, "cpuid:0xa.0.eax", ("pmu-counters",), "avx"),
    ("counter width", {"cpuid_0xa_0_eax": 0x08410802}, "cpuid:0xa.0.eax", ("pmu-counter-width",), "avx"),
    ("fixed width", {"cpuid_0xa_0_edx": 0x823}, "cpuid:0xa.0.edx", ("pmu-fixed-counters",), "pmu-version"),
    ("VMX reserved bit", {"msr_0x480": 0x00D8_1000_91E5_7ED0}, BASIC, ("vmx", "vmx-ept-wb"), "avx"),
    ("VMX reserved bits", {"msr_0x480": 0x00D8_9000_11E5_7ED0}, BASIC, ("vmx", "vmx-ept-wb"), "avx"),
    ("VMCS of no bytes", {"msr_0x480": 0x00D8_0000_11E5_7ED0}, BASIC, ("vmx",), "avx"),
    ("VMCS too large", {"msr_0x480": 0x00D8_1001_11E5_7ED0}, BASIC, ("vmx",), "avx"),
    *(
        (f"VMX halves of {index:#x}", {f"msr_{index:#x}": 0x7F_0000_0080}, f"msr:{index:#x}", gone, "avx")
        for index, gone in (
            (0x48B, ("vmx-secondary-controls", "vmx-ept-wb")),
            *((index, ("vmx", "vmx-secondary-controls")) for index in range(0x48D, 0x491)),
        )
    ),
    ("CR0 fixed", {"msr_0x487": 0x7FFF_FFFF}, "msr:0x486", ("vmx",), "avx"),
    ("CR4 fixed", {"msr_0x489": 0x1FFF}, "msr:0x488", ("vmx",), "avx"),
    ("component overlaps", {"cpuid_0xd_6_ebx": 0x470}, "cpuid:0xd.6.eax", ("avx512f", "xcr0-opmask"), "avx2"),
    ("component in the header", {"cpuid_0xd_9_ebx": 0x220}, "cpuid:0xd.9.eax", ("pku",), "avx512f"),
    ("component without a size", {"cpuid_0xd_9_eax": 0}, "cpuid:0xd.9.eax", ("pku",), "avx512f"),
    ("component without a place", {"cpuid_0xd_9_ebx": 0}, "cpuid:0xd.9.eax", ("pku",), "avx512f"),
    ("area too small", {"cpuid_0xd_0_ecx": 0xA80}, "cpuid:0xd.9.eax", ("pku",), "avx512f"),
    ("supervisor in XCR0", {"cpuid_0xd_9_ecx": 1}, "cpuid:0xd.9.eax", ("pku",), "avx512f"),
    ("reserved flags", {"cpuid_0xd_9_ecx": 8}, "cpuid:0xd.9.eax", ("pku",), "avx512f"),
    ("no x87 state", {"cpuid_0xd_0_eax": 0x2E6}, "cpuid:0xd.0.eax", ("avx", "avx512f", "pku"), "sse4.2"),
    ("XSAVE2", {"kvm_xsave2": 0xFFF}, "kvm:xsave2", ("cap-xsave2",), "avx"),
]


@pytest.mark.parametrize(
    ("changes", "told", "gone", "stays"), [row[1:] for row in CASES], ids=[c[0] for c in CASES]
)
def test_an_impossible_word_is_kept_told_and_never_offered(
    intel: Report, changes: dict[str, int], told: str, gone: tuple[str, ...], stays: str
) -> None:
    report = altered(intel, **changes)
    found = findings(report)
    assert told in {finding.word for finding in found}
    assert all(finding.describe().startswith(f"{finding.word}: ") for finding in found)
    for name, value in changes.items():
        assert report.offer_words[named(name)] == value
        assert report.to_json()["offer"][named(name)] == words.text_value(named(name), value)
    for feature in gone:
        assert intel.offer.field(feature) and not report.offer.field(feature), feature
    assert report.offer.field(stays) == intel.offer.field(stays) != 0
    assert not fits(report.offer, intel.offer)


def test_a_host_that_reports_the_impossible_spreads_it_to_nobody(intel: Report) -> None:
    """Of the pool, only features of the impossible words are lost."""
    lying = altered(intel, cpuid_0xd_9_ebx=0x220)
    met = pool.baseline([intel, lying])
    assert met == lying.offer and met.value("cpuid:0xd.9.ebx") == 0
    assert met.field("avx512f") == 1


def test_a_guest_that_needs_it_is_told_what_is_impossible(intel: Report) -> None:
    lying = altered(intel, cpuid_0x80000008_0_eax=0x003035)
    with pytest.raises(Blocked) as refused:
        negotiate(Request(level="x86-64-v1"), lying)
    (blocker,) = refused.value.blockers
    assert (blocker.feature, blocker.cause) == ("phys-bits", "policy")
    assert "53 physical address bits" in blocker.because


def test_people_are_told(intel: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / name) for name in ("lying.json", "other.json")]
    for path, report in zip(paths, (altered(intel, cpuid_0xd_9_ebx=0x220), intel), strict=True):
        Path(path).write_text(json.dumps(report.to_json()), "utf-8")
    for words_ in (["host", "--report", paths[0]], ["compare", *paths], ["baseline", *paths]):
        cli.main(words_)
        told = capsys.readouterr().out
        assert "impossible in the report of" in told and "XSAVE component 9: 8 bytes at 544" in told
    cli.main(["host", "--report", paths[1]])
    assert "impossible" not in capsys.readouterr().out


def test_what_adds_up_is_left_alone(intel: Report, amd: Report, software: Report) -> None:
    for report in (intel, amd, software):
        assert findings(report) == ()
        assert sane(ARCHITECTURE, report.offer_words) is report.offer_words
        assert report.offer == FeatureSet.of(ARCHITECTURE, report.offer_words)


def test_everything_at_once_is_possible() -> None:
    """Else what negotiation says of the full set would be about what is left of it."""
    assert impossible(ARCHITECTURE, POSSIBLE) == ()
    offer = Report(ARCHITECTURE, measured={}, combo={}, identity={}, offer=POSSIBLE).offer
    alive = {f.rule for f in NAMES.by_name.values() if f.rule in rules.RULES and offer.field(f.name)}
    assert alive == set(rules.RULES) & {feature.rule for feature in NAMES.by_name.values()}


def test_words_that_were_not_measured_contradict_nothing(intel: Report) -> None:
    for word in intel.offer_words:
        part = {other: value for other, value in intel.offer_words.items() if other != word}
        lost_a_component = word.startswith("cpuid:0xd.") and word.endswith((".eax", ".ebx"))
        assert lost_a_component or impossible(ARCHITECTURE, part) == (), word
    assert impossible(ARCHITECTURE, {"cpuid:0xd.0.eax": 0xE7}) == impossible(ARCHITECTURE, {}) == ()


def test_sizes_in_use_beyond_the_area_are_told_and_nothing_is_lost(intel: Report) -> None:
    """EBX of leaf 0xD is recomputed for each guest: no offer holds it."""
    report = altered(intel, cpuid_0xd_0_ebx=0xA90)
    (finding,) = findings(report)
    assert finding.word == "cpuid:0xd.0.ebx" and finding.dropped == ()
    assert report.offer == intel.offer


def test_supervisor_state_is_none_of_xcr0s(intel: Report) -> None:
    """The catalogue has the bits, as some tables do; XSETBV refuses them on every CPU (SDM vol. 1, 13.3)."""
    report = altered(intel, cpuid_0xd_0_eax=intel.offer_words["cpuid:0xd.0.eax"] | 0x1800)
    assert [finding.word for finding in findings(report)] == ["cpuid:0xd.0.eax"]
    assert report.offer == intel.offer


def test_a_supervisor_component_says_that_it_is_one(intel: Report) -> None:
    cet = {
        "cpuid_0xd_1_ecx": 0x1800,
        "cpuid_0xd_11_eax": 16,
        "cpuid_0xd_11_ecx": 1,
        "cpuid_0xd_12_eax": 24,
        "cpuid_0xd_12_ecx": 1,
    }
    assert findings(altered(intel, **cet)) == ()
    assert altered(intel, **cet).offer.field("xss-cet-u") == 1
    wrong = altered(intel, **(cet | {"cpuid_0xd_12_ecx": 2}))
    assert [finding.word for finding in findings(wrong)] == ["cpuid:0xd.12.eax"]
    assert wrong.offer.field("xss-cet-s") == wrong.offer.field("xss-cet-u") == 0


def test_three_components_at_one_place_all_go(intel: Report) -> None:
    """A long one that two others lie in: the last is held against the long one, not against its neighbour."""
    report = altered(intel, cpuid_0xd_2_eax=0x300)
    found = {finding.word for finding in findings(report)}
    assert found == {"cpuid:0xd.2.eax", "cpuid:0xd.5.eax", "cpuid:0xd.6.eax"}
    assert report.offer.field("avx") == 0 and report.offer.field("pku") == 1


def test_what_is_accepted_is_judged_as_well(intel: Report) -> None:
    report = Report(
        ARCHITECTURE,
        measured={},
        combo={},
        identity={},
        offer=intel.offer_words,
        accept={EAX: 0x00393C},
    )
    assert report.offer == intel.offer
    assert [finding.word for finding in findings(report)] == [EAX]
    assert report.accept.field("phys-bits") == 0 and report.accept.field("avx") == 1
    assert report.accepting() is report.accepting()


def test_other_architectures_have_no_such_checks() -> None:
    assert impossible("arm64", {EAX: 0xFFFFFFFF}) == ()


def test_supervisor_components_are_looked_at_where_xcr0_is_impossible_too() -> None:
    words_ = {
        "cpuid:0xd.0.edx": 1 << 30,
        "cpuid:0xd.1.ecx": 1 << 8,
        "cpuid:0xd.8.eax": 64,
        "cpuid:0xd.8.ecx": 0x40,
    }
    assert [finding.word for finding in impossible(ARCHITECTURE, words_)] == [
        "cpuid:0xd.0.eax",
        "cpuid:0xd.8.eax",
    ]


# -- whatever is measured: an independent reading of the offer -------------------------------------------


@given(raw() | st.fixed_dictionaries({word: st.integers(0, 2 ** words.width(word) - 1) for word in FULL}))
def test_no_offer_holds_what_no_cpu_can_have(measured: dict[str, int]) -> None:
    report = Report(ARCHITECTURE, measured={}, combo={}, identity={}, offer=measured)
    offer = report.offer
    assert report.offer_words == measured
    assert FeatureSet.of(ARCHITECTURE, offer.words) == offer
    assert impossible(ARCHITECTURE, offer.words) == ()
    assert not fits(offer, FeatureSet.of(ARCHITECTURE, measured)), "nothing is offered that was not measured"
    _addresses(offer)
    _places(offer, measured.get("cpuid:0xd.0.ecx", 0))
    _above_the_highest(offer, measured)
    for word in ("msr:0x48b", "msr:0x48d", "msr:0x48e", "msr:0x48f", "msr:0x490"):
        must, may = offer.value(word) & 0xFFFF_FFFF, offer.value(word) >> 32
        assert must & may == must
    if offer.field("vmx"):
        assert 0 < offer.field("vmx-vmcs-size") <= 4096
        for fixed0, fixed1 in (("msr:0x486", "msr:0x487"), ("msr:0x488", "msr:0x489")):
            assert not measured.get(fixed1) or not offer.value(fixed0) & ~measured[fixed1]
    assert offer.field("pmu-event-length") <= 32 and offer.field("pmu-counter-width") <= 64


def _addresses(offer: FeatureSet) -> None:
    assert offer.field("phys-bits") <= 52
    assert offer.field("linear-bits") in (0, 48, 57)
    assert offer.field("guest-phys-bits") <= 52


def _places(offer: FeatureSet, area: int) -> None:
    xcr0 = offer.value("cpuid:0xd.0.eax") | offer.value("cpuid:0xd.0.edx") << 32
    taken: set[int] = set()
    for number in (number for number in range(2, 63) if xcr0 >> number & 1):
        size, offset = (offer.value(f"cpuid:0xd.{number}.{register}") for register in ("eax", "ebx"))
        assert size and offset >= 576
        assert not area or offset + size <= area
        size = min(size, 1 << 16)  # as much as fits into memory here
        place = set(range(offset, offset + size))
        assert not taken & place
        taken |= place


def _above_the_highest(offer: FeatureSet, measured: Mapping[str, int]) -> None:
    for word, value in offer.words.items():
        if word.startswith("cpuid:") and not word.startswith("cpuid:0x4") and value:
            leaf, subleaf, _ = words.parse_cpuid(word)
            highest = measured.get(f"cpuid:{leaf & 0xF000_0000:#x}.0.eax")
            if leaf & 0xFFFF_FFFF and leaf not in (0x0, 0x8000_0000, 0xC000_0000):
                assert highest is None or leaf <= highest, word
            if leaf == 7:
                assert measured.get("cpuid:0x7.0.eax", subleaf) >= subleaf, word
