# SPDX-License-Identifier: LGPL-2.1-or-later
"""What changed between two measurements of this host, as lines for the journal."""

from __future__ import annotations

from kvmneg.errors import NoKvm
from kvmneg.features.featureset import diff
from kvmneg.policy import combos
from kvmneg.service import journal, telling

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmneg.errors import KvmnegError
    from kvmneg.features.difference import Difference
    from kvmneg.features.report import Report
    from kvmneg.service.node import Node

_NAMED = 12  # of each kind in one line; the rest are counted
_BOOT = "boot"


def told(before: Report | None, after: Report | None, why_not: KvmnegError | None = None) -> list[str]:
    """One line for each kind of change: the inputs, and what is offered no more, besides, or with another value."""
    if after is None:
        reason = f": {why_not.message}" if why_not else ""
        return [f"this host cannot be measured any more{reason}; nothing is granted"] if before else []
    if before is None:
        return ["this host is measured again"]
    lines = []
    found = {one.name: one for one in combos.between(before.combo, after.combo)}
    inputs = [
        f"{name} {found[name].ours or '-'} -> {found[name].recorded or '-'}"
        for name in combos.for_people(list(found))
    ]
    if before.combo.get(_BOOT) != after.combo.get(_BOOT):
        inputs.insert(0, "another boot")
    if inputs:
        lines.append(f"this host was measured again, as its inputs changed: {_some(inputs, '; ')}")
    if before.architecture == after.architecture:
        lines += _offers(diff(before.offer, after.offer))
    return lines


def tell(before: Report | None, after: Report | None, why_not: KvmnegError | None = None) -> None:
    """Tell it to the journal, where there is something to tell."""
    lines = told(before, after, why_not)
    if not lines:
        return
    if after is None:
        telling.unmeasured(why_not or NoKvm("not measured"), lines[0])
        return
    digests = {"host_digest": after.digest(), "combo_digest": after.combo_digest()}
    if before is None:
        journal.event("host-measured", *lines, **digests)
        return
    inputs = combos.for_people([one.name for one in combos.between(before.combo, after.combo)])
    lost, gained, other = _moved(before, after)
    told_of = {"inputs": inputs, "lost": lost, "gained": gained, "changed": other}
    journal.event("host-changed", *lines, **digests, **{name: some or None for name, some in told_of.items()})


def before_start(node: Node, first: Report) -> Report | None:
    """What this host was when it was measured before the first time of this daemon, None where it never was.

    Raises StoreError, BadInput.
    """
    from kvmneg.service.level.rolls import opened  # only where something changed

    last = node.store.rolls.before(first.digest())
    return opened(last, last.at) if last else None


def _moved(before: Report, after: Report) -> tuple[list[str], list[str], list[str]]:
    """The names of what is offered no more, what besides, and what with another value."""
    if before.architecture != after.architecture:
        return [], [], []
    rows = list(diff(before.offer, after.offer))
    bits = [row for row in rows if row.width == 1]
    return (
        [row.feature for row in bits if row.a],
        [row.feature for row in bits if row.b],
        [row.feature for row in rows if row.width > 1],
    )


def _offers(rows: Sequence[Difference]) -> list[str]:
    bits = [row for row in rows if row.width == 1]
    kinds = (
        ("it offers no more", [row.feature for row in bits if row.a]),
        ("it offers besides", [row.feature for row in bits if row.b]),
        ("it offers otherwise", [f"{row.feature} {row.a:#x} -> {row.b:#x}" for row in rows if row.width > 1]),
    )
    return [f"{what}: {_some(names, ' ' if names[0].isalnum() else ', ')}" for what, names in kinds if names]


def _some(names: Sequence[str], between: str) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return between.join(names[:_NAMED]) + more
