# SPDX-License-Identifier: LGPL-2.1-or-later
"""A contract that was negotiated for a VMM is granted for that VMM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from kvmneg.errors import Blocked, StaleOffer, UsageError
from kvmneg.policy.request import Request
from kvmneg.service.interfaces.kvmneg import Interfaces
from kvmneg.store.interface import Audit

if TYPE_CHECKING:
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.peer import Peer

    from .conftest import Host

RECORDED = Path(__file__).parents[1] / "unit/data/intel-ice-lake.json"
PEER = cast("Peer", SimpleNamespace(uid=1000, pid=7))
ASKER = cast("Connection", SimpleNamespace(peer=PEER, on_closed=None))
VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
GIVEN = "kvm-msi-ext-dest-id"


@pytest.fixture
def host(make_host: type[Host]) -> Host:
    """A host whose split interrupt controllers can go away."""
    found = make_host(RECORDED)
    found.change("offer", "kvm:split-irqchip", "0x00000001")
    return found


def test_what_the_vmm_gives_is_granted(node: Node) -> None:
    with pytest.raises(Blocked):
        node.negotiate(Request(require=(GIVEN,)), PEER)
    contract = node.negotiate(Request(require=(GIVEN,), vmm="qemu"), PEER).contract
    assert contract.granted.field(GIVEN)
    grant, _path = node.begin(contract.digest, VM, ASKER)
    assert grant.digest == contract.digest.removeprefix("sha256:")


def test_what_it_can_no_longer_give_is_stale(node: Node, host: Host) -> None:
    contract = node.negotiate(Request(require=(GIVEN,), vmm="qemu"), PEER).contract
    host.change("offer", "kvm:split-irqchip", "0x00000000")
    with pytest.raises(StaleOffer):
        node.begin(contract.digest, VM, ASKER)


def test_a_contract_is_checked_for_the_vmm_that_would_run_it(node: Node, host: Host) -> None:
    """What a VMM gives by itself KVM alone does not accept; without the capability it does not either."""
    check = Interfaces(node).handlers()["org.kvmneg.Check"]
    connection = cast("Connection", SimpleNamespace(peer=PEER))
    digest = node.negotiate(Request(require=(GIVEN,), vmm="qemu"), PEER).contract.digest
    assert check(connection, {"digest": digest, "vmm": "qemu"})["fits"] is True
    alone = check(connection, {"digest": digest})
    assert [row["feature"] for row in alone["blockers"]] == [GIVEN] and alone["fits"] is False
    with pytest.raises(UsageError, match="bochs"):
        check(connection, {"digest": digest, "vmm": "bochs"})
    with pytest.raises(UsageError, match="vmm goes with a digest"):
        check(connection, {"request": {"max": True}, "vmm": "qemu"})
    host.change("offer", "kvm:split-irqchip", "0x00000000")
    node.measure()
    gone = check(connection, {"digest": digest, "vmm": "qemu"})
    assert GIVEN in {row["feature"] for row in gone["blockers"]}


def test_what_was_not_judged_is_not_in_the_scope(node: Node) -> None:
    """A contract is held against the host alone; a request against the fence too, where one is pinned."""
    check = Interfaces(node).handlers()["org.kvmneg.Check"]
    connection = cast("Connection", SimpleNamespace(peer=PEER))
    digest = node.negotiate(Request(level="x86-64-v2"), PEER).contract.digest
    audit = Audit(0, 1, "2026-01-01T00:00:00Z", "test", "pytest")
    for fenced in (False, True):
        if fenced:
            node.pin("level:x86-64-v2", None, None, audit)
        for given, named in (({"request": {"level": "x86-64-v2"}}, fenced), ({"digest": digest}, False)):
            judged, not_judged, *_ = check(connection, given)["scope"]
            assert ("the pinned fence" in judged) is named
            assert ("any fence" in not_judged) is not named
