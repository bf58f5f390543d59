# SPDX-License-Identifier: LGPL-2.1-or-later
"""What other users, a full disk, an odd umask or an older state may not do to a daemon that a roll-out depends on."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmneg import limits
from kvmneg.errors import KvmnegError, NoSuchContract, NotPermitted, StoreError, UsageError
from kvmneg.policy.request import Request
from kvmneg.service.interfaces import fence
from kvmneg.service.interfaces.router import Router
from kvmneg.service.leases.contracts import ContractFiles
from kvmneg.service.node import Node
from kvmneg.service.varlink.message import reply
from kvmneg.service.watching import vmms
from kvmneg.service.watching.recorded import RecordedMeasurer
from kvmneg.store.interface import Audit
from kvmneg.store.leases import Leases
from kvmneg.store.sqlite import SqliteStore

from .conftest import RECORDED
from .test_node import ASKER, AUDIT, AVX2, PEER, V2, VM

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.peer import Peer

    from .conftest import Daemon, Host

OTHER = cast("Peer", SimpleNamespace(uid=1001, pid=8, groups=frozenset(), permitted=()))
OTHER_ASKER = cast("Connection", SimpleNamespace(peer=OTHER, on_closed=None))
OPTIONAL = ("rdrand", "bmi1", "adx", "smap", "smep", "clflushopt", "clwb", "umip")  # a contract each


def fail(*_: Any, **__: Any) -> Any:
    raise StoreError("no room")


def negotiate(router: Router, peer: Peer, request: dict[str, Any], *, more: bool = False) -> bytes:
    """A call as the server makes it, the cache first."""
    call = b'{"method":"org.kvmneg.Negotiate","parameters":' + repr(request).encode() + b"}\0"
    connection = cast("Any", SimpleNamespace(peer=peer, raw=call))
    known = None if more else router.cached(call)
    answer = known or router.call(connection, "org.kvmneg.Negotiate", {"request": request}, more, False)
    assert answer is not None
    return answer


# -- one user against another


def test_nobody_empties_the_offers_of_another(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CACHED_OFFERS", 4)
    digest = node.negotiate(V2, PEER).contract.digest
    for name in OPTIONAL:
        last = node.negotiate(Request(level="x86-64-v2", optional=(name,)), OTHER).contract.digest
    assert len(node.offers.values) == 4
    node.begin(digest, VM, ASKER)
    node.begin(last, VM[:-1] + "f", OTHER_ASKER)


def test_a_reply_is_given_out_only_while_its_offer_stands(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls with `more` make offers and keep no replies: a kept reply would outlive its offer."""
    monkeypatch.setattr(limits, "CACHED_OFFERS", 4)
    router, request = Router(node), {"level": "x86-64-v2"}
    digest = node.negotiate(V2, OTHER).contract.digest
    negotiate(router, OTHER, request)
    for name in OPTIONAL:
        negotiate(router, OTHER, {**request, "optional": [name]}, more=True)
    with pytest.raises(NoSuchContract):
        node.begin(digest, VM, ASKER)
    assert digest.encode() in negotiate(router, PEER, request)
    for name in OPTIONAL:
        negotiate(router, OTHER, {**request, "optional": [name]}, more=True)
    node.begin(digest, VM, ASKER)


