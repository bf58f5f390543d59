# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a VMM makes of KVM's set: given, taken, allowed, refused, and who is blamed for it."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from strategies import ARCHITECTURE, NAMES

from kvmneg.errors import Blocked, UsageError
from kvmneg.features.featureset import FeatureSet, fits
from kvmneg.features.report import Report
from kvmneg.policy import definitions, vmm
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.negotiation import ceiling, check, check_request, negotiate
from kvmneg.policy.request import Request

VMMS = definitions.available("vmms")
MSI, GPA, MIGRATION = "kvm-msi-ext-dest-id", "kvm-hc-map-gpa-range", "kvm-migration-control"


def changed(report: Report, **others: Any) -> Report:
    """The report with other offer words, silicon words or combo."""
    return Report(
        report.architecture,
        measured=report.measured,
        combo={**report.combo, **others.get("combo", {})},
        identity=report.identity,
        offer={**report.offer_words, **others.get("offer", {})},
        silicon={**report.silicon_words, **others.get("silicon", {})},
    )


def has(report: Report, name: str) -> int:
    return report.offer.field(name)


def told(report: Report, *bits: str) -> Report:
    """The report with these or-bits or hints in its offer."""
    offer: dict[str, int] = {}
    for name in bits:
        feature = NAMES.by_name[name]
        value = offer.get(feature.word, report.offer_words.get(feature.word, 0))
        offer[feature.word] = value | feature.mask
    return changed(report, offer=offer)


def without(report: Report, *names: str) -> Report:
    offer: dict[str, int] = {}
    for name in names:
        feature = NAMES.by_name[name]
        value = offer.get(feature.word, report.offer_words.get(feature.word, 0))
        offer[feature.word] = value & ~feature.mask
    return changed(report, offer=offer)


@pytest.mark.parametrize("name", VMMS)
def test_every_rule_names_features_and_where_it_was_read(name: str) -> None:
    table = definitions.vmm(name)
    rows = [row for key in ("gives", "takes", "hides", "allows") for row in table.get(key, ())]
    assert rows
    for row in rows:
        assert row["because"] and row["source"] and row["features"]
        assert set(row) <= {
            "features", "because", "source", "when", "vendor", "since", "silicon", "needs",
        }  # fmt: skip
        for feature in row["features"]:
            assert feature in NAMES.by_name


@pytest.mark.parametrize("name", VMMS)
def test_every_change_is_one(name: str, intel: Report, amd: Report, software: Report) -> None:
    for report in (intel, amd, software):
        seen = vmm.through(report, name)
        for change in seen.changes:
            before = NAMES.by_name[change.feature].of(report.offer_words.get(change.word, 0))
            after = NAMES.by_name[change.feature].of(seen.report.offer_words.get(change.word, 0))
            if change.what == vmm.GIVEN:
                assert not before and after
            elif change.what in (vmm.TAKEN, vmm.HIDDEN):
                assert before and not after
            else:
                assert not before and not after
        named = {change.word for change in seen.changes}
        assert {word: value for word, value in seen.report.offer_words.items() if word not in named} == {
            word: value for word, value in report.offer_words.items() if word not in named
        }
        assert seen.host is report and seen.report.combo is report.combo


def test_what_is_given_depends_on_capabilities(intel: Report) -> None:
    assert has(vmm.through(intel, "qemu").report, MSI) and not has(intel, MSI)
    for name in ("qemu", "generic"):
        none = changed(intel, offer={"kvm:split-irqchip": 0})
        assert not has(vmm.through(none, name).report, MSI)
    one_other = changed(intel, offer={"kvm:exit-hypercall": 0x0800})
    mapped = changed(intel, offer={"kvm:exit-hypercall": 0x1000})
    assert not has(vmm.through(one_other, "generic").report, GPA)
    assert has(vmm.through(mapped, "generic").report, GPA)
    assert not has(vmm.through(mapped, "qemu").report, GPA)  # QEMU has no property for it
    asking = changed(intel, offer={"kvm:x86-user-space-msr": 0x7})
    assert has(vmm.through(asking, "generic").report, MIGRATION)
    assert not has(vmm.through(intel, "generic").report, MIGRATION)


def test_the_timer_mode_of_kvm_is_given_where_there_is_one(intel: Report) -> None:
    hidden = changed(without(intel, "tsc-deadline", "hypervisor"), offer={"kvm:tsc-deadline-timer": 1})
    assert has(vmm.through(hidden, "qemu").report, "tsc-deadline")
    assert has(vmm.through(hidden, "qemu").report, "hypervisor")
    none = changed(without(intel, "tsc-deadline"), offer={"kvm:tsc-deadline-timer": 0})
    assert not has(vmm.through(none, "qemu").report, "tsc-deadline")
    assert has(vmm.through(none, "firecracker").report, "tsc-deadline")  # whatever KVM says


