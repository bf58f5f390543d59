# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pinned TSC rate, and what a report says about what guests carry. Pure.

A set holds the rates in kHz that its hosts can give (word tsc:khz, an interval), a contract the one rate that its
guest was pinned to, or none. Three decisions, with their reasons:

- Without a pin nothing is judged: a guest that may not count on its TSC reads the rate anew, and calibration gives
  another by a few kHz at each boot. So a contract without a pin names no rate, and fits any host.
- With a pin the rate has to lie in the interval of host and fence, and only then is invtsc granted: a guest that
  was told of it counts time by that rate for its whole life.
- A fence promises a rate that every host gives, not each rate of one host's interval: it is broken only where it
  grants invtsc and no rate is left in common. Two boots that calibrate 2 kHz apart overlap.

A report of an older kvmneg, or of another tool, has no word of them at all. That is not known, and neither yes nor
no: such a report breaks no fence and refuses no guest for the state that it carries, but it is no proof of a rate
either, so a guest with a pinned one may not go there.
"""

from __future__ import annotations

from kvmneg.features import rules
from kvmneg.features.difference import Blocker, show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.fence_text import Fence

WORD = "tsc:khz"
FEATURE = "tsc-khz"
INVARIANT = "invtsc"
INVARIANT_WORD, INVARIANT_BIT = "cpuid:0x80000007.0.edx", 1 << 8
_CARRIED = "state:"
_LOW = 0xFFFF_FFFF


def exactly(khz: int) -> int:
    """The interval of one rate."""
    return khz << 32 | khz


def pinned(granted: FeatureSet) -> int:
    """The rate in kHz that a contract over this set pins, 0 for none."""
    value = granted.value(WORD)
    return value & _LOW if value and value & _LOW == value >> 32 else 0


def gives(rates: int, khz: int) -> bool:
    """Whether a rate lies in an interval."""
    return rates & _LOW <= khz <= rates >> 32


def unmeasured(word: str, measured: Mapping[str, int]) -> bool:
    """Whether a report, by its raw words, says nothing about a word of state or of TSC rates."""
    return word.startswith((_CARRIED, WORD)) and word not in measured


def carried_unknown(word: str, measured: Mapping[str, int]) -> bool:
    """Whether a report says nothing about a class of state: no reason against a guest that carries it."""
    return word.startswith(_CARRIED) and word not in measured


def broken(promised: FeatureSet, offer: FeatureSet) -> bool:
    """Whether a fence that promises these rates is broken by a host with those."""
    invariant = promised.value(INVARIANT_WORD) & INVARIANT_BIT
    common = rules.RULES[rules.INTERVAL].meet(promised.value(WORD), offer.value(WORD))
    return bool(invariant) and not common


def refusal(khz: int, top: FeatureSet, report: Report, fence: Fence | None, wanted_by: str) -> Blocker | None:
    """Why a guest cannot be pinned to a rate under host and fence; None where it can."""
    if gives(top.value(WORD), khz):
        return None
    where, here = f"host {report.host}", report.offer.value(WORD)
    if WORD not in report.offer_words:
        cause, because = "unknown", f"this report does not say which TSC rates {report.host} can give"
    elif not gives(here, khz):
        scales = report.offer.value("kvm:tsc-control")
        why = "" if scales else ", and it cannot scale: only its own rate, within KVM's tolerance"
        cause, because = "kvm", f"{khz} kHz is asked for, {report.host} gives {show(WORD, here)}{why}"
    elif fence is not None and not gives(fence.granted.value(WORD), khz):
        where, cause = fence.name, "fence"
        because = f"{khz} kHz is asked for, the fence holds {show(WORD, fence.granted.value(WORD))}"
    else:
        cause, because = "unknown", f"{khz} kHz is asked for, {show(WORD, top.value(WORD))} is left"
    return Blocker(FEATURE, WORD, None, wanted_by, where, cause, because)
