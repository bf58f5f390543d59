# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host without a fence: its level follows the host down, and up only when an admin says so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from kvmneg import limits
from kvmneg.errors import Blocked, GuestsAbove, HostsMissing, NoKvm, NotPinned, StaleOffer, StoreError
from kvmneg.features.featureset import diff, fits
from kvmneg.features.report import Report
from kvmneg.policy import leases, negotiation, portable
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request
from kvmneg.service.leases.contracts import ContractFiles
from kvmneg.service.level import levels, moves
from kvmneg.service.level.moves import Asked
from kvmneg.service.level.rolls import Rolls
from kvmneg.service.node import Node
from kvmneg.store.interface import Audit
from kvmneg.store.sqlite import SqliteStore

from .test_arm64 import HOSTS

if TYPE_CHECKING:
    from typing import Any

    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.peer import Peer

    from .conftest import Host

DATA = Path(__file__).resolve().parents[1] / "data/hosts"
AUDIT = Audit(0, 1, "2026-11-21T06:00:00Z", "a test", "pytest")
PEER = cast("Peer", SimpleNamespace(uid=1000, pid=7, groups=(), permitted=()))
ASKER = cast("Connection", SimpleNamespace(peer=PEER, on_closed=None))
VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
WORD, AVX2 = "cpuid:0x7.0.ebx", 1 << 5
MAX = Request(maximum=True)


def gain(host: Host) -> None:
    """A kernel that offers what the one before did not."""
    host.change("offer", WORD, f"{int(host.document['offer'][WORD], 16) | AVX2:#010x}")


def gives(node: Node) -> bool:
    return bool(node.negotiate(MAX, PEER).contract.granted.value(WORD) & AVX2)


def again(node: Node, host: Host, tmp_path: Path) -> Node:
    """The daemon started again over the same state."""
    return Node(node.store, host, ContractFiles(str(tmp_path / "contracts")))


def test_it_falls_by_itself_and_does_not_rise(node: Node, host: Host, tmp_path: Path) -> None:
    assert gives(node)
    host.lose(WORD, AVX2)
    node.refresh()
    assert (node.state, node.floor) == ("floating", None)  # what the host offers is all the bound there is
    gain(host)
    node.refresh()
    assert node.floor is not None
    assert not gives(node)
    answer = node.negotiate(Request(maximum=True), PEER)
    assert answer.contract.fence[1] == node.floor.digest
    with pytest.raises(Blocked) as caught:
        node.negotiate(Request(level="x86-64-v3"), PEER)
    (blocker,) = [one for one in caught.value.blockers if one.feature == "avx2"]
    assert (blocker.cause, blocker.missing_on) == ("fence", "the level this host floats at")
    assert "`kvmneg fence unpin`" in blocker.because
    assert not gives(again(node, host, tmp_path))  # remembered
    assert [row.action for row in node.store.audit(9)] == ["level-fell"]
    assert moves.unpin(node, 0, AUDIT) == 1
    assert gives(node)
    assert (node.state, node.floor) == ("floating", None)
    assert gives(again(node, host, tmp_path))
    with pytest.raises(NotPinned):
        moves.unpin(node, None, AUDIT)


def test_another_kernel_that_offers_the_same_changes_nothing(node: Node, host: Host, tmp_path: Path) -> None:
    host.change("combo", "kernel", "7.3.0")
    node.refresh()
    assert gives(node)
    host.change("combo", "kernel", "6.1.0")
    assert gives(again(node, host, tmp_path))
    assert node.store.audit(9) == []


def test_what_vmms_give_goes_with_them(host: Host, tmp_path: Path) -> None:
    """A build is found, and its version looked up, when the daemon runs already: that is no rise of the host's."""
    files = ContractFiles(str(tmp_path / "contracts"))
    host.change("combo", "vmms", [])
    with SqliteStore(str(tmp_path / "state"), verify=lambda text: Fence.parse(text).digest) as store:
        node = Node(store, host, files)
        assert node.floor is None
        host.change("combo", "vmms", [{"name": "qemu", "version": "10.0.13", "build": "sha256:0"}])
        node.refresh()
        assert (node.floor, store.audit(9)) == (None, [])
        request = Request(maximum=True, vmm="qemu")
        before = node.negotiate(request, PEER).contract.granted
        host.lose(WORD, AVX2)
        node.refresh()
        gain(host)
        node.refresh()
        assert node.floor is not None
        after = node.negotiate(request, PEER).contract.granted
        assert {one.feature for one in diff(before, after)} == {"avx2"}


