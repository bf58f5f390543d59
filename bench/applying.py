# SPDX-License-Identifier: LGPL-2.1-or-later
"""Applying a contract from C: the whole of it on a fresh VM and vCPU, against the ioctls that it consists of."""

from __future__ import annotations

import subprocess
from statistics import median
from typing import TYPE_CHECKING

from bench.figures import ROUNDS, Figure
from kvmneg.errors import NoKvm
from kvmneg.host import measure
from kvmneg.policy import contract as contracts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROUNDS_IN_C = "101"


def contract() -> bytes:
    """Of this host, without the words that its KVM does not keep to: those cannot be applied."""
    try:
        report = measure.measure()
    except NoKvm as error:
        raise LookupError(error.message) from None
    bound = contracts._decode_words(contracts.Contract(report.offer).binary())
    for word, grade in report.enforcement.items():
        if grade != "untested":
            bound.pop(word, None)
    return contracts._encode(report.architecture, bound, (0, ""), "unverified", ())


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """One: the median of several runs, each with ours and theirs in turn."""
    if measure.ARCHITECTURE != "x86_64":
        raise LookupError("the ioctls that this is compared with are x86's")
    file = state / "contract"
    file.write_bytes(contract())
    runs = []
    for _ in range(ROUNDS):
        done = subprocess.run(
            [programs / "applying", file, ROUNDS_IN_C], capture_output=True, text=True, check=False
        )
        if done.returncode == 3:
            raise LookupError(done.stderr.strip())
        done.check_returncode()
        runs.append([int(word) for word in done.stdout.split()])
    ours, bare, reading = (median(run[place] for run in runs) for place in range(3))
    ratio = median(run[0] / run[1] for run in runs)
    detail = f"{ours / 1e3:.0f} µs to {bare / 1e3:.0f} µs; reading the file {reading / 1e3:.0f} µs"
    yield Figure("contract applied from C / bare ioctls", ratio, 1.2, detail=detail)
