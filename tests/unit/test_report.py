# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports: what one host measured, as an ordinary document."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from strategies import ARCHITECTURE, CATALOG, raw

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.negotiation import negotiate
from kvmneg.policy.request import Request


def made(offer: dict[str, int], **others: dict[str, int]) -> Report:
    return Report(ARCHITECTURE, measured={}, combo={}, identity={}, offer=offer, **others)  # type: ignore[arg-type]


@given(raw(), raw())
def test_a_document_round_trips(offer: dict[str, int], silicon: dict[str, int]) -> None:
    report = Report(
        ARCHITECTURE,
        measured={"host": "node7", "source": "kvm"},
        combo={"kernel": "6.12", "modules": {"kvm.ignore_msrs": "N"}, "vmms": [{"name": "qemu"}]},
        identity={"vendor": "GenuineIntel"},
        offer=offer,
        accept={"msr:0x10a": 5},
        silicon=silicon,
        enforcement={"cpuid:0x7.0.ebx": "replaced"},
    )
    again = Report.loads(json.dumps(report.to_json()).encode())
    assert again.to_json() == report.to_json()
    assert (again.offer, again.accept) == (report.offer, report.accept)
    assert (again.digest(), again.combo_digest()) == (report.digest(), report.combo_digest())
    assert again.silicon_words == silicon


def test_the_digest_is_of_the_outcome_not_of_the_measuring(intel: Report) -> None:
    document = intel.to_json()
    later = Report.from_json({**document, "measured": {"at": "2027-01-01T00:00:00Z", "host": "other"}})
    assert later.digest() == intel.digest() and later.host == "other"
    for section, value in (("combo", {"kernel": "6.1"}), ("identity", {}), ("silicon", {})):
        assert Report.from_json({**document, section: value}).digest() != intel.digest()
    offer = {**document["offer"], "cpuid:0x7.0.ebx": "0x00000000"}
    assert Report.from_json({**document, "offer": offer}).digest() != intel.digest()
    assert Report.from_json({**document, "combo": {"kernel": "6.1"}}).combo_digest() != intel.combo_digest()


def test_empty_sections_are_left_out() -> None:
    document = made({"cpuid:0x1.0.ecx": 1}).to_json()
    assert set(document) == {"format", "architecture", "measured", "combo", "identity", "offer"}
    assert document["offer"] == {"cpuid:0x1.0.ecx": "0x00000001"}
    assert made({}).host == "this host"


def test_accept_is_the_offer_with_what_differs() -> None:
    edx, ecx = "cpuid:0x1.0.edx", "cpuid:0x1.0.ecx"
    report = made({edx: 0x0F8BFBFF, ecx: 1}, accept={ecx: 1 | 1 << 13})
    assert report.offer.field("cx16") == 0 and report.accept.field("cx16") == 1
    assert report.accept.field("fpu") == 1
    there = report.accepting()
    assert there.offer == report.accept and there.accept == report.accept and there.host == report.host
    assert made({edx: 1}).accepting().offer == made({edx: 1}).accept == made({edx: 1}).offer


def test_unclassified_bits_stay_in_the_report_and_are_never_offered(intel: Report) -> None:
    """A bit of a known word, a word of no known leaf, an MSR: a newer kernel shows them before we know them."""
    stray = {"cpuid:0x1.0.edx": 1 << 10, "cpuid:0x99.0.eax": 0xFF, "msr:0x99": 1 << 63, "kvm:unheard-of": 1}
    offer = dict(intel.offer_words)
    for word, bits in stray.items():
        offer[word] = offer.get(word, 0) | bits
    report = made(offer)
    assert report.unclassified() == stray
    assert intel.unclassified() == {}
    assert report.offer == intel.offer
    document = report.to_json()["offer"]
    assert all(int(document[word], 16) & bits == bits for word, bits in stray.items())
    contract = negotiate(Request(maximum=True), report).contract
    assert all(not contract.words().get(word, 0) & bits for word, bits in stray.items())
    assert Fence(report.offer).text() == Fence(intel.offer).text()


