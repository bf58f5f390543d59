# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole `kvmneg verify` of the host against a C program that makes as many VMs and guest runs, and only that."""

from __future__ import annotations

import subprocess
from statistics import median
from typing import TYPE_CHECKING

from bench.figures import Figure, interleaved, seconds
from kvmneg.errors import NoKvm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPEATS = 5


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """In a warm process: the interpreter's start is the command line's, and measured there."""
    from kvmneg.host import proof
    from kvmneg.host.kvm import Kvm

    verifier = proof.verifier()
    try:
        kvm = Kvm.open()
    except NoKvm as error:
        raise LookupError(error.message) from None
    with kvm:

        def ours() -> float:
            return median(seconds(lambda: verifier.prove(kvm)) for _ in range(REPEATS))

        def bare() -> float:
            command = [str(programs / "bare_verify"), str(REPEATS)]
            return int(subprocess.run(command, check=True, capture_output=True).stdout) / 1e9

        ours()  # the first call loads the catalogue
        ratio, mine, theirs = interleaved(ours, bare)
    detail = f"{mine * 1e3:.1f} ms to {theirs * 1e3:.1f} ms"
    yield Figure("verify of a host / its VMs and guest runs in C", ratio, 20, detail=detail)
