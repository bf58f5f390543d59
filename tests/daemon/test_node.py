# SPDX-License-Identifier: LGPL-2.1-or-later
"""The node under a host that changes: a measurer that measures what the test says, a real store."""

from __future__ import annotations

from pathlib import Path
from traceback import walk_tb
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmneg import limits
from kvmneg.errors import (
    Breached,
    KvmnegError,
    LimitExceeded,
    NoKvm,
    NoSuchContract,
    StaleOffer,
    StoreError,
)
from kvmneg.policy.request import Request
from kvmneg.service.interfaces.router import Router
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
V2 = Request(level="x86-64-v2")
AVX2 = 1 << 5  # CPUID.7.0:EBX.AVX2


def ask(router: Router, call: bytes, method: str, parameters: dict[str, Any]) -> bytes:
    """What the server does with a call: the cache first."""
    connection = cast("Connection", SimpleNamespace(peer=PEER, raw=call))
    reply = router.cached(call) or router.call(connection, method, parameters, False, False)
    assert reply is not None
    return reply


def test_a_host_that_fell_below_its_fence_grants_nothing(node: Node, host: Host) -> None:
    node.pin("host", None, None, AUDIT)
    digest = node.negotiate(V2, PEER).contract.digest
    host.lose("cpuid:0x7.0.ebx", AVX2)
    with pytest.raises(Breached) as caught:
        node.begin(digest, VM, ASKER)
    assert "avx2" in {blocker.feature for blocker in caught.value.blockers}
    assert node.state == "breached"
    with pytest.raises(Breached):
        node.negotiate(V2, PEER)
    assert node.store.leases.outstanding() == []


def test_an_offer_that_the_host_can_no_longer_keep_is_stale(node: Node, host: Host) -> None:
    digest = node.negotiate(Request(maximum=True), PEER).contract.digest
    host.lose("cpuid:0x7.0.ebx", AVX2)
    with pytest.raises(StaleOffer, match="changed"):
        node.begin(digest, VM, ASKER)


def test_a_change_that_does_not_touch_the_contract_does_not_stop_it(node: Node, host: Host) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    host.lose("cpuid:0x7.0.ebx", AVX2)
    assert node.begin(digest, VM, ASKER)[0].digest == digest.removeprefix("sha256:")


def test_begin_looks_afresh(node: Node, host: Host) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    before = host.measured
    host.moved = True
    node.begin(digest, VM, ASKER)
    assert host.measured == before + 1


def test_a_host_without_kvm_is_measured_when_it_comes_back(node: Node, host: Host) -> None:
    host.error, host.moved = NoKvm("gone"), True
    node.refresh()
    assert node.state == "unmeasured"
    with pytest.raises(NoKvm, match="gone"):
        node.negotiate(V2, PEER)
    host.error = None
    node.refresh()
    assert node.state == "floating"


def test_each_measurement_that_differs_is_recorded(node: Node, host: Host) -> None:
    first = node.store.latest_report()
    assert first is not None
    host.moved = True
    node.refresh()
    assert node.store.latest_report() == first
    host.lose("cpuid:0x7.0.ebx", AVX2)
    node.refresh()
    second = node.store.latest_report()
    assert second is not None
    assert second.digest != first.digest
    assert node.store.report(first.digest) == first


def test_grants_expire_unstarted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    _, path = node.begin(digest, VM, ASKER)
    node.leases.expire()
    assert Path(path).exists()
    monkeypatch.setattr(node, "_anchor", node._anchor + limits.LEASE_UNSTARTED_SECONDS + 1)
    node.leases.expire()
    assert not Path(path).exists()
    assert node.store.leases.of(VM) == []


