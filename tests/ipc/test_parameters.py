# SPDX-License-Identifier: LGPL-2.1-or-later
"""Parameters against their types: every kind of type, every way to be wrong (UAPI.20, "Mapping the Type System")."""

from __future__ import annotations

import pytest

from kvmneg.service.interfaces.parameters import check, fields_of
from kvmneg.service.varlink.message import InvalidParameter, MethodNotFound

TYPES = {"Inner": {"name": "string", "tags": "?[]string", "deeper": "?Inner"}}
FIELDS = {
    "flag": "?bool",
    "number": "?int",
    "fraction": "?float",
    "text": "?string",
    "list": "?[]string",
    "lists": "?[][]int",
    "maybes": "?[]?int",
    "map": "?[string]int",
    "enum": "?(red, green)",
    "inner": "?Inner",
    "inners": "?[]Inner",
    "raw": "?object",
}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"flag": True},
        {"number": 0},
        {"number": -(2**63)},
        {"number": 2**64 - 1},
        {"fraction": 1.5},
        {"fraction": 1},
        {"text": "é\0"},
        {"list": []},
        {"list": ["a", "b"]},
        {"lists": [[], [1]]},
        {"maybes": [None, 1]},
        {"map": {}},
        {"map": {"a": 1}},
        {"enum": "green"},
        {"inner": {"name": "x"}},
        {"inner": {"name": "x", "deeper": {"name": "y", "tags": ["z"]}}},
        {"inners": [{"name": "x"}]},
        {"raw": {"any": [None, {"thing": 1.5}]}},
    ],
)
def test_what_fits_is_returned(given):
    assert check(given, FIELDS, TYPES) == given


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_null_is_absent(name):
    assert check({name: None}, FIELDS, TYPES) == {}


def test_null_in_a_structure_is_absent():
    assert check({"inner": {"name": "x", "tags": None}}, FIELDS, TYPES) == {"inner": {"name": "x"}}


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({"unknown": 1}, "unknown"),
        ({"flag": 1}, "flag"),
        ({"flag": "true"}, "flag"),
        ({"number": True}, "number"),
        ({"number": 1.0}, "number"),
        ({"number": "1"}, "number"),
        ({"number": 2**64}, "number"),
        ({"number": -(2**63) - 1}, "number"),
        ({"fraction": True}, "fraction"),
        ({"fraction": float("inf")}, "fraction"),
        ({"text": 1}, "text"),
        ({"text": "\ud800"}, "text"),
        ({"list": "a"}, "list"),
        ({"list": {}}, "list"),
        ({"list": ["a", 1]}, "list[1]"),
        ({"list": [None]}, "list[0]"),
        ({"lists": [[1], ["x"]]}, "lists[1][0]"),
        ({"map": []}, "map"),
        ({"map": {"a": "x"}}, "map[a]"),
        ({"enum": "blue"}, "enum"),
        ({"enum": 0}, "enum"),
        ({"inner": []}, "inner"),
        ({"inner": {}}, "inner.name"),
        ({"inner": {"name": None}}, "inner.name"),
        ({"inner": {"name": "x", "other": 1}}, "inner.other"),
        ({"inner": {"name": "x", "deeper": {"name": 1}}}, "inner.deeper.name"),
        ({"inners": [{"name": "x"}, {"name": 1}]}, "inners[1].name"),
        ({"raw": []}, "raw"),
        ({"raw": "x"}, "raw"),
    ],
)
def test_what_does_not_fit_is_named(given, path):
    with pytest.raises(InvalidParameter) as error:
        check(given, FIELDS, TYPES)
    assert error.value.parameters() == {"parameter": path}
    assert error.value.varlink == "org.varlink.service.InvalidParameter"


@pytest.mark.parametrize("given", [{}, {"request": None}])
def test_what_is_required_is_missed(given):
    with pytest.raises(InvalidParameter) as error:
        check(given, fields_of("org.kvmneg.Negotiate"))
    assert error.value.value == "request"


def test_a_request_of_the_interface():
    request = {"level": "x86-64-v2", "require": ["avx2"], "optional": None}
    checked = check({"request": request}, fields_of("org.kvmneg.Negotiate"))
    assert checked == {"request": {"level": "x86-64-v2", "require": ["avx2"]}}


@pytest.mark.parametrize("method", ["org.kvmneg.None", "org.none.Get", "Get", ""])
def test_methods_that_are_not(method):
    with pytest.raises(MethodNotFound):
        fields_of(method)
