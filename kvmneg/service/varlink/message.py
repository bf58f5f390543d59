# SPDX-License-Identifier: LGPL-2.1-or-later
"""Varlink messages: calls read strictly, replies written once as bytes (UAPI.20, "Wire Protocol").

A message is a JSON object in UTF-8; on a socket a NUL ends it. Replies here carry their NUL, because the bytes
are kept and sent as they are.
"""

from __future__ import annotations

import json

from kvmneg import limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, NoReturn

SERVICE = "org.varlink.service"
_MEMBERS = frozenset(("method", "parameters", "more", "oneway", "upgrade"))


class Malformed(Exception):
    """Not a varlink call. There is no reply to such a message: the connection is closed."""


class Later(Exception):
    """A call cannot be answered yet. It is made again at `Server.unpark`; until then its connection waits."""


class ServiceError(Exception):
    """An error that any method of any varlink service may give: org.varlink.service.*, one string each.

    No KvmnegError: these are about the call, and end with it.
    """

    member = ""

    def __init__(self, value: str = "") -> None:
        super().__init__(value)
        self.varlink = f"{SERVICE}.{type(self).__name__}"
        self.value = value

    def parameters(self) -> dict[str, Any]:
        return {self.member: self.value} if self.member else {}


class InterfaceNotFound(ServiceError):
    """The service has no such interface."""

    member = "interface"


class MethodNotFound(ServiceError):
    """The interface has no such method; the value is the fully-qualified name."""

    member = "method"


class MethodNotImplemented(ServiceError):
    """The method is not to be had in this way: no method here takes a connection over (`upgrade`)."""

    member = "method"


class InvalidParameter(ServiceError):
    """A parameter is unknown, missing or not of its type; the value is its path, such as `request.require[3]`."""

    member = "parameter"


class ExpectedMore(ServiceError):
    """The method answers more than once and has to be called with `more`."""


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")  # Python reads NaN and Infinity unless told not to


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode
# check_circular: replies are trees that we built
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode


def parse_call(call: bytes) -> tuple[str, dict[str, Any], bool, bool, bool]:
    """(method, parameters, more, oneway, upgrade) of a call without its NUL.

    Raises Malformed: not UTF-8, not JSON (an integer of more than 4300 digits, nesting beyond the parser's or
    NESTING_DEPTH, NaN), not an object, a member that is neither the text's nor a vendor's (no dot in its name),
    no method, parameters that are not an object, a flag that is not a boolean, two flags.
    """
    try:
        message = _decode(call.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None
    if type(message) is not dict:
        raise Malformed("not an object")
    for member in message:
        if member not in _MEMBERS and "." not in member:
            raise Malformed("an unknown member without a vendor's prefix")
    method, parameters = message.get("method"), message.get("parameters")
    if type(method) is not str:
        raise Malformed("no method")
    if parameters is None:
        parameters = {}
    elif type(parameters) is not dict:
        raise Malformed("parameters are not an object")
    flags = [message.get(flag, False) for flag in ("more", "oneway", "upgrade")]
    if any(type(flag) is not bool for flag in flags):
        raise Malformed("a flag is not a boolean")
    if sum(flags) > 1:
        raise Malformed("two flags exclude each other")
    _check_depth(message)
    return method, parameters, *flags


def _check_depth(message: dict[str, Any]) -> None:
    """Level by level, so that the check itself cannot run out of stack."""
    level: list[Any] = [message]
    for _ in range(limits.NESTING_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if type(node) is dict else node)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise Malformed("nested too deeply")


def reply(parameters: Mapping[str, Any], *, continues: bool = False) -> bytes:
    """A reply with its NUL; empty parameters are left out, as the text asks."""
    message: dict[str, Any] = {"parameters": parameters} if parameters else {}
    if continues:
        message["continues"] = True
    return _encode(message).encode("ascii") + b"\0"


def error_reply(name: str, parameters: Mapping[str, Any]) -> bytes:
    """An error reply with its NUL."""
    message: dict[str, Any] = {"error": name}
    if parameters:
        message["parameters"] = parameters
    return _encode(message).encode("ascii") + b"\0"
