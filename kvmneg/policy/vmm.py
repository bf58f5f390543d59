# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a VMM makes of KVM's set: what it gives by itself, takes away, cannot say, or refuses. Pure.

    through(report, "qemu")      the same host as this VMM's guests see it, and every difference with its rule
    refused(granted, through)    what the VMM would refuse of a guest's set here

What a guest may be offered is KVM's set joined with what the VMM gives, without what must not be given away;
what it may come with is what both accept. The rules are data (kvmneg/policy/definitions/vmms).
"""

from __future__ import annotations

from kvmneg.errors import UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.difference import Blocker
from kvmneg.features.report import Report
from kvmneg.policy import definitions
from kvmneg.policy.kernels import numbers
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from kvmneg.features.catalog import Feature
    from kvmneg.features.featureset import FeatureSet

GIVEN, TAKEN, HIDDEN, ALLOWED = "given", "taken", "hidden", "allowed"
_AWAY = (TAKEN, HIDDEN)  # what a new guest is not given though KVM has it
_CARRIED = "state:"
_VENDOR = ("cpuid:0x0.0.ebx", "cpuid:0x0.0.edx", "cpuid:0x0.0.ecx")


class Change(NamedTuple):
    """One difference between KVM's set and the VMM's.

    `what` is "given" or "taken", or of what the VMM accepts where it is asked for and never turns on by itself:
    "hidden" where KVM has it, "allowed" where KVM lacks it. `needs` is what the VMM has to be started with for it, ""
    for nothing; `source` says where the rule was read.
    """

    feature: str
    word: str
    bit: int | None
    what: str
    because: str
    source: str
    needs: str

    def to_json(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))


class Through:
    """A host as a VMM's guests see it.

    `report` is the host's with offer and accept as they are through this VMM; `host` the one measured. `enforces`
    says why the VMM refuses what the host lacks, "" where it takes everything. `version` is "" where no build is known.
    `arm64` is what it does with registers (kvmneg.policy.vmm_arm64), of an arm64 host.
    """

    __slots__ = (
        "_by_feature",
        "arm64",
        "changes",
        "enforces",
        "host",
        "name",
        "named",
        "report",
        "title",
        "version",
    )

    def __init__(self, host: Report, name: str) -> None:
        base, dash, version = name.partition("-")
        table = definitions.vmm(base)
        if dash and not numbers(version):
            raise UsageError(f"{name!r} names no version of {base}", hint=f"say {base}, or {base}-10.0")
        self.host = host
        self.name = name
        self.title = str(table["title"])
        self.version = version or _oldest(host, base)
        self.arm64: Mapping[str, Any] = {}
        if host.architecture == words.ARM64:
            # properties of x86 do not concern it; its own differences stand beside what it does with registers
            table = self.arm64 = table.get("arm64", {})
        self.enforces = str(table.get("enforces", ""))
        self.named: dict[str, Any] = table.get("names", {})
        self.changes = tuple(_changes(table, self.named, host, self.version))
        self._by_feature = {change.feature: change for change in self.changes}
        accepted = {**host.offer_words, **host.accept_words}
        offer = _changed(host, host.offer_words, self.changes, (GIVEN, TAKEN, HIDDEN))
        kept = [change for change in self.changes if not _withheld(host, change)]
        accept = _changed(host, accepted, kept, (GIVEN, TAKEN, ALLOWED))
        self.report = _with(host, offer, accept)

    def change(self, feature: Feature) -> Change | None:
        """What the VMM does with a feature, None where it leaves it as KVM has it."""
        return self._by_feature.get(feature.name)

    def took(self, feature: Feature) -> Change | None:
        """The change by which the VMM keeps a feature from new guests, None where it does not."""
        change = self.change(feature)
        return change if change is not None and change.what in _AWAY else None

    def missing_on(self) -> str:
        """Where a blocker of this VMM is missing."""
        return f"{self.title} on {self.host.host}"

    def to_json(self) -> dict[str, Any]:
        """{"name", "version" or null, "differences": [{"feature", "word", "bit", "what", "because", …}]}."""
        rows = [change.to_json() for change in self.changes]
        return {"name": self.name, "version": self.version or None, "differences": rows}


_last: dict[str, Through] = {}  # by the VMM's name: a daemon asks for the same report again and again


def through(report: Report, name: str) -> Through:
    """The host as guests of a VMM see it: "qemu", or with the version of a build "qemu-10.0".

    Without a version, the oldest build in the report's combo counts; where none is known, only what every
    version does. Raises UsageError for a VMM that has no definition.
    """
    found = _last.get(name)
    if found is None or found.host is not report:
        found = _last[name] = Through(report, name)
        if len(_last) > len(definitions.available("vmms")) * 4:  # names carry versions, which callers choose
            _last.clear()
    return found


def reach(report: Report) -> FeatureSet:
    """The most that any guest may be given there: what KVM offers, with what some VMM gives by itself.

    A fence is over all of a host's guests, whatever runs them, so it may name all of this.
    """
    from kvmneg.features import sanity  # a fence is pinned now and then

    names = catalogs.names(report.architecture)
    found = dict(report.offer_words)
    for vmm in definitions.available("vmms"):
        # its own differences alone, without what it takes: an asked fence is held against hundreds of reports
        table = definitions.vmm(vmm)
        table = table.get("arm64", {}) if report.architecture == words.ARM64 else table
        version = _oldest(report, vmm)
        for row in table.get("gives", ()):
            for feature in map(names.feature, row["features"]) if _holds(row, report, version) else ():
                if _matters(feature, GIVEN, row, report) and feature.rule != rules.OR:
                    found[feature.word] = found.get(feature.word, 0) | feature.mask
    return type(report.offer).of(report.architecture, sanity.sane(report.architecture, found))


def refused(granted: FeatureSet, seen: Through, wanted_by: str) -> list[Blocker]:
    """What the VMM would refuse of a guest's set: requested bits that this host lacks, whatever they mean.

    Only or-bits and hints: an and-bit that the host lacks does not fit anyway.
    """
    if not seen.enforces:
        return []
    from kvmneg.policy.contract import binding_mask  # struct and its tables: only where a VMM enforces

    blockers = []
    host = seen.report.accept if seen.report.accept_words else seen.report.offer
    raw = {**seen.report.offer_words, **seen.report.accept_words}
    table = catalogs.names(granted.architecture)
    for word, rule in catalogs.load(granted.architecture).words.items():
        if word.startswith(_CARRIED):
            continue  # state is no property: it is not asked for, and no guest is told of it
        told = granted.value(word) & binding_mask(granted, word) & (rule.or_mask | rule.hint_mask)
        # an or-bit of a word that was not measured is at its bottom, and nothing that the host has
        there = host.value(word) if word in raw else 0
        for feature in table.at(word, told & ~there):
            change = seen.change(feature)
            if (
                feature.width == 1
                and _can_say(feature, seen.named)
                and (not change or change.what != ALLOWED)
            ):
                place = feature.name, word, feature.shift
                blockers.append(Blocker(*place, wanted_by, seen.missing_on(), "vmm", seen.enforces))
    return blockers


def _with(host: Report, offer: dict[str, int], accept: dict[str, int]) -> Report:
    """The same report, whatever it holds, with another offer and accept set."""
    return Report(
        host.architecture,
        measured=host.measured,
        combo=host.combo,
        identity=host.identity,
        offer=offer,
        accept={word: value for word, value in accept.items() if value != offer.get(word)},
        silicon=host.silicon_words,
        enforcement=host.enforcement,
        settable=host.settable_words,
        dropped=host.dropped_words,
        registers=host.registers,
    )


def with_bit(host: Report, word: str, bit: int) -> Report:
    """The same report with a bit more in its offer."""
    accepted = {**host.offer_words, **host.accept_words}
    return _with(
        host,
        {**host.offer_words, word: host.offer_words.get(word, 0) | bit},
        {**accepted, word: accepted.get(word, 0) | bit},
    )


def _oldest(host: Report, name: str) -> str:
    """The lowest version of a VMM among the builds of a report's combo, "" where there is none."""
    builds = host.combo.get("vmms", ())
    found = [
        str(build.get("version", ""))
        for build in builds
        if isinstance(build, dict) and build.get("name") == name and build.get("version")
    ]
    return min(found, key=numbers, default="")