def test_rules_of_a_version_count_from_that_version(intel: Report) -> None:
    slow = without(intel, "erms")
    assert NAMES.by_name["erms"].of(intel.silicon_words["cpuid:0x7.0.ebx"])
    assert not has(vmm.through(slow, "qemu-7.2").report, "erms")
    assert has(vmm.through(slow, "qemu-10.0").report, "erms")
    assert has(vmm.through(slow, "qemu-11.1.0").report, "erms")
    assert not has(vmm.through(slow, "qemu").report, "erms")  # no version is known: what all of them do
    no_silicon = changed(slow, silicon={"cpuid:0x7.0.ebx": 0})
    assert not has(vmm.through(no_silicon, "qemu-10.0").report, "erms")


def test_without_a_version_the_oldest_build_counts(intel: Report) -> None:
    def builds(*versions: str) -> Report:
        rows = [{"name": "qemu", "path": "/usr/bin/qemu", "version": text} for text in versions]
        other = {"name": "libvirt", "path": "/usr/sbin/libvirtd", "version": "1.0"}
        return changed(without(intel, "erms"), combo={"vmms": [*rows, other, "?"]})

    assert vmm.through(builds("10.0.2", "11.1.0"), "qemu").version == "10.0.2"
    assert vmm.through(builds("10.0.2", "9.2"), "qemu").version == "9.2"
    assert has(vmm.through(builds("10.0.2"), "qemu").report, "erms")
    assert not has(vmm.through(builds("10.0.2", "7.2.22"), "qemu").report, "erms")


@pytest.mark.parametrize("name", ["", "bhyve", "../levels/x86-64-v1", "qemu-", "qemu-new", "QEMU"])
def test_a_vmm_that_nobody_knows(name: str, intel: Report) -> None:
    with pytest.raises(UsageError):
        vmm.through(intel, name)
    with pytest.raises(UsageError):
        negotiate(Request(vmm=name), intel)


def test_what_a_vmm_cannot_say_is_not_offered(intel: Report) -> None:
    assert has(intel, "cpuid-fault")  # MSR_PLATFORM_INFO: no property
    assert not has(vmm.through(intel, "qemu").report, "cpuid-fault")
    assert has(vmm.through(intel, "firecracker").report, "cpuid-fault")
    (blocker,) = _blockers(Request(maximum=True, require=("cpuid-fault",), vmm="qemu"), intel)
    assert (blocker.cause, blocker.missing_on) == ("vmm", "QEMU on node-intel")
    assert "property" in blocker.because


def _blockers(request: Request, report: Report, fence: Fence | None = None) -> tuple[Any, ...]:
    with pytest.raises(Blocked) as caught:
        negotiate(request, report, fence)
    return caught.value.blockers


def test_a_vmm_that_takes_the_counters_takes_all_of_them(intel: Report) -> None:
    seen = vmm.through(intel, "firecracker").report
    assert has(intel, "pmu-version") and has(intel, "pmu-counters")
    assert not any(has(seen, name) for name in ("pmu-version", "pmu-counters", "pdcm", "full-width-write"))
    (blocker,) = _blockers(Request(require=("pdcm",), vmm="firecracker"), intel)
    assert blocker.cause == "vmm"


def test_a_vendors_rule_is_no_other_vendors(intel: Report, amd: Report) -> None:
    assert has(vmm.through(intel, "firecracker").report, "arch-capabilities")
    assert has(amd, "arch-capabilities")
    assert not has(vmm.through(amd, "firecracker").report, "arch-capabilities")


@pytest.mark.parametrize("name", ["overflow-recov", "succor"])
def test_amds_machine_checks_are_qemus_to_give(name: str, intel: Report, amd: Report) -> None:
    """Given to guests on AMD since 10.0, and accepted from a request whatever the CPU's vendor."""
    bare_amd, bare_intel = without(amd, name), without(intel, name)
    assert not has(vmm.through(bare_amd, "qemu-7.2").report, name)
    assert not has(vmm.through(bare_amd, "generic").report, name)
    for version in ("qemu-10.0", "qemu-11.1"):
        seen = vmm.through(bare_amd, version)
        assert has(seen.report, name) and [one.what for one in seen.changes if one.feature == name] == [
            "given"
        ]
        assert negotiate(Request(require=(name,), vmm=version), bare_amd).contract.granted.field(name)
        other = vmm.through(bare_intel, version)
        assert not has(other.report, name) and other.report.accept.field(name)


