# SPDX-License-Identifier: LGPL-2.1-or-later
"""Those who are no admins may do what polkit permits them: callers of D-Bus, and peers of varlink."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits
from kvmneg.errors import LimitExceeded, NotPermitted
from kvmneg.host.guests import process
from kvmneg.service.bus import polkit as polkit_module
from tests.bus import surface
from tests.bus.conftest import NO_ADMINS, TIMEOUT, Polkit, Refused, Served, Wire, refusal, until
from tests.daemon.test_daemon import as_user

if TYPE_CHECKING:
    from collections.abc import Callable

FENCE = "org.kvmneg1.Fence"
REASON = ("sa{sv}", "a test")
HOST = {"from": ("s", "host")}
PIN: dict[str, Any] = {"reason": "a test", "from": "host"}
ASK = {"allowInteractiveAuthentication": True}
COMBO = "0" * 64


@pytest.fixture
def judged(polkit: Polkit, make_served: Callable[..., Served]) -> Served:
    """A kvmnegd that takes nobody for an admin, with polkit beside it."""
    return make_served(NO_ADMINS)


def test_what_polkit_permits_is_done(judged: Served, polkit: Polkit) -> None:
    surface.check_refusal(judged.bus.busctl)
    wire = Wire()
    polkit.say(pin="yes")
    generation, digest, _ = wire.call(FENCE, "Pin", *REASON, HOST)
    assert wire.call(FENCE, "Get")[1:3] == (generation, digest)
    with pytest.raises(Refused) as caught:  # this action, not the next
        wire.call(FENCE, "Unpin", *REASON, {})
    assert caught.value.name == "org.kvmneg1.Error.NotPermitted"
    first, *_, last = polkit.asked()
    assert (first["kind"], first["action"]) == ("system-bus-name", "org.kvmneg1.pin")
    assert last["action"] == "org.kvmneg1.unpin"
    assert first["subject"]["name"].startswith(":") and first["subject"] != last["subject"]


@pytest.mark.parametrize(
    ("interface", "method", "arguments", "action"),
    [
        (FENCE, "Pin", (*REASON, HOST), "pin"),
        (FENCE, "Unpin", (*REASON, {}), "unpin"),
        (FENCE, "Raise", (*REASON, HOST), "raise"),
        (FENCE, "Lower", (*REASON, HOST), "lower"),
        (FENCE, "Emergency", (*REASON, HOST), "emergency"),
        (FENCE, "Commit", (*REASON, {}), "lower"),
        (FENCE, "Abort", (*REASON, {}), "lower"),
        (FENCE, "Restore", (*REASON, {}), "restore"),
        (FENCE, "Audit", ("a{sv}", {}), "audit"),
        ("org.kvmneg1.Rollback", "Add", ("ssa{sv}", COMBO, "a test", {}), "rollback"),
        ("org.kvmneg1.Rollback", "Remove", ("ssa{sv}", COMBO, "a test", {}), "rollback"),
        ("org.kvmneg1.Guests", "Import", ("xssa{sv}", 1, COMBO, "a test", {}), "import"),
        ("org.kvmneg1.Guests", "Waive", ("xsa{sv}", 1, "a test", {}), "waive"),
    ],
)
def test_each_method_has_its_action(  # noqa: PLR0917 (pytest names them)
    judged: Served, polkit: Polkit, interface: str, method: str, arguments: Any, action: str
) -> None:
    with pytest.raises(Refused) as caught:
        Wire().call(interface, method, *arguments)
    assert caught.value.name == "org.kvmneg1.Error.NotPermitted"
    assert [one["action"] for one in polkit.asked()] == [f"org.kvmneg1.{action}"]


def test_what_is_proposed_is_ended_by_who_may_propose_it(judged: Served, polkit: Polkit) -> None:
    wire = Wire()
    polkit.say(pin="yes", **{"raise": "yes"})
    wire.call(FENCE, "Pin", *REASON, {"from": ("s", "level:x86-64-v2")})
    assert wire.call(FENCE, "Raise", *REASON, HOST)[1] == "raising"
    assert wire.call(FENCE, "Abort", *REASON, {})[1] == "pinned"
    assert [one["action"].rpartition(".")[2] for one in polkit.asked()] == ["pin", "raise", "raise"]


def test_the_person_is_asked_only_where_the_caller_says_so(judged: Served, polkit: Polkit) -> None:
    polkit.say(pin="yes")
    Wire().call(FENCE, "Pin", *REASON, {**HOST, "allowInteractiveAuthentication": ("b", True)})
    with judged.client() as client:
        client.call("org.kvmneg.Fence.Pin", {**PIN, **ASK})
        client.call("org.kvmneg.Fence.Pin", PIN)
    assert [one["flags"] for one in polkit.asked()] == [1, 1, 0]


def test_root_and_the_admins_are_asked_nothing(make_served: Callable[..., Served], polkit: Polkit) -> None:
    served = make_served()
    Wire().call(FENCE, "Pin", *REASON, HOST)
    with served.client() as client:
        client.call("org.kvmneg.Fence.Pin", PIN)
    assert polkit.asked() == []


def test_a_peer_of_varlink_is_asked_for_as_one_process(judged: Served, polkit: Polkit) -> None:
    polkit.say(pin="yes")
    with judged.client() as client:
        assert client.call("org.kvmneg.Fence.Pin", PIN)["generation"] == 1
        with pytest.raises(NotPermitted) as caught:
            client.call("org.kvmneg.Fence.Unpin", {"reason": "a test"})
        assert "action" not in caught.value.fields
        assert client.call("org.kvmneg.Fence.Get")["pinned"] is True
    me = process(os.getpid())
    assert me is not None
    subject = {"pid": os.getpid(), "start-time": me.started, "uid": os.geteuid()}
    assert [(one["kind"], one["subject"]) for one in polkit.asked()] == [("unix-process", subject)] * 2


def test_another_users_process_is_for_polkit_too(polkit: Polkit, make_served: Callable[..., Served]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: it calls as another user")
    served = make_served(NO_ADMINS)
    with served.client() as client:
        digest = client.negotiate({"level": "x86-64-v1"})["digest"]
    vm = {"digest": digest, "vm": "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e", "pid": os.getpid()}
    assert as_user(65534, served, "org.kvmneg.Begin", vm) == {"error": "NotPermitted"}
    polkit.say(register="yes")
    assert as_user(65534, served, "org.kvmneg.Begin", vm)["digest"] == digest
    asked = polkit.asked()
    assert [one["action"] for one in asked] == ["org.kvmneg1.register"] * 2
    assert {one["subject"]["uid"] for one in asked} == {65534}


def test_the_bus_says_who_calls(polkit: Polkit, make_served: Callable[..., Served], bus: Any) -> None:
    """Root's daemon, and a caller that is not: without anything that pretends."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it calls as another user")
    make_served()
    for folder in bus.path.parents[:-1]:
        if str(folder).startswith("/tmp/") and folder.stat().st_uid == 0:
            folder.chmod(folder.stat().st_mode | 0o011)

    def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["busctl", f"--address={bus.address}", *words],
            user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False,
        )  # fmt: skip

    surface.check_reading(as_nobody)
    surface.check_refusal(as_nobody)
    polkit.say(pin="yes", unpin="yes")
    surface.check_pinning(as_nobody)
    entries = json.loads(Wire().call(FENCE, "Audit", "a{sv}", {}))
    assert {one["uid"] for one in entries if one["action"] in ("pin", "unpin")} == {65534}
    assert {one["process"] for one in entries if one["action"] == "pin"} == {"busctl"}


