# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many sets against a host: the same verdicts as `fits` gives for each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import any_vendor

from kvmneg.features.crowd import Crowd
from kvmneg.features.featureset import FeatureSet, fits, meet
from kvmneg.features.report import Report

HOSTS = sorted((Path(__file__).parents[1] / "data/hosts").glob("*.json"))


@given(st.lists(any_vendor(), max_size=5), st.lists(any_vendor(), min_size=1, max_size=3))
def test_a_crowd_says_what_fits_says(guests: list[FeatureSet], hosts: list[FeatureSet]) -> None:
    guests = [*guests, *(meet(guest, hosts[0]) for guest in guests)]  # some that do, but for the vendor
    crowd = Crowd("x86_64", guests)
    for host in (*hosts, *hosts):  # the second time from what was judged
        assert crowd.unfit(host) == {place for place, guest in enumerate(guests) if fits(guest, host)}


@given(st.lists(any_vendor(), max_size=3), any_vendor())
def test_words_that_do_not_count(guests: list[FeatureSet], host: FeatureSet) -> None:
    crowd = Crowd("x86_64", guests)
    found = crowd.unfit(host, lambda word: word.startswith("cpuid:"))
    unfit = {
        place
        for place, guest in enumerate(guests)
        if guest.conflicts or any(not one.word.startswith("cpuid:") for one in fits(guest, host))
    }
    assert found == unfit


@pytest.mark.parametrize("architecture", ["x86_64", "arm64"])
def test_recorded_hosts_against_each_other(architecture: str) -> None:
    reports = [Report.loads(path.read_bytes()) for path in HOSTS]
    guests = [report.offer for report in reports]  # of both architectures
    crowd = Crowd(architecture, guests)
    fitting = 0
    for report in reports:
        if report.architecture == architecture:
            unfit = crowd.unfit(report.accept)
            assert unfit == {place for place, guest in enumerate(guests) if fits(guest, report.accept)}
            fitting += len(guests) - len(unfit)
    assert fitting >= sum(report.architecture == architecture for report in reports)
    assert crowd.unfit(FeatureSet.empty("arm64" if architecture == "x86_64" else "x86_64")) == set(
        range(len(guests))
    )