def _changes(
    table: Mapping[str, Any], named: Mapping[str, Any], host: Report, version: str
) -> Iterator[Change]:
    """The differences that are there on this host, in the order of the definition."""
    names = catalogs.names(host.architecture)
    told: set[str] = set()
    for key, what in (("gives", GIVEN), ("takes", TAKEN), ("hides", HIDDEN), ("allows", ALLOWED)):
        for row in table.get(key, ()):
            if _holds(row, host, version):
                for name in row["features"]:
                    feature = names.feature(name)
                    if name not in told and _matters(feature, what, row, host):
                        told.add(name)
                        yield _change(feature, what, row)
    for feature in names.by_name.values():
        if feature.name in told or not feature.of(host.offer_words.get(feature.word, 0)):
            continue
        if feature.withheld:
            rule = {"because": feature.withheld, "source": "kvmneg's catalogue: withheld"}
            yield _change(feature, TAKEN, rule)
        elif feature.is_bit and not _can_say(feature, named):
            yield _change(feature, TAKEN, named)


def _change(feature: Feature, what: str, row: Mapping[str, Any]) -> Change:
    bit = feature.shift if feature.width == 1 else None
    because, source, needs = (str(row.get(key, "")) for key in ("because", "source", "needs"))
    return Change(feature.name, feature.word, bit, what, because, source, needs)


