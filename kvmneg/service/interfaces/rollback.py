# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.kvmneg.Rollback: each method of the .varlink file, in a few lines on kvmneg.service.level.rolls."""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import LimitExceeded
from kvmneg.policy.combos import Asked
from kvmneg.service.authorization import is_admin
from kvmneg.service.interfaces.answers import audit as audit_of
from kvmneg.service.interfaces.answers import that_fit
from kvmneg.service.level.rolls import Rolls
from kvmneg.service.varlink.message import reply

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from kvmneg.policy.combos import Dimension
    from kvmneg.policy.roll import Answer, Held
    from kvmneg.service.interfaces.answers import Handler
    from kvmneg.service.level.rolls import Standing
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.peer import Peer
    from kvmneg.service.varlink.server import Connection
    from kvmneg.store.rolls import ComboRow


def handlers(node: Node) -> dict[str, Handler]:
    """Every method by its full name."""
    room = RollHandlers(Rolls(node), node)
    return {
        "org.kvmneg.Rollback.History": room.history,
        "org.kvmneg.Rollback.GetReport": room.get_report,
        "org.kvmneg.Rollback.Add": room.add,
        "org.kvmneg.Rollback.Remove": room.remove,
        "org.kvmneg.Rollback.List": room.list,
        "org.kvmneg.Rollback.Plan": room.plan,
        "org.kvmneg.Rollback.Check": room.check,
    }


class RollHandlers:
    """The methods over one node's rolls."""

    def __init__(self, rolls: Rolls, node: Node) -> None:
        self._rolls = rolls
        self._node = node

    def history(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        limit = parameters.get("limit")
        if limit is not None and not 0 < limit <= limits.COMBO_ROWS:
            raise LimitExceeded("COMBO_ROWS", limits.COMBO_ROWS, "ask for fewer entries")
        kept = {member.combo for member in self._rolls.members()}
        rows = self._rolls.history(limit or limits.COMBO_ROWS)
        entries = (self._combo(row, row.digest in kept) for row in rows)
        return {"entries": that_fit(entries, limits.REPLY_BYTES - 1024)}

    def _combo(self, row: ComboRow, rollback: bool) -> dict[str, Any]:
        combo = self._rolls.combo(row)
        builds = (one for one in combo.get("vmms", ()) if isinstance(one, dict))
        return {
            "combo": row.digest,
            "report": row.report,
            "kernel": combo.get("kernel"),
            "microcode": combo.get("microcode"),
            "vmms": [f"{one.get('name')} {one.get('version')}" for one in builds],
            "firstAt": row.first_at,
            "lastAt": row.last_at,
            "running": row.digest == self._node.combo_digest,
            "rollback": rollback,
        }

    def get_report(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        row = self._rolls.resolve(parameters["combo"])
        return {"combo": row.digest, "report": self._rolls.report(row).to_json()}

    def add(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        audit = audit_of(connection, "change the roll-back set", parameters["reason"], "rollback")
        row, changed = self._rolls.add(parameters["combo"], audit)
        return {"combo": row.digest, "changed": changed}

    def remove(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        audit = audit_of(connection, "change the roll-back set", parameters["reason"], "rollback")
        row, changed = self._rolls.remove(parameters["combo"], audit)
        return {"combo": row.digest, "changed": changed}

    def list(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        standings, scope = self._rolls.standings()
        return {"entries": [self._member(one) for one in standings], "scope": scope}

    def _member(self, one: Standing) -> dict[str, Any]:
        member, line = one.member, one.line
        return {
            "combo": self._combo(one.row, True),
            "at": member.at,
            "uid": member.uid,
            "reason": member.reason,
            "allowed": line.allowed,
            "lacking": line.lacking,
            "guests": line.guests,
        }

    def plan(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        row, lowering = self._rolls.plan(parameters["combo"])
        return {
            "combo": row.digest,
            "take": lowering.take,
            "text": lowering.fence.text() if lowering.fence else None,
            "blockers": [blocker.to_varlink() for blocker in lowering.blockers],
        }

    def check(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        asked, vmm = _asked(parameters)
        predict = parameters.get("predict", False)
        answer = self._rolls.check(parameters.get("combo"), asked, vmm, predict=predict)
        return _told(answer, self._own(connection.peer))

    def _own(self, peer: Peer) -> set[str] | None:
        """The VMs that a caller may be told of by name, None: all."""
        if is_admin(peer):
            return None
        return {holding.vm for holding in self._node.leases.holdings() if holding.uid == peer.uid}


def _asked(parameters: dict[str, Any]) -> tuple[Asked, str | None]:
    """What changes, and the VMM whose view counts, where kvmneg knows it. Raises UsageError for a name alone."""
    from kvmneg.policy import definitions

    vmm = parameters.get("vmm")
    name, _, version = (vmm or "").rpartition("-")
    versioned = bool(name and version[:1].isdigit())
    changes = (vmm,) if vmm and versioned and "combo" not in parameters else ()
    others = tuple(sorted(parameters.get("dimensions", {}).items()))
    known = (name if versioned else vmm) in definitions.available("vmms")
    # a build of a VMM without rules of its own is a dimension all the same; a name alone is a mistake, and refused
    return Asked(parameters.get("kernel"), changes, others), vmm if known or not versioned else None


def _told(answer: Answer, own: set[str] | None) -> dict[str, Any]:
    prediction = answer.prediction.to_json() if answer.prediction else None
    if prediction is not None and answer.prediction is not None:
        prediction["blockers"] = [blocker.to_varlink() for blocker in answer.prediction.blockers]
        prediction["guests"] = _held(answer.prediction.guests, own)
    return {
        "allowed": answer.allowed,
        "measured": answer.measured,
        "combo": answer.combo or None,
        "nearest": answer.nearest or None,
        "differs": _dimensions(answer.differs),
        "changes": _dimensions(answer.changes),
        "blockers": [blocker.to_varlink() for blocker in answer.blockers],
        "guests": _held(answer.guests, own),
        "unknown": len(answer.unknown),
        "unknownGuests": list(answer.unknown) if own is None else [],
        "how": answer.how or None,
        "prediction": prediction,
        "scope": list(answer.scope),
    }


def _dimensions(rows: Iterable[Dimension]) -> list[dict[str, Any]]:
    return [row.to_json() for row in rows]


def _held(guests: tuple[Held, ...], own: set[str] | None) -> list[dict[str, Any]]:
    rows, room = [], limits.ROLLBACK_REASON_BYTES
    for place, held in enumerate(guests):
        reasons = [one.to_varlink() for one in held.blockers] if place < limits.ROLLBACK_SETS else []
        told = that_fit(reasons, room)
        room -= sum(len(reply(reason)) for reason in told)
        rows.append(
            {
                "digest": held.digest or None,
                "count": len(held.vms),
                "vms": [vm for vm in held.vms if own is None or vm in own],
                "blockers": told,
            }
        )
    return rows
