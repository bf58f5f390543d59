# SPDX-License-Identifier: LGPL-2.1-or-later
"""The named tuples of a start are what typing's are: each case is made of both, and both have to agree."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import typing
from typing import Any

import pytest

from kvmneg import records

CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((1, 2), {}),
    ((1, 2, 3), {}),
    ((1,), {"second": 2}),
    ((), {"third": 3, "second": 2, "first": 1}),
    ((), {"first": 1, "second": 2}),
    ((), {}),
    ((1,), {}),
    ((1, 2, 3, 4), {}),
    ((1, 2), {"first": 1}),
    ((1, 2), {"fourth": 4}),
    ((), {"first": 1, "third": 3}),
]


class Ours(records.NamedTuple):
    first: int
    second: int
    third: object = None

    @property
    def total(self) -> int:
        return self.first + self.second


class Theirs(typing.NamedTuple):
    first: int
    second: int
    third: object = None

    @property
    def total(self) -> int:
        return self.first + self.second


def outcome(kind: Any, given: tuple[Any, ...], named: dict[str, Any]) -> object:
    try:
        made = kind(*given, **named)
    except TypeError:
        return TypeError
    return tuple(made), made.first, made.second, made.third, made.total, made._asdict()


@pytest.mark.parametrize(("given", "named"), CALLS)
def test_a_call_gives_what_typings_gives(given: tuple[Any, ...], named: dict[str, Any]) -> None:
    assert outcome(Ours, given, named) == outcome(Theirs, given, named)


def test_the_class_says_what_typings_says() -> None:
    for name in ("_fields", "_field_defaults", "__match_args__", "__slots__"):
        assert getattr(Ours, name) == getattr(Theirs, name)
    assert repr(Ours(1, 2)).removeprefix("Ours") == repr(Theirs(1, 2)).removeprefix("Theirs")


def test_it_is_a_tuple_that_cannot_be_changed() -> None:
    one = Ours(1, 2)
    assert one == (1, 2, None) and hash(one) == hash((1, 2, None)) and one < (1, 3)
    with pytest.raises(AttributeError):
        one.first = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        one.fourth = 2  # type: ignore[attr-defined]


def test_replace_and_make() -> None:
    assert Ours(1, 2)._replace(second=5) == Ours(1, 5)
    assert type(Ours(1, 2)._replace(second=5)) is Ours
    assert Ours._make([1, 2, 3]) == Ours(1, 2, 3)
    with pytest.raises((TypeError, ValueError)):
        Ours(1, 2)._replace(fourth=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Ours._make([1, 2])


def test_it_is_copied_and_pickled_as_itself() -> None:
    one = Ours(1, 2, [3])
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert again == one and type(again) is Ours


def test_a_pattern_takes_it_apart() -> None:
    match Ours(1, 2):
        case Ours(first, second):
            assert (first, second) == (1, 2)


def test_a_field_without_a_default_follows_none_that_has_one() -> None:
    source = "class Wrong(base):\n    first: int = 1\n    second: int\n"
    for base in (records.NamedTuple, typing.NamedTuple):
        with pytest.raises(TypeError):
            exec(source, {"base": base, "__name__": __name__})


def test_a_daemon_starts_without_typing() -> None:
    rooms = (
        "kvmneg.service.daemon, kvmneg.service.node, kvmneg.service.interfaces.router, kvmneg.store.opening"
    )
    code = f"import sys; had = set(sys.modules); import {rooms}; print(*sorted(set(sys.modules) - had))"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "kvmneg.store.opening" in found.stdout.split()
    assert "typing" not in found.stdout.split()
