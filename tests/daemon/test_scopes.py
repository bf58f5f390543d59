# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a yes must not leave out: guests that were taken on or waived, reports of a part, words of a VM's monitor."""

from __future__ import annotations

import os
import uuid
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.errors import Blocked, GuestsAbove, StoreError
from kvmneg.features.featureset import fits
from kvmneg.host.guests import Process
from kvmneg.policy import rates, roll
from kvmneg.policy.request import Request
from kvmneg.service.interfaces import guests, rollback
from kvmneg.service.leases.contracts import ContractFiles
from kvmneg.service.leases.unknown import Unknown, UnknownGuests
from kvmneg.service.level import moves, rolls
from kvmneg.service.node import Node
from kvmneg.store.interface import Audit
from kvmneg.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from pathlib import Path

    from .conftest import Host

AUDIT = Audit(0, 1, "2026-11-21T06:00:00Z", "a test", "kvmneg")


def vm() -> str:
    return str(uuid.uuid4())


def caller(uid: int, pid: int = 1) -> Any:
    return SimpleNamespace(peer=SimpleNamespace(uid=uid, pid=pid, groups=frozenset()), fd=-1)


class Strangers(UnknownGuests):
    """Stands in for VMs that nobody negotiated for; the recorded host counts as measured here then."""

    def __init__(self, node: Node, *found: Unknown) -> None:
        self.found = list(found)
        node._unknown = self
        node.report.measured["source"] = "kvm"

    def all(self) -> list[Unknown]:
        return self.found

    def blocking(self) -> list[Unknown]:
        return [one for one in self.found if not one.waived]

    def missed(self) -> str:
        return ""


def stranger(pid: int, waived: str = "", **called: str) -> Unknown:
    return Unknown(Process(pid, 1000, 1, 54321, "qemu"), waived, called)


def test_a_guest_that_is_taken_on_may_have_all_of_the_host(node: Node) -> None:
    """Hyper-V's leaves and what else is given by name only: nobody knows that it has none of them."""
    Strangers(node, Unknown(Process(os.getpid(), 1000, 1, os.getuid(), "qemu"), "", {}))
    call, name = guests.handlers(node)["org.kvmneg.Guests.Import"], vm()
    call(caller(os.getuid()), {"pid": os.getpid(), "vm": name, "reason": "ours"})
    (holding,) = node.leases.holdings()
    assert holding.granted is not None and holding.vm == name
    more = fits(node.report.accept, holding.granted)
    assert [one.feature for one in more if one.word != rates.WORD] == []
    assert holding.granted.value("hyperv:0x40000003.0.eax")
    assert roll.Guests([holding]).blocking(node.report) == ()  # it runs there


def test_a_waived_guest_is_named_in_the_scope(node: Node) -> None:
    Strangers(node, stranger(4711, "a test machine"))
    check = rollback.handlers(node)["org.kvmneg.Rollback.Check"]
    answer = check(caller(0), {"combo": "running"})
    assert answer["allowed"]
    assert any("4711" in line and line.startswith("not judged") for line in answer["scope"])


def test_a_yes_without_a_vmm_says_so(node: Node) -> None:
    check = rollback.handlers(node)["org.kvmneg.Rollback.Check"]
    line = "not judged: any VMM's own refusals; none was named"
    assert line in check(caller(0), {"combo": "running"})["scope"]
    assert line not in check(caller(0), {"combo": "running", "vmm": "qemu"})["scope"]


def test_what_an_unknown_guest_calls_itself_overrides_nothing(node: Node) -> None:
    """Its command line is its own: it may claim the UUID that an admin passes over."""
    moves.pin(node, "host", None, None, AUDIT)
    known = vm()
    asker = caller(0)
    node.begin(node.negotiate(Request(maximum=True), asker.peer).contract.digest, known, asker)
    moves.lower(node, moves.Asked(without=("avx2",)), None, AUDIT)
    Strangers(node, stranger(4711, uuid=known))
    with pytest.raises(GuestsAbove) as caught:
        moves.commit(node, None, AUDIT, override=(known,))
    assert [row["vm"] for row in caught.value.fields["guests"]] == ["pid 4711"]