def test_what_kvm_makes_up_on_amd_is_hidden_from_new_guests(intel: Report, amd: Report) -> None:
    """QEMU since 10.1 tells no AMD guest of MSR 0x10a, and takes one that has it."""
    base, gated = "arch-capabilities", "rdctl-no"
    assert has(amd, base) and has(amd, gated)
    older, newer = vmm.through(amd, "qemu-10.0"), vmm.through(amd, "qemu-11.1")
    assert has(older.report, base) and has(older.report, gated)
    assert not has(newer.report, base) and not has(newer.report, gated)
    (blocker,) = _blockers(Request(require=(base,), vmm="qemu-11.1"), amd)
    assert (blocker.cause, blocker.missing_on) == ("vmm", f"QEMU on {amd.host}")
    guest = negotiate(Request(maximum=True, vmm="qemu-10.0"), amd).contract
    assert guest.granted.field(base) and guest.granted.field(gated)
    assert check(guest, amd, "qemu-11.1") == ()
    assert has(vmm.through(intel, "qemu-11.1").report, base), "Intel's CPUs have it"


def test_an_invariant_tsc_is_given_to_nobody(intel: Report) -> None:
    assert has(intel, "invtsc")
    for name in VMMS:
        seen = vmm.through(intel, name)
        assert not has(seen.report, "invtsc")
        assert seen.report.accept.field("invtsc")  # one that has it may come
        answer = negotiate(Request(maximum=True, vmm=name), intel)
        assert [(row.feature, row.cause) for row in answer.not_granted if row.feature == "invtsc"] == [
            ("invtsc", "policy")
        ]
    assert _blockers(Request(maximum=True, require=("invtsc",), vmm="qemu"), intel)[0].cause == "policy"


def test_a_contract_for_a_vmm_has_what_it_gives(intel: Report) -> None:
    assert _blockers(Request(require=(MSI,)), intel)[0].feature == MSI
    granted = negotiate(Request(require=(MSI,), vmm="qemu"), intel).contract.granted
    assert granted.field(MSI)
    assert not fits(granted, ceiling(intel, None, "qemu"))
    assert [blocker.feature for blocker in fits(granted, ceiling(intel, None))] == [MSI]


def test_a_fence_bounds_what_a_vmm_gives(intel: Report) -> None:
    fence = Fence(intel.offer, 7)
    (blocker,) = _blockers(Request(require=(MSI,), vmm="qemu"), intel, fence)
    assert (blocker.feature, blocker.cause) == (MSI, "fence")
    # and the fence is not breached by what the VMM takes away
    assert not negotiate(Request(maximum=True, vmm="qemu"), intel, fence).contract.granted.field("invtsc")


# -- what comes from elsewhere -----------------------------------------------------------------------


def test_qemu_refuses_or_bits_that_this_host_lacks(intel: Report) -> None:
    there = told(intel, "md-clear", "rsba")
    here = without(intel, "md-clear", "rsba")
    guest = negotiate(Request(level="x86-64-v2", require=("md-clear", "arch-capabilities")), there).contract
    assert guest.granted.field("md-clear") and guest.granted.field("rsba")
    assert check(guest, here) == () == check(guest, here, "firecracker")
    found = check(guest, here, "qemu")
    assert {(row.feature, row.cause, row.wanted_by) for row in found} == {
        ("md-clear", "vmm", "the contract"),
        ("rsba", "vmm", "the contract"),
    }
    assert check(guest, there, "qemu") == ()


def test_qemu_refuses_hints_that_this_host_lacks(intel: Report) -> None:
    there, here = told(intel, "fsrm"), without(intel, "fsrm")
    guest = negotiate(Request(level="x86-64-v2", require=("fsrm",)), there).contract
    assert check(guest, here) == ()
    assert [(row.feature, row.cause) for row in check(guest, here, "qemu-7.2")] == [("fsrm", "vmm")]
    fast = changed(here, silicon={"cpuid:0x7.0.edx": 1 << 4})
    assert check(guest, fast, "qemu-10.0") == ()  # it takes the hint from the CPU


def test_a_guest_that_was_not_told_of_a_word_asks_nothing_of_it(intel: Report) -> None:
    """The bottom of an or-bit is 1: a register that the guest does not see is no request for it."""
    here = without(intel, "md-clear")
    for highest, refused in ((7, ["md-clear"]), (1, [])):
        there = changed(told(intel, "md-clear"), offer={"cpuid:0x0.0.eax": highest})
        guest = negotiate(Request(exact=("fpu",)), there).contract
        assert guest.granted.field("md-clear")
        assert [row.feature for row in check(guest, here, "qemu") if row.cause == "vmm"] == refused


