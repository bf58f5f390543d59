# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon whose database is lost: the fence of the copy is served read-only, until an admin confirms."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmneg import limits
from kvmneg.errors import LimitExceeded, NotPermitted, StoreError, UsageError
from kvmneg.service.interfaces import fence

from .test_node import PEER, VM

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.service.node import Node

    from .conftest import Daemon

V2 = {"level": "x86-64-v2"}


def copied(daemon: Daemon, text: str) -> None:
    """Wait until the copy says `text`."""
    for _ in range(500):
        copy = Path(daemon.state) / "fence.copy"
        if copy.exists() and text in copy.read_text():
            return
        time.sleep(0.02)
    raise TimeoutError(text)


@pytest.fixture
def lost(make_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon whose database was lost under it: two pins, one contract granted at the second. Not started."""
    daemon = make_daemon().start()
    with daemon.client() as client:
        client.fence_pin("wide", source="host")
        client.fence_pin("narrow", source="level:x86-64-v2")
        client.begin(client.negotiate(V2)["digest"], VM)
    copied(daemon, '"generation": 2')
    daemon.end(signal.SIGKILL)
    pages = bytearray((Path(daemon.state) / "kvmneg.sqlite").read_bytes())
    for start in range(0, len(pages), 4096):
        pages[start : start + 200] = os.urandom(200)
    (Path(daemon.state) / "kvmneg.sqlite").write_bytes(pages)
    (Path(daemon.state) / "kvmneg.sqlite-wal").unlink()
    return daemon


def test_the_copy_follows_each_change(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    copied(daemon, '"text": null')
    with daemon.client() as client:
        client.fence_pin("one", source="host")
        copied(daemon, '"generation": 1')
        client.fence_unpin("two")
        client.fence_pin("three", source="level:x86-64-v2")
    assert daemon.end() == 0  # an orderly end waits for no timer
    assert '"generation": 3' in (Path(daemon.state) / "fence.copy").read_text()


def test_a_lost_database_is_no_lost_fence(lost: Daemon) -> None:
    contract = list(lost.contracts.iterdir())
    for _restart in range(2):  # the second finds no database at all
        lost.start()
        with lost.client() as client:
            fence = client.fence_get()
            assert (fence["generation"], fence["state"], fence["pinned"]) == (2, "readonly", True)
            assert "generation 2" in fence["stale"]
            assert client.get_host()["state"] == "readonly"
            offer = client.negotiate({"max": True})
            assert offer["generation"] == 2
            assert any(line.startswith("stale: ") for line in offer["scope"])
            for call in (
                lambda client=client, offer=offer: client.begin(offer["digest"], VM),
                lambda client=client: client.started(VM),
                lambda client=client: client.end(VM),
                lambda client=client: client.fence_pin("no", source="host"),
                lambda client=client: client.fence_unpin("no"),
            ):
                with pytest.raises(StoreError, match="read-only until an admin acts"):
                    call()
        assert lost.end() == 0
        assert "kvmneg fence restore" in lost.errors.read_text()
    assert list(lost.contracts.iterdir()) == contract  # nobody knows whether it is held


def test_an_admin_goes_on_from_the_copy(lost: Daemon) -> None:
    lost.start()
    with lost.client() as client, lost.client() as watching:
        events = watching.watch()
        assert next(events)["state"] == "readonly"
        digest = client.fence_get()["digest"]
        with pytest.raises(LimitExceeded):
            client.fence_restore("too far", above=limits.GENERATIONS)
        with pytest.raises(UsageError, match="reason"):
            client.fence_restore(" ")
        restored = client.fence_restore("the disk was replaced", above=17)
        assert (restored["generation"], restored["digest"]) == (18, digest)
        event = next(events)
        assert (event["state"], event["generation"], event["fenceDigest"]) == ("pinned", 18, digest)
        fence = client.fence_get()
        assert (fence["state"], fence["stale"], fence["text"]) == ("pinned", None, restored["text"])
        client.begin(client.negotiate(V2)["digest"], VM)
        with pytest.raises(UsageError, match="sound"):
            client.fence_restore("once more")
        copied(lost, '"generation": 18')
    lost.end(signal.SIGKILL)
    lost.start()
    with lost.client() as client:
        assert client.fence_get()["generation"] == 18
        assert client.fence_pin("on", source="level:x86-64-v2")["generation"] == 19


def test_a_contract_that_was_granted_names_a_generation(lost: Daemon) -> None:
    """The copy is one pin behind, the database unreadable: a guest runs on a contract of the last generation."""
    copy = Path(lost.state) / "fence.copy"
    for aside in Path(lost.state).glob("kvmneg.sqlite*"):
        aside.unlink()
    copy.write_bytes(behind(copy))
    lost.start()
    with lost.client() as client:
        assert client.fence_get()["generation"] == 1
        assert client.fence_restore("as it was")["generation"] == 3


def behind(copy: Path) -> bytes:
    """That copy as it would be of generation 1."""
    import hashlib

    body = copy.read_bytes().partition(b"\n")[2].replace(b'"generation": 2', b'"generation": 1')
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def test_a_read_only_file_system_is_served_from_the_copy(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    """As it is after the disk failed: nothing can be opened to write, what was committed bounds offers on."""
    small = tmp_path / "small"
    small.mkdir()
    wrapped = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    mount = f"mount -t tmpfs none {small}"
    if subprocess.run([*wrapped, mount], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a tmpfs of its own")
    daemon = make_daemon()
    before = daemon.state
    daemon.start()
    with daemon.client() as client:
        text = client.fence_pin("while it could be written", source="level:x86-64-v2")["text"]
    assert daemon.end() == 0
    daemon.state = str(small / "state")
    daemon.start(
        *wrapped, f'{mount} && cp -r {before} {small} && mount -o remount,ro {small} && exec "$@"', "sh"
    )
    with daemon.client() as client:
        fence = client.fence_get()
        assert (fence["state"], fence["generation"], fence["text"]) == ("readonly", 1, text)
        assert client.negotiate(V2)["generation"] == 1
        with pytest.raises(StoreError, match="read-only until an admin acts"):
            client.fence_pin("no", source="host")
        with pytest.raises(StoreError, match="there is a database"):
            client.fence_restore("it is only read-only")
    assert daemon.end() == 0
    daemon.state = before
    daemon.start()
    with daemon.client() as client:
        assert client.fence_get()["state"] == "pinned"


def test_only_an_admin_restores(node: Node) -> None:
    stranger = cast(
        "Any", SimpleNamespace(peer=SimpleNamespace(uid=65534, pid=1, groups=frozenset(), permitted=()))
    )
    restore = fence.handlers(node)["org.kvmneg.Fence.Restore"]
    with pytest.raises(NotPermitted):
        restore(stranger, {"reason": "mine"})


def test_readonly_while_the_disk_refuses_and_not_longer(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the store says stands in the state, and is told to who watches; nobody has to ask for it to end."""
    told: list[str] = []
    node.changed.append(lambda: told.append(node.state))
    database = cast("Any", node.store)._database
    fault = StoreError("cannot pin the fence: disk full", cause="SQLITE_FULL")
    database._note(fault)
    assert (node.state, node.stale) == ("readonly", fault.message)
    assert node.negotiate(cast("Any", _request()), PEER).contract
    node.keep_up()
    assert (node.state, node.stale) == ("floating", None)
    assert told == ["readonly", "floating"]


def _request() -> object:
    from kvmneg.policy.request import Request

    return Request(level="x86-64-v2")


def test_a_copy_that_cannot_be_written_is_told_and_tried_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmneg.service.level.restoring import Copier
    from kvmneg.store.sqlite import SqliteStore

    later: list[tuple[float, Callable[[], None]]] = []
    trouble: list[str] = []
    server = cast("Any", SimpleNamespace(after=lambda seconds, call: later.append((seconds, call))))
    Copier(server, node, trouble.append)
    node._tell()
    assert [seconds for seconds, _ in later] == [limits.COPY_SECONDS]  # one for both

    def refuse(*_: object) -> bool:
        raise StoreError("no room")

    with monkeypatch.context() as disk:
        disk.setattr(SqliteStore, "copy_out", refuse)
        later.pop()[1]()
    assert trouble == ["the copy of the fence is an old one: no room"]
    assert later[0][0] == limits.COPY_AGAIN_SECONDS
    later.pop()[1]()
    assert (len(trouble), later) == (1, [])
    assert not node.store.copy_out("now")  # it is there
