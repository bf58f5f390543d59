# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run inside an emulated arm64 host by bench.emulated: `python3 -m bench.inside BARE_PROBE BARE_VERIFY`.

Prints JSON: "rounds", [[seconds of a measurement, of the bare ioctls, of the part that makes VMs], …], how many
"ioctls" there are, and "proofs", [[seconds of a verify, of the bare one], …].
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median

from bench.figures import seconds
from kvmneg.features.featureset import FeatureSet
from kvmneg.host import arm64, kvm_arm64, proof
from kvmneg.host.kvm import Kvm

ROUNDS, REPEATS = 9, 12
PROOFS = 5


def main() -> None:
    decoder = arm64.decoder()
    with Kvm.open() as kvm:

        def once() -> float:
            """A measurement on a new scratch VM, which is not part of it: the last one's is used up."""
            with kvm.scratch() as scratch:
                return seconds(
                    lambda: FeatureSet.of(arm64.ARCHITECTURE, decoder.offer(kvm_arm64.probe(kvm, scratch)))
                )

        once()  # the first call loads the catalogue
        rounds, count = [], 0
        for _ in range(ROUNDS):
            ours = median(once() for _ in range(REPEATS))
            bare = subprocess.run([sys.argv[1], str(REPEATS)], check=True, capture_output=True).stdout.split()
            count = int(bare[0])
            rounds.append([ours, int(bare[1]) / 1e9, int(bare[2]) / 1e9])
        proofs = proved(kvm)
    print(json.dumps({"rounds": rounds, "ioctls": count, "proofs": proofs}))


def proved(kvm: Kvm) -> list[list[float]]:
    """Seconds of a whole verify and of its VMs and guest runs in C, measured in turn."""
    verifier, pairs = proof.verifier(), []
    for _ in range(PROOFS):
        ours = seconds(lambda: verifier.prove(kvm))
        bare = subprocess.run([sys.argv[2], "1"], check=True, capture_output=True).stdout
        pairs.append([ours, int(bare) / 1e9])
    return pairs


if __name__ == "__main__":
    main()
