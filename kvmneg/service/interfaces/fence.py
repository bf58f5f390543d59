# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.kvmneg.Fence: each method of the .varlink file, in a few lines on the node and kvmneg.service.level."""

from __future__ import annotations

from functools import partial

from kvmneg import limits
from kvmneg.errors import LimitExceeded
from kvmneg.service.authorization import is_admin, require_admin
from kvmneg.service.interfaces.answers import audit as audit_of
from kvmneg.service.interfaces.answers import that_fit
from kvmneg.service.level import moves
from kvmneg.service.level.moves import Asked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmneg.service.interfaces.answers import Handler
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.server import Connection
    from kvmneg.store.interface import Audit

    Move = Callable[[Node, Audit, dict[str, Any]], dict[str, Any]]


def handlers(node: Node) -> dict[str, Handler]:
    """Every method, by its full name."""
    methods: dict[str, Callable[..., dict[str, Any]]] = {
        "Get": _get,
        "History": _history,
        "Audit": _audit,
        "Plan": _plan,
        "Progress": _progress,
        "Restore": _restore,
        **{name: partial(_move, name) for name in _MOVES},
    }
    return {f"org.kvmneg.Fence.{name}": partial(method, node) for name, method in methods.items()}


# -- what everybody may see -----------------------------------------------------------------------


def _get(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    fence = node.fence
    return {
        "pinned": fence is not None,
        "generation": node.generation,
        "digest": fence.digest if fence else None,
        "text": fence.text() if fence else None,
        "state": node.state,
        "heldBack": node.floor is not None,
        "proposal": node.proposal or None,
        "stale": node.stale,
    }


def _history(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    rows = node.history(_rows(given))
    names = ("action", "generation", "at", "reason", "digest")
    who = ("uid", "pid") if is_admin(connection.peer) else ()
    nobody = {"uid": None, "pid": None}
    entries = (nobody | {name: getattr(row, name) for name in (*names, *who)} for row in rows)
    return {"entries": that_fit(entries, limits.REPLY_BYTES - 1024)}


def _plan(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    return {"plan": moves.plan(node, _asked(given)).to_json(_sees(connection))}


def _progress(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    return moves.progress(node, _sees(connection))


def _sees(connection: Connection) -> int | None:
    """Only admins see other users' guests, which are counted for everybody."""
    return None if is_admin(connection.peer) else connection.peer.uid


# -- an admin's -----------------------------------------------------------------------------------


def _audit(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    require_admin(connection.peer, "read the audit", "audit")  # it names who asked
    rows = node.store.audit(_rows(given), before=given.get("before"))
    return {"entries": that_fit((row._asdict() for row in rows), limits.REPLY_BYTES - 1024)}


def _restore(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    from kvmneg.service.level import restoring  # a bad day only

    who = audit_of(connection, "restore the fence", given["reason"], "restore")
    return restoring.restore(node, given.get("above"), who)


def _move(name: str, node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    """Move the level: that needs an admin and a reason."""
    what, method = _MOVES[name]
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


_MOVES: dict[str, tuple[str, Move]] = {
    "Pin": ("pin a fence", _pin),
    "Unpin": ("unpin the fence", _unpin),
    "Raise": ("raise the fence", _raise),
    "Lower": ("lower the fence", _lower),
    "Emergency": ("lower the fence", _emergency),
    "Commit": ("commit what is proposed", _commit),
    "Abort": ("abort what is proposed", _abort),
}


def _rows(given: dict[str, Any]) -> int:
    """How many entries are asked for. Raises LimitExceeded."""
    limit: int | None = given.get("limit")
    if limit is not None and not 0 < limit <= limits.HISTORY_ROWS:
        raise LimitExceeded("HISTORY_ROWS", limits.HISTORY_ROWS, "ask for fewer entries")
    return limit or limits.HISTORY_ROWS


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
