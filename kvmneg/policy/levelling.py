# SPDX-License-Identifier: LGPL-2.1-or-later
"""arm64: which value of a register a host can be told to show, and what a pool can be levelled to. Pure.

An ID register is not granted bit by bit: the VMM writes the value before the first run, where the kernel lets it. So a
set that fits a host may still be out of its reach: its guests would see more than the contract says. Three verdicts
for a field in which the members of a pool differ:

    levelled            every member that has another value can be set to the common one
    must-match          some member's kernel does not let it be set, others' do
    cannot-be-levelled  no kernel lets it be set (upstream's up to 7.3), or writing changes nothing (workarounds)

What can be set is measured (a report's "settable"). An imported report has no such section: then upstream's table
says, by the kernel's version, and `by_table` tells it. x86 has nothing of this kind: KVM shows what it is given.
"""

from __future__ import annotations

from kvmneg.errors import Incompatible
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy.contract import binding_mask
from kvmneg.policy.kernels import numbers
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvmneg.features.catalog import Feature
    from kvmneg.features.report import Report

LEVELLED, MUST_MATCH, NEVER = "levelled", "must-match", "cannot-be-levelled"
NEWEST = "7.3"  # the newest kernel that the catalogue's `settable` was read from
INIT = "arm:vcpu-features"  # its bits switch fields off without a write
CLIDR, CTR = "arm64:0x603000000013c801", "arm64:0x603000000013d801"
_CCSIDR = 0x6020_0000_0011_0000
_NEVER, _NOT_YET, _FROM, _ZERO_OR_FROM = "never", "not yet", "from ", "0 or from "
_NAMED = 4  # members of one side in a message


class Verdict(NamedTuple):
    """One field of a pool whose members differ: the common value, and what stands in the way.

    `members` are (host, kernel, own value, verdict on it alone), those that have the common value left out.
    """

    feature: str
    word: str
    verdict: str
    value: int
    members: tuple[tuple[str, str, int, str], ...]

    def describe(self) -> str:
        """One sentence: what differs where, and why that cannot be levelled."""
        guilty = [row for row in self.members if row[3] == self.verdict]
        named = ", ".join(f"{value:#x} on {host} ({kernel})" for host, kernel, value, _how in guilty[:_NAMED])
        more = f" and {len(guilty) - _NAMED} more" if len(guilty) > _NAMED else ""
        what = {
            LEVELLED: "is set to the common value",
            MUST_MATCH: f"and {_unwritten(self.feature)}",
            NEVER: f"and no kernel up to {NEWEST} lets it be set",
        }
        return f"{self.value:#x} in common, {named}{more} {what[self.verdict]}"

    def blocker(self) -> Blocker:
        """As a reason why the pool has no baseline."""
        where = ", ".join(host for host, _kernel, _value, how in self.members if how == self.verdict)
        return Blocker(
            self.feature, self.word, None, "the pool", where, "kvm", f"{self.verdict}: {self.describe()}"
        )


class Levelled(NamedTuple):
    """What a pool can be levelled to, and the fields in which members differ from it, in the order of addresses."""

    granted: FeatureSet
    verdicts: tuple[Verdict, ...]

    @property
    def conflicts(self) -> tuple[Verdict, ...]:
        """The fields that stand in the way: there is no common level while there is one."""
        return tuple(one for one in self.verdicts if one.verdict != LEVELLED)


def kernel(report: Report) -> str:
    """The kernel's release, for people."""
    return str(report.combo.get("kernel") or "a kernel that is not known")


def by_table(report: Report) -> bool:
    """Whether what can be set there is not measured, but looked up by the kernel's version."""
    return report.architecture == words.ARM64 and not report.settable_words


def settable(feature: Feature, report: Report) -> int:
    """The bits of a feature's word that user space can set there, of this feature."""
    if report.settable_words:
        return report.settable_words.get(feature.word, 0) & feature.mask
    since = feature.settable.partition(",")[0]
    known = bool(since) and since != _NEVER
    return feature.mask if known and numbers(since) <= numbers(str(report.combo.get("kernel") or "")) else 0


def unreachable(granted: FeatureSet, report: Report, wanted_by: str = "the contract") -> list[Blocker]:
    """Why a guest on this host would see other values than `granted`, one blocker a field; empty where it would not.

    Only fields whose value fits (kvmneg.features.featureset.fits tells the others) and that cannot be set to it.
    """
    found = []
    for feature, offered, wanted, verdict in _standing(granted, report):
        if verdict != LEVELLED:
            why = _unwritten(feature.name, f"KVM of {kernel(report)}")
            if verdict == NEVER:
                why = f"no KVM up to {NEWEST} lets it be set"
            has = f"is {offered:#x} for guests there" if offered is not None else "is no register there"
            because = f"{wanted:#x} is needed, it {has}, and {why}"
            where = f"host {report.host}"
            found.append(Blocker(feature.name, feature.word, None, wanted_by, where, "kvm", because))
    return found