def test_what_is_the_vmms_is_known_and_not_offered() -> None:
    topology = {"cpuid:0x4.0.eax": 0x1C004121, "cpuid:0xb.0.ebx": 2, "cpuid:0x8000001e.0.ebx": 0x100}
    report = made({**topology, "msr:0x8b": 5 << 32})
    assert report.unclassified() == {}
    assert report.offer == FeatureSet.empty(ARCHITECTURE)


@given(raw())
def test_offered_and_unclassified_bits_are_apart(offer: dict[str, int]) -> None:
    report = made(offer)
    for word, bits in report.unclassified().items():
        assert not bits & CATALOG.words[word].judged
        assert not bits & ~offer[word]


def test_the_recorded_reports_say_what_they_are(intel: Report, amd: Report, software: Report) -> None:
    for report, vendor in ((intel, "GenuineIntel"), (amd, "AuthenticAMD"), (software, "GenuineIntel")):
        letters = b"".join(
            report.offer_words[f"cpuid:0x0.0.{register}"].to_bytes(4, "little")
            for register in ("ebx", "edx", "ecx")
        )
        assert letters.decode() == vendor == report.identity["vendor"]
        assert report.measured["source"] == "recorded"


# -- arm64 -------------------------------------------------------------------------------------------


def _arm64(**sections: object) -> bytes:
    document = {
        "format": "kvmneg.report/1",
        "architecture": "arm64",
        "offer": {"arm64:0x6030000000160000": "0x1"},
    }
    return json.dumps({**document, **sections}).encode()


def test_what_a_probe_of_arm64_found_is_kept() -> None:
    sections = {
        "settable": {"arm64:0x6030000000160000": "0x0000000000000001"},
        "dropped": {"arm64:0x603000000013c03a": "0x000000000f000000"},
        "registers": ["0x6030000000100000", "0x6030000000160000"],
    }
    report = Report.loads(_arm64(**sections))
    assert report.settable_words == {"arm64:0x6030000000160000": 1}
    assert report.dropped_words == {"arm64:0x603000000013c03a": 0xF << 24}
    assert report.registers == (0x6030_0000_0010_0000, 0x6030_0000_0016_0000)
    document = report.to_json()
    assert {name: document[name] for name in sections} == sections
    assert report.digest() != Report.loads(_arm64()).digest()
    assert {"settable", "dropped", "registers"} & set(Report.loads(_arm64()).to_json()) == set()
    accepting = Report.loads(_arm64(**sections, accept={"arm64:0x6030000000160001": "0x1"})).accepting()
    assert accepting.registers == report.registers and accepting.settable_words == report.settable_words


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"registers": {}}, "not a JSON list"),
        ({"registers": [1]}, "register's id"),
        ({"registers": ["0X1"]}, "register's id"),
        ({"registers": ["0x01"]}, "register's id"),
        ({"registers": ["0x10000000000000000"]}, "register's id"),
        ({"registers": ["0x2", "0x1"]}, "order"),
        ({"registers": ["0x1", "0x1"]}, "order"),
        ({"settable": {"arm64:0x1": "1"}}, "settable"),
        ({"settable": []}, "settable is not a JSON object"),
        ({"dropped": {"arm64:0x01": "0x1"}}, "dropped"),
        ({"registers": [hex(n) for n in range(limits.REGISTERS + 1)]}, str(limits.REGISTERS)),
    ],
)
def test_bad_sections_of_arm64_are_refused(sections: dict[str, object], what: str) -> None:
    with pytest.raises(BadInput, match=what):
        Report.loads(_arm64(**sections))


def test_as_many_registers_as_the_limit_are_read() -> None:
    listed = [hex(n) for n in range(limits.REGISTERS)]
    assert len(Report.loads(_arm64(registers=listed)).registers) == limits.REGISTERS