def test_qemu_takes_fb_clear_on_hosts_that_are_immune(intel: Report) -> None:
    immune = told(without(intel, "fb-clear"), "mds-no", "taa-no", "sbdr-ssdp-no", "fbsdp-no", "psdp-no")
    guest = negotiate(Request(maximum=True, vmm="qemu"), told(immune, "fb-clear")).contract
    assert guest.granted.field("fb-clear")
    assert check(guest, immune, "qemu-10.0") == ()
    assert [row.feature for row in check(guest, immune, "qemu-7.2")] == ["fb-clear"]
    assert not vmm.through(immune, "qemu-10.0").report.accept.field("fb-clear")  # hosts are not told


def test_what_is_allowed_may_come_and_is_not_offered(intel: Report) -> None:
    assert not has(intel, "topoext")
    seen = vmm.through(intel, "qemu")
    assert not has(seen.report, "topoext") and seen.report.accept.field("topoext")
    request = Request(require=("topoext",), vmm="qemu")
    assert _blockers(request, intel)[0].feature == "topoext"
    assert check_request(request, intel).contract.granted.field("topoext")


def test_a_fence_of_a_pool_can_tell_what_qemu_refuses(intel: Report) -> None:
    here = without(intel, "md-clear")
    pool = FeatureSet.of(ARCHITECTURE, told(intel, "md-clear").offer_words)
    fence = Fence(pool, 3)
    assert negotiate(Request(maximum=True), here, fence).contract.granted.field("md-clear")
    (blocker,) = _blockers(Request(maximum=True, vmm="qemu"), here, fence)
    assert (blocker.feature, blocker.cause, blocker.wanted_by) == ("md-clear", "vmm", "the fence")


def test_the_request_carries_the_vmm() -> None:
    request = Request.from_json({"level": "x86-64-v1", "vmm": "qemu"})
    assert request.vmm == "qemu" and request.to_json()["vmm"] == "qemu"
    assert Request.from_json({"vmm": None}).vmm is None and "vmm" not in Request().to_json()
    with pytest.raises(UsageError):
        Request.from_json({"vmm": 1})


def test_reports_take_turns(intel: Report, amd: Report) -> None:
    """What is remembered of one report is never given out for another."""
    for _ in range(2):
        assert vmm.through(intel, "qemu").host is intel
        assert vmm.through(amd, "qemu").host is amd
    for number in range(50):
        assert vmm.through(intel, f"qemu-10.{number}").version == f"10.{number}"


def test_qemus_arguments_bring_what_a_given_feature_needs(intel: Report) -> None:
    from kvmneg.emit import qemu

    for request, split in ((Request(require=(MSI,), vmm="qemu"), True), (Request(), False)):
        contract = negotiate(request, intel).contract
        emitted = qemu.emit(contract, "pc-q35-7.2", host=ceiling(intel, None, request.vmm))
        assert (f",{MSI}=on" in emitted.cpu) == split
        assert emitted.machine == "pc-q35-7.2"
        assert emitted.arguments[1] == "pc-q35-7.2" + (",kernel-irqchip=split" if split else "")


def test_firecrackers_rules_are_what_its_guests_saw() -> None:
    """Every bit that a rule of firecracker.toml decides, in the fingerprints that Firecracker published."""
    folder = os.environ.get("KVMNEG_PEER_DATA")
    if not folder:
        pytest.skip("KVMNEG_PEER_DATA is not set")
    table = definitions.vmm("firecracker")
    paths = [path for path in Path(folder, "firecracker").glob("fingerprint_*") if "_ARM_" not in path.name]
    assert paths
    for path in paths:
        vendor = "AuthenticAMD" if "_AMD_" in path.name else "GenuineIntel"
        seen = _guest_cpuid(json.loads(gzip.decompress(path.read_bytes())))
        for key, expected in (("gives", 1), ("takes", 0)):
            for row in table[key]:
                for name in row["features"] if row.get("vendor", vendor) == vendor else ():
                    feature = NAMES.by_name[name]
                    assert bool(feature.of(seen.get(feature.word, 0))) == bool(expected), (path.name, name)


def _guest_cpuid(document: dict[str, Any]) -> dict[str, int]:
    """The CPUID words of a fingerprint: bitmaps in binary digits."""
    return {
        f"cpuid:{int(entry['leaf'], 16):#x}.{int(entry['subleaf'], 16)}.{row['register']}": int(
            row["bitmap"].replace("_", ""), 2
        )
        for entry in document["guest_cpu_config"]["cpuid_modifiers"]
        for row in entry["modifiers"]
    }
