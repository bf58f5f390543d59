# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a daemon tells the journal: of the fence's changes and refusals, limits, strangers, the store, the host."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmneg import limits
from kvmneg.errors import KvmnegError, LimitExceeded, NotPermitted, StoreError
from kvmneg.host.guests import Process
from kvmneg.service import announcing, journal, systemd, telling
from kvmneg.service.interfaces.router import Router
from kvmneg.service.level import moves
from kvmneg.service.level.moves import Asked
from kvmneg.service.watching import changes

from .test_node import AUDIT, AVX2, PEER

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.service.node import Node

    from .conftest import Host

    Told = list[tuple[str, tuple[str, ...], dict[str, object]]]

ROOT = cast("Any", SimpleNamespace(uid=0, pid=11, groups=frozenset(), permitted=()))
WORD = "cpuid:0x7.0.ebx"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """The events, with the fields that are not None."""
    found: Told = []

    def remember(name: str, *lines: str, **fields: object) -> None:
        given = {field: value for field, value in fields.items() if value is not None}
        assert {field.upper() for field in given} <= set(journal.EVENTS[name][2])
        found.append((name, lines, given))

    monkeypatch.setattr(journal, "event", remember)
    return found


def call(node: Node, peer: Any, method: str, **parameters: Any) -> KvmnegError | None:
    """How a call was refused, None where it was not."""
    connection = cast("Any", SimpleNamespace(peer=peer, raw=b""))
    try:
        Router(node).call(connection, f"org.kvmneg.{method}", parameters, False, False)
    except KvmnegError as error:
        return error
    return None


def names(told: Told) -> list[str]:
    return [name for name, *_ in told]


def test_each_change_of_the_fence(node: Node, told: Told) -> None:
    node.pin("level:x86-64-v2", None, None, AUDIT)
    moves.raise_(node, Asked("host"), None, AUDIT)
    moves.abort(node, None, AUDIT)
    moves.raise_(node, Asked("host"), None, AUDIT)
    moves.commit(node, None, AUDIT)
    moves.lower(node, Asked(without=("avx2",)), None, AUDIT, urgent=True)
    moves.commit(node, None, AUDIT)
    node.unpin(None, AUDIT)
    assert names(told) == [
        "fence-pinned", "fence-proposed", "fence-aborted", "fence-proposed", "fence-raised", "fence-lowered",
        "fence-settled", "fence-unpinned",
    ]  # fmt: skip
    _, lines, fields = told[5]
    assert fields == {
        "generation": 3, "fence_digest": told[6][2]["fence_digest"], "uid": 0, "pid": 1, "reason": "a test",
        "urgent": 1,
    }  # fmt: skip
    assert lines == ("uid 0 lowered the fence for new guests, generation 3: a test",)
    assert [fields["generation"] for _, _, fields in told] == [1, 1, 1, 1, 2, 3, 3, 4]


def test_what_only_looks_is_not_told(node: Node, told: Told) -> None:
    moves.pin(node, "host", None, None, AUDIT, dry_run=True)
    assert call(node, ROOT, "Fence.Raise", reason="r", dryRun=True, **{"from": "host"}) is not None
    assert call(node, PEER, "GetContract", digest="0" * 64) is not None
    assert told == []


