# SPDX-License-Identifier: LGPL-2.1-or-later
"""What to expect of a combo that was never measured, from tables. A prediction grants nothing and proves nothing. Pure.

The host as it is measured now is taken, with what the tables say of another kernel: on x86 the CPUID bits that
upstream's KVM of that version passes on (kvmneg.policy.kernels), on arm64 the fields that it lets be set (the
catalogue's `settable`). Of another VMM build, its rules by version (kvmneg.policy.vmm). Everything else is as now.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.report import Report
from kvmneg.policy import kernels, roll
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.features.catalog import Feature
    from kvmneg.features.difference import Blocker
    from kvmneg.policy.combos import Asked
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.roll import Guests, Held

LABEL = "PREDICTION, not a measurement"
_X86 = "not predicted: MSRs, capabilities, Hyper-V's leaves, portable state, and what a distribution changed in its KVM"
_ARM64 = "not predicted: values that the kernel shows by itself, hypercalls, which registers it lists"


class Prediction(NamedTuple):
    """`source` names the tables, "" where there are none for it. `lost`, `gained`: features against now.

    `blockers` and `guests` are what would stand in the way if the tables were the truth.
    """

    source: str
    lost: tuple[str, ...]
    gained: tuple[str, ...]
    blockers: tuple[Blocker, ...]
    guests: tuple[Held, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "label": LABEL,
            "source": self.source or None,
            "lost": list(self.lost),
            "gained": list(self.gained),
            "blockers": [blocker.to_json() for blocker in self.blockers],
            "guests": [held.to_json() for held in self.guests],
            "notes": list(self.notes),
        }


def predict(running: Report, asked: Asked, kernel: str, fence: Fence | None, guests: Guests) -> Prediction:
    """What tables say of the asked combo, whose kernel is `kernel`."""
    source, there = "", running
    lost: list[Feature] = []
    gained: list[Feature] = []
    notes = [f"{name} is not predicted: no table tells what it changes" for name, _ in asked.others]
    if kernel == str(running.combo.get("kernel") or ""):
        source = f"kvmneg's rules for {', '.join(asked.vmms)}" if asked.vmms else ""
    elif running.architecture == words.ARM64:
        there, source = _settable(running, kernel), f"what upstream Linux {kernel} lets be set"
        notes.append(_ARM64)
    else:
        table, _later = kernels.nearest(kernel)
        notes.append(_X86 if table else f"no table is as old as {kernel}: nothing is known of it")
        if table is not None:
            there, lost, gained = _passed(running, kernel, table)
            source = f"upstream's KVM of Linux {table}"
    vmm = asked.vmms[0] if len(asked.vmms) == 1 and _defined(asked.vmms[0]) else None
    return Prediction(
        source,
        tuple(feature.name for feature in lost),
        tuple(feature.name for feature in gained),
        roll.below(there, fence),
        guests.blocking(there, vmm),
        tuple(notes),
    )


def _defined(vmm: str) -> bool:
    from kvmneg.policy import definitions

    return vmm.rpartition("-")[0] in definitions.available("vmms")


def _settable(running: Report, kernel: str) -> Report:
    """The host with what its kernel lets be set unmeasured: kvmneg.policy.levelling looks it up by the version."""
    return _like(running, kernel, running.offer_words, settable={})


def _passed(running: Report, kernel: str, table: str) -> tuple[Report, list[Feature], list[Feature]]:
    """The host with the CPUID bits that a table's KVM does not know hidden, and those it has besides shown."""
    offer = dict(running.offer_words)
    lost, gained = [], []
    for feature in catalogs.names(running.architecture).by_name.values():
        if not (feature.is_bit and feature.width == 1 and feature.word.startswith("cpuid:")):
            continue
        value = offer.get(feature.word, 0)
        known = kernels.knows(table, feature.word, feature.mask)
        if feature.of(value) and known is False and _by_kernel(feature, running):
            offer[feature.word] = feature.taken_from(value)
            lost.append(feature)
        elif not feature.of(value) and known and _newly(feature, running):
            offer[feature.word] = feature.given_to(value)
            gained.append(feature)
    there = _like(running, kernel, offer)
    return there, lost, [one for one in gained if one.of(there.offer.value(one.word))]


def _by_kernel(feature: Feature, running: Report) -> bool:
    """Whether it is upstream's KVM of now that passes a bit, so that its table is one to go by."""
    now, _later = kernels.nearest(str(running.combo.get("kernel") or ""))
    return now is not None and kernels.knows(now, feature.word, feature.mask) is True


def _newly(feature: Feature, running: Report) -> bool:
    """Whether the CPU has a feature that KVM of now does not know."""
    now, _later = kernels.nearest(str(running.combo.get("kernel") or ""))
    if now is None or not feature.of(running.silicon_words.get(feature.word, 0)):
        return False
    return kernels.knows(now, feature.word, feature.mask) is False


def _like(
    running: Report, kernel: str, offer: dict[str, int], settable: dict[str, int] | None = None
) -> Report:
    return Report(
        running.architecture,
        measured={
            **running.measured,
            "host": f"{running.host} under {kernel} (a prediction)",
        },
        combo={**running.combo, "kernel": kernel},
        identity=running.identity,
        offer=offer,
        # of a word that changes, what is accepted beyond the offer is not known
        accept={
            word: value
            for word, value in running.accept_words.items()
            if offer.get(word) == running.offer_words.get(word)
        },
        silicon=running.silicon_words,
        settable=running.settable_words if settable is None else settable,
        dropped=running.dropped_words,
        registers=running.registers,
    )
