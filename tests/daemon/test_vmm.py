# SPDX-License-Identifier: LGPL-2.1-or-later
"""A contract that was negotiated for a VMM is granted for that VMM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from kvmneg.errors import Blocked, StaleOffer
from kvmneg.policy.request import Request

if TYPE_CHECKING:
    from kvmneg.service.node import Node
    from kvmneg.service.peer import Peer

    from .conftest import Host

RECORDED = Path(__file__).parents[1] / "unit/data/intel-ice-lake.json"
PEER = cast("Peer", SimpleNamespace(uid=1000, pid=7))
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
    grant, _path = node.begin(contract.digest, VM, PEER)
    assert grant.digest == contract.digest.removeprefix("sha256:")


def test_what_it_can_no_longer_give_is_stale(node: Node, host: Host) -> None:
    contract = node.negotiate(Request(require=(GIVEN,), vmm="qemu"), PEER).contract
    host.change("offer", "kvm:split-irqchip", "0x00000000")
    with pytest.raises(StaleOffer):
        node.begin(contract.digest, VM, PEER)
