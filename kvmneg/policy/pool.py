# SPDX-License-Identifier: LGPL-2.1-or-later
"""A pool of hosts: what they all offer, and who holds what back. Pure.

The baseline is the meet of the offers. Reports with equal offers count once, so ten thousand hosts of a few
hundred kinds cost about what a few hundred hosts do.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import Incompatible, LimitExceeded, UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.difference import Blocker, show
from kvmneg.features.featureset import fits, meet_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmneg.features.catalog import Feature
    from kvmneg.features.difference import Conflict
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report

# CPUID leaf 0 spells the vendor in EBX, EDX, ECX, AMD's leaf 0x80000000 repeats it: one reason, not six.
_VENDOR = ("cpuid:0x0.0.e", "cpuid:0x80000000.0.e")
_NAMED_HOSTS = 8  # of one side in a message; the rest are counted


class Kind:
    """Hosts with the same raw offer: the offer once, and who they are."""

    __slots__ = ("offer", "reports")

    def __init__(self, first: Report) -> None:
        self.offer = first.offer
        self.reports = [first]

    def hosts(self) -> list[str]:
        return [report.host for report in self.reports]


class Holder:
    """A feature that some members offer and the baseline does not have, and who holds it back.

    `hosts` lack it or, for a number, keep it down; `of` is the size of the pool. `because` says what differs where it
    goes with registers that must be equal together (kvmneg.policy.unequal), else "".
    """

    __slots__ = ("because", "bit", "feature", "hosts", "of", "word")

    def __init__(
        self, feature: str, word: str, bit: int | None, hosts: tuple[str, ...], *, of: int, because: str
    ) -> None:
        self.feature = feature
        self.word = word
        self.bit = bit
        self.hosts = hosts
        self.of = of
        self.because = because

    def to_json(self) -> dict[str, object]:
        """{"feature", "word", "bit": number or null, "held_back_by": [host, …], "of": pool size, "because" or null}."""
        return {
            "feature": self.feature,
            "word": self.word,
            "bit": self.bit,
            "held_back_by": list(self.hosts),
            "of": self.of,
            "because": self.because or None,
        }


def kinds(reports: Sequence[Report]) -> list[Kind]:
    """The reports grouped by equal offers, in the order they first appear.

    Raises UsageError on no report or on mixed architectures, LimitExceeded on more than REPORTS_PER_BASELINE.
    """
    if not reports:
        raise UsageError("a baseline needs at least one report")
    if len(reports) > limits.REPORTS_PER_BASELINE:
        raise LimitExceeded("REPORTS_PER_BASELINE", limits.REPORTS_PER_BASELINE)
    found: dict[tuple[str, tuple[int, ...], tuple[str, ...]], Kind] = {}
    shapes: dict[tuple[str, ...], tuple[str, ...]] = {}  # one copy of each: hosts mostly have the same words
    for report in reports:
        # by raw words: making ten thousand canonical sets would cost more than merging them
        raw = report.offer_words
        addresses = tuple(raw)
        addresses = shapes.setdefault(addresses, addresses)
        key = (report.architecture, tuple(raw.values()), addresses)
        kind = found.get(key)
        if kind is None:
            found[key] = Kind(report)
        else:
            kind.reports.append(report)
    architectures = {report.architecture: report for report in reports}
    if len(architectures) > 1:
        both = ", ".join(f"{report.host} is {name}" for name, report in sorted(architectures.items()))
        raise UsageError(f"a pool has one architecture: {both}")
    return list(found.values())


def baseline(reports: Sequence[Report]) -> FeatureSet:
    """What every host of the pool offers.

    On arm64 what they can all be set to (kvmneg.policy.levelling), which may be less.

    Raises Incompatible where hosts must agree and do not (vendors), naming both sides; what `kinds` raises.
    """
    members = kinds(reports)
    met = meet_all(kind.offer for kind in members)
    if met.conflicts:
        raise _incompatible(met.conflicts, members)
    if met.architecture == words.ARM64:
        from kvmneg.policy import levelling  # x86 shows guests whatever it is told

        return levelling.baseline(met, reports)
    return met


def study(reports: Sequence[Report]) -> FeatureSet:
    """What hosts of several vendors have in common, for study: no guest could ever move between them.

    Where vendors differ, the set keeps the conflict: it fits nothing, and is neither a fence's nor a contract's
    (both refuse it). Where they do not, it is the baseline. Raises as `baseline`, but for vendors.
    """
    members = kinds(reports)
    met = meet_all(kind.offer for kind in members)
    others = [conflict for conflict in met.conflicts if not conflict.word.startswith(_VENDOR)]
    if others:
        raise _incompatible(others, members)
    return met


def vendors(reports: Sequence[Report]) -> dict[str, list[str]]:
    """The hosts by vendor, the few first: they are what somebody has to look at."""
    found = _by_vendor(kinds(reports))
    return dict(sorted(found.items(), key=lambda row: (len(row[1]), row[0])))


def sides(found: dict[str, list[str]]) -> str:
    """Vendors with their hosts as a sentence names them."""
    return ", ".join(f"{vendor} on {some(hosts)}" for vendor, hosts in found.items())


def conflicting(conflicts: Sequence[Conflict], reports: Sequence[Report]) -> list[Blocker]:
    """What hosts must agree on and do not, as reasons: one for the vendor, one for each other register."""
    return _conflicts(conflicts, kinds(reports))


def _incompatible(conflicts: Sequence[Conflict], members: list[Kind]) -> Incompatible:
    blockers = _conflicts(conflicts, members)
    both = "; ".join(blocker.because for blocker in blockers)
    return Incompatible(
        f"these hosts have no common baseline: {both}", blockers, hint="make one pool for each of them"
    )


def _conflicts(conflicts: Sequence[Conflict], members: list[Kind]) -> list[Blocker]:
    blockers = []
    if any(conflict.word.startswith(_VENDOR) for conflict in conflicts):
        found = vendors([report for kind in members for report in kind.reports])
        missing_on = some([host for hosts in found.values() for host in hosts])
        blockers.append(
            Blocker("vendor", "cpuid:0x0.0.ebx", None, "the pool", missing_on, "silicon", sides(found))
        )
    for conflict in conflicts:
        if not conflict.word.startswith(_VENDOR):
            blockers.append(_conflict(conflict, members))
    return blockers


def _conflict(conflict: Conflict, members: list[Kind]) -> Blocker:
    rows = []
    for value in conflict.values:
        hosts = [
            host for kind in members if kind.offer.words.get(conflict.word) == value for host in kind.hosts()
        ]
        rows.append((len(hosts), f"{show(conflict.word, value)} on {some(hosts)}"))
    both = [side for _number, side in sorted(rows)]
    because = f"{conflict.word} must be the same on every host: " + ", ".join(both)
    blocker = Blocker.of_conflict(conflict, "the pool")
    return blocker._replace(because=because)


def _by_vendor(members: list[Kind]) -> dict[str, list[str]]:
    """Hosts by the vendor their report names, or by the one their CPUID spells."""
    found: dict[str, list[str]] = {}
    for kind in members:
        for report in kind.reports:
            vendor = str(report.identity.get("vendor") or spelled_vendor(kind.offer) or "an unknown vendor")
            found.setdefault(vendor, []).append(report.host)
    return found


def spelled_vendor(one: FeatureSet) -> str:
    """The twelve letters of CPUID leaf 0 (EBX, EDX, ECX), "" where the set has none."""
    raw = b"".join(
        one.words.get(f"cpuid:0x0.0.{register}", 0).to_bytes(4, "little")
        for register in ("ebx", "edx", "ecx")
    )
    return raw.decode("latin-1") if any(raw) else ""


def some(hosts: Sequence[str]) -> str:
    """The first hosts by name, the rest counted."""
    named = ", ".join(hosts[:_NAMED_HOSTS])
    return f"{named} and {len(hosts) - _NAMED_HOSTS} more" if len(hosts) > _NAMED_HOSTS else named


def holders(reports: Sequence[Report], granted: FeatureSet) -> tuple[Holder, ...]:
    """Who holds what back: every feature in which some member is beyond `granted`, with the hosts at fault.

    They lack it, keep the number down, or, for an or-feature, have it; where a number must be the same on
    every host and is not, they differ from most others (all are named where no value is the most frequent).
    A feature that every host offers and `granted` lacks is held back by whoever holds back what it is built
    on; where that is nobody (a fence hides it), no host is named. In the order of addresses. Raises as
    `kinds` does.
    """
    from kvmneg.policy import unequal  # it asks for kinds of hosts too

    members = kinds(reports)
    places = {(blocker.word, blocker.feature) for kind in members for blocker in fits(kind.offer, granted)}
    table = catalogs.names(granted.architecture)
    found = []
    differing = unequal.groups(members)
    for _word, name in places:
        feature = table.by_name.get(name)
        if feature is not None:  # else a conflict, which no baseline names
            bit = feature.shift if feature.width == 1 else None
            guilty = _guilty(members, granted, feature, {name})
            hosts = tuple(host for kind in guilty for host in kind.hosts())
            because = unequal.because(feature, differing, members)
            found.append(Holder(name, feature.word, bit, hosts, of=len(reports), because=because))
    return tuple(sorted(found, key=lambda held: (words.order(held.word), table.by_name[held.feature].shift)))


def _guilty(members: list[Kind], granted: FeatureSet, feature: Feature, seen: set[str]) -> list[Kind]:
    """The hosts whose value is the granted one where others' differ; where all were dropped, the odd ones.

    Where all are the same, whoever holds back what the feature is built on; `seen` ends circles.
    """
    values = [feature.of(kind.offer.value(feature.word)) for kind in members]
    own = feature.of(granted.value(feature.word))
    if len(set(values)) > 1:
        behind = [kind for kind, value in zip(members, values, strict=True) if value == own]
        return behind or _odd_ones(members, values)
    table = catalogs.names(granted.architecture)
    found: list[Kind] = []
    for name, _least in feature.bases if values[0] != own else ():
        if name not in seen:
            seen.add(name)
            found += _guilty(members, granted, table.by_name[name], seen)
    return [kind for kind in members if kind in found]


def _odd_ones(members: list[Kind], values: Sequence[int]) -> list[Kind]:
    """The hosts that do not have the value which most have; all, where two values are as frequent."""
    counts: dict[int, int] = {}
    for kind, value in zip(members, values, strict=True):
        counts[value] = counts.get(value, 0) + len(kind.reports)
    most = [value for value, number in counts.items() if number == max(counts.values())]
    if len(most) > 1:
        return members
    return [kind for kind, value in zip(members, values, strict=True) if value != most[0]]
