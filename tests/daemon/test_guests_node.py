# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leases inside a daemon: what a host, or a level, that moved does to guests that come back; who is told of whom."""

from __future__ import annotations

import json
import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits
from kvmneg.errors import Blocked, NotPermitted, StaleOffer, UsageError
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy import negotiation
from kvmneg.policy.request import Request
from kvmneg.service.interfaces import fence, guests, rollback
from kvmneg.service.level import moves
from kvmneg.store.interface import Audit

if TYPE_CHECKING:
    from kvmneg.service.node import Node

    from .conftest import Host

AUDIT = Audit(0, 1, "2026-11-21T06:00:00Z", "a test", "kvmneg")
MAX = Request(maximum=True)
WORD, AVX2 = "cpuid:0x7.0.ebx", 1 << 5


def vm() -> str:
    return str(uuid.uuid4())


class Caller:
    """A connection of a user, as the methods see it."""

    def __init__(self, uid: int) -> None:
        self.peer: Any = SimpleNamespace(uid=uid, pid=0, groups=frozenset())
        self.fd = -1
        self.on_closed: Any = None


def caller(uid: int = 1000) -> Any:
    return Caller(uid)


def begin(node: Node, name: str, asker: Any) -> str:
    digest = node.negotiate(MAX, asker.peer).contract.digest
    node.begin(digest, name, asker)
    return digest


def call(node: Node, name: str, asker: Any, **given: Any) -> dict[str, Any]:
    return guests.handlers(node)[f"org.kvmneg.Guests.{name}"](asker, given)


def test_who_has_a_vm_is_told_to_admins_alone(node: Node) -> None:
    name = vm()
    for uid in (4711, 4712):
        begin(node, name, caller(uid))
        with pytest.raises(NotPermitted) as caught:
            call(node, "Get", caller(1000), vm=name)
        told = f"{caught.value} {caught.value.fields}"
        assert "4711" not in told and "4712" not in told
    with pytest.raises(UsageError, match="users 4711, 4712 have"):
        call(node, "Get", caller(0), vm=name)
    assert call(node, "Get", caller(4712), vm=name)["guest"]["uid"] == 4712


def test_who_moved_the_fence_is_told_to_admins_alone(node: Node) -> None:
    moves.pin(node, "host", None, None, AUDIT._replace(uid=4711, pid=4712))
    history = fence.handlers(node)["org.kvmneg.Fence.History"]
    (hidden,), (shown,) = (history(caller(uid), {})["entries"] for uid in (1000, 0))
    assert (shown["uid"], shown["pid"]) == (4711, 4712)
    assert hidden == {**shown, "uid": None, "pid": None}


def test_an_image_is_not_restored_on_a_host_that_lost_what_it_has(node: Node, host: Host) -> None:
    asker, name = caller(), vm()
    begin(node, name, asker)
    contract = node.contract(node.lease(name, asker.peer).digest)[0].to_json()
    for _ in range(2):  # while the host is as it was it comes back, in either way
        call(node, "Saved", asker, vm=name)
        call(node, "Handover", asker, vm=name, hold=True)
    call(node, "Saved", asker, vm=name)
    call(node, "Receive", asker, vm=name, contract=contract)
    host.lose(WORD, AVX2)
    with pytest.raises(Blocked) as caught:
        call(node, "Handover", asker, vm=name, hold=True)
    assert {one.feature for one in caught.value.blockers} == {"avx2"}
    with pytest.raises(Blocked):
        call(node, "Receive", asker, vm=name, contract=contract)
    assert node.lease(name, asker.peer).state == "saved"


def test_what_the_vmm_gave_by_itself_is_restored_with_it(node: Node) -> None:
    """KVM offers none of it, and Handover names no VMM."""
    asker, name = caller(), vm()
    contract = node.negotiate(Request(maximum=True, vmm="qemu"), asker.peer).contract
    assert negotiation.check(contract, node.report)
    node.begin(contract.digest, name, asker)
    call(node, "Saved", asker, vm=name)
    assert call(node, "Handover", asker, vm=name, hold=True)["incarnation"] == 1