def _holds(row: Mapping[str, Any], host: Report, version: str) -> bool:
    """Whether a rule's conditions are met: capabilities, the CPU's vendor, the VMM's version."""
    when: dict[str, int] = row.get("when", {})
    if any(host.offer_words.get(word, 0) & mask != mask for word, mask in when.items()):
        return False
    if "vendor" in row and row["vendor"] != _vendor(host):
        return False
    return "since" not in row or (bool(version) and numbers(version) >= numbers(row["since"]))


def _matters(feature: Feature, what: str, row: Mapping[str, Any], host: Report) -> bool:
    """Whether a rule makes a difference to KVM's set here."""
    if feature.rule in rules.UNMERGED:
        return False  # a constant of policy, the same with every VMM
    has = feature.of(host.offer_words.get(feature.word, 0))
    if what in _AWAY:
        return bool(has)
    return not has and (not row.get("silicon") or bool(feature.of(host.silicon_words.get(feature.word, 0))))


def _can_say(feature: Feature, named: Mapping[str, Any]) -> bool:
    """Whether the VMM has a name for a feature, or needs none."""
    if (
        not named
        or feature.word.startswith(tuple(named["besides"]))
        or feature.name in named.get("follows", ())
    ):
        return True
    return bool(getattr(feature, named["tool"]))


def _withheld(host: Report, change: Change) -> bool:
    """Whether it is kvmneg that gives a feature to no new guest: one that has it may come all the same."""
    return bool(catalogs.names(host.architecture).by_name[change.feature].withheld)


def _vendor(host: Report) -> str:
    letters = b"".join(host.offer_words.get(word, 0).to_bytes(4, "little") for word in _VENDOR)
    return letters.decode("latin-1")


def _changed(
    host: Report, words: Mapping[str, int], changes: list[Change] | tuple[Change, ...], kinds: tuple[str, ...]
) -> dict[str, int]:
    """Raw words with the changes of some kinds made. An or-bit that is only allowed stays: hosts are not told."""
    table = catalogs.names(host.architecture)
    found = dict(words)
    for change in changes:
        feature = table.by_name[change.feature]
        if change.what not in kinds or (change.what == ALLOWED and feature.rule == rules.OR):
            continue
        value = found.get(change.word, 0)
        found[change.word] = feature.taken_from(value) if change.what in _AWAY else feature.given_to(value)
    return found
