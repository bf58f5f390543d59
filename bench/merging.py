# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pool's baseline: meet over many reports in memory, against numpy's AND of the same bits."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.figures import ROUNDS, Figure, interleaved, seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report

RECORDED = Path(__file__).parent.parent / "kvmneg/data/recorded-host.json"
REPORTS, DISTINCT = 10_000, 200
MANY = 100_000
# Nested VMX of an Ice Lake, which the recorded host does not have: its rules occur nowhere else.
VMX = {
    "msr:0x480": 0x00D8_1000_11E5_7ED0,
    "msr:0x485": 0x2000_0065,
    "msr:0x48a": 0x2E,
    "msr:0x48b": 0x0055_3CFE_0000_0000,
    "msr:0x48c": 0x0F01_0673_4141,
    "msr:0x48d": 0x7F_0000_0016,
    "msr:0x48e": 0xFFF9_FFFE_0400_6172,
    "msr:0x48f": 0x037F_FFFF_0003_6DFB,
    "msr:0x490": 0xF3FF_0000_11FB,
}


def recorded() -> Report:
    from kvmneg.features.report import Report

    return Report.loads(RECORDED.read_bytes())


def like(base: Report, offer: dict[str, int], name: str) -> Report:
    """A report of another host with this offer; equal values are one object, as in reports that were read."""
    from kvmneg.features.report import Report

    return Report(
        base.architecture, measured={"host": name}, combo={}, identity=base.identity, offer=dict(offer)
    )


def reports() -> list[Report]:
    """REPORTS reports of DISTINCT kinds: a recorded host with a few bits of each kind's own missing."""
    base = recorded()
    chance = random.Random(1)
    kinds = []
    for _ in range(DISTINCT):
        offer = dict(base.offer_words)
        for word in chance.sample(
            [word for word in sorted(offer) if word.startswith("cpuid:") and ":0x0." not in word], 6
        ):
            offer[word] &= ~(1 << chance.randrange(32))
        kinds.append(offer)
    return [like(base, kinds[n % DISTINCT], f"h{n}") for n in range(REPORTS)]


def distinct_reports() -> list[Report]:
    """MANY reports, no two equal, of about 100 words that are not zero, among them every rule's."""
    base = recorded()
    offer = {word: value for word, value in base.offer_words.items() if value} | VMX
    offer["cpuid:0x1.0.ecx"] |= 1 << 5  # vmx
    chance = random.Random(2)
    bits = [word for word in sorted(base.offer.words) if word.startswith(("cpuid:0x7.", "kvm:", "hyperv:"))]
    vcpus = list(range(1024, 1024 + MANY))
    chance.shuffle(vcpus)
    pool = []
    for n in range(MANY):
        own = offer | {"kvm:max-vcpus": vcpus[n], "cpuid:0x1.0.eax": 0x606A0 + chance.randrange(16)}
        for word in chance.sample(bits, 4):
            own[word] &= ~(1 << chance.randrange(32))
        own["cpuid:0x7.0.edx"] |= chance.randrange(2) << 10  # md-clear: set in any is set in all
        own["cpuid:0x80000008.0.eax"] = chance.randrange(40, 52) | 48 << 8 | chance.choice((0, 40, 48)) << 16
        own["hyperv:0x4000000a.0.eax"] = chance.choice((0x0101, 0x0201, 0x0301))
        own["msr:0x480"] = VMX["msr:0x480"] ^ chance.randrange(2) << 32
        own["msr:0x48d"] = VMX["msr:0x48d"] ^ (chance.randrange(2) << 32 | chance.randrange(2) << 33)
        own["cpuid:0xd.9.ebx"] = chance.choice((0xA80, 0x980))  # equal or dropped
        pool.append(like(base, own, f"h{n}"))
    return pool


def resident_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise LookupError("no VmRSS")


def array(sets: list[FeatureSet]) -> np.ndarray:
    """The same words as numpy would have them: a row a set, 32 bits a column, absent words at their bottom."""
    import numpy as np

    from kvmneg.features.words import width

    every = sorted({word for one in sets for word in one.words})
    columns = [(word, width(word) // 8) for word in every]
    rows = (b"".join(one.value(word).to_bytes(size, "little") for word, size in columns) for one in sets)
    return np.frombuffer(b"".join(rows), dtype=np.uint32).reshape(len(sets), -1)


def large() -> Iterator[Figure]:
    """What is in memory: reports as read, their canonical sets, and what these keep to be met again.

    The first meet packs each set; a later one, after some host's report has changed, packs that host's alone.
    """
    from kvmneg.features.featureset import meet_all

    before = resident_mib()
    pool = distinct_reports()
    sets = [report.offer for report in pool]
    first = seconds(lambda: meet_all(sets))
    met = meet_all(sets)
    held = resident_mib() - before
    words = sum(len(one.words) for one in sets) / MANY
    import numpy as np

    rows = array(sets)
    ratio, ours, theirs = interleaved(
        lambda: seconds(lambda: meet_all(sets)), lambda: seconds(lambda: np.bitwise_and.reduce(rows, axis=0))
    )
    assert met == meet_all(sets) and not met.conflicts
    detail = f"{ours * 1e3:.0f} ms to {theirs * 1e3:.1f} ms, {words:.0f} words; the first meet {first:.1f} s"
    yield Figure(f"meet of {MANY} distinct sets / numpy's AND", ratio, 20, detail=detail)
    yield Figure(f"{MANY} distinct reports and their sets, resident", held, 1024, "MiB")


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """Reports are parsed and canonical before: what is measured is the baseline."""
    from kvmneg.policy.pool import baseline

    pool = reports()
    for report in pool:
        report.offer  # noqa: B018 (makes it canonical)
    taken = median(seconds(lambda: baseline(pool)) for _ in range(ROUNDS))
    yield Figure(f"meet of {REPORTS} reports, {DISTINCT} distinct", taken, 0.1, "s")
    yield from large()