def test_nobody_empties_the_kept_replies_of_another(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CACHED_REPLIES", 4)
    router = Router(node)
    mine = negotiate(router, PEER, {"max": True})
    for name in OPTIONAL:
        negotiate(router, OTHER, {"level": "x86-64-v2", "optional": [name]})
    assert negotiate(router, PEER, {"max": True}) is mine
    assert len(router._known.values) == 4


def test_what_is_long_is_not_kept(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    router = Router(node)
    long_call = {"level": "x86-64-v2", "optional": ["rdrand"] * (limits.CACHED_CALL_BYTES // 8)}
    assert negotiate(router, PEER, long_call) is not negotiate(router, PEER, long_call)
    monkeypatch.setattr(limits, "CACHED_REPLY_BYTES", 100)
    assert negotiate(router, PEER, {"max": True}) is not negotiate(router, PEER, {"max": True})


def test_nobody_takes_the_uuid_of_another_users_vm(node: Node) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    node.begin(digest, VM, OTHER_ASKER)
    with pytest.raises(NotPermitted, match="another user"):
        node.lease(VM, PEER)
    mine, _ = node.begin(digest, VM, ASKER)
    assert node.lease(VM, PEER) == mine and mine.uid == 1000
    assert node.lease(VM, OTHER).uid == 1001
    with pytest.raises(UsageError, match="users 1000, 1001"):
        node.lease(VM, cast("Peer", SimpleNamespace(uid=0, pid=9, groups=frozenset(), permitted=())))


# -- a host that changes


def test_a_look_that_another_took_is_not_counted_as_ones_own(node: Node, host: Host) -> None:
    """`changed` without `fresh` may answer from a look that is a second old: with the reply's, two."""
    looks: list[bool] = []
    host.changed = lambda *, fresh=False: looks.append(fresh) or False  # type: ignore[func-returns-value]
    router = Router(node)
    router.attach(cast("Any", SimpleNamespace(clock=lambda: 100.0, after=lambda *_: None)))
    negotiate(router, PEER, {"max": True})
    assert looks == [True]


def test_a_host_that_changed_is_seen_though_nobody_asks(node: Node, host: Host) -> None:
    told: list[int] = []
    node.changed.append(lambda: told.append(1))
    node.keep_up()
    assert told == []
    host.lose("cpuid:0x7.0.ebx", AVX2)
    node.keep_up()
    assert told == [1]


def test_a_full_disk_does_not_hide_a_new_measurement(
    node: Node, host: Host, trouble: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    router = Router(node)
    first = negotiate(router, PEER, {"max": True})
    host.lose("cpuid:0x7.0.ebx", AVX2)
    with monkeypatch.context() as disk:
        disk.setattr(SqliteStore, "record_report", fail)
        node.refresh()
        assert negotiate(router, PEER, {"max": True}) != first
    assert "no room" in trouble[0]
    node.keep_up()
    kept = node.store.latest_report()
    assert kept is not None
    assert kept.digest == node.report.digest()


def test_a_fault_of_ours_leaves_no_old_report(
    node: Node, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = Router(node)
    negotiate(router, PEER, {"max": True})
    host.moved = True
    with monkeypatch.context() as broken:
        broken.setattr(host, "measure", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            node.refresh()
        assert node.state == "unmeasured"
        with pytest.raises(KvmnegError):
            node.negotiate(V2, PEER)
        assert not router._replies
    node.refresh()
    assert node.state == "floating"


# -- grants and their files


def test_a_grant_whose_file_cannot_be_written_is_none(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    with monkeypatch.context() as disk:
        disk.setattr(ContractFiles, "write", fail)
        with pytest.raises(StoreError):
            node.begin(digest, VM, ASKER)
    assert node.store.leases.outstanding() == []


def test_a_grant_that_cannot_be_stored_leaves_no_file(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    with monkeypatch.context() as disk:
        disk.setattr(Leases, "begin", fail)
        with pytest.raises(StoreError):
            node.begin(digest, VM, ASKER)
    assert node.files.digests() == []


def test_asked_again_the_file_is_there_again(node: Node) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    path = Path(node.begin(digest, VM, ASKER)[1])
    content = path.read_bytes()
    path.unlink()
    assert node.begin(digest, VM, ASKER)[1] == str(path)
    assert path.read_bytes() == content


def test_a_vm_has_ended_though_its_file_stays(
    node: Node, trouble: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node.begin(node.negotiate(V2, PEER).contract.digest, VM, ASKER)
    monkeypatch.setattr(ContractFiles, "remove", fail)
    node.leases.end(node.lease(VM, PEER))
    assert trouble == ["no room"]
    assert node.store.leases.outstanding() == []


def test_only_contracts_are_taken_from_the_directory(tmp_path: Path) -> None:
    (tmp_path / "lease.pdf").write_text("somebody's")
    (tmp_path / "folder").mkdir()
    (tmp_path / ("0" * 64)).write_text("nobody's any more")
    (tmp_path / ("1" * 64 + ".new")).write_text("half written")
    tmp_path.chmod(0o755)
    ContractFiles(str(tmp_path)).keep([("a" * 64, b"contract")])
    assert sorted(os.listdir(tmp_path)) == ["a" * 64, "folder", "lease.pdf"]


@pytest.mark.parametrize("what", ["empty", "other", "writable", "link"])
def test_a_file_that_is_not_what_was_granted_is_replaced(tmp_path: Path, what: str) -> None:
    files, victim = ContractFiles(str(tmp_path / "contracts")), tmp_path / "victim"
    victim.write_bytes(b"contract")
    path = Path(files.path("a" * 64))
    if what == "link":
        path.symlink_to(victim)
    else:
        path.write_bytes({"empty": b"", "other": b"contracT", "writable": b"contract"}[what])
        path.chmod(0o666 if what == "writable" else 0o444)
    Path(f"{path}.new").symlink_to(victim)
    files.keep([("a" * 64, b"contract")])
    assert (path.read_bytes(), path.is_symlink(), stat.S_IMODE(path.stat().st_mode)) == (
        b"contract",
        False,
        0o444,
    )
    assert (victim.read_bytes(), os.listdir(files.directory)) == (b"contract", ["a" * 64])


@pytest.mark.parametrize("what", ["writable", "link", "file"])
def test_a_directory_that_others_rule_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "contracts"
    if what == "writable":
        path.mkdir()
        path.chmod(0o777)
    elif what == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o755)
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_text("")
    with pytest.raises(StoreError, match="only this daemon"):
        ContractFiles(str(path))


# -- replies


def test_a_long_history_is_as_much_as_one_reply_holds(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPLY_BYTES", 64 * 1024)
    for number in range(10):
        wordy = Audit(0, 1, AUDIT.at, f"{number}" + "\N{GRINNING FACE}" * (limits.REASON_CHARACTERS - 1), "x")
        node.pin("host", None, None, wordy)
    asker: Any = SimpleNamespace(peer=SimpleNamespace(uid=0, pid=0, groups=frozenset()))
    answer = fence.handlers(node)["org.kvmneg.Fence.History"](asker, {})
    assert [row["generation"] for row in answer["entries"]][:2] == [10, 9]
    assert limits.REPLY_BYTES // 2 < len(reply(answer)) <= limits.REPLY_BYTES


def test_a_recorded_report_says_so_whatever_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "saved.json"
    file.write_text(RECORDED.read_text().replace('"source": "recorded"', '"source": "kvm"'))
    assert '"source": "kvm"' in file.read_text()
    assert RecordedMeasurer(str(file)).measure().measured["source"] == "recorded"


def test_a_yes_on_a_recorded_report_says_so(daemon: Daemon) -> None:
    with daemon.client() as client:
        offer = client.negotiate({"max": True})
        for scope in (offer["scope"], client.check({"max": True})["scope"]):
            assert any(line.startswith("not judged: the KVM of this machine") for line in scope)


# -- the daemon itself


def run(daemon: Daemon) -> subprocess.CompletedProcess[str]:
    return subprocess.run(daemon.command(), capture_output=True, text=True, timeout=20, check=False)


def test_a_file_in_the_socket_s_place_is_left_alone(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    file = Path(daemon.socket)
    file.parent.mkdir()
    file.write_text("precious")
    done = run(daemon)
    assert done.returncode == UsageError.exit_code
    assert "is no socket" in done.stderr
    assert file.read_text() == "precious"


def test_an_odd_umask_shuts_nobody_out(make_daemon: Callable[..., Daemon]) -> None:
    before = os.umask(0o077)
    try:
        daemon = make_daemon().start()
    finally:
        os.umask(before)
    with daemon.client() as client:
        path = Path(client.begin(client.negotiate({"max": True})["digest"], VM)["path"])
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path.parent.parent, path.parent, path)]
    assert modes == [0o755, 0o755, 0o444]
    assert stat.S_IMODE(Path(daemon.socket).stat().st_mode) == 0o666


def test_a_socket_that_is_another_s_by_now_stays(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    os.unlink(daemon.socket)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(daemon.socket)
        assert daemon.end() == 0
        assert Path(daemon.socket).exists()


def test_paths_are_absolute(make_daemon: Callable[..., Daemon], monkeypatch: pytest.MonkeyPatch) -> None:
    daemon = make_daemon()
    monkeypatch.chdir(Path(daemon.socket).parents[1])
    daemon.socket = "run/org.kvmneg"
    daemon.start()
    with daemon.client() as client:
        assert os.path.isabs(client.begin(client.negotiate({"max": True})["digest"], VM)["path"])


def test_a_service_manager_that_is_gone_stops_nothing(
    make_daemon: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    daemon = make_daemon().start()
    with daemon.client() as client:
        assert client.fence_pin("told to nobody", source="host")["generation"] == 1
    assert daemon.end() == 0


@pytest.mark.parametrize("leave", ["pin", "unpin"])
def test_a_stored_fence_that_this_build_cannot_read(make_daemon: Callable[..., Daemon], leave: str) -> None:
    """A catalogue that changed: nothing is granted, nothing is lost, and an admin gets out of it."""
    text = "architecture x86_64\ncpuid:0xdead.0.eax 0b" + "0" * 32 + "\n"
    daemon = make_daemon()
    with SqliteStore(daemon.state) as store:
        store.pin(text, "sha256:" + "1" * 64, expected_generation=None, audit=AUDIT)
    daemon.start()
    with daemon.client() as client, daemon.client() as watching:
        events = watching.watch()
        assert next(events)["state"] == "unreadable"
        for call in (
            client.get_host,
            client.fence_get,
            lambda: client.negotiate({"max": True}),
            lambda: client.check({"max": True}),
        ):
            with pytest.raises(StoreError, match=r"generation 1 .*0xdead"):
                call()
        assert client.call("org.kvmneg.Fence.History")["entries"][0]["reason"] == AUDIT.reason
        if leave == "pin":
            client.fence_pin("as it was meant", source="host", expected_generation=1)
        else:
            client.fence_unpin("without one for now")
        assert next(events)["state"] == ("pinned" if leave == "pin" else "floating")
        assert client.negotiate({"max": True})["generation"] == 2
    assert "generation 1" in daemon.errors.read_text()
    assert daemon.end(signal.SIGTERM) == 0


def test_without_pidfds_the_lookup_of_vmms_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox may refuse pidfd_open(2)."""
    children: list[int] = []
    spawn = os.posix_spawn

    def remember(*arguments: Any, **options: Any) -> int:
        children.append(spawn(*arguments, **options))
        return children[-1]

    def refuse(pid: int) -> int:
        raise PermissionError(1, "refused")

    monkeypatch.setattr(os, "posix_spawn", remember)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    monkeypatch.setattr(vmms, "_PROGRAM", "pass")
    lookup = vmms.VmmLookup(str(tmp_path), cast("Any", SimpleNamespace(vmms=())))
    lookup.start(cast("Any", SimpleNamespace(after=lambda _, function: function())), cast("Any", object()))
    assert os.waitpid(children[0], 0)[1] == 0
