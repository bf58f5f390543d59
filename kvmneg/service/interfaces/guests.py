# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.kvmneg.Guests: each method of the .varlink file, in a few lines on the node and its leases."""

from __future__ import annotations

from functools import partial

from kvmneg import limits
from kvmneg.errors import BadInput, Blocked, UsageError
from kvmneg.policy import negotiation
from kvmneg.service.authorization import is_admin
from kvmneg.service.interfaces.answers import audit, granted, that_fit
from kvmneg.service.node import uuid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.policy.contract import Contract
    from kvmneg.service.interfaces.answers import Handler
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.connection import Connection
    from kvmneg.store.interface import Lease


def handlers(node: Node) -> dict[str, Handler]:
    """Every method, by its full name."""
    return {
        f"org.kvmneg.Guests.{name}": partial(function, node)
        for name, function in (
            ("List", _list),
            ("Get", _get),
            ("Report", _report),
            ("Saved", _saved),
            ("Handover", _hand_over),
            ("Receive", _receive),
            ("Import", _import),
            ("Waive", _waive),
        )
    }


def _lease(node: Node, connection: Connection, given: dict[str, Any]) -> Lease:
    return node.lease(given["vm"], connection.peer, given.get("incarnation"))


def _list(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    peer, room = connection.peer, limits.REPLY_BYTES // 2 - 1024
    sees = None if is_admin(peer) else peer.uid
    after = given.get("after", 0)
    guests = [one for one in node.leases.to_json() if one["incarnation"] > after]
    unknown = [one.to_json() for one in node.unknown.all()]
    mine = [[one for one in rows if sees in (None, one["uid"])] for rows in (guests, unknown)]
    shown, strangers = (that_fit(rows, room) for rows in mine)
    missed = node.unknown.missed()
    if len(strangers) < len(mine[1]):
        missed = f"{len(mine[1]) - len(strangers)} more than one reply has room for"
    return {
        "guests": shown,
        "unknown": strangers,
        "missed": missed or None,
        "others": len(guests) + len(unknown) - len(mine[0]) - len(mine[1]),
        "next": shown[-1]["incarnation"] if len(shown) < len(mine[0]) else None,
    }


def _get(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    from kvmneg.policy.contract import Contract

    lease = _lease(node, connection, given)
    (guest,) = (one for one in node.leases.to_json() if one["incarnation"] == lease.incarnation)
    contract = Contract.from_binary(node.store.leases.contract(lease.digest) or b"", file=lease.digest)
    return {
        "guest": guest,
        "contract": contract.to_json(),
        "holds": node.leases.held_set(lease).to_json(),
    }


def _report(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    from kvmneg.policy import images

    lease = _lease(node, connection, given)
    applied = images.reported(node.report.architecture, given["words"])
    exceeds = node.leases.report(lease, applied)
    return {"digest": applied.digest(), "exceeds": [blocker.to_varlink() for blocker in exceeds]}


def _saved(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    node.leases.saved(_lease(node, connection, given))
    return {}


def _hand_over(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    lease = _lease(node, connection, given)
    holder = node.leases.holder(connection, given.get("hold"), given.get("pid"))
    if holder is None:
        raise UsageError("a handover needs who is to keep the lease", hint="give hold or pid")
    if lease.state == "saved":
        _require_restorable(node, lease)
    node.leases.hand_over(lease, connection, holder)
    return {"incarnation": lease.incarnation}


def _require_restorable(node: Node, lease: Lease, vmm: str | None = None) -> None:
    """A host changes while a guest lies in its image: another boot, another kernel. Raises Blocked."""
    from kvmneg.policy import moving
    from kvmneg.policy.contract import Contract

    node.refresh(fresh=True)
    body = node.store.leases.contract(lease.digest) or b""
    contract = Contract.from_binary(body, file=lease.digest)
    held = node.leases.held_set(lease)
    blockers = moving.comes_back(held, node.report, portable=contract.portable, vmm=vmm)
    if blockers:
        raise Blocked(f"host {node.report.host} cannot restore VM {lease.vm}", blockers)


def _receive(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    holder = node.leases.holder(connection, given.get("hold"), given.get("pid"))
    contract, vmm = _incoming(given), given.get("vmm")
    held = node.leases.held(uuid(given["vm"]), contract.digest.removeprefix("sha256:"), connection.peer)
    if held is None:
        node.refresh(fresh=True)
        blockers = negotiation.check(contract, node.report, vmm)
        if blockers:
            raise Blocked(f"host {node.report.host} cannot take this guest", blockers)
        lease, path = node.leases.begin(
            contract, uuid(given["vm"]), node.generation, connection, holder=holder
        )
    else:  # a migration inside this host, or asked twice
        if held.state == "saved":
            _require_restorable(node, held, vmm)
        lease, path = node.leases.again(held, connection, holder)
    return {**granted(lease, path), "above": _above(contract, node)}


def _incoming(given: dict[str, Any]) -> Contract:
    """The contract that came with a guest, in either of its forms. Raises UsageError, BadInput."""
    if ("contract" in given) == ("binary" in given):
        raise UsageError(
            "a guest comes with its contract as JSON or in its binary form", hint="give one of both"
        )
    if "contract" in given:
        return _contract(given["contract"])
    import binascii

    from kvmneg.policy.contract import Contract

    try:
        data = binascii.a2b_base64(given["binary"], strict_mode=True)
    except ValueError as error:
        raise BadInput(f"the contract's binary form is no Base64: {error}") from None
    return Contract.from_binary(data, file="the contract that came")


def _above(contract: Contract, node: Node) -> list[dict[str, Any]]:
    """What a guest that came has beyond the level here: it is an island, and holds a lowering up."""
    from kvmneg.policy import leases

    bound = None if node.unreadable else node.bound
    if bound is None or contract.granted.architecture != bound.granted.architecture:
        return []
    found = leases.exceeding(contract.granted, bound.granted, bound.name)
    return [blocker.to_varlink() for blocker in found]


def _contract(document: dict[str, Any]) -> Contract:
    from kvmneg.policy.contract import Contract

    return Contract.from_json(document)


def _import(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    record = audit(connection, "import a guest", given["reason"], "import")
    node.unknown.of(given["pid"])  # nothing else is taken on
    if "contract" in given:
        contract = _contract(given["contract"])
    else:  # nobody knows what it has: what it could have at most
        from kvmneg.policy import utmost  # of an admin's day

        node.refresh(fresh=True)
        contract = utmost.contract(node.report)
    holder = node.leases.keepers.of_process(given["pid"], connection.peer)  # a number that we told
    lease, _ = node.leases.begin(
        contract, uuid(given["vm"]), node.generation, connection, holder=holder, audit=record
    )
    node.leases.started(lease)
    return {"digest": "sha256:" + lease.digest, "incarnation": lease.incarnation}


def _waive(node: Node, connection: Connection, given: dict[str, Any]) -> dict[str, Any]:
    record = audit(connection, "waive a guest", given["reason"], "waive")
    node.unknown.waive(given["pid"], record, node.generation)
    return {}