def test_a_started_grant_does_not_expire(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    _, path = node.begin(digest, VM, ASKER)
    node.leases.started(node.lease(VM, PEER))
    monkeypatch.setattr(node, "_anchor", node._anchor + limits.LEASE_UNSTARTED_SECONDS + 1)
    node.leases.expire()
    assert Path(path).exists()


def test_a_file_lives_as_long_as_one_vm_holds_it(node: Node) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    second = VM[:-1] + "f"
    path = Path(node.begin(digest, VM, ASKER)[1])
    node.begin(digest, second, ASKER)
    node.leases.end(node.lease(VM, PEER))
    assert path.exists()
    node.leases.end(node.lease(second, PEER))
    assert not path.exists()


def test_grants_per_uid_are_limited(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LEASES_PER_UID", 2)
    digest = node.negotiate(V2, PEER).contract.digest
    for number in range(2):
        node.begin(digest, f"00000000-0000-4000-8000-00000000000{number}", ASKER)
    with pytest.raises(LimitExceeded, match="LEASES_PER_UID"):
        node.begin(digest, VM, ASKER)
    other = cast("Peer", SimpleNamespace(uid=1001, pid=8))
    node.begin(digest, VM, cast("Connection", SimpleNamespace(peer=other)))  # others are served


def test_the_oldest_offers_are_forgotten(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CACHED_OFFERS", 3)
    requests = [Request(level="x86-64-v2", optional=(name,)) for name in ("rdrand", "rdseed", "adx", "smap")]
    digests = [node.negotiate(request, PEER).contract.digest for request in requests]
    assert len(set(digests)) == 4
    with pytest.raises(NoSuchContract):
        node.begin(digests[0], VM, ASKER)
    node.begin(digests[1], VM, ASKER)


def test_the_same_call_gets_the_same_bytes_until_something_changes(node: Node, host: Host) -> None:
    router = Router(node)
    call = b'{"method":"org.kvmneg.Negotiate","parameters":{"request":{"max":true}}}\0'
    parameters: dict[str, Any] = {"request": {"max": True}}
    first = ask(router, call, "org.kvmneg.Negotiate", parameters)
    assert router.cached(call) is first
    node.pin("level:x86-64-v2", None, None, AUDIT)
    assert router.cached(call) is None
    second = ask(router, call, "org.kvmneg.Negotiate", parameters)
    assert second != first
    host.lose("cpuid:0x7.0.ebx", AVX2)  # not in the fence: the answer stays, the host is another
    node.refresh()
    assert router.cached(call) is None


def test_a_no_is_kept_like_a_yes(node: Node) -> None:
    router = Router(node)
    call = b'{"method":"org.kvmneg.Negotiate","parameters":{"request":{"level":"x86-64-v4"}}}\0'
    refused = ask(router, call, "org.kvmneg.Negotiate", {"request": {"level": "x86-64-v4"}})
    assert b'"error":"org.kvmneg.Blocked"' in refused
    assert router.cached(call) is refused


def test_kept_replies_are_limited(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CACHED_REPLIES", 4)
    router = Router(node)
    for number in range(10):
        call = b'{"method":"org.kvmneg.GetHost"}' + b" " * number + b"\0"
        ask(router, call, "org.kvmneg.GetHost", {})
        assert len(router._known.values) <= 4
    assert router.cached(call) is not None


def test_replies_get_old_with_the_inputs(node: Node, host: Host) -> None:
    """After VOLATILE_SECONDS the host is looked at before anything is given out."""
    now = 100.0
    timers: list[Any] = []
    server = SimpleNamespace(
        clock=lambda: now, after=lambda seconds, callback: timers.append((now + seconds, callback))
    )
    router = Router(node)
    router.attach(cast("Any", server))
    call = b'{"method":"org.kvmneg.GetHost"}\0'
    first = ask(router, call, "org.kvmneg.GetHost", {})
    host.lose("cpuid:0x7.0.ebx", AVX2)
    assert ask(router, call, "org.kvmneg.GetHost", {}) is first  # not a second old
    now += limits.VOLATILE_SECONDS
    for due, callback in timers:
        if due <= now:
            callback()
    assert ask(router, call, "org.kvmneg.GetHost", {}) != first


@pytest.mark.parametrize("what", ["report", "fence"])
def test_a_reason_that_is_kept_does_not_grow(node: Node, host: Host, what: str) -> None:
    """It is raised for each call, for as long as the daemon runs."""
    if what == "report":
        host.error, host.moved = NoKvm("gone"), True
        node.refresh()
    else:
        node._fence_fault = StoreError("changed by hand", generation=3)
    lengths = set()
    for _ in range(3):
        with pytest.raises(KvmnegError) as caught:
            getattr(node, what)
        lengths.add(len(list(walk_tb(caught.value.__traceback__))))
    assert len(lengths) == 1
