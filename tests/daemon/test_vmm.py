# SPDX-License-Identifier: LGPL-2.1-or-later
"""A contract that was negotiated for a VMM is granted for that VMM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from kvmneg.errors import Blocked, StaleOffer
from kvmneg.features.report import Report
from kvmneg.policy.fence import Fence
from kvmneg.policy.request import Request
from kvmneg.service.contracts import ContractFiles
from kvmneg.service.node import Node
from kvmneg.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.service.peer import Peer

RECORDED = Path(__file__).parents[1] / "unit/data/intel-ice-lake.json"
PEER = cast("Peer", SimpleNamespace(uid=1000, pid=7))
VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
GIVEN = "kvm-msi-ext-dest-id"


class Host:
    """A host whose split interrupt controllers can go away."""

    def __init__(self) -> None:
        self.split = True
        self.moved = False

    def measure(self) -> Report:
        self.moved = False
        document = Report.loads(RECORDED.read_bytes()).to_json()
        document["offer"]["kvm:split-irqchip"] = f"{int(self.split):#010x}"
        return Report.from_json(document)

    def changed(self, *, fresh: bool = False) -> bool:
        return self.moved


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def node(host: Host, tmp_path: Path) -> Iterator[Node]:
    with SqliteStore(str(tmp_path / "state"), verify=lambda text: Fence.parse(text).digest) as store:
        yield Node(store, host, ContractFiles(str(tmp_path / "contracts")))


def test_what_the_vmm_gives_is_granted(node: Node) -> None:
    with pytest.raises(Blocked):
        node.negotiate(Request(require=(GIVEN,)), PEER)
    contract = node.negotiate(Request(require=(GIVEN,), vmm="qemu"), PEER).contract
    assert contract.granted.field(GIVEN)
    grant, _path = node.begin(contract.digest, VM, PEER)
    assert grant.digest == contract.digest.removeprefix("sha256:")


def test_what_it_can_no_longer_give_is_stale(node: Node, host: Host) -> None:
    contract = node.negotiate(Request(require=(GIVEN,), vmm="qemu"), PEER).contract
    host.split, host.moved = False, True
    with pytest.raises(StaleOffer):
        node.begin(contract.digest, VM, PEER)