def _unwritten(name: str, kvm: str = "that kernel") -> str:
    """Why a field that must match is not set to the common value."""
    feature = catalogs.names(words.ARM64).by_name[name]
    if _NOT_YET in feature.settable:
        # KVM_CAP_ARM_WRITABLE_IMP_ID_REGS is of use with a list of implementations, which the VMM has to give the guest
        return f"it is set for no guest: {feature.why}"
    return f"{kvm} does not let it be set"


def _standing(granted: FeatureSet, report: Report) -> Iterator[tuple[Feature, int | None, int, str]]:
    """(field, the host's own value, the wanted one, verdict) of each register field that the host shows otherwise.

    The host's own value is None where it does not have the register.
    """
    if granted.architecture != words.ARM64:
        return
    names, catalog = catalogs.names(words.ARM64), catalogs.load(words.ARM64)
    shown = _switched(granted, report)
    for word in sorted({*granted.words, *report.offer_words}, key=words.order):
        rule = catalog.words.get(word)
        if rule is None or not word.startswith("arm64:") or not binding_mask(granted, word):
            continue
        wanted, offered = granted.value(word), report.offer_words.get(word)
        if offered is None:
            yield from _absent(names.at(word, wanted & rule.judged), word, wanted, granted)
            continue
        offered = shown.get(word, offered)
        for feature in names.at(word, (wanted ^ offered) & rule.judged):
            ours, theirs = feature.of(wanted), feature.of(offered)
            if rules.RULES[feature.rule].fits(ours, theirs):
                yield feature, theirs, ours, _verdict(feature, theirs, ours, report)


def _switched(granted: FeatureSet, report: Report) -> dict[str, int]:
    """The host's own words as a vCPU has them that is initialized with the granted features only.

    That closing drops what a feature is built on is what KVM does: without KVM_ARM_VCPU_SVE there is no SVE to see.
    """
    offered = report.offer_words.get(INIT, 0)
    if not offered & ~granted.value(INIT):
        return {}
    without = FeatureSet.of(words.ARM64, {**report.offer_words, INIT: offered & granted.value(INIT)})
    lost = {}
    for word, value in report.offer.words.items():
        gone = value ^ without.value(word)
        if gone and word.startswith("arm64:"):
            lost[word] = report.offer_words[word] & ~gone | without.value(word) & gone
    return lost


def _absent(
    features: Iterable[Feature], word: str, wanted: int, granted: FeatureSet
) -> Iterator[tuple[Feature, int | None, int, str]]:
    """Fields of a register that the host does not have; what may be dropped, or is not promised, is no obstacle."""
    if is_ccsidr(word):  # it holds what KVM made up there, and is dropped with it (kvmneg.policy.portable)
        return
    for feature in features:
        if feature.rule == rules.MATCH and feature.of(wanted):
            yield feature, None, feature.of(wanted), MUST_MATCH


def is_ccsidr(word: str) -> bool:
    """Whether a word is one of the cache sizes, of which older kernels list fewer."""
    return word.startswith("arm64:") and int(word[6:], 16) & ~0xFF == _CCSIDR


def _verdict(feature: Feature, offered: int, wanted: int, report: Report) -> str:
    """Whether a host's own value of a field can be replaced by one that fits it."""
    since, _, values = feature.settable.partition(", ")
    if since in ("", _NEVER) and not report.settable_words.get(feature.word, 0) & feature.mask:
        return NEVER
    if since == _NEVER:
        return NEVER
    changed = (offered ^ wanted) << feature.shift
    if values == _NOT_YET or changed & ~settable(feature, report) or not _taken(values, wanted):
        return MUST_MATCH
    return LEVELLED


def _taken(values: str, wanted: int) -> bool:
    """Whether KVM takes a value that its mask allows: some fields have a least one."""
    if values.startswith(_ZERO_OR_FROM):
        return not wanted or wanted >= int(values.removeprefix(_ZERO_OR_FROM))
    return wanted >= int(values.removeprefix(_FROM)) if values.startswith(_FROM) else True


# -- a pool ------------------------------------------------------------------------------------------


def level(met: FeatureSet, reports: Sequence[Report]) -> Levelled:
    """What the pool whose offers meet in `met` can be levelled to.

    That is the meet, with values that must match taken from the members that cannot change theirs, and without the
    vCPU features (pointer authentication) whose fields differ and cannot be set.
    """
    members = _distinct(reports)
    granted = _matched(met, members)
    found = _verdicts(granted, members)
    names = catalogs.names(words.ARM64)
    while True:
        switches = {
            base for one in found if one.verdict != LEVELLED for base in _switches(one.feature, names.by_name)
        }
        bits = granted.value(INIT)
        for name in switches:
            bits &= ~names.by_name[name].mask
        if bits == granted.value(INIT):
            return Levelled(granted, found)
        granted = FeatureSet.of(words.ARM64, {**granted.words, INIT: bits})
        found = _verdicts(granted, members)