def test_a_combo_to_return_to_that_was_measured_in_part_holds_a_raise(node: Node, host: Host) -> None:
    """Its newest report counts; one over some of the CPUs says nothing of the others."""
    old = host.document
    host.lose("cpuid:0x7.0.ebx", 1 << 5)  # avx2
    host.change("combo", "kernel", "5.10.0")
    node.measure()
    weak = host.document
    moves.pin(node, "level:x86-64-v2", None, None, AUDIT)
    rolls.Rolls(node).add("running", AUDIT)
    # the same combo again, but only where avx2 is
    host.document = {**weak, "offer": old["offer"]}
    host.document["combo"] = {**weak["combo"], "unvisited": [{"cpus": "4-7", "because": "no affinity"}]}
    host.moved = True
    node.measure()
    host.document = old
    node.measure()
    moves.raise_(node, moves.Asked("host"), None, AUDIT)
    with pytest.raises(Blocked) as caught:
        moves.commit(node, None, AUDIT)
    assert {one.feature for one in caught.value.blockers} == {"avx2"}


def test_a_level_that_floats_is_not_lost_with_its_record(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was cannot be read any more: nothing is granted, rather than all that the host offers by now."""
    strong = host.document
    host.lose("cpuid:0x7.0.ebx", 1 << 5)  # avx2

    def unreadable(self: SqliteStore, digest: str) -> None:
        raise StoreError("cannot read the reports: Input/output error")

    with SqliteStore(str(tmp_path / "state")) as store:
        node = Node(store, host, ContractFiles(str(tmp_path / "contracts")))
        host.document, host.moved = strong, True
        monkeypatch.setattr(SqliteStore, "report", unreadable)
        node.measure()
        with pytest.raises(StoreError, match="Input/output"):
            node.negotiate(Request(maximum=True), caller(0).peer)
        monkeypatch.undo()
        node.keep_up()
        granted = node.negotiate(Request(maximum=True), caller(0).peer).contract.granted
        assert not granted.value("cpuid:0x7.0.ebx") & 1 << 5


def test_a_guest_that_was_waived_is_not_told_as_gone(node: Node) -> None:
    moves.pin(node, "host", None, None, AUDIT)
    strangers = Strangers(node, stranger(4711), stranger(4712))
    moves.lower(node, moves.Asked(without=("avx2",)), None, AUDIT)
    strangers.found = [stranger(4711, "a test machine")]
    rows = {row["vm"]: row["became"] for row in moves.progress(node)["guests"]}
    assert rows == {"pid 4711": "waived", "pid 4712": "gone"}


def test_what_runs_is_what_runs_now(node: Node, host: Host) -> None:
    """A parameter was written since the last look: `running` is not the combo of then."""
    before = node.combo_digest
    host.change("combo", "cmdline", "mitigations=off")
    row, _ = rolls.Rolls(node).add("running", AUDIT)
    assert row.digest != before and row.digest == node.combo_digest


def test_a_guest_that_is_taken_on_has_what_the_host_has_now(node: Node, host: Host) -> None:
    Strangers(node, Unknown(Process(os.getpid(), 1000, 1, os.getuid(), "qemu"), "", {}))
    word, bit = "cpuid:0x7.0.ecx", 1 << 22  # rdpid, which the recorded host lacks
    assert not node.report.accept.value(word) & bit
    host.change("offer", word, f"{int(host.document['offer'][word], 16) | bit:#x}")
    call = guests.handlers(node)["org.kvmneg.Guests.Import"]
    call(caller(os.getuid()), {"pid": os.getpid(), "vm": vm(), "reason": "ours"})
    (holding,) = node.leases.holdings()
    assert holding.granted is not None and holding.granted.value(word) & bit
