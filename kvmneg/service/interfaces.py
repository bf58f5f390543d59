# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.kvmneg and org.kvmneg.Fence: each method of the .varlink files, in a few lines on the node.

A handler takes the connection and the checked parameters (kvmneg.service.parameters) and returns the reply's
parameters. It raises KvmnegError, which becomes the error reply.
"""

from __future__ import annotations

import os
from functools import partial

from kvmneg import limits
from kvmneg.clock import now
from kvmneg.errors import Blocked, LimitExceeded, UsageError
from kvmneg.policy import grade, negotiation
from kvmneg.policy.request import Request
from kvmneg.policy.scope import scope
from kvmneg.service.authorization import require_admin
from kvmneg.service.message import reply
from kvmneg.store.interface import Audit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from kvmneg.features.difference import Blocker
    from kvmneg.policy.contract import Contract
    from kvmneg.service.node import Node
    from kvmneg.service.varlink import Connection
    from kvmneg.store.interface import Lease

    Handler = Callable[[Connection, dict[str, Any]], dict[str, Any]]

# Methods whose answer, a no included, depends on nothing but the call, the host and the fence: their reply bytes
# are kept until one of these changes.
CACHEABLE = frozenset(("org.kvmneg.GetHost", "org.kvmneg.Negotiate", "org.kvmneg.Check"))


# Methods of org.kvmneg.Fence that move the level, or say what would: kvmneg.service.interfaces_levels.
_MOVES = ("Pin", "Unpin", "Plan", "Raise", "Lower", "Emergency", "Commit", "Abort", "Progress", "Audit")


class Interfaces:
    """The methods of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handlers(self) -> dict[str, Handler]:
        """Every method but the introspection's and Watch, by its full name."""
        return {
            "org.kvmneg.GetHost": self._get_host,
            "org.kvmneg.Negotiate": self._negotiate,
            "org.kvmneg.Begin": self._begin,
            "org.kvmneg.Started": self._started,
            "org.kvmneg.End": self._end,
            "org.kvmneg.Check": self._check,
            "org.kvmneg.GetContract": self._get_contract,
            "org.kvmneg.Fence.Get": self._fence_get,
            "org.kvmneg.Fence.History": self._fence_history,
            "org.kvmneg.Fence.Restore": self._fence_restore,
            **{f"org.kvmneg.Fence.{name}": partial(self._move, name) for name in _MOVES},
        }

    def event(self) -> dict[str, Any]:
        """What Watch tells: where host and fence stand now."""
        node = self._node
        return {
            "generation": node.generation,
            "fenceDigest": node.fence_digest,
            "state": node.state,
            "hostDigest": node.host_digest,
        }

    # -- org.kvmneg -------------------------------------------------------------------------------

    def _get_host(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        node = self._node
        fence = {"generation": node.fence.generation, "digest": node.fence.digest} if node.fence else None
        return {
            "host": node.report.to_json(),
            "generation": node.generation,
            "state": node.state,
            "fence": fence,
        }

    def _negotiate(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        answer = self._node.negotiate(Request.from_json(parameters["request"]), connection.peer)
        contract = {} if parameters.get("digestOnly") else {"contract": answer.contract.to_json()}
        return {
            **contract,
            "digest": answer.contract.digest,
            "generation": self._node.generation,
            "notGranted": [blocker.to_varlink() for blocker in answer.not_granted],
            "scope": self._scope(self._node.bound is not None),
        }

    def _begin(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        lease, path = self._node.begin(
            parameters["digest"],
            parameters["vm"],
            connection,
            hold=parameters.get("hold"),
            pid=parameters.get("pid"),
        )
        return granted(lease, path)

    def _started(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        self._node.leases.started(self._lease(connection, parameters))
        return {}

    def _end(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        self._node.leases.end(self._lease(connection, parameters))
        return {}

    def _lease(self, connection: Connection, parameters: dict[str, Any]) -> Lease:
        return self._node.lease(parameters["vm"], connection.peer, parameters.get("incarnation"))

    def _check(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        if ("request" in parameters) == ("digest" in parameters):
            raise UsageError("check needs either a request or a contract's digest")
        contract: Contract | None
        if "digest" in parameters:
            contract = self._node.contract(parameters["digest"])[0]
            blockers = negotiation.check(contract, self._node.report, parameters.get("vmm"))
        elif "vmm" in parameters:
            raise UsageError("vmm goes with a digest", hint="a request names its VMM itself")
        else:
            contract, blockers = self._judge(Request.from_json(parameters["request"]))
        graded = grade.of(contract.granted, self._node.report) if contract and not blockers else None
        rows = [blocker.to_varlink() for blocker in blockers]
        judged = self._scope("request" in parameters and self._node.bound is not None)
        return {"fits": not rows, "blockers": rows, "grade": graded, "scope": judged}

    def _scope(self, fenced: bool) -> list[str]:
        source = self._node.report.measured.get("source")
        recorded = [] if source == "kvm" else [f"not judged: the KVM of this machine; the report is {source}"]
        last = f"stale: the last fence known, of generation {self._node.generation}; see `kvmneg fence show`"
        stale = [last] if self._node.stale else []
        return [*scope(fenced, self._node.report.architecture, self._node.report), *recorded, *stale]

    def _judge(self, request: Request) -> tuple[Contract | None, tuple[Blocker, ...]]:
        try:
            return negotiation.check_request(request, self._node.report, self._node.bound).contract, ()
        except Blocked as no:
            return None, no.blockers

    def _get_contract(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        contract, state = self._node.contract(parameters["digest"])
        path = self._node.files.path(contract.digest) if state == "granted" else None
        return {"contract": contract.to_json(), "path": path, "state": state}

    # -- org.kvmneg.Fence -------------------------------------------------------------------------

    def _fence_get(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        fence = self._node.fence
        return {
            "pinned": fence is not None,
            "generation": self._node.generation,
            "digest": fence.digest if fence else None,
            "text": fence.text() if fence else None,
            "state": self._node.state,
            "heldBack": self._node.floor is not None,
            "proposal": self._node.proposal or None,
            "stale": self._node.stale,
        }

    def _move(self, name: str, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        from kvmneg.service import interfaces_levels  # of an admin's day: not before the first of them

        return interfaces_levels.call(self._node, name, connection, parameters)

    def _fence_restore(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        from kvmneg.service import restoring  # a bad day only

        who = audit(connection, "restore the fence", parameters["reason"], "restore")
        return restoring.restore(self._node, parameters.get("above"), who)

    def _fence_history(self, connection: Connection, parameters: dict[str, Any]) -> dict[str, Any]:
        limit = parameters.get("limit")
        if limit is not None and not 0 < limit <= limits.HISTORY_ROWS:
            raise LimitExceeded("HISTORY_ROWS", limits.HISTORY_ROWS, "ask for fewer entries")
        rows = self._node.history(limit or limits.HISTORY_ROWS)
        names = ("action", "generation", "at", "uid", "pid", "reason", "digest")
        entries = ({name: getattr(row, name) for name in names} for row in rows)
        return {"entries": that_fit(entries, limits.REPLY_BYTES - 1024)}


def granted(lease: Lease, path: str) -> dict[str, Any]:
    """What a VM was given, as Begin and Guests.Receive answer it: `path` is the file with the binary form."""
    return {
        "digest": "sha256:" + lease.digest,
        "generation": lease.generation,
        "path": path,
        "expiresInSeconds": int(limits.LEASE_UNSTARTED_SECONDS),
        "incarnation": lease.incarnation,
    }


def that_fit(entries: Iterable[dict[str, Any]], room: int) -> list[dict[str, Any]]:
    """The first entries, as many as one reply may hold."""
    kept: list[dict[str, Any]] = []
    for entry in entries:
        room -= len(reply(entry))
        if room < 0:
            break
        kept.append(entry)
    return kept


def audit(connection: Connection, what: str, reason: str, action: str) -> Audit:
    """Who asks, and why. Raises NotPermitted, UsageError (no reason), LimitExceeded (a long one)."""
    peer = connection.peer
    require_admin(peer, what, action)
    if not reason.strip():
        raise UsageError(f"a reason is needed to {what}", hint="a later admin will ask for it")
    if len(reason) > limits.REASON_CHARACTERS:
        raise LimitExceeded("REASON_CHARACTERS", limits.REASON_CHARACTERS, "say it shorter")
    return Audit(peer.uid, peer.pid, now(), reason, _process_name(peer.pid))


def _process_name(pid: int) -> str:
    """The peer's name as ps shows it, for the record only: any process may choose its own."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return os.fsdecode(file.read(64)).strip()
    except OSError:
        return ""
