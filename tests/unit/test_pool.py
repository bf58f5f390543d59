# SPDX-License-Identifier: LGPL-2.1-or-later
"""Baselines of pools: what all offer, who holds what back, who cannot share a pool."""

import pytest

from kvmneg import limits
from kvmneg.errors import Incompatible, LimitExceeded, UsageError
from kvmneg.features.featureset import FeatureSet, fits
from kvmneg.features.report import Report
from kvmneg.policy import pool

FPU, CX8, SSE2, MD_CLEAR = 1 << 0, 1 << 8, 1 << 26, 1 << 10
INTEL = {"cpuid:0x0.0.ebx": 0x756E6547, "cpuid:0x0.0.edx": 0x49656E69, "cpuid:0x0.0.ecx": 0x6C65746E}
AMD = {"cpuid:0x0.0.ebx": 0x68747541, "cpuid:0x0.0.edx": 0x69746E65, "cpuid:0x0.0.ecx": 0x444D4163}


def report(
    host: str, offer: dict[str, int], vendor: str = "GenuineIntel", architecture: str = "x86_64"
) -> Report:
    measured = {"host": host, "source": "recorded"}
    return Report(architecture, measured=measured, combo={}, identity={"vendor": vendor}, offer=offer)


def held(reports: list[Report]) -> dict[str, tuple[str, ...]]:
    return {holder.feature: holder.hosts for holder in pool.holders(reports, pool.baseline(reports))}


def test_the_baseline_is_what_every_host_offers() -> None:
    reports = [
        report("a", {**INTEL, "cpuid:0x1.0.edx": FPU | CX8}),
        report("b", {**INTEL, "cpuid:0x1.0.edx": FPU | CX8 | 1 << 4}),
        report("c", {**INTEL, "cpuid:0x1.0.edx": FPU | 1 << 4}),
    ]
    assert pool.baseline(reports).words["cpuid:0x1.0.edx"] == FPU


def test_the_baseline_fits_every_member() -> None:
    reports = [report(str(bit), {**INTEL, "cpuid:0x1.0.edx": FPU | 1 << bit}) for bit in (4, 8)]
    met = pool.baseline(reports)
    assert [fits(met, one.offer) for one in reports] == [(), ()]


def test_one_report_is_its_own_baseline() -> None:
    only = report("a", {**INTEL, "cpuid:0x1.0.edx": FPU})
    assert pool.baseline([only]) == only.offer


def test_who_holds_a_feature_back_is_named() -> None:
    reports = [
        report("old1", {**INTEL, "cpuid:0x1.0.edx": FPU}),
        report("new", {**INTEL, "cpuid:0x1.0.edx": FPU | CX8}),
        report("old2", {**INTEL, "cpuid:0x1.0.edx": FPU}),
    ]
    assert held(reports) == {"cx8": ("old1", "old2")}


def test_who_keeps_a_number_down_is_named() -> None:
    reports = [
        report("small", {"cpuid:0x80000008.0.eax": 39}),
        report("large", {"cpuid:0x80000008.0.eax": 46}),
    ]
    assert pool.baseline(reports).field("phys-bits") == 39
    assert held(reports)["phys-bits"] == ("small",)


def test_who_brings_an_or_feature_is_named() -> None:
    """A guest must be told of MD_CLEAR if it may land on a host that has it: that host is the reason."""
    reports = [report("plain", {"cpuid:0x7.0.edx": 0}), report("mds", {"cpuid:0x7.0.edx": MD_CLEAR})]
    assert pool.baseline(reports).field("md-clear") == 1
    assert held(reports)["md-clear"] == ("mds",)


def test_numbers_that_must_be_equal_are_dropped_and_all_are_named() -> None:
    reports = [report("a", {"cpuid:0x1.0.ebx": 8 << 8}), report("b", {"cpuid:0x1.0.ebx": 16 << 8})]
    assert held(reports)["clflush-size"] == ("a", "b")


def test_the_odd_one_is_named_where_all_must_be_equal() -> None:
    usual = [report(f"n{number}", {"cpuid:0x1.0.ebx": 8 << 8}) for number in range(5)]
    assert held([*usual, report("odd", {"cpuid:0x1.0.ebx": 16 << 8})])["clflush-size"] == ("odd",)


