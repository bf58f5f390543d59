# SPDX-License-Identifier: LGPL-2.1-or-later
"""A node on a host of which a kind of CPU cannot be measured: nothing is offered, begun or pinned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from kvmneg.errors import Blocked
from kvmneg.policy.request import Request
from kvmneg.store.interface import Audit

if TYPE_CHECKING:
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.peer import Peer

    from .conftest import Host

AUDIT = Audit(0, 1, "2026-11-21T06:00:00Z", "a test", "pytest")
PEER = cast("Peer", SimpleNamespace(uid=1000, pid=7))
ASKER = cast("Connection", SimpleNamespace(peer=PEER, on_closed=None))
VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
OTHERS = [{"cpus": "4-7", "kind": {"model": "190"}, "because": "its affinity leaves them out"}]


def test_a_cpu_of_another_kind_that_comes_online(node: Node, host: Host) -> None:
    """Offered before, it is not begun after; what is pinned stays pinned, and comes back with the CPUs' measurement."""
    node.pin("host", None, None, AUDIT)
    digest = node.negotiate(Request(level="x86-64-v2"), PEER).contract.digest
    host.change("combo", "unvisited", OTHERS)
    with pytest.raises(Blocked, match="not every kind of CPU"):
        node.begin(digest, VM, ASKER)
    assert node.state == "unmeasured"
    assert node.store.leases.outstanding() == []
    with pytest.raises(Blocked, match="not every kind of CPU"):
        node.negotiate(Request(), PEER)
    with pytest.raises(Blocked, match="not every kind of CPU"):
        node.pin("level:x86-64-v1", None, None, AUDIT)
    assert node.generation == 1
    host.change("combo", "unvisited", [])
    assert node.begin(digest, VM, ASKER)[0].digest == digest.removeprefix("sha256:")
    assert node.state == "pinned"
