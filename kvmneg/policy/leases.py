# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests hold, and which of them stand above a level. Pure.

What counts is the set that a guest really has: the one its VMM reported back, until then the one it was granted. An
outstanding contract counts like a guest, started or not; a guest nobody knows anything about is above every level.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import GuestsAbove
from kvmneg.features import catalog as catalogs
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet, fits
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

# states of a holding, in the order in which an urgent lowering deals with them (kvmneg.policy.urgent)
BEGUN, RUNNING, UNKNOWN, SUSPENDED, SAVED = "begun", "running", "unknown", "suspended", "saved"


class Holding(NamedTuple):
    """One guest, or one contract that is outstanding.

    `vm` is its UUID ("pid N" of a process with a VM of which nobody knows it), `digest` its contract's, "" where it has
    none, `granted` what it holds, None where nobody knows; `state` one of the above; `uid` the owner's.
    """

    vm: str
    digest: str
    granted: FeatureSet | None
    state: str
    uid: int


class Above(NamedTuple):
    """A holding above a level, and what it has more: empty where nobody knows what it has."""

    holding: Holding
    blockers: tuple[Blocker, ...]

    def to_json(self) -> dict[str, object]:
        """{"vm", "digest" or null, "state", "uid", "features": the first names, "count", "known"}."""
        holding = self.holding
        names = sorted({blocker.feature for blocker in self.blockers})
        return {
            "vm": holding.vm,
            "digest": holding.digest or None,
            "state": holding.state,
            "uid": holding.uid,
            "features": names[: limits.FEATURES_NAMED],
            "count": len(names),
            "known": holding.granted is not None,
        }


def above(holdings: Iterable[Holding], level: FeatureSet, where: str = "the level") -> list[Above]:
    """The holdings that do not fit a level, in the order given; thousands of guests share a few sets."""
    judged: dict[FeatureSet, tuple[Blocker, ...]] = {}
    found = []
    for holding in holdings:
        granted = holding.granted
        if granted is None:
            found.append(Above(holding, ()))
            continue
        if granted not in judged:
            judged[granted] = exceeding(granted, level, where)
        if judged[granted]:
            found.append(Above(holding, judged[granted]))
    return found


def exceeding(granted: FeatureSet, level: FeatureSet, where: str) -> tuple[Blocker, ...]:
    """What a guest has more than a level. A vendor that the level leaves open is nobody's excess."""
    if granted.architecture != level.architecture:
        return fits(granted, level, missing_on=where, cause="fence")
    unnamed = set(catalogs.load(level.architecture).equal_words) - set(level.words)
    found = fits(granted, level, missing_on=where, cause="fence")
    return tuple(blocker for blocker in found if blocker.word not in unnamed)


def require_none_above(
    holdings: Iterable[Holding], level: FeatureSet, override: Collection[str] = ()
) -> list[str]:
    """The guests above a level that `override` names, sorted. Raises GuestsAbove where it does not name all.

    A guest's name is its UUID, UUID/UID where several users have one of it: any user may choose another's.
    """
    high = above(holdings, level)
    found = list(zip(high, _names(high), strict=True))
    given = {name.lower() for name in override}
    unnamed = [(one, name) for one, name in found if name.lower() not in given]
    if unnamed:
        named = ", ".join(name for _, name in unnamed[:8])
        more = f" and {len(unnamed) - 8} more" if len(unnamed) > 8 else ""
        raise GuestsAbove(
            f"guests hold more than that: {named}{more}",
            hint="they keep it until they are cold-booted, moved away, or named to be passed over",
            guests=[one.to_json() for one, _ in unnamed[: limits.GUESTS_NAMED]],
            count=len(unnamed),
        )
    return sorted(name for _, name in found)


def _names(found: Iterable[Above]) -> list[str]:
    holdings = [one.holding for one in found]
    users: dict[str, set[int]] = {}
    for one in holdings:
        users.setdefault(one.vm, set()).add(one.uid)
    return [f"{one.vm}/{one.uid}" if len(users[one.vm]) > 1 else one.vm for one in holdings]
