# SPDX-License-Identifier: LGPL-2.1-or-later
"""May this host go back to a combo? From what was recorded there, the fence, and what guests hold. Pure.

    Allowed iff the combo was measured, its offer is not below the fence (D ≥ F), and it accepts what every guest
    holds (M ≥ V(vm)), the portable state included. A guest of which nobody knows what it holds blocks.

The whole combo has to be a recorded one (kvmneg.policy.combos). Of one that was never measured the answer is no,
with what differs and how to measure it; a prediction (kvmneg.policy.prediction) never makes it a yes.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.features import words
from kvmneg.features.crowd import Crowd
from kvmneg.features.difference import Blocker
from kvmneg.policy import combos, coverage, negotiation, rates, reasons
from kvmneg.policy.scope import unmeasured
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.combos import Asked, Dimension
    from kvmneg.policy.fence_text import Fence
    from kvmneg.policy.leases import Holding
    from kvmneg.policy.portable import Entry
    from kvmneg.policy.prediction import Prediction

UNKNOWN = "an unknown guest"
_JUDGED = (
    "judged: what was measured under that combo, feature by feature, against the pinned fence and what each guest "
    "holds, by its contract or its VM monitor's word, portable state that they name included"
)
_UNFENCED = "not judged: guests that start after this answer; no fence is pinned, and the next may hold more"
_FLOATING = (
    "not judged: guests that start once the level rises; no fence is pinned, and it floats within that combo"
)
_NO_VMM = "not judged: any VMM's own refusals; none was named"
_ELSE = (
    "not judged: images and snapshots of which nobody said so (`kvmneg vm saved`), a second VM in a process that "
    "holds a contract",
    "not judged: machine types and device state of another VMM build, ROM sizes, vhost-user and vDPA back ends, "
    "VFIO, live nested guests, whether firmware and microcode can be brought back",
    "not judged: guests on other hosts that may come here later",
)


class Recorded(NamedTuple):
    """A combo that was measured here: its digest, the combo, and when it was recorded first and last."""

    digest: str
    combo: Mapping[str, Any]
    first_at: str
    last_at: str


class Held(NamedTuple):
    """Guests that hold the same set and cannot go there: why, in reasons that they share."""

    digest: str
    vms: tuple[str, ...]
    blockers: tuple[Blocker, ...]

    def to_json(self) -> dict[str, Any]:
        """{"digest" of the contract or null, "vms": [UUID, …], "blockers": [{…}]}."""
        rows = [blocker.to_json() for blocker in self.blockers]
        return {"digest": self.digest or None, "vms": list(self.vms), "blockers": rows}


class Answer(NamedTuple):
    """Whether the host may go to a combo, and everything that stands in the way.

    `combo` is the digest of the recorded one that was judged, "" where none is the asked one: then `differs` tells
    in what the nearest recorded one (`nearest`) is another, and `how` to measure it. `changes` are the dimensions
    in which the judged combo is not the running one. `blockers` are of the fence and of CPUs that were not measured,
    `guests` of guests, `unknown` names guests of which nobody knows what they hold.
    """

    combo: str
    nearest: str
    differs: tuple[Dimension, ...]
    changes: tuple[Dimension, ...]
    blockers: tuple[Blocker, ...]
    guests: tuple[Held, ...]
    unknown: tuple[str, ...]
    how: str
    prediction: Prediction | None
    scope: tuple[str, ...]

    @property
    def measured(self) -> bool:
        return bool(self.combo)

    @property
    def allowed(self) -> bool:
        return self.measured and not (self.blockers or self.guests or self.unknown)


class Guests:
    """What guests hold, each distinct set once.

    `registers` are the portable state of arm64 contracts by their digest. Guests of unknown sets are `unknown`;
    `unjudged` are lines of the scope: guests that are left out of all this.
    """

    __slots__ = ("_crowds", "_held", "unjudged", "unknown")

    def __init__(
        self,
        holdings: Iterable[Holding],
        unknown: Sequence[str] = (),
        registers: Mapping[str, tuple[Entry, ...]] | None = None,
        unjudged: Sequence[str] = (),
    ) -> None:
        self.unjudged = tuple(unjudged)
        strangers: list[str] = []
        by_set: dict[tuple[str, FeatureSet], list[str]] = {}
        for holding in holdings:
            if holding.granted is None:
                strangers.append(holding.vm)
            else:
                by_set.setdefault((holding.digest, holding.granted), []).append(holding.vm)
        self.unknown = (*strangers, *unknown)
        carried = registers or {}
        self._held = [
            (digest, granted, carried.get(digest, ()), vms) for (digest, granted), vms in by_set.items()
        ]
        self._crowds: dict[str, Crowd] = {}

    def blocking(self, report: Report, vmm: str | None = None) -> tuple[Held, ...]:
        """The guests that the host of this report does not accept: the first ROLLBACK_SETS sets with their reasons.

        Monitors say what their guests have, and each may say something else: reasons take long, a crowd does not.
        """
        found: list[Held] = []
        sure = self._crowded(report, vmm)
        for digest, granted, registers, vms in self._suspects(report, vmm):
            if sure and len(found) >= limits.ROLLBACK_SETS:
                found.append(Held(digest, tuple(vms), ()))
                continue
            blockers = negotiation.accepts(granted, report, vmm, portable=registers)
            if blockers:
                found.append(Held(digest, tuple(vms), blockers))
        return tuple(found)

    def count(self, report: Report) -> int:
        """How many guests the host of this report does not accept, unknown ones included."""
        if report.architecture == words.ARM64:
            return len(self.unknown) + sum(len(held.vms) for held in self.blocking(report))
        return len(self.unknown) + sum(len(vms) for *_, vms in self._suspects(report, None))

    def _crowded(self, report: Report, vmm: str | None) -> bool:
        """Whether all guests are judged at once."""
        return not (vmm is not None or report.architecture == words.ARM64 or coverage.unvisited(report))

    def _suspects(
        self, report: Report, vmm: str | None
    ) -> list[tuple[str, FeatureSet, tuple[Entry, ...], list[str]]]:
        """Those that may be blocked. On x86 without a VMM, which adds rules of its own, they are."""
        if not self._crowded(report, vmm):
            return self._held
        crowd = self._crowds.get(report.architecture)
        if crowd is None:
            sets = [granted for _, granted, _, _ in self._held]
            crowd = self._crowds[report.architecture] = Crowd(report.architecture, sets)
        there = report.accepting()
        raw = there.offer_words
        unfit = crowd.unfit(there.offer, lambda word: rates.carried_unknown(word, raw))
        return [self._held[place] for place in sorted(unfit)]


def below(report: Report, fence: Fence | None, running: Report | None = None) -> tuple[Blocker, ...]:
    """What the fence promises and the host of this report does not offer, or cannot be told to show.

    `running` is the machine's report of now, where the other is an older one of it.
    """
    if fence is None:
        return ()
    found = [reasons.unfit(one, report, "the fence") for one in negotiation.below(report, fence)]
    found += negotiation.unreachable(fence.granted, report, "the fence")
    return reasons.under(reasons.in_order(found), report, running)


def judge(
    report: Report,
    fence: Fence | None,
    guests: Guests,
    *,
    floor: Fence | None = None,
    combo: str = "",
    vmm: str | None = None,
    running: Report | None = None,
) -> Answer:
    """The answer on one measured combo: the newest report of it. `floor` bounds new guests where no fence is pinned.

    `running` is the machine's report of now.

    Raises UsageError for a VMM without a definition.
    """
    negotiation.through(report, vmm)  # a name that nobody knows is a mistake, whether there are guests or not
    blockers = (*coverage.blockers(report), *below(report, fence, running))
    held = guests.blocking(report, vmm) if not coverage.unvisited(report) else ()
    held = tuple(one._replace(blockers=reasons.under(one.blockers, report, running)) for one in held)
    return Answer(
        combo or report.combo_digest(),
        "",
        (),
        (),
        blockers,
        held,
        guests.unknown,
        "",
        None,
        scope([report], fence, floor, vmm=vmm, unjudged=guests.unjudged),
    )


def find(
    running: Mapping[str, Any], asked: Asked, recorded: Sequence[Recorded]
) -> tuple[list[Recorded], Recorded | None, list[Dimension]]:
    """The recorded combos that are the asked one; where there is none, the nearest, and in what it differs.

    Several are: the same release built twice. Raises UsageError as combos.Search does.
    """
    kernels = [str(one.combo.get("kernel") or "") for one in recorded]
    search = combos.Search(running, asked, kernels)
    matching: list[Recorded] = []
    nearest: tuple[Recorded, list[Dimension]] | None = None
    for one in recorded:
        differs = search.differs(one.combo)
        if not differs:
            matching.append(one)
        elif nearest is None or _distance(differs) < _distance(nearest[1]):
            nearest = one, differs
    if matching or nearest is None:
        return matching, None, []
    return [], *nearest


def refuse(
    asked: Asked,
    nearest: Recorded | None,
    differs: Sequence[Dimension],
    guests: Guests,
    prediction: Prediction | None = None,
) -> Answer:
    """The answer on a combo that was never measured: no, whatever is predicted."""
    digest = nearest.digest if nearest else ""
    scope = ("not judged: anything; no measurement was made under that combo",)
    how = how_to_measure(asked, differs)
    return Answer("", digest, tuple(differs), (), (), (), guests.unknown, how, prediction, scope)


def how_to_measure(asked: Asked, differs: Sequence[Dimension]) -> str:
    """What has to be done so that a combo can be judged, for people."""
    names = {one.name for one in differs}
    software = bool(names) and all(name.startswith("vmms.") for name in names)
    if software or (asked.vmms and not asked.kernel and not asked.others):
        return (
            "install that VMM build beside the one in use, without guests: kvmnegd looks builds up and measures "
            "again by itself; then ask again"
        )
    return (
        "move the guests away, boot this host under that combo as a CANDIDATE (no guest on it), and let kvmnegd start: "
        "it measures and records it, and grants nothing that the fence does not hold; then boot back, and ask again"
    )


def changes(running: Mapping[str, Any], there: Mapping[str, Any]) -> tuple[Dimension, ...]:
    """In what a recorded combo is not the running one: all of this has to be as recorded for an answer to hold."""
    return tuple(combos.between(running, there))


def _distance(differs: Sequence[Dimension]) -> tuple[bool, int]:
    """Another kernel is the furthest; then the number of dimensions counts."""
    return any(one.name == "kernel" for one in differs), len(differs)


def scope(
    reports: Sequence[Report],
    fence: Fence | None,
    floor: Fence | None = None,
    *,
    vmm: str | None = None,
    unjudged: Sequence[str] = (),
) -> tuple[str, ...]:
    """What a yes on these combos is about, and what it is not about; `unjudged` are Guests'."""
    lines = [_JUDGED if fence else _JUDGED.replace("the pinned fence and ", ""), *unmeasured(reports)]
    if fence is None:
        within = floor is not None and not any(below(report, floor) for report in reports)
        lines.append(_FLOATING if within else _UNFENCED)
    lines += [
        f"not judged: which registers guests carry, as {report.host} lists none"
        for report in reports
        if report.architecture == words.ARM64 and not report.registers
    ]
    return (*lines, *([] if vmm else [_NO_VMM]), *unjudged, *_ELSE)


class Line(NamedTuple):
    """One combo in a survey: how many features of the fence it lacks, how many guests it does not accept."""

    digest: str
    lacking: int
    guests: int

    @property
    def allowed(self) -> bool:
        return not (self.lacking or self.guests)


def survey(reports: Iterable[tuple[str, Report]], fence: Fence | None, guests: Guests) -> list[Line]:
    """Every given combo (its digest, its newest report) in one line each."""
    found = []
    for digest, report in reports:
        lacking = len(coverage.blockers(report)) + len(below(report, fence))
        found.append(Line(digest, lacking, guests.count(report)))
    return found
