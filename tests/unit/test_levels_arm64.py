# SPDX-License-Identifier: LGPL-2.1-or-later
"""Levels, exact requests and platforms of arm64: what they set, and where a kernel does not let it be set."""

from __future__ import annotations

import arm64_reports as hosts
import pytest

from kvmneg.errors import Blocked, UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy import definitions, levels_arm64, negotiation, pinning
from kvmneg.policy.request import Request

LEVELS = definitions.levels("arm64")
NAMES = catalogs.names("arm64")
MMFR0 = "arm64:0x603000000013c038"
# Cortex-A53 (8.0), Neoverse N1 (8.2), V1 (8.4) by their manuals' ID registers, as KVM shows them with pointer
# authentication and SVE; V2 is a 9.0.
A53 = {hosts.ISAR0: 0x1_1120, hosts.ISAR1: 0, hosts.MMFR1: 0, hosts.MMFR2: 0}
N1 = {word: hosts.N1[word] for word in (hosts.ISAR0, hosts.ISAR1, hosts.MMFR1, hosts.MMFR2)}
V1 = {
    hosts.ISAR0: 0x0221_1111_1021_2120, hosts.ISAR1: 0x0011_0000_0121_1012, hosts.MMFR1: 0x1021_2122,
    hosts.MMFR2: 0x0221_0001_1011_1011 & ~(0xFFF << 20), hosts.PFR0: hosts.N1[hosts.PFR0] | 1 << 48,
    hosts.INIT: 0b110_0100,
}  # fmt: skip


BARELY = {**hosts.WRITABLE_6_1, hosts.VENDOR_2: hosts.EVERY}  # no ID register


def host(values: dict[str, int], settable: dict[str, int] | None = None) -> hosts.Report:
    return hosts.report("host", {**hosts.NEW, **values}, settable=settable)


def granted(values: dict[str, int], **request: object) -> FeatureSet:
    return negotiation.negotiate(Request(**request), host(values)).contract.granted  # type: ignore[arg-type]


def reached(values: dict[str, int]) -> list[str]:
    found = []
    for level in LEVELS:
        try:
            negotiation.negotiate(Request(level=level), host(values))
        except Blocked:
            continue
        found.append(level)
    return found


def test_a_level_holds_those_below() -> None:
    """Armv9.n-A is Armv8.(n+5)-A and Armv9.(n-1)-A (Arm ARM A3)."""
    assert len(LEVELS) == 15
    least = {level: definitions.least(level, "arm64") for level in LEVELS}
    for big in (8, 9):
        for minor in range(1, 10 if big == 8 else 5):
            above, below = least[f"armv{big}.{minor}-a"], least[f"armv{big}.{minor - 1}-a"]
            assert all(above[name] >= value for name, value in below.items()) and above != below
    for minor in range(5):
        above, below = least[f"armv9.{minor}-a"], least[f"armv8.{minor + 5}-a"]
        assert all(above[name] >= value for name, value in below.items())
    for name, value in least["armv9.4-a"].items():
        feature = NAMES.by_name[name]
        assert 0 < value < 1 << feature.width, name


def test_what_known_cpus_reach() -> None:
    assert reached(A53) == ["armv8.0-a"]
    assert reached(N1) == ["armv8.0-a", "armv8.1-a", "armv8.2-a"]
    v1 = reached(V1)
    assert v1 == ["armv8.0-a", "armv8.1-a", "armv8.2-a", "armv8.3-a", "armv8.4-a"]
    # a number that is too low is named
    with pytest.raises(Blocked) as no:
        negotiation.negotiate(Request(level="armv8.4-a"), host({**V1, hosts.ISAR1: 0x0011_0000_0111_1012}))
    assert [(one.feature, one.wanted_by) for one in no.value.blockers] == [("aa64isar1-lrcpc", "armv8.4-a")]


