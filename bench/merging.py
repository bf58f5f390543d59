# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pool's baseline: meet over many reports in memory."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.figures import ROUNDS, Figure, seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.features.report import Report

RECORDED = Path(__file__).parent.parent / "kvmneg/data/recorded-host.json"
REPORTS, DISTINCT = 10_000, 200


def reports() -> list[Report]:
    """REPORTS reports of DISTINCT kinds: a recorded host with a few bits of each kind's own missing."""
    from kvmneg.features.report import Report

    base = Report.loads(RECORDED.read_bytes())
    chance = random.Random(1)
    kinds = []
    for _ in range(DISTINCT):
        offer = dict(base.offer_words)
        for word in chance.sample(
            [word for word in sorted(offer) if word.startswith("cpuid:") and ":0x0." not in word], 6
        ):
            offer[word] &= ~(1 << chance.randrange(32))
        kinds.append(offer)
    return [
        Report(
            base.architecture,
            measured={"host": f"h{n}"},
            combo={},
            identity=base.identity,
            offer=dict(kinds[n % DISTINCT]),
        )
        for n in range(REPORTS)
    ]


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """Reports are parsed and canonical before: what is measured is the baseline."""
    from kvmneg.policy.pool import baseline

    pool = reports()
    for report in pool:
        report.offer  # noqa: B018 (makes it canonical)
    taken = median(seconds(lambda: baseline(pool)) for _ in range(ROUNDS))
    yield Figure(f"meet of {REPORTS} reports, {DISTINCT} distinct", taken, 0.1, "s")
