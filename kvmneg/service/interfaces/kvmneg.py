# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.kvmneg: each method of the .varlink file, in a few lines on the node.

A handler takes the connection and the checked parameters (kvmneg.service.interfaces.parameters) and returns the
reply's parameters. It raises KvmnegError, which becomes the error reply.
"""

from __future__ import annotations

from kvmneg.errors import Blocked, UsageError
from kvmneg.policy import grade, negotiation
from kvmneg.policy.request import Request
from kvmneg.policy.scope import scope
from kvmneg.service.interfaces.answers import granted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.features.difference import Blocker
    from kvmneg.policy.contract import Contract
    from kvmneg.service.interfaces.answers import Handler
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.server import Connection
    from kvmneg.store.interface import Lease

# Methods whose answer, a no included, depends on nothing but the call, the host and the fence: their reply bytes
# are kept until one of these changes.
CACHEABLE = frozenset(("org.kvmneg.GetHost", "org.kvmneg.Negotiate", "org.kvmneg.Check"))


class Interfaces:
    """The methods of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handlers(self) -> dict[str, Handler]:
        """Every method but Watch, by its full name."""
        return {
            "org.kvmneg.GetHost": self._get_host,
            "org.kvmneg.Negotiate": self._negotiate,
            "org.kvmneg.Begin": self._begin,
            "org.kvmneg.Started": self._started,
            "org.kvmneg.End": self._end,
            "org.kvmneg.Check": self._check,
            "org.kvmneg.GetContract": self._get_contract,
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