def test_a_refusal_is_told_once_and_a_permission_is_none(judged: Served, polkit: Polkit) -> None:
    """In the journal: only when polkit has said no."""

    def told() -> int:
        return judged.errors.read_text().count("may not pin a fence")

    polkit.say(pin="yes")
    with judged.client() as client:
        client.call("org.kvmneg.Fence.Pin", PIN)
        Wire().call(FENCE, "Pin", *REASON, HOST)
        assert told() == 0
        polkit.say()
        with pytest.raises(NotPermitted):
            client.call("org.kvmneg.Fence.Pin", PIN)
        assert told() == 1
        with pytest.raises(Refused):
            Wire().call(FENCE, "Pin", *REASON, HOST)
        assert told() == 2


SOON = f"{NO_ADMINS}\nfrom kvmneg import limits\nlimits.POLKIT_SECONDS = 0.3"


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("no", "polkit did not permit it"),
        ("password", "polkit would ask for a password, and the caller did not allow that"),
        ("never", "polkit did not answer in time"),
        ("", "polkit cannot be asked: "),
    ],
)
@pytest.mark.parametrize("by", ["varlink", "D-Bus"])
def test_a_refusal_is_told_with_its_reason(
    make_served: Callable[..., Served], request: pytest.FixtureRequest, answer: str, why: str, by: str
) -> None:
    """Once, when it stands; "": there is no polkit."""
    if answer:
        request.getfixturevalue("polkit").say(pin=answer)
    served = make_served(SOON)
    if by == "varlink":
        with served.client() as client, pytest.raises(NotPermitted):
            client.call("org.kvmneg.Fence.Pin", PIN)
    else:
        with pytest.raises(Refused):
            Wire().call(FENCE, "Pin", *REASON, HOST)
    (line,) = (line for line in served.errors.read_text().splitlines() if "may not pin a fence" in line)
    assert f"(pid {os.getpid()}): uid {os.geteuid()} may not pin a fence ({why}" in line