def baseline(met: FeatureSet, reports: Sequence[Report]) -> FeatureSet:
    """The level of a pool. Raises Incompatible, naming field, members and kernels, where there is none."""
    levelled = level(met, reports)
    if levelled.conflicts:
        blockers = [one.blocker() for one in levelled.conflicts]
        names = ", ".join(blocker.feature for blocker in blockers)
        raise Incompatible(
            f"these hosts have no common level: {names}",
            blockers,
            hint="make one pool for each of them, or update the kernels that cannot set these fields",
        )
    return levelled.granted


def bounded(offer: FeatureSet, fence: FeatureSet, met: FeatureSet) -> FeatureSet:
    """The meet of an offer and a fence, with what must match as the fence has it: the host is told, if it can be."""
    if met.architecture != words.ARM64:
        return met
    kept = dict(met.words)
    for word, mask in _matching():
        if word in offer.words:
            kept[word] = met.value(word) & ~mask | fence.value(word) & mask
    return FeatureSet.of(words.ARM64, kept)


def _distinct(reports: Sequence[Report]) -> list[Report]:
    """One report for all that are alike in what is judged here; the verdicts name the first."""
    found: dict[object, Report] = {}
    for report in reports:
        key = (
            frozenset(report.offer_words.items()),
            frozenset(report.settable_words.items()),
            kernel(report),
        )
        found.setdefault(key, report)
    return list(found.values())


def _matching() -> list[tuple[str, int]]:
    """(word, mask) of the fields that must match and that some kernel lets be set: caches."""
    found: dict[str, int] = {}
    for feature in catalogs.names(words.ARM64).by_name.values():
        if (
            feature.rule == rules.MATCH
            and feature.settable not in ("", _NEVER)
            and _NOT_YET not in feature.settable
        ):
            found[feature.word] = found.get(feature.word, 0) | feature.mask
    return list(found.items())


def _matched(met: FeatureSet, members: Sequence[Report]) -> FeatureSet:
    """`met` with one value for what must match: of the members that cannot change theirs, else of the oldest kernel."""
    kept = dict(met.words)
    for word, mask in _matching():
        rows = [(report, report.offer_words[word] & mask) for report in members if word in report.offer_words]
        fixed = {value for report, value in rows if _fixed(report, word, mask)}
        if not rows or len(fixed) > 1:
            continue
        # a host whose caches need cleaning takes no hierarchy without a level to clean to (_caches), others take any
        coherent = catalogs.names(words.ARM64).by_name["ctr-idc"]
        oldest = min(
            rows,
            key=lambda row: (coherent.of(row[0].offer_words.get(CTR, 0)), numbers(kernel(row[0])), row[1]),
        )[1]
        kept[word] = met.value(word) & ~mask | (fixed.pop() if fixed else oldest)
    return FeatureSet.of(words.ARM64, kept)


def _fixed(report: Report, word: str, mask: int) -> bool:
    features = catalogs.names(words.ARM64).at(word, mask)
    return any(settable(feature, report) != feature.mask for feature in features)


def _switches(name: str, table: dict[str, Feature]) -> Iterator[str]:
    """The vCPU features that a field is built on."""
    for base, _least in table[name].bases:
        if table[base].word == INIT:
            yield base


def _verdicts(granted: FeatureSet, members: Sequence[Report]) -> tuple[Verdict, ...]:
    rows: dict[tuple[str, str, int], list[tuple[str, str, int, str]]] = {}
    for report in members:
        for feature, offered, wanted, verdict in _standing(granted, report):
            row = (report.host, kernel(report), offered or 0, verdict)
            rows.setdefault((feature.name, feature.word, wanted), []).append(row)
    found = []
    for (name, word, wanted), own in rows.items():
        worst = max((how for *_, how in own), key=(LEVELLED, MUST_MATCH, NEVER).index)
        found.append(Verdict(name, word, worst, wanted, tuple(own)))
    clash = _caches(granted, members)
    found += [clash] if clash else []
    table = catalogs.names(words.ARM64).by_name
    return tuple(sorted(found, key=lambda one: (words.order(one.word), table[one.feature].shift)))


def _caches(granted: FeatureSet, members: Sequence[Report]) -> Verdict | None:
    """CLIDR without a level of unification needs CTR.IDC: KVM takes no other (set_clidr, arch/arm64/kvm/sys_regs.c)."""
    clidr, names = granted.value(CLIDR), catalogs.names(words.ARM64)
    coherent, unified = clidr >> 24 & 7, clidr >> 27 & 7 or clidr >> 21 & 7
    if CLIDR not in granted.words or granted.field("ctr-idc") or (coherent and unified):
        return None
    guilty = [one for one in members if names.feature("ctr-idc").of(one.offer_words.get(CTR, 0))]
    rows = tuple(
        (one.host, kernel(one), one.offer_words.get(CLIDR, 0) >> 24 & 7, MUST_MATCH) for one in guilty
    )
    return Verdict("clidr-loc", CLIDR, MUST_MATCH, coherent, rows) if rows else None
