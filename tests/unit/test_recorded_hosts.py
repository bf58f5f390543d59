# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pools of recorded hosts (tests/data/hosts, see tests/hosts/recording.py): one CPU under many kernels, many CPUs.

What a kernel must offer is from measurements made by hand before this code was there (but see BY_KERNEL); what a
merge must give is worked out here from the rules, by code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from itertools import combinations
from operator import and_, or_
from pathlib import Path

import pytest

from kvmneg.errors import Incompatible
from kvmneg.features.featureset import fits
from kvmneg.features.report import Report
from kvmneg.policy import pool

FOLDER = Path(__file__).parents[1] / "data/hosts"
AMD = tuple(f"amd-{line}.max" for line in ("5.10", "6.1", "6.12", "6.16", "6.18", "newest"))
INTEL = (
    "intel-6.1.corei7_sandy_bridge_2600k",
    "intel-6.12.corei7_haswell_4770",
    "intel-6.1.corei7_skylake_x",
    "intel-6.12.corei7_icelake_u",
    "intel-6.12.tigerlake",
)

# What `-cpu max` has by kernel: leaf 0x80000008 EAX gains the guest's width at 6.12, SVM's features grow, quirks
# that can be disabled come and go, vhost-net gains bit 40 (VIRTIO_F_RING_RESET) and then 35 (VIRTIO_F_IN_ORDER).
# Measured by hand from 6.1 on; of the row 5.10, vhost-net and the absent quirks are as recorded.
BY_KERNEL = {
    "5.10": (0x3928, 0x1, 0x0, 0x33D008000),
    "6.1": (0x3928, 0x10010021, 0x7F, 0x33D008000),
    "6.12": (0x283928, 0x10010061, 0x7FF, 0x1033D008000),
    "6.18": (0x283928, 0x10010061, 0x3FF, 0x10B3D008000),
    "7": (0x283928, 0x10010061, 0xFFF, 0x10B3D008000),
}
WORDS = ("cpuid:0x80000008.0.eax", "cpuid:0x8000000a.0.edx", "kvm:disable-quirks2", "vhost-net:features")


@cache
def report(name: str) -> Report:
    return Report.loads((FOLDER / f"{name}.json").read_bytes(), file=name)


def test_there_are_all_of_them() -> None:
    assert len(AMD) == 6
    assert len({report(name).combo["kernel"] for name in AMD}) == 6
    # family, model and stepping as CPUID.1.EAX has them; models 2AH, 3CH, 55H, 7EH and 8CH: Intel SDM vol. 4 table 2-1
    signatures = {int(report(name).identity["signature"], 16) >> 4 for name in INTEL}
    assert signatures == {0x206A, 0x306C, 0x5065, 0x706E, 0x806C}


@pytest.mark.parametrize("name", [*AMD, *INTEL])
def test_each_says_what_it_is(name: str) -> None:
    found = report(name)
    assert found.measured["source"] == "recorded"
    assert "not a CPU of that name" in found.measured["by"]
    assert found.identity["vendor"] == ("AuthenticAMD" if name in AMD else "GenuineIntel")
    assert found.offer_words["kvm:max-vcpus"] >= 1


@pytest.mark.parametrize("kernel", BY_KERNEL)
def test_a_kernel_offers_what_was_measured_by_hand(kernel: str) -> None:
    found = next(report(name) for name in AMD if str(report(name).combo["kernel"]).startswith(f"{kernel}."))
    assert tuple(found.offer_words.get(word, 0) for word in WORDS) == BY_KERNEL[kernel]


def test_a_pool_of_kernels_has_what_the_oldest_knows() -> None:
    """SVM's features only ever grew, and 5.10 has no KVM_CAP_DISABLE_QUIRKS2."""
    met = pool.baseline([report(name) for name in AMD]).words
    assert met["cpuid:0x8000000a.0.edx"] == 0x1
    assert met.get("kvm:disable-quirks2", 0) == 0


@pytest.mark.parametrize("names", [*combinations(INTEL, 2), INTEL], ids="+".join)
def test_vmx_halves(names: tuple[str, ...]) -> None:
    """MSRs 0x48b and 0x48d to 0x490: must-be-1 (low half) by or, may-be-1 (high half) by and; SDM vol. 3 A.3."""
    members = [report(name).offer_words for name in names]
    met = pool.baseline([report(name) for name in names]).words
    for index in (0x48B, 0x48D, 0x48E, 0x48F, 0x490):
        values = [words[f"msr:{index:#x}"] for words in members]
        low = reduce(or_, (value & 0xFFFFFFFF for value in values))
        high = reduce(and_, (value >> 32 for value in values))
        assert not low & ~high, "no host could enter a guest"
        assert met[f"msr:{index:#x}"] == high << 32 | low


RULES: dict[int, Callable[[int, int], int]] = {0x486: or_, 0x488: or_, 0x48A: min, 0x48C: and_}


@pytest.mark.parametrize("names", [*combinations(INTEL, 2), INTEL], ids="+".join)
def test_other_vmx_words(names: tuple[str, ...]) -> None:
    """CR0 and CR4 bits that are fixed to 1 by or, the highest VMCS index by minimum, EPT and VPID abilities by and."""
    met = pool.baseline([report(name) for name in names]).words
    for index, rule in RULES.items():
        word = f"msr:{index:#x}"
        assert met[word] == reduce(rule, (report(name).offer_words[word] for name in names)), word


@pytest.mark.parametrize("names", [*combinations(INTEL, 2), INTEL, AMD], ids="+".join)
def test_a_baseline_fits_each_member(names: tuple[str, ...]) -> None:
    members = [report(name) for name in names]
    met = pool.baseline(members)
    assert [fits(met, member.offer) for member in members] == [()] * len(members)


@pytest.mark.parametrize("intel", INTEL)
def test_intel_with_amd_is_refused(intel: str) -> None:
    """And told by the vendor, with a host of each side, not by the registers that spell it."""
    with pytest.raises(Incompatible) as caught:
        pool.baseline([report(intel), report(AMD[0])])
    assert [blocker.feature for blocker in caught.value.blockers] == ["vendor"]
    assert "GenuineIntel" in str(caught.value.blockers)
    assert "AuthenticAMD" in str(caught.value.blockers)
