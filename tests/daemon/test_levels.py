# SPDX-License-Identifier: LGPL-2.1-or-later
"""The level of a real daemon over its socket: raised, lowered, aborted, breached, healed; dry runs change nothing."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.errors import (
    Blocked,
    Breached,
    GenerationMismatch,
    GuestsAbove,
    LimitExceeded,
    NotPinned,
    StaleOffer,
    UsageError,
    WrongState,
)

from .conftest import RECORDED
from .test_daemon import as_user

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvmneg.client import Client

    from .conftest import Daemon

VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
SECOND = VM[:-1] + "f"
MAX: dict[str, Any] = {"max": True}
AVX2 = {"level": "x86-64-v1", "require": ["avx2", "avx", "xsave", "xcr0-avx", "xcr0-sse"]}
CX16 = {"level": "x86-64-v1", "require": ["cx16"]}


def begin(client: Client, vm: str = VM, *, started: bool = True) -> str:
    """A VM with all it can get; the digest of its contract."""
    digest: str = client.negotiate(MAX)["digest"]
    client.begin(digest, vm)
    if started:
        client.started(vm)
    return digest


def gives(client: Client, request: dict[str, Any]) -> bool:
    return bool(client.check(request)["fits"])


def audit(daemon: Daemon) -> list[tuple[str, int]]:
    """Actions and generations of the audit, oldest first; read when the daemon has ended."""
    with closing(sqlite3.connect(f"{daemon.state}/kvmneg.sqlite")) as connection:
        return list(connection.execute("SELECT action, generation FROM audit ORDER BY id"))


def content(client: Client) -> tuple[Any, ...]:
    """All that a dry run must not change."""
    return client.fence_get(), client.fence_progress(), client.fence_history(), client.get_host()["state"]


def recorded_without(path: Path, word: str, bits: int) -> Path:
    """The recorded report of a host that lost some bits, as after an update of its microcode."""
    document = json.loads(RECORDED.read_text())
    document["offer"][word] = f"{int(document['offer'][word], 16) & ~bits:#010x}"
    document["combo"]["microcode"] = "0xbad"
    path.write_text(json.dumps(document))
    return path


def test_a_raise_from_its_plan_to_its_commit(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.fence_pin("low", source="level:x86-64-v2")
        before = client.fence_get()
        plan = client.fence_plan(source="host")["plan"]
        assert (plan["kind"], plan["lost"], plan["guestCount"]) == ("raise", [], 0)
        assert "avx2" in plan["gained"]
        proposed = client.fence_raise("after the upgrade", source="host")
        assert (proposed["state"], proposed["generation"], proposed["plan"]) == ("raising", 1, plan)
        assert client.fence_get() == {**before, "state": "raising", "proposal": "raise"}
        assert not gives(client, AVX2)  # until it is committed
        assert client.fence_plan()["plan"] == plan
        assert client.fence_progress()["proposal"]["reason"] == "after the upgrade"
        committed = client.fence_commit("no way back")
        assert (committed["state"], committed["generation"]) == ("pinned", 2)
        assert client.fence_get()["digest"] == plan["digest"]
        assert gives(client, AVX2)
        with pytest.raises(WrongState) as caught:
            client.fence_commit("again")
        assert caught.value.fields["state"] == "pinned"
    assert daemon.end() == 0
    assert audit(daemon) == [("pin", 1), ("raise-propose", 1), ("raise-commit", 2)]


def test_what_was_looked_at_is_committed(daemon: Daemon) -> None:
    """The generation does not tell two proposals of a raise apart."""
    with daemon.client() as client:
        client.fence_pin("low", source="level:x86-64-v1")
        seen = client.fence_raise("a little", source="level:x86-64-v2")
        client.fence_abort("of another admin")
        other = client.fence_raise("all of it, of another admin", source="host")
        assert other["generation"] == seen["generation"]
        with pytest.raises(WrongState, match="what is proposed"):
            client.fence_commit("a little", digest=seen["plan"]["digest"], expected_generation=1)
        assert client.fence_get()["state"] == "raising"
        assert client.fence_commit("all", digest=other["plan"]["digest"])["generation"] == 2


def test_a_lowering_waits_for_the_guest_above(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.fence_pin("all", source="host")
        stale = client.negotiate(MAX)["digest"]
        begin(client)
        lowered = client.fence_lower("no avx2 on the other host", without=("avx2",))
        assert (lowered["state"], lowered["generation"]) == ("lowering", 2)
        (guest,) = lowered["plan"]["guests"]
        assert (guest["vm"], guest["state"], guest["known"]) == (VM, "running", True)
        assert guest["features"] == ["avx2"]
        assert not gives(client, AVX2)  # at once
        with pytest.raises(StaleOffer):
            client.begin(stale, SECOND)
        with pytest.raises(GuestsAbove) as caught:
            client.fence_commit("done?")
        assert [row["vm"] for row in caught.value.fields["guests"]] == [VM]
        assert client.fence_get()["state"] == "lowering"
        begin(client, SECOND)  # under the lower one: it is not in the way
        client.end(VM)
        assert client.fence_commit("done")["generation"] == 2
        assert client.fence_get()["state"] == "pinned"
        client.end(SECOND)
        assert [row["action"] for row in client.fence_history()["entries"]] == ["lower", "pin"]
    assert daemon.end() == 0
    assert audit(daemon)[-2:] == [("lower-propose", 2), ("lower-finish", 2)]


def test_guests_that_are_named_may_stay_above(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.fence_pin("all", source="host")
        begin(client)
        begin(client, SECOND, started=False)  # an outstanding contract counts like a guest
        client.fence_lower("why not", without=("avx2",))
        with pytest.raises(GuestsAbove) as caught:
            client.fence_commit("some", override=(VM,))
        assert [(row["vm"], row["state"]) for row in caught.value.fields["guests"]] == [(SECOND, "begun")]
        assert client.fence_commit("all of them", override=(VM, SECOND))["state"] == "pinned"
    assert daemon.end() == 0
    with closing(sqlite3.connect(f"{daemon.state}/kvmneg.sqlite")) as connection:
        (detail,) = connection.execute("SELECT detail FROM audit ORDER BY id DESC LIMIT 1").fetchone()
    assert json.loads(detail)["overridden"] == sorted([VM, SECOND])


@pytest.mark.parametrize("kind", ["raise", "lower"])
def test_what_is_proposed_survives_a_restart_and_is_aborted(daemon: Daemon, kind: str) -> None:
    with daemon.client() as client:
        client.fence_pin("start", source="level:x86-64-v2")
        first = client.fence_get()
        if kind == "raise":
            client.fence_raise("maybe", source="host")
        else:
            client.fence_lower("maybe", without=("cx16",))
        before = content(client)
    assert daemon.end() == 0
    daemon.start()
    with daemon.client() as client:
        assert content(client) == before
        assert client.fence_get()["state"] == kind.replace("lower", "lowering").replace("raise", "raising")
        aborted = client.fence_abort("no")
        assert aborted["generation"] == (1 if kind == "raise" else 3)
        assert {**client.fence_get(), "generation": 1} == first
        with pytest.raises(WrongState):
            client.fence_abort("again")


def test_a_breach_is_told_and_healed(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Another report is served after a restart: less than the fence promises, and then again what it does."""
    daemon = make_daemon().start()
    with daemon.client() as client:
        client.fence_pin("all", source="host")
    daemon.end()
    daemon.options = ("--report", str(recorded_without(tmp_path / "less", "cpuid:0x7.0.ebx", 1 << 5)))
    daemon.start()
    with daemon.client() as client:
        assert client.get_host()["state"] == "breached"
        with pytest.raises(Breached) as caught:
            client.negotiate({"level": "x86-64-v1"})
        assert "avx2" in {blocker.feature for blocker in caught.value.blockers}
        with pytest.raises(Blocked, match="breached"):
            client.fence_raise("up", text=client.fence_get()["text"])
        assert client.fence_get()["generation"] == 1  # nothing is lowered silently
    daemon.end()
    daemon.options = ("--report", str(RECORDED))
    daemon.start()
    with daemon.client() as client:
        assert client.get_host()["state"] == "pinned"
        assert client.negotiate(AVX2)["generation"] == 1
    daemon.end()
    assert "offers less than fence generation 1 promises: avx2" in daemon.errors.read_text()
    assert audit(daemon) == [("pin", 1), ("breached", 1), ("healed", 1)]


