# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.kvmneg.Fence: the methods that move the level, or say what would become of it."""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import LimitExceeded
from kvmneg.service import moves
from kvmneg.service.authorization import is_admin, require_admin
from kvmneg.service.interfaces import audit as audit_of
from kvmneg.service.interfaces import that_fit
from kvmneg.service.moves import Asked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmneg.service.node import Node
    from kvmneg.service.varlink import Connection
    from kvmneg.store.interface import Audit

    Method = Callable[[Node, Audit, dict[str, Any]], dict[str, Any]]


def call(node: Node, name: str, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    """Answer one method. Everybody may plan and look; what moves the level needs an admin and a reason.

    Only admins see other users' guests, which are counted for everybody, and the audit, which names them.
    """
    sees = None if is_admin(connection.peer) else connection.peer.uid
    if name == "Plan":
        return {"plan": moves.plan(node, _asked(given)).to_json(sees)}
    if name == "Progress":
        return moves.progress(node, sees)
    if name == "Audit":
        require_admin(connection.peer, "read the audit", "audit")
        return _audit(node, given)
    what, method = _METHODS[name]
    action = name.lower()
    if name in ("Commit", "Abort"):  # who may propose it may end it
        action = "raise" if node.proposal == "raise" else "lower"
    return method(node, audit_of(connection, what, given["reason"], action), given)


def _pin(node: Node, audit: Audit, given: dict[str, Any]) -> dict[str, Any]:
    row = moves.pin(
        node, given.get("from"), given.get("text"), _expected(given), audit, dry_run=_dry_run(given)
    )
    return {"generation": row.generation, "digest": row.digest, "text": row.text}


def _unpin(node: Node, audit: Audit, given: dict[str, Any]) -> dict[str, Any]:
    return {"generation": moves.unpin(node, _expected(given), audit, dry_run=_dry_run(given))}


def _raise(node: Node, audit: Audit, given: dict[str, Any]) -> dict[str, Any]:
    return moves.raise_(node, _asked(given), _expected(given), audit, dry_run=_dry_run(given))


def _lower(node: Node, audit: Audit, given: dict[str, Any]) -> dict[str, Any]:
    return moves.lower(node, _asked(given), _expected(given), audit, dry_run=_dry_run(given))


def _emergency(node: Node, audit: Audit, given: dict[str, Any]) -> dict[str, Any]:
    return moves.lower(node, _asked(given), _expected(given), audit, urgent=True, dry_run=_dry_run(given))


def _commit(node: Node, audit: Audit, given: dict[str, Any]) -> dict[str, Any]:
    return moves.commit(
        node,
        _expected(given),
        audit,
        consent=_few(given, "consent", "CONSENTS", limits.CONSENTS),
        override=_few(given, "override", "OVERRIDES", limits.OVERRIDES),
        digest=given.get("digest"),
        dry_run=_dry_run(given),
    )


def _abort(node: Node, audit: Audit, given: dict[str, Any]) -> dict[str, Any]:
    return moves.abort(node, _expected(given), audit, dry_run=_dry_run(given))


def _audit(node: Node, given: dict[str, Any]) -> dict[str, Any]:
    limit = given.get("limit")
    if limit is not None and not 0 < limit <= limits.HISTORY_ROWS:
        raise LimitExceeded("HISTORY_ROWS", limits.HISTORY_ROWS, "ask for fewer entries")
    rows = node.store.audit(limit or limits.HISTORY_ROWS, before=given.get("before"))
    return {"entries": that_fit((row._asdict() for row in rows), limits.REPLY_BYTES - 1024)}


_METHODS: dict[str, tuple[str, Method]] = {
    "Pin": ("pin a fence", _pin),
    "Unpin": ("unpin the fence", _unpin),
    "Raise": ("raise the fence", _raise),
    "Lower": ("lower the fence", _lower),
    "Emergency": ("lower the fence", _emergency),
    "Commit": ("commit what is proposed", _commit),
    "Abort": ("abort what is proposed", _abort),
}


def _asked(given: dict[str, Any]) -> Asked:
    without = _few(given, "without", "REQUEST_FEATURES", limits.REQUEST_FEATURES)
    return Asked(given.get("from"), given.get("text"), without)


def _few(given: dict[str, Any], name: str, limit: str, most: int) -> tuple[str, ...]:
    """A list of names. Raises LimitExceeded."""
    names = tuple(given.get(name, ()))
    if len(names) > most:
        raise LimitExceeded(limit, most, "name fewer at once")
    return names


def _expected(given: dict[str, Any]) -> int | None:
    expected: int | None = given.get("expectedGeneration")
    return expected


def _dry_run(given: dict[str, Any]) -> bool:
    return bool(given.get("dryRun", False))
