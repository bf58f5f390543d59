# SPDX-License-Identifier: LGPL-2.1-or-later
"""The single controls of the VMX control MSRs: their names, places, and what a comparison says of them.

Numbers by hand, after the Intel SDM, vol. 3C chapter 26 (where a control is in its VMCS field) and vol. 3D A.2 to A.5
(bits 31:0 of the MSR must be 1, bits 63:32 may be 1; the default1 class).
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmneg.emit import qemu_vmx
from kvmneg.errors import Blocked, UsageError
from kvmneg.features import catalog, rules
from kvmneg.features.catalog import controls
from kvmneg.features.featureset import FeatureSet, diff, fits, meet
from kvmneg.features.report import Report
from kvmneg.policy import pool, reasons, vmm
from kvmneg.policy.negotiation import negotiate
from kvmneg.policy.request import Request

ARCHITECTURE = "x86_64"
NAMES = catalog.names(ARCHITECTURE)
SECONDARY, PINBASED, PROCBASED, EXIT, ENTRY = (
    f"msr:{index:#x}" for index in (0x48B, 0x48D, 0x48E, 0x48F, 0x490)
)
# SDM vol. 3D A.3.1, A.3.2, A.4, A.5: what is 1 in the default1 class; A.3.3: none of the secondary controls is
DEFAULT1 = {SECONDARY: 0, PINBASED: 0x16, PROCBASED: 0x0401E172, EXIT: 0x36DFF, ENTRY: 0x11FF}
VMX = {
    "cpuid:0x1.0.ecx": 0x20,
    "msr:0x480": 0x00D8_1000_11E5_7ED0,
    PINBASED: 0x7F << 32 | 0x16,
    PROCBASED: 0xFFF9FFFE << 32 | 0x04006172,
    EXIT: 0x01FFFFFF << 32 | 0x00036DFB,
    ENTRY: 0x0003FFFF << 32 | 0x000011FB,
}

PLACES = [
    # name, word, number, and a value of the word that offers it beside one that does not
    ("vmx-ept", SECONDARY, 1, 1 << 33, 1 << 34),
    ("vmx-vpid", SECONDARY, 5, 1 << 37, 1 << 36),
    ("vmx-mbec", SECONDARY, 22, 1 << 54, 1 << 53),
    ("vmx-enable-user-wait-pause", SECONDARY, 26, 1 << 58, 1 << 57),
    ("vmx-posted-intr", PINBASED, 7, 0x96 << 32 | 0x16, 0x16 << 32 | 0x16),
    ("vmx-preemption-timer", PINBASED, 6, 0x56 << 32 | 0x16, 0x56 << 32 | 0x56),  # the second insists on it
    ("vmx-secondary-ctls", PROCBASED, 31, 1 << 63, 0),
    # reading CR3 need not exit where "exit" need not be 1
    ("vmx-cr3-store-noexit", PROCBASED, 16, 0x0401E172 << 32 | 0x0400E172, 0x0401E172 << 32 | 0x0401E172),
    ("vmx-exit-nosave-debugctl", EXIT, 2, 0x36DFF << 32 | 0x36DFB, 0x36DFF << 32 | 0x36DFF),
    ("vmx-exit-ack-intr", EXIT, 15, 1 << 47, 1 << 46),
    ("vmx-entry-load-fred", ENTRY, 23, 1 << 55, 1 << 54),
]


@pytest.mark.parametrize(("name", "word", "number", "offering", "other"), PLACES)
def test_a_control_is_offered_where_it_may_be_1_and_need_not_be(
    name: str, word: str, number: int, offering: int, other: int
) -> None:
    control = NAMES.by_name[name]
    assert (control.word, control.shift, control.width) == (word, 32 + number, 1)
    assert (control.of(offering), control.of(other)) == (1, 0)
    assert control.rule == rules.VMX_CONTROLS and control.is_bit
    assert control in list(NAMES.within(word, offering))
    assert control not in list(NAMES.within(word, other))
    assert control not in list(NAMES.at(word, control.mask))  # it is the word that merges


def test_the_default1_class_of_each_word() -> None:
    assert NAMES.default1 == DEFAULT1
    assert set(NAMES.controls) == set(DEFAULT1)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("vmx-rdtsc-exit", "vmx-rdtsc-exit"), ("preemption_timer", "vmx-preemption-timer"), ("enable EPT", "vmx-ept"),
     ("vtpr", "vmx-flexpriority"), ("pml", "vmx-pml")],
)  # fmt: skip
def test_every_tool_s_name_finds_it(alias: str, name: str) -> None:
    assert NAMES.feature(alias).name == name


VALUES = st.tuples(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFFFF_FFFF)).map(
    lambda halves: (halves[0] | halves[1]) << 32 | halves[1]
)


@given(VALUES, VALUES)
def test_what_a_pool_offers_is_what_all_offer(a: int, b: int) -> None:
    """The law that makes a name of a control one: meeting the words is an AND of what they offer."""
    met = rules.RULES[rules.VMX_CONTROLS].meet(a, b)
    assert controls.offered(met) == (controls.offered(a) & controls.offered(b) if met else 0)


@given(st.sampled_from(sorted(DEFAULT1)), st.integers(0, 0xFFFF_FFFF), st.data())
def test_a_word_is_made_of_what_it_offers(word: str, offered: int, data: st.DataObject) -> None:
    value = controls.value_of(offered, DEFAULT1[word])
    assert controls.offered(value) == offered
    for number in range(32):
        if not offered >> number & 1:  # both halves say that it has no choice
            assert (value >> number & 1) == (value >> 32 + number & 1) == DEFAULT1[word] >> number & 1
    control = data.draw(st.sampled_from(NAMES.controls[word]))
    assert control.given_to(value) == controls.value_of(offered | 1 << control.number, DEFAULT1[word])
    assert control.taken_from(value) == controls.value_of(offered & ~(1 << control.number), DEFAULT1[word])


def _set(**words: int) -> FeatureSet:
    return FeatureSet.of(
        ARCHITECTURE, {**VMX, **{f"msr:0x{name[1:]}": value for name, value in words.items()}}
    )


def test_blockers_name_the_controls() -> None:
    guest = _set(x48b=0x5F << 32)
    host = _set(x48b=0x5D << 32, x48d=0x3F << 32 | 0x1F)
    # 0x48b: control 1 is vmx-ept; 0x48d: control 6 is the timer; 0 and 3 must be 1 there
    assert [(one.feature, one.word, one.bit) for one in fits(guest, host)] == [
        ("vmx-ept", SECONDARY, 33),
        ("vmx-intr-exit", PINBASED, 0),
        ("vmx-nmi-exit", PINBASED, 3),
        ("vmx-preemption-timer", PINBASED, 38),
    ]
    because = {one.feature: one.because for one in fits(guest, host, missing_on="node7", cause="fence")}
    assert because["vmx-ept"] == "node7 does not offer it"
    assert because["vmx-nmi-exit"].startswith("must be 1 there: node7")
    assert fits(host, host) == ()


def test_a_blocker_of_a_control_that_has_no_name_tells_its_bit() -> None:
    """Control 8 of the pin-based ones is reserved."""
    (blocker,) = fits(_set(x48d=0x17F << 32 | 0x16), _set())
    assert (blocker.feature, blocker.bit) == ("vmx-pinbased-controls", 40)


def test_a_guest_whose_control_must_be_1_does_not_fit_where_it_must_be_0() -> None:
    (blocker,) = fits(_set(x48d=0x7F << 32 | 0x56), _set(x48d=0x3F << 32 | 0x16))
    assert blocker.feature == "vmx-preemption-timer"
    assert "must be 0 there" in blocker.because


def test_a_host_without_the_word_is_told_once() -> None:
    guest = _set(x48b=0x5F << 32)
    (blocker,) = fits(guest, _set())
    assert (blocker.feature, blocker.bit) == ("vmx-secondary-controls", None)


def test_differences_name_the_controls() -> None:
    one, other = _set(x48b=0x5F << 32), _set(x48b=0x7D << 32)
    assert [(row.feature, row.shift, row.a, row.b) for row in diff(one, other)] == [
        ("vmx-ept", 33, 1, 0), ("vmx-vpid", 37, 0, 1),
    ]  # fmt: skip


def test_a_difference_that_no_name_tells_is_the_word_s() -> None:
    forced, free, reserved = 0x7F << 32 | 0x56, 0x3F << 32 | 0x16, 0x13F << 32 | 0x16
    # one insists on control 6, the other has none: neither offers it
    (row,) = diff(_set(x48d=forced), _set(x48d=free))
    assert (row.feature, row.a, row.b) == ("vmx-pinbased-controls", forced, free)
    assert [row.feature for row in diff(_set(x48d=free), _set(x48d=reserved))] == ["vmx-pinbased-controls"]


def test_capabilities_need_their_control() -> None:
    """EPT's and VPID's capabilities go with their control, and all secondary controls with what activates them."""
    caps = 1 << 20 | 1 << 32  # INVEPT, INVVPID
    both = _set(x48b=1 << 33 | 1 << 37, x48c=caps)
    assert both.value("msr:0x48c") == caps
    assert meet(both, _set(x48b=1 << 33, x48c=caps)).value("msr:0x48c") == 1 << 20
    assert meet(both, _set(x48b=1 << 37, x48c=caps)).value("msr:0x48c") == 1 << 32
    inactive = _set(x48b=1 << 33 | 1 << 37, x48c=caps, x48e=0x7FF9FFFE << 32 | 0x04006172)
    assert (inactive.value(SECONDARY), inactive.value("msr:0x48c")) == (0, 0)
    assert inactive.field("vmx") == 1


def _host(report: Report, **words: int) -> Report:
    offer = {**report.offer_words, **{f"msr:0x{name[1:]}": value for name, value in words.items()}}
    return Report(
        report.architecture,
        measured=report.measured,
        combo=report.combo,
        identity=report.identity,
        offer=offer,
    )


def test_a_control_can_be_required(intel: Report) -> None:
    """Ice Lake has EPT, and no shadow VMCS under this KVM (its 0x48b is 0x00553cfe00000000: bit 46 is clear)."""
    assert intel.offer_words[SECONDARY] == 0x0055_3CFE_0000_0000
    granted = negotiate(Request(require=("vmx", "vmx-ept")), intel).contract.granted
    assert granted.field("vmx-ept") == 1
    with pytest.raises(Blocked) as caught:
        negotiate(Request(require=("vmx", "vmx-shadow-vmcs")), intel)
    (blocker,) = caught.value.blockers
    assert (blocker.feature, blocker.word, blocker.bit) == ("vmx-shadow-vmcs", SECONDARY, 46)
    assert blocker.cause == "kvm"
    with pytest.raises(UsageError, match="vmx-ept is built on vmx, which"):
        negotiate(Request(require=("vmx-ept",)), intel)


def test_exactly_one_control(intel: Report) -> None:
    """The others are what their class is: 1 in the default1 class, else 0."""
    exact = ("vmx", "vmx-secondary-ctls", "vmx-ept")
    granted = negotiate(Request(exact=exact), intel).contract.granted
    assert granted.value(SECONDARY) == 1 << 33
    assert granted.value(PROCBASED) == (0x0401E172 | 1 << 31) << 32 | 0x0401E172
    assert granted.value(PINBASED) == 0x16 << 32 | 0x16
    with pytest.raises(UsageError, match="vmx-secondary-ctls"):
        negotiate(Request(exact=("vmx", "vmx-ept")), intel)


def test_who_holds_a_control_back(intel: Report) -> None:
    poorer = _host(intel, x48b=intel.offer_words[SECONDARY] & ~(1 << 37))
    holders = pool.holders([intel, poorer], meet(intel.offer, poorer.offer))
    held = {holder.feature for holder in holders}
    assert {"vmx-vpid", "vmx-invvpid"} <= held
    assert not held & {"vmx-secondary-controls", "vmx-ept"}
    found = reasons.standing(NAMES.by_name["vmx-vpid"], poorer)
    assert (found.state, found.cause) == (reasons.HELD_BACK, "kvm")
    forced = _host(intel, x48d=0x7F << 32 | 0x56)
    found = reasons.standing(NAMES.by_name["vmx-preemption-timer"], forced)
    assert (found.state, found.cause) == (reasons.HELD_BACK, "kvm")
    assert found.because.startswith("must be 1 there")


def test_qemu_takes_the_controls_that_it_cannot_say(intel: Report) -> None:
    """EPT-violation #VE (50) and "conceal VMX from PT" of exits (56) have no property; both are 0 then."""
    seen = vmm.through(intel, "qemu-10.0")
    taken = {change.feature: change.bit for change in seen.changes if change.feature.startswith("vmx-")}
    assert taken == {"vmx-ept-violation-ve": 50, "vmx-exit-pt-conceal": 56}
    assert seen.report.offer_words[SECONDARY] == intel.offer_words[SECONDARY] & ~(1 << 50)
    assert seen.report.offer_words[EXIT] == intel.offer_words[EXIT] & ~(1 << 56)


@pytest.mark.parametrize(
    ("granted", "written"), [((), 0x2E), (("vmx-tsc-scaling",), 0x32), (("vmx-exit-secondary-ctls",), 0x44),
     (("vmx-tsc-scaling", "vmx-entry-load-fred"), 0x52)],
)  # fmt: skip
def test_the_highest_vmcs_field_is_qemu_s(granted: tuple[str, ...], written: int) -> None:
    feature = NAMES.by_name["vmx-vmcs-enum"]
    values = {NAMES.by_name[name].word: NAMES.by_name[name].mask for name in granted}
    assert qemu_vmx.treated(feature, {**values, "msr:0x48a": written}, None) == (qemu_vmx.FOLLOWS, "")
    lost = qemu_vmx.treated(feature, {**values, "msr:0x48a": 0x30}, None)
    assert lost == (qemu_vmx.LOST, f"QEMU writes {written:#x}")