def test_an_emergency_is_followed_to_its_end(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon().start()
    with daemon.client() as client:
        client.fence_pin("all", source="host")
        begin(client, SECOND, started=False)
        begin(client)
    daemon.end()
    daemon.options = ("--report", str(recorded_without(tmp_path / "less", "cpuid:0x7.0.ebx", 1 << 5)))
    daemon.start()
    with daemon.client() as client:
        assert client.get_host()["state"] == "breached"
        lowered = client.fence_emergency("new microcode")
        assert lowered["state"] == "lowering"
        assert "avx2" in lowered["plan"]["lost"]
        assert [row["vm"] for row in lowered["plan"]["guests"]] == [SECOND, VM]  # begun before running
        progress = client.fence_progress()
        assert (progress["proposal"]["urgent"], progress["done"], progress["count"]) == (True, 0, 2)
        client.end(SECOND)
        client.end(VM)
        begin(client)  # cold-booted, with what there is now
        progress = client.fence_progress()
        assert [(row["vm"], row["became"]) for row in progress["guests"]] == [
            (SECOND, "gone"),
            (VM, "cold-booted"),
        ]
        assert progress["done"] == 2
        assert client.fence_commit("everybody is through")["state"] == "pinned"
        assert client.fence_progress() == {"proposal": None, "guests": [], "done": 0, "count": 0}
    daemon.end()
    assert [action for action, _ in audit(daemon)] == [
        "pin",
        "breached",
        "lower-propose",
        "healed",
        "lower-finish",
    ]


def test_an_emergency_goes_before_a_raise(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.fence_pin("some", source="level:x86-64-v2")
        client.fence_raise("up", source="host")
        with pytest.raises(WrongState, match="proposed to raise"):
            client.fence_lower("down", without=("cx16",))
        assert client.fence_emergency("at once", without=("cx16",))["state"] == "lowering"
        assert client.fence_progress()["proposal"]["kind"] == "lower"
        assert client.fence_emergency("and more", without=("sse4.1",))["generation"] == 3
        assert client.fence_abort("it was a mistake")["generation"] == 4
        assert gives(client, CX16)


def test_dry_runs_change_nothing(daemon: Daemon) -> None:
    with daemon.client() as client:
        empty = content(client)
        assert client.fence_pin("try", source="host", dry_run=True)["generation"] == 1
        assert content(client) == empty
        client.fence_pin("all", source="host")
        pinned = content(client)
        client.fence_unpin("try", dry_run=True)
        assert client.fence_lower("try", without=("avx2",), dry_run=True)["plan"]["lost"] == ["avx2"]
        client.fence_emergency("try", without=("avx2",), dry_run=True)
        assert content(client) == pinned
        client.fence_lower("really", without=("avx2",))
        lowering = content(client)
        client.fence_commit("try", dry_run=True)
        client.fence_abort("try", dry_run=True)
        assert content(client) == lowering
        client.fence_commit("really")
        done = content(client)
        client.fence_raise("try", source="host", dry_run=True)
        assert content(client) == done
    daemon.end()
    assert [action for action, _ in audit(daemon)] == ["pin", "lower-propose", "lower-finish"]


def test_moves_that_are_none(daemon: Daemon) -> None:
    with daemon.client() as client:
        for move in (client.fence_raise, client.fence_lower, client.fence_emergency):
            with pytest.raises(NotPinned):
                move("nothing there", source="host")
        client.fence_pin("all", source="host")
        with pytest.raises(UsageError, match="in force already"):
            client.fence_raise("up", source="host")
        with pytest.raises(Blocked, match=r"takes away too: .*avx2"):
            client.fence_raise("up", source="level:x86-64-v2")
        with pytest.raises(UsageError, match="one of them"):
            client.fence_lower("which", source="host", without=("avx2",))
        with pytest.raises(UsageError, match="fdp-excptn-only cannot be taken away"):
            client.fence_lower("hide a risk", without=("fdp-excptn-only",))
        with pytest.raises(UsageError, match="no feature is called"):
            client.fence_lower("hide", without=("avx3",))
        with pytest.raises(UsageError, match="a reason is needed"):
            client.fence_lower("", without=("avx2",))
        with pytest.raises(GenerationMismatch):
            client.fence_lower("late", without=("avx2",), expected_generation=0)
        assert client.fence_get()["generation"] == 1


def test_a_fence_is_not_pinned_below_a_guest(daemon: Daemon) -> None:
    """In the place of another a pin is a raise and a lowering in one step, with the guards of both."""
    with daemon.client() as client:
        client.fence_pin("all", source="host")
        begin(client)
        with pytest.raises(GuestsAbove) as caught:
            client.fence_pin("less", source="level:x86-64-v2")
        assert caught.value.fields["guests"][0]["vm"] == VM
        client.fence_lower("less", without=("avx2",))
        with pytest.raises(WrongState, match="proposed to lower"):
            client.fence_pin("all", source="host")
        with pytest.raises(WrongState, match="proposed to lower"):
            client.fence_unpin("all")
        client.end(VM)
        client.fence_commit("done")
        assert client.fence_pin("less", source="level:x86-64-v2")["generation"] == 3


@pytest.mark.parametrize(
    ("limit", "call"),
    [
        ("CONSENTS", lambda c: c.fence_commit("x", consent=["c"] * (limits.CONSENTS + 1))),
        ("OVERRIDES", lambda c: c.fence_commit("x", override=["v"] * (limits.OVERRIDES + 1))),
        ("REQUEST_FEATURES", lambda c: c.fence_plan(without=["f"] * (limits.REQUEST_FEATURES + 1))),
    ],
)
def test_lists_are_limited(daemon: Daemon, limit: str, call: Callable[[Client], object]) -> None:
    with daemon.client() as client, pytest.raises(LimitExceeded, match=limit):
        call(client)


def test_only_admins_see_the_guests_of_others(daemon: Daemon) -> None:
    parameters = {"without": ["avx2"]}
    with daemon.client() as client:
        client.fence_pin("all", source="host")
        begin(client)
        assert [row["vm"] for row in client.fence_plan(without=("avx2",))["plan"]["guests"]] == [VM]
        plan = as_user(65534, daemon, "org.kvmneg.Fence.Plan", parameters)["plan"]
        assert (plan["guests"], plan["guestCount"], plan["lost"]) == ([], 1, ["avx2"])
        client.fence_lower("down", without=("avx2",))
        progress = as_user(65534, daemon, "org.kvmneg.Fence.Progress", {})
        assert (progress["guests"], progress["count"], progress["done"]) == ([], 1, 0)
    for method in ("Raise", "Lower", "Emergency", "Commit", "Abort"):
        given = {"reason": "mine", **(parameters if method in ("Lower", "Emergency") else {})}
        assert as_user(65534, daemon, f"org.kvmneg.Fence.{method}", given) == {"error": "NotPermitted"}
    assert as_user(65534, daemon, "org.kvmneg.Fence.Audit", {}) == {"error": "NotPermitted"}


def test_the_audit_is_read_in_pages(daemon: Daemon) -> None:
    with daemon.client() as client:
        assert client.fence_audit() == {"entries": []}
        client.fence_pin("all", source="host")
        client.fence_lower("down", without=("avx2",))
        client.fence_abort("no")
        newest, older = client.fence_audit(2)["entries"]
        assert (newest["id"], newest["action"], newest["reason"]) == (3, "lower-abort", "no")
        assert (older["id"], older["detail"]["lost"], older["detail"]["guests_above"]) == (2, ["avx2"], 0)
        assert [row["action"] for row in client.fence_audit(before=2)["entries"]] == ["pin"]
        with pytest.raises(LimitExceeded, match="HISTORY_ROWS"):
            client.fence_audit(limits.HISTORY_ROWS + 1)
