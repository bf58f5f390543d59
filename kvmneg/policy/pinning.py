# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a fence to pin comes from: `kvmneg fence pin --from SOURCE`. Pure."""

from __future__ import annotations

from kvmneg.errors import Blocked, UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.featureset import FeatureSet, fits
from kvmneg.policy import coverage, definitions, negotiation, pool, reasons
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.report import Report

SOURCES = ("host", "baseline", "level:NAME", "platform:NAME")


def source(text: str, report: Report) -> FeatureSet:
    """The set that one of SOURCES means on the host of this report; none exceeds what guests can have there.

    host: all it offers, and what VMMs give there. baseline: what every host of the pool offers, here a pool of
    one. level:NAME: what a request for that level is granted without a fence. platform:NAME: the offer, with the
    words that the platform bounds cut to its features.

    Raises UsageError (no such source or name), Blocked (the host does not reach the level).
    """
    kind, colon, name = text.partition(":")
    if text == "host":
        return _reach(report)
    if text == "baseline":
        return pool.baseline([report])
    if kind == "level" and name:
        return negotiation.negotiate(Request(level=name), report).contract.granted
    if kind == "platform" and name:
        return _platform(name, report)
    wrong = f"{text!r} names no {kind}" if colon and kind in ("level", "platform") else f"no source {text!r}"
    raise UsageError(wrong, hint=f"there are: {', '.join(SOURCES)}")


def named(granted: FeatureSet, report: Report) -> FeatureSet:
    """The set with this host's vendor where it leaves that open.

    Raises UsageError where it is of another architecture, Incompatible where it is a study over several vendors.
    """
    if granted.architecture != report.architecture:
        raise UsageError(f"the fence is of {granted.architecture}, this host is {report.architecture}")
    Fence(granted)  # a set without a common vendor is no fence's, whatever it is called
    catalog = catalogs.load(report.architecture)
    offered = report.offer.words
    vendor = {word: offered[word] for word in catalog.equal_words if word in offered}
    if granted.words.keys() >= vendor.keys():
        return granted
    return FeatureSet.of(report.architecture, {**vendor, **granted.words})


def to_pin(granted: FeatureSet, report: Report) -> FeatureSet:
    """The set as it is pinned: a vendor that it leaves open is this host's.

    Raises Blocked, naming each feature, where it promises what the host does not offer, or what not all kinds of the
    host's CPUs were asked for, Incompatible where it is a study over several vendors.
    """
    coverage.require(report)
    whole = named(granted, report)
    where = f"host {report.host}"
    lacking = fits(whole, report.offer, missing_on=where)
    lacking = lacking and fits(whole, _reach(report), missing_on=where)
    unreachable = []
    if report.architecture == words.ARM64:
        from kvmneg.policy import levelling  # x86 shows guests whatever it is told

        unreachable = levelling.unreachable(whole, report, "the fence")
    if lacking or unreachable:
        raise Blocked(
            f"{report.host} offers less than this fence promises",
            [*(reasons.unfit(blocker, report, "the fence") for blocker in lacking), *unreachable],
            hint="pin no more than every host has; `kvmneg baseline` computes it",
        )
    return whole


def _reach(report: Report) -> FeatureSet:
    from kvmneg.policy import vmm  # the rules of every VMM: a daemon starts without them

    return vmm.reach(report)


def _platform(name: str, report: Report) -> FeatureSet:
    bounds, features = definitions.platform(name, report.architecture)
    names = catalogs.names(report.architecture)
    kept: dict[str, int] = {}
    for feature in map(names.feature, features):
        kept[feature.word] = kept.get(feature.word, 0) | feature.mask
    values = dict(report.offer.words)
    for word, offered in report.offer.words.items():
        if word.startswith(bounds):
            rule = catalogs.load(report.architecture).words[word]
            # an or-bit is a risk that the host has, whatever its platform: it stays
            cut = rule.judged & ~rule.or_mask & ~kept.get(word, 0)
            values[word] = offered & ~cut | rule.bottom & cut
    for number, most in definitions.at_most(name, report.architecture).items():
        feature = names.feature(number)
        value = values.get(feature.word, 0)
        if feature.of(value) > most:
            values[feature.word] = value & ~feature.mask | most << feature.shift
    return FeatureSet.of(report.architecture, values)
