# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a test needs of KVM, as its `kvm` marks say it, and the request that asks for it. Pure."""

from __future__ import annotations

from kvmneg.errors import Blocked, NoKvm, NotApplied, UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.policy import definitions
from kvmneg.policy.request import Request

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from kvmneg.errors import KvmnegError
    from kvmneg.features.difference import Blocker

_FIELDS = ("requires", "level", "enforced")
_LONGEST_NAME = 64  # of a mistake that is told


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
                raise _wrong(f"it has no {what}", f"it has {', '.join(_FIELDS)}")
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
        """What a VMM would ask for: the features with those that they are built on. Raises UsageError as `check`."""
        return Request(
            level=self.level,
            require=with_bases(self.requires, architecture),
            require_enforced=self.enforced,
        )

    def check(self) -> None:
        """Raises UsageError for a feature or a level that no architecture has, and for several that none has together.

        With what is nearest. No host is needed for it: a mistake shows on every one.
        """
        if any(map(self._known, catalogs.available())):
            return
        parts = [Needs((name,)) for name in self.requires]
        parts += [Needs(level=self.level)] if self.level is not None else []
        of = {(*part.requires, part.level)[0]: part.architectures() for part in parts}
        for name, architectures in of.items():
            if not architectures:
                raise _unknown(str(name), feature=name != self.level)
        each = ", ".join(f"{name} is {' and '.join(found)}'s" for name, found in of.items())
        raise _wrong("no architecture has all of it", each)

    def meant_for(self, architecture: str) -> str:
        """The other architecture that all of it is of, where it makes no sense on this one; "" where there is none."""
        return next((one for one in self.architectures() if one != architecture), "")

    def architectures(self) -> list[str]:
        """Those that have all of it."""
        return [one for one in catalogs.available() if self._known(one)]

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


def refusal(error: KvmnegError) -> str:
    """Why the host cannot run a test, in one line; "" for an error that says nothing of the host."""
    if isinstance(error, NoKvm):
        return f"no usable KVM: {error.message}"
    if isinstance(error, NotApplied):
        return f"KVM does not keep to the contract: {error.message}"
    return f"KVM cannot give it: {error.message}" if isinstance(error, Blocked) else ""


def brief(blockers: Sequence[Blocker]) -> str:
    """Blockers in one line: features that are missing for the same reason stand together.

    What is missing only because something else in the line is, is named without details.
    """
    groups: dict[str, list[str]] = {}
    roots = any(blocker.cause != "dependency" for blocker in blockers)
    for blocker in blockers:
        follows = roots and blocker.cause == "dependency"
        because = "not without what they are built on" if follows else blocker.because
        groups.setdefault(f"{because} [{blocker.cause}]", []).append(blocker.feature)
    return "; ".join(f"{' '.join(features)}: {because}" for because, features in groups.items())


def _wrong(what: str, hint: str = "") -> UsageError:
    return UsageError(f"the mark kvm makes no sense: {what}", hint=hint)


def _unknown(name: str, *, feature: bool) -> UsageError:
    """With what is nearest, on any architecture."""
    from difflib import get_close_matches  # only for a mistake

    there: set[str] = set()
    for architecture in catalogs.available():
        book = catalogs.names(architecture)
        if feature and name in book.by_alias:
            book.feature(name)  # it says of which features it is an alias
        there.update([*book.by_name, *book.by_alias] if feature else definitions.levels(architecture))
    near = get_close_matches(name[:_LONGEST_NAME], there, 3)
    what = "feature" if feature else "level"
    listed = "`kvmneg features` lists them" if feature else f"there are {', '.join(sorted(there))}"
    return _wrong(
        f"no {what} is called {name[:_LONGEST_NAME]!r}",
        f"did you mean {', '.join(near)}?" if near else listed,
    )


def _names(value: object) -> tuple[str, ...]:
    """A list of names. One string would be taken apart into letters."""
    if isinstance(value, str) or not isinstance(value, list | tuple | set | frozenset):
        raise _wrong("requires is a list of features", 'write requires=["avx2"]')
    if not all(isinstance(name, str) for name in value):
        raise _wrong("requires is a list of names of features", 'write requires=["avx2"]')
    return tuple(value)


def _level(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise _wrong("level is a name", 'write level="x86-64-v3"')
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong("enforced is True or False")
    return value
