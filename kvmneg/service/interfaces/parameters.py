# SPDX-License-Identifier: LGPL-2.1-or-later
"""The input types of every method, and the check of a call's parameters against them.

The types are written as in the .varlink files, which are the API document. Reading those at each start would cost
more than the rest of the transport's start, so they stand here again, and tests/ipc/test_idl.py holds both together.
"""

from __future__ import annotations

from kvmneg.service.varlink.message import InvalidParameter, MethodNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

# Structures that inputs use, by the name the interface gives them: field → type.
TYPES: dict[str, dict[str, str]] = {
    "Request": {
        "max": "?bool",
        "level": "?string",
        "require": "?[]string",
        "optional": "?[]string",
        "exact": "?[]string",
        "vmm": "?string",
        "requireEnforced": "?bool",
        "tscKhz": "?int",
    },
}

# What moves of the fence have in common: how a level is named, and the rest.
_LEVEL = {"from": "?string", "text": "?string", "without": "?[]string"}
# What polkit may permit: whether it may ask a person.
_ASK = {"allowInteractiveAuthentication": "?bool"}
_MOVE = {"reason": "string", "expectedGeneration": "?int", "dryRun": "?bool", **_ASK}

# Interface → method → parameter → type.
METHODS: dict[str, dict[str, dict[str, str]]] = {
    "org.varlink.service": {"GetInfo": {}, "GetInterfaceDescription": {"interface": "string"}},
    "org.kvmneg": {
        "GetHost": {},
        "Negotiate": {"request": "Request", "digestOnly": "?bool"},
        "Begin": {"digest": "string", "vm": "string", "hold": "?bool", "pid": "?int", **_ASK},
        "Started": {"vm": "string", "incarnation": "?int"},
        "End": {"vm": "string", "incarnation": "?int"},
        "Check": {"request": "?Request", "digest": "?string", "vmm": "?string"},
        "GetContract": {"digest": "string"},
        "Watch": {},
    },
    "org.kvmneg.Guests": {
        "List": {"after": "?int"},
        "Get": {"vm": "string"},
        "Report": {"vm": "string", "words": "[string]string", "incarnation": "?int"},
        "Saved": {"vm": "string", "incarnation": "?int"},
        "Handover": {"vm": "string", "hold": "?bool", "pid": "?int", "incarnation": "?int", **_ASK},
        "Receive": {
            "contract": "?object",
            "binary": "?string",
            "vm": "string",
            "vmm": "?string",
            "hold": "?bool",
            "pid": "?int",
            **_ASK,
        },
        "Import": {"pid": "int", "vm": "string", "contract": "?object", "reason": "string", **_ASK},
        "Waive": {"pid": "int", "reason": "string", **_ASK},
    },
    "org.kvmneg.Fence": {
        "Get": {},
        "Pin": {"from": "?string", "text": "?string", **_MOVE},
        "Unpin": _MOVE,
        "Restore": {"reason": "string", "above": "?int", **_ASK},
        "History": {"limit": "?int"},
        "Plan": _LEVEL,
        "Raise": {"from": "?string", "text": "?string", **_MOVE},
        "Lower": {**_LEVEL, **_MOVE},
        "Emergency": {**_LEVEL, **_MOVE},
        "Commit": {"consent": "?[]string", "override": "?[]string", "digest": "?string", **_MOVE},
        "Abort": _MOVE,
        "Progress": {},
        "Audit": {"limit": "?int", "before": "?int", **_ASK},
    },
    "org.kvmneg.Rollback": {
        "History": {"limit": "?int"},
        "GetReport": {"combo": "string"},
        "Add": {"combo": "string", "reason": "string", **_ASK},
        "Remove": {"combo": "string", "reason": "string", **_ASK},
        "List": {},
        "Plan": {"combo": "string"},
        "Check": {
            "combo": "?string",
            "kernel": "?string",
            "vmm": "?string",
            "dimensions": "?[string]string",
            "predict": "?bool",
        },
    },
}

_INT = range(-(2**63), 2**64)  # the range UAPI.20 recommends ("Integers")


def check(
    parameters: Mapping[str, Any],
    fields: Mapping[str, str],
    types: Mapping[str, Mapping[str, str]] = TYPES,
) -> dict[str, Any]:
    """The parameters, with nullable fields that are null left out: absent and null are the same.

    Raises InvalidParameter with the path of the first one that is unknown, missing or not of its type.
    """
    return _structure(parameters, fields, types, "")


def fields_of(method: str) -> dict[str, str]:
    """The input of a fully-qualified method. Raises MethodNotFound."""
    interface, _, name = method.rpartition(".")
    try:
        return METHODS[interface][name]
    except KeyError:
        raise MethodNotFound(method) from None


def _structure(
    value: Mapping[str, Any], fields: Mapping[str, str], types: Mapping[str, Mapping[str, str]], path: str
) -> dict[str, Any]:
    checked = {}
    for name, item in value.items():
        if name not in fields:
            raise InvalidParameter(path + name)
        if item is None and fields[name].startswith("?"):
            continue
        checked[name] = _value(item, fields[name].removeprefix("?"), types, path + name)
    for name, kind in fields.items():
        if name not in checked and not kind.startswith("?"):
            raise InvalidParameter(path + name)
    return checked


def _value(value: Any, kind: str, types: Mapping[str, Mapping[str, str]], path: str) -> Any:
    """One value of a type that is not nullable."""
    if kind.startswith("[]"):
        if type(value) is not list:
            raise InvalidParameter(path)
        element = kind[2:]
        return [_element(item, element, types, f"{path}[{number}]") for number, item in enumerate(value)]
    if kind.startswith("[string]"):
        if type(value) is not dict:
            raise InvalidParameter(path)
        element = kind[8:]
        return {key: _element(item, element, types, f"{path}[{key}]") for key, item in value.items()}
    if kind in _ELEMENTARY:
        if not _ELEMENTARY[kind](value):
            raise InvalidParameter(path)
        return value
    if kind.startswith("("):  # an enumeration
        if type(value) is not str or value not in kind[1:-1].split(", "):
            raise InvalidParameter(path)
        return value
    if type(value) is not dict:
        raise InvalidParameter(path)
    return _structure(value, types[kind], types, path + ".")


def _element(value: Any, kind: str, types: Mapping[str, Mapping[str, str]], path: str) -> Any:
    if kind.startswith("?"):
        return None if value is None else _value(value, kind[1:], types, path)
    return _value(value, kind, types, path)


def _is_string(value: Any) -> bool:
    """Unicode text. JSON can spell half a surrogate pair, which is none, and which no file or database takes."""
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_ELEMENTARY: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: type(value) is bool,
    "int": lambda value: type(value) is int and value in _INT,
    "float": lambda value: type(value) in (int, float) and abs(value) < float("inf"),
    "string": _is_string,
    "object": lambda value: type(value) is dict,
}