def test_a_refusal_without_a_bus_is_told_with_its_reason(
    bus: Any, make_served: Callable[..., Served]
) -> None:
    bus.end()
    served = make_served(NO_ADMINS, wait=False)
    with served.client() as client, pytest.raises(NotPermitted):
        client.call("org.kvmneg.Fence.Pin", PIN)
    assert (
        served.errors.read_text().count("may not pin a fence (there is no bus, so polkit was not asked)") == 1
    )


def test_a_question_that_the_child_takes_with_it_is_told(judged: Served, polkit: Polkit) -> None:
    polkit.say(pin="never")
    with judged.client() as waiting:
        waiting._send("org.kvmneg.Fence.Pin", PIN, more=False)
        until(polkit.asked)
        os.kill(judged.children()[0], signal.SIGKILL)
        with pytest.raises(NotPermitted):
            waiting._reply(TIMEOUT)
    told = until(lambda: [one for one in judged.errors.read_text().splitlines() if "may not pin" in one])
    assert len(told) == 1 and told[0].endswith("(what asks it ended while polkit was asked)")


def test_a_call_that_comes_before_the_bus_side_is_asked_about(
    polkit: Polkit, make_served: Callable[..., Served]
) -> None:
    """The one that started the daemon, say."""
    late = "from kvmneg.service.bus import child\nchild._LATER_SECONDS = 1.0"
    served = make_served(f"{NO_ADMINS}\n{late}", wait=False)
    polkit.say(pin="yes")
    with served.client() as client:
        assert served.children() == []
        assert client.call("org.kvmneg.Fence.Pin", PIN)["generation"] == 1
    assert len(polkit.asked()) == 1


MEASURING = f"""{NO_ADMINS}
from kvmneg.service.interfaces import router
from kvmneg.service.level import moves
from kvmneg.service.watching.again import Measuring

attach, pin, servers, times = router.Router.attach, moves.pin, [], [0]

def attached(self, server):
    servers.append(server)
    attach(self, server)

def measuring(*given, **more):
    times[0] += 1
    if times[0] % 3:
        servers[0].after(0.1, servers[0].unpark)
        raise Measuring
    return pin(*given, **more)

router.Router.attach, moves.pin = attached, measuring
"""


def test_a_permission_outlasts_a_measurement(polkit: Polkit, make_served: Callable[..., Served]) -> None:
    """A call that has to wait for one is made again, and polkit is not asked again."""
    served = make_served(MEASURING)
    polkit.say(pin="yes")
    with served.client() as client:
        assert client.call("org.kvmneg.Fence.Pin", PIN)["generation"] == 1
    assert Wire().call(FENCE, "Pin", *REASON, HOST)[0] == 2
    assert len(polkit.asked()) == 2


# --- an answer that does not come


def test_nobody_else_waits_for_polkit(judged: Served, polkit: Polkit) -> None:
    """A call by either way hangs; on other connections everything goes on, on the same one it waits its turn."""
    polkit.say(pin="never")
    hanging = Wire()
    hanging.message(FENCE, "Pin", *REASON, HOST).send()
    with judged.client() as waiting, judged.client() as other:
        waiting._send("org.kvmneg.Fence.Pin", PIN, more=False)
        until(lambda: len(polkit.asked()) == 1)
        waiting._send("org.varlink.service.GetInfo", None, more=False)
        for _ in range(10):
            assert other.call("org.kvmneg.Fence.Get")["pinned"] is False
            assert Wire().call(FENCE, "Get")[0] is False
        assert judged.process is not None


def test_a_caller_that_goes_takes_its_question_back(judged: Served, polkit: Polkit) -> None:
    polkit.say(pin="never")
    with judged.client() as waiting:
        waiting._send("org.kvmneg.Fence.Pin", {**PIN, **ASK}, more=False)
        (question,) = until(polkit.asked)
    assert until(lambda: polkit.asked()[1:]) == [{"kind": "cancelled", "id": question["id"]}]
    with judged.client() as client:
        assert client.call("org.kvmneg.Fence.Get")["pinned"] is False


def test_an_answer_that_does_not_come_is_a_no(polkit: Polkit, make_served: Callable[..., Served]) -> None:
    served = make_served(f"{NO_ADMINS}\nfrom kvmneg import limits\nlimits.POLKIT_SECONDS = 0.3")
    polkit.say(pin="never")
    with served.client() as client:
        with pytest.raises(NotPermitted):
            client.call("org.kvmneg.Fence.Pin", PIN)
        assert client.call("org.kvmneg.Fence.Get")["pinned"] is False


