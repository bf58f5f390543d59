# SPDX-License-Identifier: LGPL-2.1-or-later
"""The contract of a guest that nobody made one for: all that it can have on its host. Pure.

A request for everything is less than that: it leaves out what a guest is given by name only (Hyper-V's leaves, whole
VMX controls), and of such a guest nobody knows that it was not.
"""

from __future__ import annotations

from kvmneg.features.featureset import FeatureSet
from kvmneg.policy import coverage, grade, negotiation, rates
from kvmneg.policy.contract import Contract

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.report import Report


def contract(report: Report) -> Contract:
    """Everything that the host of this report accepts, under no fence; no TSC rate, of which the host has a range.

    What VMMs give by themselves is theirs, and not in it. Raises Blocked where not all of the host was measured.
    """
    coverage.require(report)
    there = report.accepting()
    found = {word: value for word, value in there.offer.words.items() if word != rates.WORD}
    granted = FeatureSet.of(report.architecture, found)
    return Contract(granted, (0, ""), grade.of(granted, report), **negotiation.carried(granted, there, None))
