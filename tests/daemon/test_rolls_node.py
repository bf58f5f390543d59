# SPDX-License-Identifier: LGPL-2.1-or-later
"""The room of records and the roll-back set inside a daemon: whom it tells what, what blocks, what it tells others."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits
from kvmneg.errors import KvmnegError, NotPermitted
from kvmneg.features.difference import Blocker
from kvmneg.policy import roll
from kvmneg.policy.request import Request
from kvmneg.service import interfaces_rolls, rolls
from kvmneg.service.router import Router
from kvmneg.store.interface import Audit

if TYPE_CHECKING:
    from kvmneg.service.node import Node

AUDIT = Audit(0, 1, "2026-11-21T06:00:00Z", "before the 6.12 roll-out", "kvmneg")


def vm() -> str:
    return str(uuid.uuid4())


def caller(uid: int) -> Any:
    return SimpleNamespace(peer=SimpleNamespace(uid=uid, pid=1, groups=frozenset()))


def test_other_users_guests_are_counted_not_named(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [vm(), vm()]
    for name, uid in zip(names, (54321, 54322), strict=True):
        peer = caller(uid).peer
        node.begin(node.negotiate(Request(maximum=True), peer).contract.digest, name, caller(uid))
    blocker = Blocker("avx2", "cpuid:0x7.0.ebx", 5, "the contract", "host old", "kvm", "because")
    monkeypatch.setattr("kvmneg.policy.negotiation.accepts", lambda *_, **__: (blocker,))
    check = interfaces_rolls.handlers(node)["org.kvmneg.Rollback.Check"]
    for uid, told in ((54321, names[:1]), (54322, names[1:]), (54323, []), (0, names)):
        # with a VMM each distinct set is judged by itself
        answer = check(caller(uid), {"combo": "running", "vmm": "qemu"})
        (held,) = answer["guests"]
        assert (held["count"], held["vms"], len(held["blockers"])) == (2, told, 1)


def test_reasons_are_told_of_so_many_sets(node: Node) -> None:
    blocker = Blocker("avx2", "cpuid:0x7.0.ebx", 5, "the contract", "host old", "kvm", "because")
    many = tuple(roll.Held(f"{n}", (f"vm{n}",), (blocker,)) for n in range(limits.ROLLBACK_SETS + 2))
    told = interfaces_rolls._held(many, None)
    assert [len(held["blockers"]) for held in told] == [1] * limits.ROLLBACK_SETS + [0, 0]
    assert [held["vms"] for held in told[-2:]] == [["vm64"], ["vm65"]]


def test_only_an_admin_changes_the_set(node: Node) -> None:
    handlers = interfaces_rolls.handlers(node)
    for method in ("Add", "Remove"):
        with pytest.raises(NotPermitted):
            handlers[f"org.kvmneg.Rollback.{method}"](caller(54321), {"combo": "running", "reason": "r"})


def test_unknown_guests_are_named_for_admins(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolls.Rolls, "guests", lambda self: roll.Guests((), unknown=("pid 4711",)))
    check = interfaces_rolls.handlers(node)["org.kvmneg.Rollback.Check"]
    for uid, named in ((0, ["pid 4711"]), (54321, [])):
        answer = check(caller(uid), {"combo": "running"})
        assert (answer["allowed"], answer["unknown"], answer["unknownGuests"]) == (False, 1, named)


def test_the_roll_back_set_is_told(node: Node) -> None:
    """Kept replies rest on the ceiling, which the roll-back set bounds."""
    told: list[int] = []
    node.changed.append(lambda: told.append(1))
    room = rolls.Rolls(node)
    room.add("running", AUDIT)
    room.add("running", AUDIT)
    assert told == [1]
    assert [combo for combo, _ in room.offers()] == [node.combo_digest]
    room.remove("running", AUDIT)
    assert told == [1, 1] and room.offers() == []


def test_a_combo_with_unmeasured_cpus_is_no_way_back(node: Node, host: Any) -> None:
    host.change("combo", "unvisited", [{"cpus": "4-7", "because": "no affinity"}])
    node.measure()
    with pytest.raises(KvmnegError, match="not every kind of CPU"):
        rolls.Rolls(node).add("running", AUDIT)


def test_a_room_comes_with_its_first_call(node: Node) -> None:
    router = Router(node)
    assert not any(method.startswith("org.kvmneg.Rollback") for method in router._handlers)
    assert router._handler("org.kvmneg.Rollback.List") == router._handler("org.kvmneg.Rollback.List")