def test_a_started_vm_does_not_boot_again_above_the_level(node: Node) -> None:
    """Begin asked twice answers twice; a VM that ran begins a life of its own, under the level of now."""
    moves.pin(node, "host", None, None, AUDIT)
    asker, name = caller(), vm()
    digest = begin(node, name, asker)
    assert node.begin(digest, name, asker)[0].incarnation == node.lease(name, asker.peer).incarnation
    node.leases.started(node.lease(name, asker.peer))
    moves.lower(node, moves.Asked(without=("avx2",)), None, AUDIT)
    with pytest.raises(StaleOffer):
        node.begin(digest, name, asker)
    moves.commit(node, None, AUDIT, override=(name,))
    with pytest.raises(StaleOffer):
        node.begin(digest, name, asker)


def test_others_guests_are_counted_not_listed(node: Node) -> None:
    names = {uid: vm() for uid in (1000, 1001)}
    for uid, name in names.items():
        begin(node, name, caller(uid))
    for uid, name in names.items():
        told = call(node, "List", caller(uid))
        assert [one["vm"] for one in told["guests"]] == [name]
        assert told["others"] == 1
    assert call(node, "List", caller(2000))["guests"] == []
    told = call(node, "List", caller(0))
    assert ({one["vm"] for one in told["guests"]}, told["others"]) == (set(names.values()), 0)


def test_reported_sets_do_not_pile_up(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    asker, name = caller(), vm()
    begin(node, name, asker)
    monkeypatch.setattr(limits, "SETS_KEPT", 4)
    for value in range(100):
        bits = value << 3 & 0xF8 | value << 11 & 0x70000
        call(node, "Report", asker, vm=name, words={WORD: f"{bits:#x}"})
        assert len(node.leases._known) <= 4
    node.leases._known.clear()  # what is kept is a view of what is stored
    assert node.leases.held_set(node.lease(name, asker.peer)) == FeatureSet.of("x86_64", {WORD: bits})


def test_a_vmm_that_claims_everything_does_not_break_the_answer(node: Node) -> None:
    """Reasons are of what guests say they have: the reply has to fit what a client takes."""
    words = {word: "0xffffffff" for word in node.report.offer_words if word.startswith("cpuid:")}
    asker = caller()
    for place in range(40):
        name = vm()
        begin(node, name, asker)
        call(node, "Report", asker, vm=name, words={**words, "msr:0x10a": f"{place:#x}"})
    check = rollback.handlers(node)["org.kvmneg.Rollback.Check"]
    answer = check(caller(0), {"combo": "running"})
    assert not answer["allowed"]
    assert sum(one["count"] for one in answer["guests"]) == 40
    assert len(json.dumps(answer)) < limits.REPLY_BYTES


def test_a_guest_from_elsewhere_above_the_level_is_told(node: Node) -> None:
    asker = caller()
    contract = node.negotiate(MAX, asker.peer).contract.to_json()
    moves.pin(node, "level:x86-64-v2", None, None, AUDIT)
    told = call(node, "Receive", asker, vm=vm(), contract=contract)
    assert "avx2" in {one["feature"] for one in told["above"]}


def test_many_guests_are_listed_in_pages(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    asker, names = caller(0), [vm() for _ in range(50)]
    for name in names:
        begin(node, name, asker)
    monkeypatch.setattr(limits, "REPLY_BYTES", 10_000)
    found, after = [], 0
    while after is not None:
        told = call(node, "List", asker, after=after)
        assert len(json.dumps(told)) < limits.REPLY_BYTES and told["guests"]
        found += [one["vm"] for one in told["guests"]]
        after = told["next"]
    assert found == names


def test_an_admin_ends_one_of_two_users_vms_of_a_uuid(node: Node) -> None:
    """Any user may take another's UUID: that must not keep an admin from either."""
    name = vm()
    for uid in (1000, 1001):
        begin(node, name, caller(uid))
    first, second = node.leases.records.of(name)
    admin = caller(0).peer
    with pytest.raises(UsageError, match="users 1000, 1001"):
        node.lease(name, admin)
    for one in (first, second):
        assert node.lease(name, admin, one.incarnation).uid == one.uid
    with pytest.raises(UsageError):
        node.lease(name, admin, second.incarnation + 1)
    with pytest.raises(UsageError, match="incarnation"):
        node.lease(name, caller(1000).peer, second.incarnation)