def test_a_rise_and_a_fall_at_once(node: Node, host: Host, tmp_path: Path) -> None:
    host.lose(WORD, AVX2)
    node.refresh()
    gain(host)
    host.lose("cpuid:0x7.0.ebx", 1 << 7)  # smep goes as avx2 comes back
    node.refresh()
    for one in (node, again(node, host, tmp_path)):
        value = one.negotiate(MAX, PEER).contract.granted.value(WORD)
        assert (value & AVX2, value & 1 << 7) == (0, 0)
        assert one.floor is not None
    assert [row.action for row in node.store.audit(9)] == ["level-fell", "level-fell"]


def test_an_offer_above_the_level_is_not_begun(node: Node, host: Host) -> None:
    digest = node.negotiate(MAX, PEER).contract.digest
    host.lose(WORD, AVX2)
    node.refresh()
    gain(host)
    with pytest.raises(StaleOffer):
        node.begin(digest, VM, ASKER)


def test_what_is_pinned_over_a_held_level_may_be_all_of_the_host(node: Node, host: Host) -> None:
    """To pin is an admin's act: it raises."""
    host.lose(WORD, AVX2)
    node.refresh()
    gain(host)
    node.refresh()
    node.pin("host", None, None, AUDIT)
    assert gives(node)
    assert node.floor is None


