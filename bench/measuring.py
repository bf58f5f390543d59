# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measuring KVM, decoded to a feature set, against a C program that makes the same ioctls and keeps nothing."""

from __future__ import annotations

import subprocess
from statistics import median
from typing import TYPE_CHECKING

from bench.figures import Figure, interleaved, seconds
from kvmneg.errors import NoKvm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPEATS = 100


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """Without creating and closing the VM: that is the kernel's time, the same for both."""
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.words import X86_64
    from kvmneg.host import x86
    from kvmneg.host.kvm import Kvm

    decoder = x86.decoder()
    try:
        kvm = Kvm.open()
    except NoKvm as error:
        raise LookupError(error.message) from None
    with kvm, kvm.scratch() as scratch:

        def once() -> None:
            FeatureSet.of(X86_64, decoder.offer(kvm.probe(scratch)))

        def ours() -> float:
            return median(seconds(once) for _ in range(REPEATS))

        def bare() -> float:
            command = [str(programs / "bare_probe"), str(REPEATS)]
            return int(subprocess.run(command, check=True, capture_output=True).stdout) / 1e9

        ours()  # the first call loads the catalogue
        ratio, mine, theirs = interleaved(ours, bare)
    detail = f"{mine * 1e6:.0f} µs to {theirs * 1e6:.0f} µs"
    yield Figure("measurement as a feature set / the bare ioctls in C", ratio, 1.3, detail=detail)
