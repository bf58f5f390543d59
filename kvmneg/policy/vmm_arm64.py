# SPDX-License-Identifier: LGPL-2.1-or-later
"""arm64: which registers a VMM can set for a guest, and which it can leave out when the guest moves. Pure.

    unset(granted, seen, wanted_by)   the fields that KVM could be told to show, and this VMM cannot tell it
    leaves_out(seen)                  the registers that this VMM leaves out by itself; None: it follows the contract

KVM lets a VMM write ID and firmware registers before the first run. QEMU writes none of them for a new guest: it has a
property for some vCPU features and for vector lengths, and its guests see the rest as KVM has it. The rules are data,
in the table `arm64` of kvmneg/policy/definitions/vmms.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy.contract import binding_mask
from kvmneg.policy.kernels import numbers

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any

    from kvmneg.features.catalog import Feature
    from kvmneg.features.report import Report
    from kvmneg.policy.vmm import Through

INIT = "arm:vcpu-features"


def unset(granted: FeatureSet, seen: Through, wanted_by: str, told: Iterable[Blocker] = ()) -> list[Blocker]:
    """One blocker for each field that a guest of this VMM would see otherwise than `granted` has it.

    Not for those of `told`: what KVM does not let be set is its fault.
    """
    table = seen.arm64
    if granted.architecture != words.ARM64 or table.get("follows_contracts") or table.get("sets_all"):
        return []
    able = settable(table, seen.version) | {blocker.feature for blocker in told}
    found = []
    for feature, wanted, shown in differing(granted, seen.host.offer):
        if feature.name not in able:
            because = f"{wanted:#x} is needed, its guests see {shown:#x}, and {table['because']}"
            place = feature.name, feature.word, None
            found.append(Blocker(*place, wanted_by, seen.missing_on(), "vmm", because))
    return found


def settable(table: Mapping[str, Any], version: str) -> frozenset[str]:
    """The features of registers that a version of the VMM sets when it is asked to."""
    return frozenset(
        name for row in table.get("sets", ()) if _since(row, version) for name in row["features"]
    )


def differing(granted: FeatureSet, offer: FeatureSet) -> Iterator[tuple[Feature, int, int]]:
    """(field, wanted, shown) of each register field that a host shows otherwise, were it told nothing.

    The vCPU features are taken as granted: every VMM chooses them. What goes with one that is off goes by itself.
    """
    init = offer.value(INIT) & granted.value(INIT)
    shown = FeatureSet.of(words.ARM64, {**offer.words, INIT: init})
    names, catalog = catalogs.names(words.ARM64), catalogs.load(words.ARM64)
    for word in sorted(shown.words, key=words.order):
        rule = catalog.words.get(word)
        if rule is None or not word.startswith("arm64:") or not binding_mask(granted, word):
            continue
        wanted, there = granted.value(word), shown.value(word)
        for feature in names.at(word, (wanted ^ there) & rule.judged):
            ours, theirs = feature.of(wanted), feature.of(there)
            # what has to be asked for by name is off in KVM too until it is set (VENDOR_HYP_BMAP_2 resets to 0)
            if ours != theirs and not (feature.withheld and not ours):
                yield feature, ours, theirs


def leaves_out(seen: Through) -> frozenset[int] | None:
    """The ids of the registers that a guest may lose on the way with this VMM; None: those of its contract."""
    if seen.arm64.get("follows_contracts"):
        return None
    rows = (row for row in seen.arm64.get("leaves_out", ()) if _since(row, seen.version))
    return frozenset(words.parse_register(register) for row in rows for register in row["registers"])


def stuck(seen: Through, host: Report, carried: Iterable[int]) -> list[Blocker]:
    """Registers of this host that not every member of the fence lists, and that this VMM cannot leave out.

    A guest that is started with one could never move within its fence.
    """
    lost = leaves_out(seen)
    if lost is None:
        return []
    because = f"not every host of the fence knows this register, and {seen.title} cannot leave it out"
    addresses = map(words.register_word, sorted(set(host.registers) - set(carried) - lost))
    where = f"host {host.host}"
    return [Blocker(word, word, None, "the fence", where, "vmm", because) for word in addresses]


def _since(row: Mapping[str, Any], version: str) -> bool:
    return "since" not in row or (bool(version) and numbers(version) >= numbers(row["since"]))