def test_a_disk_that_is_full_does_not_raise_the_level(
    node: Node, host: Host, trouble: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    host.lose(WORD, AVX2)
    node.refresh()
    connection = node.store._database.connection  # type: ignore[attr-defined]
    connection.execute("PRAGMA query_only = ON")  # SQLite refuses each write
    gain(host)
    node.refresh()
    assert not gives(node)
    connection.execute("PRAGMA query_only = OFF")
    assert trouble


def test_an_unmeasured_host_raises_nothing(node: Node, host: Host) -> None:
    node.pin("level:x86-64-v2", None, None, AUDIT)
    host.error, host.moved = NoKvm("gone"), True
    with pytest.raises(HostsMissing, match="not measured since"):
        moves.unpin(node, None, AUDIT)
    host.error = None
    moves.raise_(node, Asked("host"), None, AUDIT)
    host.error = NoKvm("gone")
    with pytest.raises(NoKvm):
        moves.commit(node, None, AUDIT)
    assert node.generation == 1
    host.error = None
    assert moves.commit(node, None, AUDIT)["generation"] == 2


def test_a_commit_measures_whatever_was_known(node: Node, host: Host) -> None:
    node.pin("level:x86-64-v2", None, None, AUDIT)
    moves.raise_(node, Asked("host"), None, AUDIT)
    before = host.measured
    host.lose(WORD, AVX2)
    host.moved = False  # nothing tells of it
    with pytest.raises(Blocked, match="not every host offers") as caught:
        moves.commit(node, None, AUDIT)
    assert host.measured == before + 1
    assert "avx2" in {blocker.feature for blocker in caught.value.blockers}
    assert (node.state, node.generation) == ("raising", 1)


def test_a_raise_past_a_combo_to_return_to_needs_its_name(node: Node, host: Host) -> None:
    """Once it is committed there is no way back: the combo has left the roll-back set."""
    host.lose(WORD, AVX2)
    host.change("combo", "kernel", "6.1.0")
    node.refresh()
    old = node.combo_digest
    assert old is not None
    node.pin("host", None, None, AUDIT)
    node.store.rolls.add(old, 1, AUDIT)
    gain(host)
    host.change("combo", "kernel", "6.12.0")
    node.refresh()
    moves.raise_(node, Asked("host"), None, AUDIT)
    assert [combo for combo, _ in moves.plan(node, Asked()).left] == [old]
    with pytest.raises(Blocked, match="could not return") as caught:
        moves.commit(node, None, AUDIT)
    assert {one.feature for one in caught.value.blockers} == {"avx2"}
    assert {one.missing_on.partition(" under ")[2] for one in caught.value.blockers} == {"6.1.0"}
    assert [row.combo for row in node.store.rolls.members()] == [old]
    moves.commit(node, None, AUDIT, consent=(old,))
    assert node.store.rolls.members() == []
    assert gives(node)


def test_a_raise_that_nobody_commits_is_aborted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.pin("level:x86-64-v2", None, None, AUDIT)
    moves.raise_(node, Asked("host"), None, AUDIT)
    node.keep_up()
    assert node.state == "raising"
    monkeypatch.setattr(node, "_anchor", node._anchor + limits.PROPOSAL_SECONDS + 1)
    node.keep_up()
    assert (node.state, node.generation) == ("pinned", 1)
    last = node.store.audit(1)[0]
    assert (last.action, last.process) == ("raise-timeout", "kvmnegd")


def test_a_lowered_level_goes_back_up_only_over_what_the_host_has(node: Node, host: Host) -> None:
    node.pin("host", None, None, AUDIT)
    moves.lower(node, Asked(without=("avx2",)), None, AUDIT)
    host.lose(WORD, AVX2)
    node.refresh()
    assert node.state == "lowering"  # the host still has all of what is in force
    with pytest.raises(Blocked, match="offers less"):
        moves.abort(node, None, AUDIT)
    assert (node.state, node.generation) == ("lowering", 2)
    gain(host)
    assert moves.abort(node, None, AUDIT)["generation"] == 3


def test_a_breached_fence_is_not_taken_down_under_its_guests(node: Node, host: Host) -> None:
    node.pin("host", None, None, AUDIT)
    node.begin(node.negotiate(MAX, PEER).contract.digest, VM, ASKER)
    host.lose(WORD, AVX2)
    with pytest.raises(GuestsAbove):
        moves.unpin(node, None, AUDIT)
    node.leases.end(node.lease(VM, PEER))
    assert moves.unpin(node, None, AUDIT) == 2


def test_contracts_are_never_above_the_level_they_were_given_under(node: Node, host: Host) -> None:
    """What decides who is in the way of a lowering agrees with what negotiation grants."""
    requests = [
        MAX,
        Request(level="x86-64-v2"),
        Request(level="x86-64-v2", vmm="qemu"),
        Request(maximum=True, vmm="qemu"),
        Request(maximum=True, vmm="firecracker"),
        Request(exact=()),
    ]
    node.pin("host", None, None, AUDIT)
    for number, names in enumerate([(), ("avx2",), ("smep", "cx16")]):
        if names:
            moves.lower(node, Asked(without=names), None, AUDIT)
            moves.commit(node, None, AUDIT, override=tuple(one.vm for one in levels.holdings(node)))
        for place, request in enumerate(requests):
            vm = f"00000000-0000-4000-8000-0000000000{number}{place}"
            try:
                digest = node.negotiate(request, PEER).contract.digest
            except Blocked:
                continue
            node.begin(digest, vm, ASKER)
            assert node.fence is not None
            held = [one for one in levels.holdings(node) if one.vm == vm]
            assert leases.above(held, node.fence.granted) == []
    assert len(levels.holdings(node)) > 12
    assert node.fence is not None
    assert leases.above(levels.holdings(node), node.fence.granted)  # those from before


def test_a_proposal_that_was_tampered_with_is_told(node: Node) -> None:
    node.pin("host", None, None, AUDIT)
    moves.lower(node, Asked(without=("avx2",)), None, AUDIT)
    connection = node.store._database.connection  # type: ignore[attr-defined]
    connection.execute("UPDATE proposals SET digest = 'sha256:0'")
    with pytest.raises(Exception, match="not the one that was proposed"):
        moves.commit(node, None, AUDIT)


def test_a_store_from_before_floats_at_its_latest_report(tmp_path: Path, host: Host) -> None:
    """Migrated: what the newest report of the old schema offers is the level."""
    from kvmneg.store import schema

    state, steps = str(tmp_path / "old"), schema.MIGRATIONS
    files = ContractFiles(str(tmp_path / "contracts"))
    host.lose(WORD, AVX2)
    report = host.measure()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", steps[:1])
        import zlib

        with SqliteStore(state) as old:
            connection = old._database.connection
            row = report.digest(), report.combo_digest(), "2026-11-21", zlib.compress(report.canonical())
            connection.execute("INSERT INTO reports VALUES (?, ?, ?, ?, 1)", row)
    gain(host)
    with SqliteStore(state, verify=lambda text: Fence.parse(text).digest) as store:
        node = Node(store, host, files)
        assert not gives(node)
        assert json.loads(json.dumps(store.level().report)) == report.digest()
        assert fits(node.negotiate(MAX, PEER).contract.granted, report.offer) == ()


def test_a_plan_without_a_fence_is_about_what_there_is(node: Node) -> None:
    plan = moves.plan(node, Asked(without=("avx2",)))
    assert (plan.kind, plan.lost, plan.gained) == ("lower", ("avx2",), ())
    assert "avx2" in moves.plan(node, Asked("level:x86-64-v2")).lost


def test_a_level_that_cannot_be_read_grants_nothing(node: Node, host: Host, tmp_path: Path) -> None:
    """A catalogue that changed: the remedy is that of a fence that cannot be read."""
    node.store.levels.floats_at("", "architecture x86_64\ncpuid:0xdead.0.eax 0b" + "0" * 32 + "\n")
    after = again(node, host, tmp_path)
    assert after.state == "unreadable"
    with pytest.raises(StoreError, match="0xdead"):
        after.negotiate(MAX, PEER)
    moves.unpin(after, None, AUDIT)
    assert after.state == "floating"
    assert gives(after)


def test_guests_that_never_asked_stop_a_lowering(
    node: Node, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host that was measured here: those of a recorded report are not this machine's."""
    process = SimpleNamespace(pid=77, uid=5)
    found = [
        SimpleNamespace(process=SimpleNamespace(pid=76, uid=5), called={"uuid": VM}),
        SimpleNamespace(process=process, called={}),
    ]
    unknown = SimpleNamespace(blocking=lambda: found, missed=lambda: "some could not be looked into")
    monkeypatch.setattr(node, "_unknown", unknown)
    node.pin("host", None, None, AUDIT)
    moves.lower(node, Asked(without=("avx2",)), None, AUDIT)
    assert moves.commit(node, None, AUDIT, dry_run=True)["plan"]["guestCount"] == 0
    host.change("measured", "source", "kvm")
    with pytest.raises(GuestsAbove) as caught:
        moves.commit(node, None, AUDIT)
    assert [row["vm"] for row in caught.value.fields["guests"]] == ["pid 76", "pid 77", "unseen"]
    assert not any(row["known"] for row in caught.value.fields["guests"])
    assert moves.commit(node, None, AUDIT, override=("pid 76", "pid 77", "unseen"))["state"] == "pinned"


def test_a_saved_guest_is_in_the_way(node: Node) -> None:
    node.pin("host", None, None, AUDIT)
    node.begin(node.negotiate(MAX, PEER).contract.digest, VM, ASKER)
    node.leases.started(node.lease(VM, PEER))
    node.leases.saved(node.lease(VM, PEER))
    moves.lower(node, Asked(without=("avx2",)), None, AUDIT)
    with pytest.raises(GuestsAbove) as caught:
        moves.commit(node, None, AUDIT)
    assert [(row["vm"], row["state"]) for row in caught.value.fields["guests"]] == [(VM, "saved")]


def test_a_level_has_what_the_kernel_cannot_hide(tmp_path: Path) -> None:
    """arm64: a field that no guest can be told less of is shown, which is recorded; what can be hidden stays hidden."""
    host = SimpleNamespace(report=HOSTS.old(VENDOR=1))
    measurer = SimpleNamespace(measure=lambda: host.report, changed=lambda fresh=False: True)
    with SqliteStore(str(tmp_path / "state"), verify=lambda text: Fence.parse(text).digest) as store:
        node = Node(store, cast("Any", measurer), ContractFiles(str(tmp_path / "contracts")))
        host.report = HOSTS.old(
            ISAR0=0x2000_1021_1120, STD=3
        )  # 6.1 lets the hypercalls be set, and no ID register
        node.refresh()
        assert node.floor is not None
        granted = node.negotiate(MAX, PEER).contract.granted
        assert (granted.value(HOSTS.ISAR0), granted.value(HOSTS.VENDOR)) == (0x2000_1021_1120, 1)
        assert [row.action for row in store.audit(9)] == ["level-shown"]


def test_guests_carry_what_every_combo_to_return_to_lists(tmp_path: Path) -> None:
    """arm64: a register that only the new kernel knows has a rule in a new guest's contract, which can go back."""
    older, newer = (
        Report.loads((DATA / f"arm64-{line}.neoverse-n1.json").read_bytes()) for line in ("6.1", "newest")
    )
    extra = set(newer.registers) - set(older.registers)
    assert extra
    host = SimpleNamespace(report=older)
    measurer = SimpleNamespace(measure=lambda: host.report, changed=lambda fresh=False: True)
    files = ContractFiles(str(tmp_path / "contracts"))

    def rules(node: Node) -> dict[int, str]:
        contract = node.negotiate(MAX, PEER).contract
        return {one.register: one.rule for one in contract.portable if one.register in extra}

    with SqliteStore(str(tmp_path / "state"), verify=lambda text: Fence.parse(text).digest) as store:
        node = Node(store, cast("Any", measurer), files)
        host.report = newer
        node.refresh()
        moves.unpin(node, None, AUDIT)
        assert rules(node) == dict.fromkeys(extra, portable.CARRY)
        assert negotiation.check(node.negotiate(MAX, PEER).contract, older)
        Rolls(node).add(older.combo_digest(), AUDIT)
        for one in (node, Node(store, cast("Any", measurer), files)):  # remembered
            assert portable.CARRY not in rules(one).values()
            assert negotiation.check(one.negotiate(MAX, PEER).contract, older) == ()
        assert [row.action for row in store.audit(9)].count("level-fell") == 1  # the start changed nothing
        Rolls(node).remove(older.combo_digest(), AUDIT)
        assert rules(node) == dict.fromkeys(extra, portable.CARRY)


def test_the_same_offer_with_more_registers_is_bounded_by_a_combo_to_return_to(tmp_path: Path) -> None:
    """arm64: where nothing but the registers differs, the level is the host's, and what is carried is not."""
    newer = Report.loads((DATA / "arm64-newest.neoverse-n1.json").read_bytes())
    extra = newer.registers[-1]
    document = json.loads(json.dumps(newer.to_json()))
    document["combo"]["kernel"] = "6.99.0"
    document["registers"].pop()
    older = Report.from_json(document)
    assert (older.offer, older.registers) == (newer.offer, newer.registers[:-1])
    host = SimpleNamespace(report=older)
    measurer = SimpleNamespace(measure=lambda: host.report, changed=lambda fresh=False: True)
    files = ContractFiles(str(tmp_path / "contracts"))
    with SqliteStore(str(tmp_path / "state"), verify=lambda text: Fence.parse(text).digest) as store:
        node = Node(store, cast("Any", measurer), files)
        Rolls(node).add(older.combo_digest(), AUDIT)
        assert node.floor is None
        host.report = newer
        node.refresh()
        for one in (node, Node(store, cast("Any", measurer), files)):
            assert one.floor is not None
            assert one.floor.registers == older.registers
            rule = {row.register: row.rule for row in one.negotiate(MAX, PEER).contract.portable}[extra]
            assert rule != portable.CARRY
        host.report = older
        node.refresh()
        assert node.floor is None


def test_a_breach_is_recorded_once(node: Node, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """And so is its end: whatever settles the level in between."""
    node.pin("host", None, None, AUDIT)
    host.lose(WORD, 1 << 7)
    node.refresh()
    for _ in range(2):
        levels.settle(node, host.measure())
    gain_smep = f"{int(host.document['offer'][WORD], 16) | 1 << 7:#010x}"
    host.change("offer", WORD, gain_smep)
    node.refresh()
    levels.settle(node, host.measure())
    told = [row.action for row in node.store.audit(9) if row.action in ("breached", "healed")]
    assert told == ["healed", "breached"]
    assert capsys.readouterr().err.count("fence generation 1 promises") == 2