def test_a_breach_is_told_once_at_each_start(
    node: Node, host: Host, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the first measurement, where it is new; else with the state, of which an operator reads after a start."""
    monkeypatch.setattr(systemd, "ready", lambda status: True)
    node.pin("host", None, None, AUDIT)
    host.lose(WORD, AVX2)
    for _ in range(2):
        told.clear()
        announcing.announce(type(node)(node.store, host, node.files))
        ((name, lines, fields),) = told
        assert name == "breached" and fields["count"] == 1, lines


def test_a_change_that_is_refused(node: Node, told: Told) -> None:
    error = call(node, ROOT, "Fence.Commit", reason="r")
    assert error is not None and error.varlink == "org.kvmneg.Fence.WrongState"
    ((name, lines, fields),) = told
    assert (name, fields) == (
        "fence-refused",
        {"method": "org.kvmneg.Fence.Commit", "error": "WrongState", "uid": 0, "pid": 11, "generation": 0},
    )
    assert error.message in lines[0]


def test_a_user_who_may_not(node: Node, told: Told) -> None:
    peer = cast("Any", SimpleNamespace(uid=1000, pid=7, groups=frozenset(), permitted=()))
    assert isinstance(call(node, peer, "Fence.Pin", reason="r", **{"from": "host"}), NotPermitted)
    assert [(name, fields) for name, _, fields in told] == [
        (
            "peer-refused",
            {
                "method": "org.kvmneg.Fence.Pin",
                "uid": 1000,
                "pid": 7,
                "reason": "D-Bus is off, so polkit was not asked",
            },
        )
    ]


def test_a_limit_that_a_call_crosses(node: Node, told: Told) -> None:
    request = {"level": "x86-64-v2", "optional": ["rdrand"] * (limits.REQUEST_FEATURES + 1)}
    assert isinstance(call(node, PEER, "Negotiate", request=request), LimitExceeded)
    ((name, _, fields),) = told
    assert (name, fields["limit"], fields["allowed"], fields["uid"]) == (
        "limit-hit", "REQUEST_FEATURES", limits.REQUEST_FEATURES, 1000,
    )  # fmt: skip


def test_a_limit_of_the_transport(make_daemon: Callable[..., Any]) -> None:
    import socket

    daemon = make_daemon().start()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(daemon.socket)
        client.sendall(b"x" * (limits.CALL_BYTES + 1))
        while client.recv(65536):
            pass
    daemon.end()
    assert "was refused: limit CALL_BYTES exceeded: at most 65536\n" in daemon.errors.read_text()


def test_a_host_below_its_fence_and_back(node: Node, host: Host, told: Told) -> None:
    node.pin("host", None, None, AUDIT)
    before = host.document["offer"][WORD]
    host.lose(WORD, AVX2)
    node.refresh()
    host.change("offer", WORD, before)
    node.refresh()
    assert names(told) == ["fence-pinned", "breached", "healed"]
    assert told[1][2]["features"] == ["avx2"]
    assert (told[1][2]["count"], told[1][2]["generation"]) == (1, 1)


def test_what_changed_on_the_host(node: Node, host: Host, told: Told) -> None:
    before = node.report
    host.lose(WORD, AVX2)
    host.change("combo", "microcode", "0xdead")
    node.refresh()
    changes.tell(before, node.report)
    changes.tell(node.report, node.report)
    ((name, lines, fields),) = told
    assert (name, fields["lost"], fields["inputs"]) == ("host-changed", ["avx2"], ["microcode"])
    assert fields["host_digest"] == node.host_digest
    assert lines == tuple(changes.told(before, node.report))


def test_a_host_that_goes_and_comes(node: Node, told: Told) -> None:
    changes.tell(node.report, None, KvmnegError("kvm is gone", cause="x"))
    changes.tell(None, node.report)
    assert [(name, fields) for name, _, fields in told] == [
        ("host-unmeasured", {"reason": "kvm is gone", "cause": "x"}),
        ("host-measured", {"host_digest": node.host_digest, "combo_digest": node.combo_digest}),
    ]


def test_the_store_fails_once_and_recovers_once(node: Node, told: Told) -> None:
    announcing.follow(cast("Any", SimpleNamespace(after=lambda *_: None)), node)
    connection = node.store._database.connection  # type: ignore[attr-defined]
    connection.execute("PRAGMA query_only = ON")  # SQLite refuses each write
    for _ in range(2):
        with pytest.raises(StoreError):
            node.store.record_report("sha256:1", "sha256:2", AUDIT.at, b"", "{}")
    node.keep_up()
    assert names(told) == ["store-failing"]
    connection.execute("PRAGMA query_only = OFF")
    node.keep_up()
    node.keep_up()
    assert names(told) == ["store-failing", "store-recovered"]
    assert told[0][2]["cause"] == "SQLITE_READONLY"


class Guests:
    """Unknown guests as a test says they are."""

    def __init__(self) -> None:
        self.on_found: Callable[[Process], None] = lambda process: None
        self.there: list[Any] = []

    def all(self) -> list[Any]:
        return self.there

    def come(self, pid: int, *, stays: bool = True, waived: str = "") -> None:
        process = Process(pid, 1, 1, 1000, f"vmm{pid}")
        if stays:
            called = {"name": "web", "uuid": "u"} if pid == 5 else {}
            self.there.append(SimpleNamespace(process=process, waived=waived, called=called))
        self.on_found(process)


def test_a_stranger_is_told_of_once_and_not_at_once(told: Told) -> None:
    guests, timers = Guests(), []
    loop: Any = SimpleNamespace(after=lambda seconds, callback: timers.append((seconds, callback)))
    telling.Strangers(loop, cast("Any", guests))
    guests.come(5)
    guests.come(6, stays=False)  # asked meanwhile, or has gone
    guests.come(7, waived="known")
    assert told == []
    ((seconds, tell),) = timers
    assert seconds == limits.STRANGER_SECONDS
    tell()
    assert told == [
        (
            "unknown-guest",
            ("process 5 (vmm5, web) of uid 1000 has a VM that nobody negotiated for",),
            {"process_pid": 5, "process_uid": 1000, "process": "vmm5", "vm": "u", "vm_name": "web"},
        )
    ]
    guests.come(8)
    timers[1][1]()
    assert [fields["process_pid"] for _, _, fields in told] == [5, 8]


def test_only_so_many_strangers_wait(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "UNKNOWN_GUESTS", 3)
    guests, timers = Guests(), []
    loop: Any = SimpleNamespace(after=lambda seconds, callback: timers.append(callback))
    telling.Strangers(loop, cast("Any", guests))
    for pid in range(10, 20):
        guests.come(pid)
    timers[0]()
    assert len(told) == 3


def test_a_start(node: Node, told: Told) -> None:
    telling.started(node, "floating, generation 0, no fence")
    assert told[0][1] == ("started: floating, generation 0, no fence",)
    assert {"state": "floating", "generation": 0, "host_digest": node.host_digest}.items() <= told[0][
        2
    ].items()
