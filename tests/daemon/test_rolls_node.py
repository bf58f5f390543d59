# SPDX-License-Identifier: LGPL-2.1-or-later
"""The room of records and the roll-back set inside a daemon: whom it tells what, what blocks, what it tells others."""

from __future__ import annotations

import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits
from kvmneg.errors import KvmnegError, NotPermitted, StoreError
from kvmneg.features.difference import Blocker
from kvmneg.policy import roll
from kvmneg.policy.combos import Asked
from kvmneg.policy.request import Request
from kvmneg.service.interfaces import rollback
from kvmneg.service.interfaces.router import Router
from kvmneg.service.level import rolls
from kvmneg.store.interface import Audit

from .conftest import Host

if TYPE_CHECKING:
    from kvmneg.service.node import Node

AUDIT = Audit(0, 1, "2026-11-21T06:00:00Z", "before the 6.12 roll-out", "kvmneg")


def vm() -> str:
    return str(uuid.uuid4())


def caller(uid: int) -> Any:
    return SimpleNamespace(peer=SimpleNamespace(uid=uid, pid=1, groups=frozenset(), permitted=()))


def test_other_users_guests_are_counted_not_named(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [vm(), vm()]
    for name, uid in zip(names, (54321, 54322), strict=True):
        peer = caller(uid).peer
        node.begin(node.negotiate(Request(maximum=True), peer).contract.digest, name, caller(uid))
    blocker = Blocker("avx2", "cpuid:0x7.0.ebx", 5, "the contract", "host old", "kvm", "because")
    monkeypatch.setattr("kvmneg.policy.negotiation.accepts", lambda *_, **__: (blocker,))
    check = rollback.handlers(node)["org.kvmneg.Rollback.Check"]
    for uid, told in ((54321, names[:1]), (54322, names[1:]), (54323, []), (0, names)):
        # with a VMM each distinct set is judged by itself
        answer = check(caller(uid), {"combo": "running", "vmm": "qemu"})
        (held,) = answer["guests"]
        assert (held["count"], held["vms"], len(held["blockers"])) == (2, told, 1)


def test_reasons_are_told_of_so_many_sets(node: Node) -> None:
    blocker = Blocker("avx2", "cpuid:0x7.0.ebx", 5, "the contract", "host old", "kvm", "because")
    many = tuple(roll.Held(f"{n}", (f"vm{n}",), (blocker,)) for n in range(limits.ROLLBACK_SETS + 2))
    told = rollback._held(many, None)
    assert [len(held["blockers"]) for held in told] == [1] * limits.ROLLBACK_SETS + [0, 0]
    assert [held["vms"] for held in told[-2:]] == [["vm64"], ["vm65"]]


def test_only_an_admin_changes_the_set(node: Node) -> None:
    handlers = rollback.handlers(node)
    for method in ("Add", "Remove"):
        with pytest.raises(NotPermitted):
            handlers[f"org.kvmneg.Rollback.{method}"](caller(54321), {"combo": "running", "reason": "r"})


def test_unknown_guests_are_named_for_admins(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolls.Rolls, "guests", lambda self: roll.Guests((), unknown=("pid 4711",)))
    check = rollback.handlers(node)["org.kvmneg.Rollback.Check"]
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


def test_records_of_the_first_kvmneg_and_damaged_ones(node: Node) -> None:
    """A combo without a document is read from its report; what cannot be read is a fault of the store, told."""
    room = rolls.Rolls(node)
    connection = node.store._database.connection  # type: ignore[attr-defined]
    connection.execute("UPDATE combos SET document = NULL")
    (row,) = room.history(9)
    assert room.combo(row)["kernel"] == node.report.combo["kernel"]
    history = rollback.handlers(node)["org.kvmneg.Rollback.History"]
    assert history(caller(1), {})["entries"][0]["kernel"] == node.report.combo["kernel"]
    connection.execute("UPDATE combos SET document = '{'")
    with pytest.raises(StoreError, match="cannot be read"):
        history(caller(1), {})
    connection.execute("DROP TRIGGER reports_update")
    connection.execute("UPDATE reports SET body = x'00'")
    with pytest.raises(StoreError, match="cannot be read"):
        rolls.Rolls(node).check("running", Asked(), None, predict=False)


def test_a_release_that_was_built_twice_is_allowed_where_both_are(node: Node, host: Any) -> None:
    """Who asks for a kernel by its release may boot either build."""
    release = node.report.combo["kernel"]
    host.change("combo", "build", "#2 SMP, the one without AVX2")
    host.lose("cpuid:0x7.0.ebx", 1 << 5)
    node.measure()
    less = node.combo_digest
    host.document = Host().document
    host.change("combo", "kernel", "7.3.4-amd64")
    node.measure()
    room = rolls.Rolls(node)
    assert room.check(None, Asked(kernel=release), None, predict=False).allowed
    node.pin("host", None, None, AUDIT)
    answer = room.check(None, Asked(kernel=release), None, predict=False)
    assert (answer.combo, answer.allowed) == (less, False)
    assert "avx2" in {blocker.feature for blocker in answer.blockers}
    asked = Asked(kernel=release, others=(("build", Host().document["combo"]["build"]),))
    assert room.check(None, asked, None, predict=False).allowed


def test_a_vmm_without_rules_of_its_own_is_a_dimension(node: Node) -> None:
    check = rollback.handlers(node)["org.kvmneg.Rollback.Check"]
    answer = check(caller(0), {"vmm": "bhyve-1.0"})
    assert [row["dimension"] for row in answer["differs"]] == ["vmms.bhyve.version"]
    assert "install that VMM build" in answer["how"]
