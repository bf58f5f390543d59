# SPDX-License-Identifier: LGPL-2.1-or-later
"""Registers that are one value together and differ between hosts: what they say on each, and what goes with them. Pure.

An XSAVE component (size, offset, flags) and the leaf of processor trace are such values (`with` in the catalogue's
tables): guests keep images of them in their memory, so a pool whose hosts differ has neither of both.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features.difference import show
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmneg.features.catalog import Feature, Names
    from kvmneg.policy.pool import Kind

_XSAVE = "cpuid:0xd."
_PARTS = {"eax": "size", "ebx": "offset", "ecx": "flags"}  # of an XSAVE component, CPUID 0xD


class Group(NamedTuple):
    """One such value that differs: the feature of the register that leads it, and all its registers."""

    lead: Feature
    words: tuple[str, ...]


def groups(members: Sequence[Kind]) -> list[Group]:
    """Those in which hosts that have them differ, in the order of the catalogue."""
    architecture = members[0].offer.architecture
    table = catalogs.names(architecture)
    found = []
    for lead, others in catalogs.load(architecture).groups:
        words = lead, *others
        if len({_value(kind, words) for kind in members if kind.offer.value(lead)}) > 1:
            (feature,) = table.by_place[lead]
            found.append(Group(feature, words))
    return found


def because(feature: Feature, differing: Sequence[Group], members: Sequence[Kind]) -> str:
    """Why hosts that have a feature do not share it: what differs of each value it is built on, "" where nothing does.

    Like "XSAVE layout differs: pkru offset 0xa80 on node1, 0x980 on node2".
    """
    if not differing:
        return ""
    bases = _bases(feature, catalogs.names(members[0].offer.architecture))
    owners = [kind for kind in members if feature.of(kind.offer.value(feature.word))]
    parts: dict[str, list[str]] = {}
    for group in differing:
        if group.lead.name in bases or feature.word in group.words:
            title, what = _told(group, owners)
            if what:
                parts.setdefault(title, []).append(what)
    return "; ".join(f"{title} differs: {'; '.join(rows)}" for title, rows in parts.items())


def _told(group: Group, owners: Sequence[Kind]) -> tuple[str, str]:
    """("XSAVE layout", "pkru offset 0xa80 on node1, 0x980 on node2"), "" where these hosts have the same."""
    rows = []
    for word in group.words:
        hosts: dict[int, list[str]] = {}
        for kind in owners:
            hosts.setdefault(kind.offer.value(word), []).extend(kind.hosts())
        if len(hosts) > 1:
            rows.append(f"{_part(group, word)} {_sides(word, hosts)}")
    if group.lead.word.startswith(_XSAVE):
        return "XSAVE layout", ", ".join(rows)
    return f"leaf {group.lead.word.partition(':')[2].partition('.')[0]}", ", ".join(rows)


def _sides(word: str, hosts: dict[int, list[str]]) -> str:
    from kvmneg.policy.pool import some

    return ", ".join(f"{show(word, value)} on {some(names)}" for value, names in hosts.items())


def _part(group: Group, word: str) -> str:
    if not word.startswith(_XSAVE):
        return word
    return f"{group.lead.name.removeprefix('xsave-').removesuffix('-size')} {_PARTS[word.rpartition('.')[2]]}"


def _value(kind: Kind, words: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(kind.offer.value(word) for word in words)


def _bases(feature: Feature, table: Names) -> set[str]:
    """Everything that a feature is built on, by name."""
    found: set[str] = set()
    queue = [feature]
    while queue:
        for name, _least in queue.pop().bases:
            if name not in found:
                found.add(name)
                queue.append(table.by_name[name])
    return found
