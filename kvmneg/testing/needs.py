# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test needs of KVM, as its `kvm` marks say it, and the request that asks for it. Pure."""

from __future__ import annotations

from kvmneg.errors import UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.policy import definitions
from kvmneg.policy.request import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from kvmneg.features.difference import Blocker

_FIELDS = ("requires", "level", "enforced")


class Needs:
    """`requires` are names of features, `level` a psABI level; with `enforced` KVM must keep to all of the contract.

    Equal needs are one key of a dict.
    """

    __slots__ = ("enforced", "level", "requires")

    def __init__(
        self, requires: tuple[str, ...] = (), level: str | None = None, *, enforced: bool = False
    ) -> None:
        self.requires = requires
        self.level = level
        self.enforced = enforced

    @classmethod
    def of_marks(cls, marks: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]]) -> Needs:
        """From the (args, kwargs) of a test's marks, the closest first: features add up, the closest level counts.

        Raises UsageError for what a mark does not have.
        """
        requires: dict[str, None] = {}
        level, enforced = None, False
        for positional, named in marks:
            unknown = sorted(set(named) - set(_FIELDS))
            if positional or unknown:
                what = unknown[0] if unknown else repr(positional[0])
                raise UsageError(f"the mark kvm has no {what}", hint=f"it has {', '.join(_FIELDS)}")
            requires |= dict.fromkeys(_names(named.get("requires", ())))
            level = level or _level(named.get("level"))
            enforced |= _flag(named.get("enforced", False))
        return cls(tuple(requires), level, enforced=enforced)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Needs) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __bool__(self) -> bool:
        """Whether anything is needed besides a KVM."""
        return any(self._key())

    def _key(self) -> tuple[tuple[str, ...], str | None, bool]:
        return self.requires, self.level, self.enforced

    def request(self, architecture: str) -> Request:
        """What a VMM would ask for: the features with those that they are built on.

        Raises UsageError for a feature that there is not.
        """
        return Request(
            level=self.level,
            require=with_bases(self.requires, architecture),
            require_enforced=self.enforced,
        )

    def meant_for(self, architecture: str) -> str:
        """The other architecture that all of it is of, where it makes no sense on this one; "" where there is none."""
        for other in catalogs.available():
            if other != architecture and self._known(other):
                return other
        return ""

    def _known(self, architecture: str) -> bool:
        try:
            with_bases(self.requires, architecture)
            if self.level is not None:
                definitions.level(self.level, architecture)
        except UsageError:
            return False
        return True


def with_bases(names: Iterable[str], architecture: str) -> tuple[str, ...]:
    """Features with those that must be asked for by name too: avx2 with avx, xsave, xcr0-avx, …

    Numbers, and VMX controls, which come with their word, are not asked for. Raises UsageError for an unknown name.
    """
    book = catalogs.names(architecture)
    asked = {feature.name: feature for feature in map(book.feature, names)}
    queue = list(asked.values())
    seen = set(asked)
    while queue:
        for name, _least in queue.pop().bases:
            if name not in seen:
                seen.add(name)
                base = book.by_name[name]
                queue.append(base)
                if base.is_bit and not base.whole:
                    asked[name] = base
    return tuple(asked)


def brief(blockers: Iterable[Blocker]) -> str:
    """Blockers in one line: features that are missing for the same reason stand together."""
    groups: dict[str, list[str]] = {}
    for blocker in blockers:
        groups.setdefault(f"{blocker.because} [{blocker.cause}]", []).append(blocker.feature)
    return "; ".join(f"{' '.join(features)}: {because}" for because, features in groups.items())


def _names(value: object) -> tuple[str, ...]:
    """A list of names. One string would be taken apart into letters."""
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise UsageError("requires is a list of features", hint='write requires=["avx2"]')
    if not all(isinstance(name, str) for name in value):
        raise UsageError("requires is a list of names of features")
    return tuple(value)


def _level(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise UsageError("level is a name", hint='write level="x86-64-v3"')
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError("enforced is True or False")
    return value
