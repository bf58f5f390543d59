# SPDX-License-Identifier: LGPL-2.1-or-later
"""Going back: every recorded combo of a host against its fence and its guests, and one asked combo among them."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.figures import ROUNDS, Figure, seconds
from bench.merging import VMX, recorded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.leases import Holding

COMBOS, GUESTS, SETS = 500, 5000, 50


def combos() -> list[Report]:
    """COMBOS reports of one host, no two alike: kernels that lack a few features each, every second parameters."""
    from kvmneg.features.report import Report

    base = recorded()
    offer = {word: value for word, value in base.offer_words.items() if value} | VMX
    offer["cpuid:0x1.0.ecx"] |= 1 << 5  # vmx
    chance = random.Random(5)
    places = [word for word in sorted(base.offer.words) if word.startswith(("cpuid:0x7.", "kvm:", "hyperv:"))]
    found = []
    for number in range(COMBOS):
        own = dict(offer)
        for word in chance.sample(places, 3 if number % 2 else 0):
            own[word] &= ~(1 << chance.randrange(32))
        combo = {
            **base.combo,
            "kernel": f"6.{number}.0-amd64",
            "modules": {"kvm": f"build-id:{number}", "kvm.ignore_msrs": "YN"[number % 2]},
        }
        found.append(
            Report(base.architecture, measured={"host": f"c{number}"}, combo=combo, identity={}, offer=own)
        )
    return found


def fence_and_guests(reports: list[Report]) -> tuple[Fence, list[Holding]]:
    """A fence below most combos, and GUESTS guests with SETS sets, a few of which have more than the fence."""
    from kvmneg.features.featureset import FeatureSet, meet_all
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.leases import Holding

    top = reports[0].offer
    low = meet_all(report.offer for report in reports[: COMBOS // 2])
    chance = random.Random(6)
    bits = [word for word in sorted(low.words) if word.startswith("cpuid:0x7.")]
    sets = []
    for number in range(SETS):
        values = dict((top if number < SETS // 10 else low).words)
        values[chance.choice(bits)] &= ~(1 << chance.randrange(32))
        sets.append(FeatureSet.of(top.architecture, values))
    guests = [Holding(f"vm{n}", f"sha256:{n % SETS}", sets[n % SETS], "running", 0) for n in range(GUESTS)]
    return Fence(low, 1), guests


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """Reports and contracts are parsed, as a daemon has them; guests are grouped anew, as they change all the time."""
    from kvmneg.policy import roll
    from kvmneg.policy.combos import Asked

    reports = combos()
    fence, holdings = fence_and_guests(reports)
    rows = [roll.Recorded(report.combo_digest(), report.combo, "", "") for report in reports]
    known = [(row.digest, report) for row, report in zip(rows, reports, strict=True)]
    for report in reports:
        report.offer  # noqa: B018 (makes it canonical)
    survey = roll.survey(known, fence, roll.Guests(holdings))
    taken = median(seconds(lambda: roll.survey(known, fence, roll.Guests(holdings))) for _ in range(ROUNDS))
    refused = sum(not line.allowed for line in survey)
    detail = f"{refused} refused, {len({holding.digest for holding in holdings})} sets"
    yield Figure(f"rollback: {COMBOS} combos, {GUESTS} guests", taken * 1e3, 100, "ms", detail)

    asked = Asked(kernel="6.7.0-amd64", others=(("modules.kvm.ignore_msrs", "N"),))

    def one() -> roll.Answer:
        found, _, _ = roll.find(reports[0].combo, asked, rows)
        return roll.judge(reports[7], fence, roll.Guests(holdings), combo=found[0].digest)

    answer = one()
    taken = median(seconds(one) for _ in range(ROUNDS))
    detail = f"{sum(len(held.vms) for held in answer.guests)} guests in the way"
    yield Figure(f"rollback: one asked of {COMBOS} combos, {GUESTS} guests", taken * 1e3, 100, "ms", detail)