def test_a_level_lowers_what_levels_are_about_and_nothing_else() -> None:
    one = granted({**V1, MMFR0: 0x10_1125}, level="armv8.1-a")
    assert one.value(hosts.ISAR0) == 0x1021_0000  # CRC32, atomics, RDM
    assert one.value(hosts.ISAR1) == 0
    assert one.field("aa64mmfr1-pan") == one.field("aa64mmfr1-hpds") == 1
    assert not one.field("vcpu-ptrauth-address")
    for word in (MMFR0, hosts.MIDR, hosts.CLIDR, hosts.DFR0, hosts.PSCI):
        assert one.value(word) == {**hosts.NEW, MMFR0: 0x10_1125}[word]
    for name in ("aa64pfr0-csv2", "aa64pfr0-csv3", "aa64pfr1-ssbs", "aa64mmfr1-specsei"):
        # what tells a guest of mitigations is no level's to take
        assert one.field(name) == host(V1).offer.field(name)
    assert all(feature.settable for feature in levels_arm64.decided() if feature.word.startswith("arm64:"))


def test_what_is_asked_for_on_top_comes_as_the_host_has_it() -> None:
    one = granted(
        V1, level="armv8.1-a", require=("aa64isar0-aes",), optional=("aa64isar1-bf16", "aa64isar0-rndr")
    )
    assert (
        one.field("aa64isar0-aes") == 2
        and not one.field("aa64isar0-sha1")
        and not one.field("aa64isar0-rndr")
    )
    exact = granted(N1, exact=("aa64isar0-aes", "aa64isar0-atomic"))
    assert exact.value(hosts.ISAR0) == 0x20_0020 and exact.field("vcpu-psci")
    assert granted(N1, exact=()).value(hosts.ISAR0) == 0
    with pytest.raises(UsageError):
        granted(N1, exact=("avx512f",))


def test_vector_lengths_stay_whole_under_a_level_with_vectors() -> None:
    sve = {
        **V1, hosts.INIT: 0b111_0100, hosts.VLS: 0b11, hosts.PFR0: V1[hosts.PFR0] | 1 << 32, hosts.ZFR0: 0x2,
        hosts.ISAR0: 0x0222_1111_1021_2120, hosts.ISAR1: 0x0011_1111_0121_1012, hosts.PFR1: 0x21,
        hosts.MMFR2: V1[hosts.MMFR2] & ~(0xF << 60) | 1 << 60,
    }  # fmt: skip
    one = granted(sve, level="armv9.0-a")
    assert one.field("sve-lengths") == 0b11 and one.field("aa64zfr0-svever") == 1
    assert granted(sve, level="armv8.5-a").field("vcpu-sve") == 0


def test_a_kernel_that_sets_nothing_says_which_fields() -> None:
    with pytest.raises(Blocked) as no:
        negotiation.negotiate(Request(level="armv8.1-a"), host(N1, settable=BARELY))
    assert {blocker.cause for blocker in no.value.blockers} == {"kvm"}
    assert "aa64isar0-aes" in {blocker.feature for blocker in no.value.blockers}
    assert all("does not let it be set" in blocker.because for blocker in no.value.blockers)
    # the level that the host has already asks for nothing to be set
    plain = {**A53, hosts.ISAR0: 0}
    negotiation.negotiate(Request(level="armv8.0-a"), host(plain, settable=BARELY))


def test_a_level_is_pinned_and_a_platform_bounds_numbers() -> None:
    report = host(N1)
    assert pinning.source("level:armv8.1-a", report) == granted(N1, level="armv8.1-a")
    older = pinning.to_pin(pinning.source("platform:linux-6.1", report), report)
    assert older.value(hosts.PSCI) == 0x1_0001 and older.field("aa64dfr0-debugver") == 6
    assert older.value(hosts.STD) == 1 and older.value(hosts.VENDOR) == 3 and older.value(hosts.VENDOR_2) == 0
    assert older.value(hosts.ISAR0) == report.offer.value(hosts.ISAR0)
    oldest = pinning.source("platform:linux-5.10", report)
    assert oldest.value(hosts.PSCI) == 0x1_0000 and oldest.value(hosts.STD) == oldest.value(hosts.VENDOR) == 0
    with pytest.raises(UsageError, match="not defined"):
        definitions.platform("linux-6.1", "x86_64")