def test_what_is_lost_with_its_base_is_held_back_by_who_holds_the_base() -> None:
    """PKU needs its XSAVE component, whose place in the area must be the same everywhere (SDM vol. 1, 13.4)."""

    def with_pkru(host: str, offset: int) -> Report:
        pku = {
            "cpuid:0x1.0.edx": FPU | 1 << 24 | 1 << 25,
            "cpuid:0x1.0.ecx": 1 << 26,
            "cpuid:0x7.0.ecx": 1 << 3,
        }
        area = {"cpuid:0xd.0.eax": 1 << 9 | 3, "cpuid:0xd.9.eax": 8, "cpuid:0xd.9.ebx": offset}
        return report(host, {**INTEL, **pku, **area})

    usual = [with_pkru(f"n{number}", 2688) for number in range(3)]
    assert pool.baseline(usual).field("pku") == 1
    assert not held(usual)
    found = held([*usual, with_pkru("odd", 2432)])
    assert {name: found[name] for name in ("pku", "xcr0-pkru", "xsave-pkru-offset")} == {
        "pku": ("odd",),
        "xcr0-pkru": ("odd",),
        "xsave-pkru-offset": ("odd",),
    }


def test_nobody_is_blamed_for_what_a_fence_hides() -> None:
    reports = [report("a", {"cpuid:0x1.0.edx": FPU}), report("b", {"cpuid:0x1.0.edx": FPU})]
    found = pool.holders(reports, FeatureSet.empty("x86_64"))
    assert [(holder.feature, holder.hosts) for holder in found] == [("fpu", ())]


def test_two_vendors_have_no_baseline_and_both_sides_are_named() -> None:
    reports = [report("i1", INTEL), report("a1", AMD, "AuthenticAMD"), report("i2", INTEL)]
    with pytest.raises(Incompatible) as caught:
        pool.baseline(reports)
    (blocker,) = caught.value.blockers
    assert blocker.feature == "vendor"
    assert blocker.because == "AuthenticAMD on a1, GenuineIntel on i1, i2"
    with pytest.raises(Incompatible, match="GenuineIntel on i1, AuthenticAMD on a1, a2"):
        pool.baseline([*reports[:2], report("a2", AMD, "AuthenticAMD")])
    assert "AuthenticAMD on a1" in caught.value.message


def test_the_vendor_is_read_from_cpuid_where_the_report_names_none() -> None:
    reports = [report("i", INTEL, vendor=""), report("a", AMD, vendor="")]
    with pytest.raises(Incompatible, match="AuthenticAMD on a, GenuineIntel on i"):
        pool.baseline(reports)


def test_many_hosts_of_one_side_are_counted_not_listed() -> None:
    reports = [report(f"i{number}", INTEL) for number in range(100)] + [report("a", AMD, "AuthenticAMD")]
    with pytest.raises(Incompatible, match="i7 and 92 more"):
        pool.baseline(reports)


def test_no_report_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="at least one report"):
        pool.baseline([])


def test_two_architectures_are_a_mistake_and_both_are_named() -> None:
    with pytest.raises(UsageError, match="b is arm64, a is x86_64"):
        pool.kinds([report("a", INTEL), _arm64("b")])


def _arm64(host: str) -> Report:
    one = report(host, {})
    one.architecture = "arm64"
    one._offer = FeatureSet("arm64", {})  # there is no arm64 catalogue to canonicalise with yet
    return one


def test_more_reports_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPORTS_PER_BASELINE", 2)
    reports = [report(str(number), INTEL) for number in range(3)]
    with pytest.raises(LimitExceeded, match="REPORTS_PER_BASELINE"):
        pool.baseline(reports)


def test_equal_offers_are_made_canonical_once() -> None:
    reports = [report(str(number), dict(INTEL)) for number in range(50)]
    members = pool.kinds(reports)
    assert [len(kind.reports) for kind in members] == [50]
    assert sum(one._offer is not None for one in reports) == 1
