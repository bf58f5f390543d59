# SPDX-License-Identifier: LGPL-2.1-or-later
"""Grades of words, on KVMs that keep what they are given and on KVMs that do not; and what follows for contracts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmneg.errors import Blocked, KvmFault, UsageError
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.host import enforcement
from kvmneg.host.enforcement import REFUSED, REPLACED, UNTESTED
from kvmneg.host.tables import CpuidEntry, MsrShown, Probe
from kvmneg.policy import grade
from kvmneg.policy.contract import Contract
from kvmneg.policy.negotiation import check_request, negotiate
from kvmneg.policy.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmneg.host.kvm import Kvm, Scratch

SCRATCH = cast("Scratch", None)
# cx16 hypervisor | avx2 erms | a bit of leaf 7 ECX.OSPKE's word, pku | max leaf and vendor of leaf 0
TABLE = [
    CpuidEntry(0x0, 0, 0, 0xD, 0x68747541, 0x444D4163, 0x69746E65),
    CpuidEntry(0x1, 0, 0, 0xA00F11, 0x00000800, 0x80202000, 0x0F8BFBFF),
    CpuidEntry(0x7, 0, 1, 0, 0x00000220, 0x00000008, 0),
    CpuidEntry(0xD, 0, 1, 0x7, 0x340, 0x340, 0),
    CpuidEntry(0xD, 1, 1, 0xF, 0x340, 0, 0),
    CpuidEntry(0x80000001, 0, 0, 0, 0, 0x1, 0x2FD3FBFF),
]
MSRS = {0x10A: 0x4000000000000069, 0x8B: 0x1000065, 0x48D: 0x7F00000016}
VMX_PINBASED = 0x48D
# hv-time-ref-count and what it is built on
HYPERV = {"hyperv:0x40000000.0.eax": 0x4000000A, "hyperv:0x40000003.0.eax": 2}


class Vcpu:
    """Keeps what it is given; subclasses say what they do instead."""

    def __init__(self) -> None:
        self.tables: list[list[CpuidEntry]] = []
        self.msrs: list[dict[int, int]] = []

    def try_cpuid(self, scratch: object, entries: Sequence[CpuidEntry]) -> list[CpuidEntry] | None:
        self.tables.append(list(entries))
        return None if self.refuses(entries) else self.shown(list(entries))

    def try_msrs(self, scratch: object, values: Mapping[int, int]) -> dict[int, MsrShown]:
        self.msrs.append(dict(values))
        return {index: self.msr(index, value) for index, value in values.items()}

    def refuses(self, entries: Sequence[CpuidEntry]) -> bool:
        return False

    def shown(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
        return entries

    def msr(self, index: int, value: int) -> MsrShown:
        return MsrShown(value, unread=False, unset=False)


def leaf(entry: CpuidEntry, number: int, **registers: int) -> CpuidEntry:
    return entry._replace(**registers) if entry.function == number else entry


def graded(vcpu: Vcpu, **others: int) -> dict[str, str]:
    """The grades of an offer of TABLE, MSRS and other words."""
    names = ("eax", "ebx", "ecx", "edx")
    offer = {
        f"cpuid:{entry.function:#x}.{entry.index}.{name}": value
        for entry in TABLE
        for name, value in zip(names, entry[3:], strict=True)
    }
    offer |= {f"msr:{index:#x}": value for index, value in MSRS.items()} | others
    probe = Probe({}, TABLE, None, None, MSRS, (), None, {})  # type: ignore[arg-type]
    return enforcement.grades(cast("Kvm", vcpu), SCRATCH, probe, offer)


def not_kept(vcpu: Vcpu) -> dict[str, str]:
    return {word: found for word, found in graded(vcpu).items() if found != UNTESTED}


def test_a_faithful_kvm_has_nothing_against_it() -> None:
    assert not_kept(Vcpu()) == {}


def test_what_is_tried() -> None:
    """The offer as it is, without bits but with its numbers, and nothing at all; leaves always the same."""
    vcpu = Vcpu()
    graded(vcpu)
    offered, lowered, empty = vcpu.tables
    assert offered == TABLE
    assert [entry[:3] for entry in lowered] == [entry[:3] for entry in empty] == [e[:3] for e in TABLE]
    by_leaf = {entry[:2]: entry for entry in lowered}
    assert by_leaf[0, 0] == TABLE[0]  # vendor and highest leaf
    assert by_leaf[1, 0].eax == TABLE[1].eax  # family, model, stepping
    assert (by_leaf[1, 0].ecx, by_leaf[7, 0].ebx, by_leaf[0x80000001, 0].ecx) == (0, 0, 0)
    assert all(entry[3:] == (0, 0, 0, 0) for entry in empty)


def test_what_msrs_are_given() -> None:
    """Their values, then without bits; VMX controls keep what must be 1, and nobody grades the microcode."""
    vcpu = Vcpu()
    graded(vcpu)
    exact, lowered = vcpu.msrs
    assert exact == {index: value for index, value in MSRS.items() if index != 0x8B}
    assert lowered == {0x10A: 0, VMX_PINBASED: 0x16 << 32 | 0x16}


def test_forced_bits_are_found_although_they_are_what_is_offered() -> None:
    """The full offer comes back as it was: only taking away shows it."""

    class Forces(Vcpu):
        def shown(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
            return [leaf(entry, 7, ebx=0x220) for entry in entries]

    assert not_kept(Forces()) == {"cpuid:0x7.0.ebx": REPLACED}


def test_bits_taken_away_are_found() -> None:
    class Hides(Vcpu):
        def shown(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
            return [leaf(entry, 0x80000001, edx=entry.edx & ~1) for entry in entries]

    assert not_kept(Hides()) == {"cpuid:0x80000001.0.edx": REPLACED}


def test_forced_only_for_a_vendor() -> None:
    """Such a KVM keeps an empty table, which has no vendor."""

    class ForcesAmd(Vcpu):
        def shown(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
            amd = entries[0].ebx == TABLE[0].ebx
            return [leaf(entry, 7, ebx=0x220) if amd else entry for entry in entries]

    assert not_kept(ForcesAmd()) == {"cpuid:0x7.0.ebx": REPLACED}


def test_a_forced_number_is_found() -> None:
    class ForcesSignature(Vcpu):
        def shown(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
            return [leaf(entry, 1, eax=TABLE[1].eax) for entry in entries]

    assert not_kept(ForcesSignature()) == {"cpuid:0x1.0.eax": REPLACED}


def test_leaves_that_come_or_go() -> None:
    """A leaf that KVM adds is shown to guests; one it drops reads zero."""

    class Rearranges(Vcpu):
        def shown(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
            return [entry for entry in entries if entry.function != 7] + [
                CpuidEntry(0x80000008, 0, 0, 0, 1, 0, 0)
            ]

    assert not_kept(Rearranges()) == {
        "cpuid:0x7.0.ebx": REPLACED,
        "cpuid:0x7.0.ecx": REPLACED,
        "cpuid:0x80000008.0.ebx": REPLACED,
    }


def test_what_kvm_owns_is_not_judged() -> None:
    """kvm_update_cpuid_runtime(): OSXSAVE, APIC, OSPKE, sizes of XSAVE areas; and the APIC id of leaf 1."""

    class Runtime(Vcpu):
        def shown(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
            changed = []
            for entry in entries:
                one = leaf(entry, 1, ecx=entry.ecx ^ 1 << 27, edx=entry.edx ^ 1 << 9, ebx=entry.ebx ^ 3 << 24)
                changed.append(leaf(leaf(one, 7, ecx=one.ecx ^ 1 << 4), 0xD, ebx=0x240))
            return changed

    assert not_kept(Runtime()) == {}


def test_one_leaf_refused() -> None:
    """KVM refuses a table as a whole; the leaf is found, and the others are still judged."""

    class Refuses(Vcpu):
        def refuses(self, entries: Sequence[CpuidEntry]) -> bool:
            return any(entry.function == 0x80000001 and not entry.edx for entry in entries)

        def shown(self, entries: list[CpuidEntry]) -> list[CpuidEntry]:
            return [leaf(entry, 7, ebx=0x220) for entry in entries]

    found = not_kept(Refuses())
    assert {word for word, why in found.items() if why == REPLACED} == {"cpuid:0x7.0.ebx"}
    assert {word for word, why in found.items() if why == REFUSED} == {
        f"cpuid:0x80000001.0.{register}" for register in ("eax", "ebx", "ecx", "edx")
    }


def test_everything_refused() -> None:
    class Refuses(Vcpu):
        def refuses(self, entries: Sequence[CpuidEntry]) -> bool:
            return True

    found = not_kept(Refuses())
    assert {found["cpuid:0x7.0.ebx"], found["cpuid:0x1.0.ecx"]} == {REFUSED}
    assert set(found.values()) == {REFUSED}


def test_msrs() -> None:
    class Msrs(Vcpu):
        def msr(self, index: int, value: int) -> MsrShown:
            if index == VMX_PINBASED:
                return MsrShown(value, unread=False, unset=True)
            return MsrShown(MSRS[index], unread=False, unset=False)

    assert not_kept(Msrs()) == {"msr:0x10a": REPLACED, "msr:0x48d": REFUSED}


# As Linux 6.12's kvm_intel lists them on a Haswell (Bochs, corei7_haswell_4770).
HASWELL = {
    0x480: 0xD8100011E57ED0, 0x481: 0x7F00000016, 0x482: 0xF7F9FFFE0401E172, 0x483: 0x7FFFFF00036DFF,
    0x484: 0xF3FF000011FF, 0x485: 0x20000165, 0x486: 0x80000021, 0x487: 0xFFFFFFFF, 0x488: 0x2000, 0x489: 0x172FFF,
    0x48A: 0x32, 0x48B: 0x27BFF00000000, 0x48C: 0xF0106334041, 0x48D: 0x7F00000016, 0x48E: 0xF7F9FFFE04006172,
    0x48F: 0x7FFFFF00036DFB, 0x490: 0xF3FF000011FB, 0x491: 0x1, 0x10A: 0x400000000C000040,
}  # fmt: skip
GENERATED = {0x481, 0x482, 0x483, 0x484, 0x487, 0x489}  # from others, or from CPUID: not to be set


class IntelKvm(Vcpu):
    """Takes VMX MSRs as vmx_set_vmx_msr does (Linux 6.12, arch/x86/kvm/vmx/nested.c), once CPUID has VMX."""

    def __init__(self) -> None:
        super().__init__()
        self.values = dict(HASWELL)

    def takes(self, index: int, value: int) -> bool:
        was = HASWELL[index]
        if index == 0x10A:
            return True
        if not self.tables or not any(
            entry.function == 1 and entry.ecx & 1 << 5 for entry in self.tables[-1]
        ):
            return False
        if 0x48D <= index <= 0x490 or index == 0x48B:
            must, may = was & (1 << 32) - 1, was >> 32
            return not must & ~value and not value >> 32 & ~may
        if index in (0x486, 0x488):
            return not was & ~value
        return index not in GENERATED and not value & ~was

    def msr(self, index: int, value: int) -> MsrShown:
        taken = self.takes(index, value)
        if taken:
            self.values[index] = value
        return MsrShown(self.values[index], unread=False, unset=not taken)


def test_nested_vmx_of_a_faithful_kvm_is_kept_to() -> None:
    """What KVM generates itself is not set, controls keep what must be 1, and VMX is in CPUID before its MSRs."""
    vcpu = IntelKvm()
    table = [leaf(entry, 1, ecx=entry.ecx | 1 << 5) for entry in TABLE]
    offer = {f"msr:{index:#x}": value for index, value in HASWELL.items()}
    probe = Probe({}, table, None, None, HASWELL, (), None, {})  # type: ignore[arg-type]
    found = enforcement.grades(cast("Kvm", vcpu), SCRATCH, probe, offer)
    assert found == {f"msr:{index:#x}": UNTESTED for index in sorted(GENERATED)}
    given = {index: value for values in vcpu.msrs for index, value in values.items()}
    assert not GENERATED & given.keys()
    assert given[0x48E] == 0x04006172_04006172 and given[0x48B] == 0  # lowered as far as KVM goes


def test_what_nothing_reads_back_is_untested() -> None:
    class Mute(Vcpu):
        def msr(self, index: int, value: int) -> MsrShown:
            return MsrShown(0, unread=True, unset=False)

    found = graded(Mute(), **{"kvm:exit-hypercall": 1, "hyperv:0x40000003.0.eax": 2, "tap:features": 3})
    assert {word for word, why in found.items() if why == UNTESTED} == {
        "kvm:exit-hypercall", "hyperv:0x40000003.0.eax", "tap:features", "msr:0x10a", "msr:0x8b", "msr:0x48d",
    }  # fmt: skip


def test_a_kvm_that_cannot_be_tried_gives_no_grades() -> None:
    class Broken(Vcpu):
        def try_cpuid(self, scratch: object, entries: Sequence[CpuidEntry]) -> list[CpuidEntry] | None:
            raise KvmFault("KVM_GET_CPUID2", 25)

    assert graded(Broken()) == {}


# -- contracts --------------------------------------------------------------------------------------------


def with_grades(report: Report, **grades: str) -> Report:
    """The report as if it had been tried, `grades` by word; capabilities are untested as always."""
    document = report.to_json() | {"enforcement": {"kvm:max-vcpus": "untested", **grades}}
    return Report.from_json(document)


def test_grades_of_contracts(amd: Report) -> None:
    wanted = Request(level="x86-64-v2")
    assert negotiate(wanted, amd).contract.grade == "unverified"  # recorded before grades existed
    assert negotiate(wanted, with_grades(amd)).contract.grade == "enforced"
    leaves = with_grades(amd, **{"cpuid:0x7.0.ebx": "replaced"})
    assert negotiate(wanted, leaves).contract.grade == "partial"
    assert check_request(wanted, leaves).contract.grade == "partial"


@pytest.mark.parametrize("why", ["replaced", "refused", "leaks", "untested", "a grade of another version"])
def test_any_grade_but_honoured_counts(amd: Report, why: str) -> None:
    report = with_grades(amd, **{"cpuid:0x1.0.ecx": why})
    assert negotiate(Request(), report).contract.grade == "partial"
    honoured = with_grades(amd, **{"cpuid:0x1.0.ecx": "honoured"})
    assert negotiate(Request(), honoured).contract.grade == "enforced"


def test_only_words_that_the_guest_is_shown_count(amd: Report) -> None:
    """Capabilities are the VMM's; an MSR counts with the bit that announces it, Hyper-V's leaves when granted."""
    hyperv = {"hyperv:0x40000003.0.eax": "untested"}
    odd = {"kvm:exit-hypercall": "refused", "tap:features": "untested", "no-word": "replaced", **hyperv}
    report = with_grades(amd, **odd, **{"msr:0x48d": "refused"})
    assert grade.of(negotiate(Request(), report).contract.granted, report) == "enforced"
    enlightened = FeatureSet.of("x86_64", {**amd.offer_words, **HYPERV})
    assert enlightened.value("hyperv:0x40000003.0.eax") == 2
    assert list(grade.broken(enlightened, report)) == ["hyperv:0x40000003.0.eax"]


def test_a_contract_that_must_be_enforced(amd: Report) -> None:
    wanted = Request(level="x86-64-v2", require_enforced=True)
    assert negotiate(wanted, with_grades(amd)).contract.grade == "enforced"
    report = with_grades(amd, **{"cpuid:0x7.0.ebx": "replaced", "cpuid:0x1.0.ecx": "refused"})
    with pytest.raises(Blocked) as caught:
        negotiate(wanted, report)
    rows = [(blocker.word, blocker.bit, blocker.cause) for blocker in caught.value.blockers]
    assert rows == [("cpuid:0x1.0.ecx", None, "kvm"), ("cpuid:0x7.0.ebx", None, "kvm")]
    assert caught.value.blockers[1].because == "KVM takes this word and shows the guest another value"
    with pytest.raises(Blocked) as never_tried:
        negotiate(wanted, amd)
    assert [blocker.cause for blocker in never_tried.value.blockers] == ["unknown"]


def test_a_request_carries_it() -> None:
    wanted = Request(maximum=True, require_enforced=True)
    assert wanted.to_json() == {"max": True, "requireEnforced": True}
    assert Request.from_json(json.loads(json.dumps(wanted.to_json()))).require_enforced
    assert not Request.from_json({"requireEnforced": None}).require_enforced
    with pytest.raises(UsageError, match="requireEnforced"):
        Request.from_json({"requireEnforced": "yes"})


def test_the_grade_is_in_the_digest(amd: Report) -> None:
    granted = amd.offer
    made: list[Any] = [Contract(granted, grade=name) for name in ("unverified", "partial", "enforced")]
    assert len({contract.digest for contract in made}) == 3
    assert [Contract.from_binary(contract.binary()).grade for contract in made] == [c.grade for c in made]


def test_a_host_that_keeps_less_than_it_did(amd: Report) -> None:
    kept, replaced = with_grades(amd), with_grades(amd, **{"cpuid:0x7.0.ebx": "replaced"})
    contract = negotiate(Request(), kept).contract
    assert not grade.worse(contract, kept)
    assert grade.worse(contract, replaced) and grade.worse(contract, amd)
    assert not grade.worse(negotiate(Request(), amd).contract, kept)
