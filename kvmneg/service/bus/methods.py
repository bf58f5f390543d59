# SPDX-License-Identifier: LGPL-2.1-or-later
"""The methods that D-Bus has, as twins of varlink's, and how values go from the one to the other.

Inputs that varlink needs are a method's own, in varlink's order; those that may be null are entries of a last one,
`options`, a dictionary. A structure, or a list of them, is a JSON text as varlink would have it. What varlink has as
null is an empty text, list, 0 or false here. What a VM monitor calls for its own guest, or keeps by its connection,
is varlink's alone.
"""

from __future__ import annotations

import json

from kvmneg.service.interfaces.parameters import METHODS as INPUTS
from kvmneg.service.varlink.message import InvalidParameter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

PATH = "/org/kvmneg1"
NAME = "org.kvmneg1"

_MOVED = {"generation": "t", "state": "s", "digest": "s", "plan": "s"}
_SET = {"combo": "s", "changed": "b"}

# varlink's interface → method → what it returns, as D-Bus types. The interface is called org.kvmneg1… here. Answers of
# D-Bus cannot grow as varlink's can: once released, what comes to those is left out here, or has a method of its own.
METHODS: dict[str, dict[str, dict[str, str]]] = {
    "org.kvmneg": {
        "GetHost": {"host": "s", "generation": "t", "state": "s", "fence": "s"},
        "Negotiate": {"contract": "s", "digest": "s", "generation": "t", "notGranted": "s", "scope": "as"},
        "Check": {"fits": "b", "blockers": "s", "grade": "s", "scope": "as"},
        "GetContract": {"contract": "s", "path": "s", "state": "s"},
        "End": {},
    },
    "org.kvmneg.Fence": {
        "Get": {
            "pinned": "b", "generation": "t", "digest": "s", "text": "s", "state": "s", "heldBack": "b",
            "proposal": "s", "stale": "s",
        },
        "Pin": {"generation": "t", "digest": "s", "text": "s"},
        "Unpin": {"generation": "t"},
        "History": {"entries": "s"},
        "Plan": {"plan": "s"},
        "Raise": _MOVED,
        "Lower": _MOVED,
        "Emergency": _MOVED,
        "Commit": _MOVED,
        "Abort": _MOVED,
        "Restore": {"generation": "t", "digest": "s", "text": "s"},
        "Progress": {"proposal": "s", "guests": "s", "done": "t", "count": "t"},
        "Audit": {"entries": "s"},
    },
    "org.kvmneg.Guests": {
        "List": {"guests": "s", "unknown": "s", "missed": "s", "others": "t", "next": "t"},
        "Get": {"guest": "s", "contract": "s", "holds": "a{ss}"},
        "Import": {"digest": "s", "incarnation": "t"},
        "Waive": {},
    },
    "org.kvmneg.Rollback": {
        "History": {"entries": "s"},
        "GetReport": {"combo": "s", "report": "s"},
        "Add": _SET,
        "Remove": _SET,
        "List": {"entries": "s", "scope": "as"},
        "Plan": {"combo": "s", "take": "as", "text": "s", "blockers": "s"},
        "Check": {
            "allowed": "b", "measured": "b", "combo": "s", "nearest": "s", "differs": "s", "changes": "s",
            "blockers": "s", "guests": "s", "unknown": "t", "unknownGuests": "as", "how": "s",
            "prediction": "s", "scope": "as",
        },
    },
}  # fmt: skip

# Of org.kvmneg1 itself; each tells of its change.
PROPERTIES = {"Generation": "t", "FenceDigest": "s", "State": "s", "Host": "s"}
SIGNALS = {
    "FenceChanged": {"generation": "t", "digest": "s", "state": "s"},
    "HostChanged": {"digest": "s"},
    "Breached": {"generation": "t", "digest": "s"},
}

# varlink's type → D-Bus's; what is not here is a JSON text.
_TYPES = {"string": "s", "bool": "b", "int": "x", "[]string": "as", "[string]string": "a{ss}"}
_INTEGERS = frozenset("nqiuxty")
_EMPTY: dict[str, Any] = {"s": "", "b": False, "t": 0, "as": [], "a{ss}": {}}


def interface_name(varlink: str) -> str:
    """org.kvmneg.Fence → org.kvmneg1.Fence."""
    return NAME + varlink.removeprefix("org.kvmneg")


def inputs(interface: str, method: str) -> dict[str, str]:
    """A method's inputs: name → D-Bus type."""
    fields = INPUTS[interface][method]
    needed = {name: _TYPES.get(kind, "s") for name, kind in fields.items() if not kind.startswith("?")}
    return {**needed, "options": "a{sv}"} if len(needed) < len(fields) else needed


def to_varlink(interface: str, method: str, given: tuple[Any, ...]) -> dict[str, Any]:
    """A call's parameters from its D-Bus values, whose signature sd-bus has checked. Raises InvalidParameter.

    Only what D-Bus can spell otherwise is looked at here; the daemon checks the parameters as those of any call.
    """
    fields = INPUTS[interface][method]
    parameters: dict[str, Any] = {}
    for (name, signature), value in zip(inputs(interface, method).items(), given, strict=True):
        if signature == "a{sv}":
            for option, (kind, content) in value.items():
                parameters[option] = _option(option, fields.get(option, ""), kind, content)
        else:
            parameters[name] = _document(name, value) if _is_document(fields[name]) else value
    return parameters


def from_varlink(interface: str, method: str, answer: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
    """The signature and the values of an answer."""
    outputs = METHODS[interface][method]
    return "".join(outputs.values()), tuple(
        _output(signature, answer.get(name)) for name, signature in outputs.items()
    )


def _is_document(kind: str) -> bool:
    return kind.removeprefix("?") not in _TYPES


def _option(name: str, field: str, kind: str, content: Any) -> Any:
    if not field.startswith("?"):
        raise InvalidParameter(name)  # unknown, or one that stands by itself
    expected = _TYPES.get(field.removeprefix("?"), "s")
    if kind != expected and not (expected == "x" and kind in _INTEGERS):
        raise InvalidParameter(name)
    return _document(name, content) if _is_document(field) else content


def _document(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidParameter(name) from None


def _output(signature: str, value: Any) -> Any:
    if value is None:
        return _EMPTY[signature]
    if signature == "s" and not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    return value