def test_questions_of_one_user_are_bounded(judged: Served, polkit: Polkit) -> None:
    polkit.say(pin="never")
    most = limits.POLKIT_QUESTIONS_PER_UID
    clients = [judged.client() for _ in range(most)]
    for number, client in enumerate(clients):
        client._send("org.kvmneg.Fence.Pin", PIN, more=False)
        until(lambda number=number: len(polkit.asked()) == number + 1)
    with judged.client() as more, pytest.raises(LimitExceeded, match="POLKIT_QUESTIONS_PER_UID"):
        more.call("org.kvmneg.Fence.Pin", PIN)
    for client in clients:
        client.close()
    until(lambda: len(polkit.asked()) == 2 * most)  # each is taken back
    polkit.say(pin="yes")
    with judged.client() as client:
        assert client.call("org.kvmneg.Fence.Pin", PIN)["generation"] == 1


def test_questions_of_one_caller_of_the_bus_are_bounded(judged: Served, polkit: Polkit) -> None:
    polkit.say(pin="never")
    most = limits.POLKIT_QUESTIONS_PER_UID

    async def ask() -> Refused:
        wire = Wire()
        calls = [wire.bus.call_async(wire.message(FENCE, "Pin", *REASON, HOST)) for _ in range(most + 1)]
        done, _ = await asyncio.wait(calls, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        (one,) = done
        error = one.exception()
        assert error is not None
        return refusal(error)

    found = asyncio.run(ask())
    assert (found.name, "POLKIT_QUESTIONS_PER_UID" in found.text) == ("org.kvmneg1.Error.LimitExceeded", True)
    until(lambda: len(polkit.asked()) == most)
    until(lambda: "was refused: limit POLKIT_QUESTIONS_PER_UID exceeded" in judged.errors.read_text())


def test_without_polkit_the_answer_is_no(make_served: Callable[..., Served]) -> None:
    served = make_served(NO_ADMINS)
    with served.client() as client, pytest.raises(NotPermitted):
        client.call("org.kvmneg.Fence.Pin", PIN)
    with pytest.raises(Refused) as caught:
        Wire().call(FENCE, "Pin", *REASON, HOST)
    assert caught.value.name == "org.kvmneg1.Error.NotPermitted"
    assert served.errors.read_text().count("kvmnegd: polkit cannot be asked: ") == 1


class Nobody:
    """A bus without polkit."""

    method_call_timeout_usec = 0

    def new_method_call_message(self, *address: str) -> Nobody:
        return self

    def append_data(self, *values: Any) -> None:
        pass

    async def call_async(self, message: Nobody) -> None:
        raise RuntimeError("nobody is there")


@pytest.mark.parametrize(("seconds", "times"), [(3600.0, 1), (0.0, 3)])
def test_that_polkit_cannot_be_asked_is_told_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: float, times: int
) -> None:
    """Not once for all: a caller that ends before polkit looks at it would use that up, and be all that is told."""
    monkeypatch.setattr(limits, "TROUBLE_SECONDS", seconds)
    authority = polkit_module.Polkit(Nobody())  # type: ignore[arg-type]

    async def ask() -> None:
        for _ in range(3):
            assert await authority.permits(("unix-process", {}), 1000, "org.kvmneg1.pin", False)

    asyncio.run(ask())
    assert capsys.readouterr().err.count("polkit cannot be asked: nobody is there") == times


def test_a_oneway_call_is_not_worth_a_question(judged: Served, polkit: Polkit) -> None:
    """Nobody could be told the answer."""
    polkit.say(pin="yes")
    with judged.client() as client:
        call = {"method": "org.kvmneg.Fence.Pin", "parameters": PIN, "oneway": True}
        client._connected().sendall(json.dumps(call).encode() + b"\0")
        assert client.call("org.kvmneg.Fence.Get")["pinned"] is False
    assert polkit.asked() == []


def test_only_the_child_speaks_for_others(judged: Served) -> None:
    """What the daemon and its child say to each other is no interface of anybody else's."""
    caller = {"uid": 0, "pid": 1, "groups": [], "permitted": [], "final": True}
    call = {"id": 1, "method": "org.kvmneg.Fence.Pin", "parameters": PIN, "caller": caller}
    for method, parameters in (("Call", call), ("Answer", {"id": 1, "allowed": True}), ("Listen", {})):
        with judged.client() as client, pytest.raises(Exception, match=r"no interface 'org\.kvmneg\.Bus'"):
            client.call(f"org.kvmneg.Bus.{method}", parameters)
    assert Path(f"/proc/{judged.children()[0]}/fd").exists()
