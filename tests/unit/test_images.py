# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a guest in an image may be restored: by what its monitor said it has, as any guest that comes."""

from __future__ import annotations

from pathlib import Path

from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.policy import images, negotiation, rollback
from kvmneg.policy.request import Request

HOSTS = Path(__file__).parents[1] / "data/hosts"
CCSIDR = "arm64:0x6020000000110000"  # demultiplexed; every host shows its own
VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"


def load(name: str) -> Report:
    return Report.loads((HOSTS / f"{name}.json").read_bytes())


def test_a_reported_set_is_judged_as_a_contract_is() -> None:
    """On arm64 what a kernel cannot be told to show is no way back, whoever says that the guest has it."""
    new, old = load("arm64-6.12.neoverse-n1"), load("arm64-6.1.neoverse-n1")
    fence = rollback.judge(new, old).fence
    contract = negotiation.negotiate(Request(maximum=True), new, fence).contract
    assert images.judge(images.Image(VM, contract, contract.granted, 0), old) == []
    other = contract.granted.value(CCSIDR) ^ 1
    held = FeatureSet.of(new.architecture, {**contract.granted.words, CCSIDR: other})
    blockers = images.judge(images.Image(VM, contract, held, 0), old)
    assert {one.word for one in blockers} == {CCSIDR}
