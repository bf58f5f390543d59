# SPDX-License-Identifier: LGPL-2.1-or-later
"""Checking many promised sets against one host: as many as QEMU has CPU models, without QEMU at hand."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.figures import ROUNDS, Figure, seconds
from bench.merging import recorded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.policy.contract import Contract

MODELS = 190  # what QEMU 11 answers to query-cpu-definitions on x86
LEVELS = ("x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4")


def models() -> list[Contract]:
    """MODELS promises between nothing and all: a level's features, and a share of every feature bit there is.

    From model to model the share grows, so that some fit and the richest lack dozens of features here.
    """
    from kvmneg.features import catalog
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.policy import definitions
    from kvmneg.policy.contract import Contract

    host = recorded()
    table = catalog.names(host.architecture)
    every = [feature for feature in table.by_name.values() if feature.is_bit and feature.width == 1]
    every = [feature for feature in every if feature.word.startswith("cpuid:")]
    offered = [feature for feature in every if feature.of(host.offer.value(feature.word))]
    numbers = {
        word: value
        for word, value in host.offer.words.items()
        if catalog.load(host.architecture).words[word].fields
    }
    chance = random.Random(3)
    promised = []
    for n in range(MODELS):
        level = [table.feature(name) for name in definitions.level(LEVELS[n % 4], host.architecture)]
        more = chance.sample(offered, len(offered) * n // MODELS) + chance.sample(every, n // 2)
        values = dict(numbers)
        for feature in (*level, *more):
            values[feature.word] = values.get(feature.word, 0) | feature.mask
        promised.append(Contract(FeatureSet.of(host.architecture, values)))
    return promised


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """The report and the promises are in memory, names loaded: what a scheduler asks again and again."""
    from kvmneg.policy.negotiation import check

    host, promised = recorded(), models()
    blockers = [len(check(contract, host)) for contract in promised]
    taken = median(seconds(lambda: [check(contract, host) for contract in promised]) for _ in range(ROUNDS))
    detail = f"{blockers.count(0)} fit, the rest lack {sum(blockers) / (MODELS - blockers.count(0)):.0f} on average"
    yield Figure(f"check of {MODELS} models on a report", taken * 1e3, 50, "ms", detail)
