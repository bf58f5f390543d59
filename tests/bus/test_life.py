# SPDX-License-Identifier: LGPL-2.1-or-later
"""Buses that come and go, children that die, and callers that send too much."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from sdbus import sd_bus_internals as sd_bus

from kvmneg import limits
from tests.bus.conftest import HERE, Refused, Served, Wire, refusal, until
from tests.daemon.conftest import RECORDED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.bus.conftest import Bus

FENCE = "org.kvmneg1.Fence"


def test_a_bus_that_goes_and_comes_back(served: Served) -> None:
    (child,) = served.children()
    served.bus.end()
    until(lambda: not served.children())
    with served.client() as client:  # everything else goes on
        assert client.call("org.kvmneg.Fence.Get")["pinned"] is False
    served.bus.start()
    until(lambda: served.bus.has("org.kvmneg1"))
    assert Wire().call(FENCE, "Get")[0] is False
    assert served.children() != [child]
    told = served.errors.read_text()
    assert told.count("D-Bus:") == 1
    assert "is gone; it is tried again" in told
    assert "Traceback" not in told


def test_a_bus_that_comes_late(bus: Bus, make_served: Callable[..., Served]) -> None:
    bus.end()
    served = make_served(wait=False)
    with served.client() as client:
        assert client.call("org.kvmneg.Fence.Get")["pinned"] is False
    until(lambda: "there is no bus at" in served.errors.read_text())
    assert served.children() == []
    bus.start()
    until(lambda: bus.has("org.kvmneg1"))


def test_a_name_that_is_anothers(bus: Bus, make_served: Callable[..., Served]) -> None:
    other: Any = sd_bus.sd_bus_open_system()
    other.request_name("org.kvmneg1", 0)
    served = make_served(wait=False)
    until(lambda: "the name org.kvmneg1 is not to be had" in served.errors.read_text())
    other.close()
    until(lambda: bus.has("org.kvmneg1"))
    assert Wire().call(FENCE, "Get")[0] is False


def test_a_child_that_is_killed_is_replaced(served: Served) -> None:
    (child,) = served.children()
    os.kill(child, signal.SIGKILL)
    until(lambda: served.children() not in ([], [child]))
    until(lambda: served.bus.has("org.kvmneg1"))
    assert Wire().call(FENCE, "Get")[0] is False
    assert f"status {-signal.SIGKILL}" in served.errors.read_text()


def ended(pid: int) -> bool:
    """Nobody may have reaped it: that is the business of who inherits it."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_child_ends_with_the_daemon(served: Served, number: int) -> None:
    (child,) = served.children()
    served.end(number)
    until(lambda: ended(child))
    assert "Traceback" not in served.errors.read_text()
    assert "D-Bus" not in served.errors.read_text()


def test_without_the_option_nothing_of_it_is_loaded(bus: Bus, tmp_path: Path) -> None:
    """Though there is a bus: a start costs what it did."""
    program = """
import sys
from kvmneg.service.varlink import server
server.Server.run = lambda self: print("\\n".join(sys.modules))
from kvmneg.service.daemon import main
raise SystemExit(main())
"""
    options = ["--socket", str(tmp_path / "s"), "--state", str(tmp_path / "state"), "--report", str(RECORDED)]
    loaded = {}
    for more in ([], ["--bus", bus.address]):
        command = [sys.executable, "-P", "-c", program, *options, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        loaded[len(more)] = set(done.stdout.split())
    assert "kvmneg.service.interfaces.router" in loaded[0]
    bus_side = {"kvmneg.service.bus", "kvmneg.service.bus.child", "kvmneg.service.bus.dbus"}
    assert not {"sdbus", "asyncio", *bus_side} & loaded[0]
    assert loaded[2] - loaded[0] == {
        "kvmneg.service.bus",
        "kvmneg.service.bus.child",
    }  # nor in the daemon with it


# --- too much


def burst(wire: Wire, count: int) -> list[Any]:
    """Calls that are sent together."""
    return [wire.bus.call_async(wire.message(FENCE, "Get")) for _ in range(count)]


def outcome(error: BaseException | None) -> str:
    return refusal(error).name.rpartition(".")[2] if error else "answered"


def test_calls_that_wait_are_bounded(served: Served) -> None:
    """Of one caller, and of one user with several: while the daemon is busy nothing is answered."""
    most, of_user = limits.BUS_CALLS_PER_CALLER, limits.BUS_CALLS_PER_UID
    assert served.process is not None
    pid = served.process.pid

    async def ask() -> list[list[str]]:
        wires = [Wire() for _ in range(3)]
        for wire in wires:  # known to the child before
            await wire.bus.call_async(wire.message(FENCE, "Get"))
        os.kill(pid, signal.SIGSTOP)
        try:
            calls = [burst(wire, most + 20) for wire in wires]
            together = [one for some in calls for one in some]
            while sum(one.done() for one in together) < len(together) - of_user:
                await asyncio.sleep(0.02)
        finally:
            os.kill(pid, signal.SIGCONT)
        await asyncio.wait(together, timeout=20)
        return [[outcome(one.exception()) for one in some] for some in calls]

    found = asyncio.run(ask())
    answered = [some.count("answered") for some in found]
    assert sum(answered) == of_user
    assert max(answered) <= most
    assert {name for some in found for name in some} == {"answered", "LimitExceeded"}
    who = f"uid {os.geteuid()} (pid {os.getpid()}) was refused: limit "
    for limit in ("BUS_CALLS_PER_CALLER", "BUS_CALLS_PER_UID"):  # once for each caller that went over it
        until(lambda limit=limit: f"{who}{limit} exceeded" in served.errors.read_text())
        assert served.errors.read_text().count(f"limit {limit} exceeded") <= 3
    assert Wire().call(FENCE, "Get")[0] is False


@pytest.mark.parametrize(
    ("interface", "method"),
    [
        (FENCE, "Get"),
        ("org.freedesktop.DBus.Introspectable", "Introspect"),
        ("org.freedesktop.DBus.Peer", "Ping"),
        (FENCE, "Nothing"),
    ],
)
def test_a_flood_does_not_reach_varlink(served: Served, interface: str, method: str) -> None:
    """It goes on until it is ended; meanwhile the daemon serves, and afterwards the bus does."""
    command = [sys.executable, str(HERE / "flood.py"), interface, method]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flood:
        try:
            assert flood.stdout is not None and flood.stdout.readline() == "flooding\n"
            with served.client() as client:
                for _ in range(200):
                    assert client.call("org.kvmneg.Fence.Get")["pinned"] is False
            assert flood.poll() is None
        finally:
            flood.kill()
    assert Wire().call(FENCE, "Get")[0] is False
    assert "Traceback" not in served.errors.read_text()


def test_others_are_served_during_a_flood_of_calls(served: Served) -> None:
    command = [sys.executable, str(HERE / "flood.py"), FENCE, "Get"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flood:
        try:
            assert flood.stdout is not None and flood.stdout.readline() == "flooding\n"
            wire, served_there = Wire(), 0
            while served_there < 5:
                try:
                    served_there += wire.call(FENCE, "Get")[0] is False
                except Refused as no:  # the user's calls are bounded, whoever of its programs makes them
                    assert no.name == "org.kvmneg1.Error.LimitExceeded"
            assert flood.poll() is None
            until(
                lambda: (
                    f"(pid {flood.pid}) was refused: limit BUS_CALLS_PER_CALLER" in served.errors.read_text()
                )
            )
        finally:
            flood.kill()
    told = served.errors.read_text().count("was refused: limit BUS_CALLS_PER_CALLER")
    assert told <= limits.EVENT_BURST  # of some ten thousand


def test_a_reload_reaches_the_child(make_served: Callable[..., Served], tmp_path: Path) -> None:
    """Without another child: how many calls of a caller may wait is as the file says now."""
    file = tmp_path / "kvmneg.toml"
    file.write_text("[limits]\nBUS_CALLS_PER_CALLER = 1\n")
    served = make_served("", "--report", str(RECORDED), "--config", str(file))
    (child,) = served.children()

    def together() -> int:
        """Of three calls at once, how many are refused."""

        async def ask() -> list[str]:
            calls = burst(Wire(), 3)
            await asyncio.wait(calls, timeout=20)
            return [outcome(one.exception()) for one in calls]

        return asyncio.run(ask()).count("LimitExceeded")

    assert together() == 2
    file.write_text("[limits]\nBUS_CALLS_PER_CALLER = 3\n")
    assert served.process is not None
    served.process.send_signal(signal.SIGHUP)
    until(lambda: "reloaded" in served.errors.read_text())
    until(lambda: together() == 0)
    assert served.children() == [child]


def test_callers_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmneg.service.bus.dbus import Service

    class Known:
        """A bus that knows everybody."""

        method_call_timeout_usec = 0

        def new_method_call_message(self, *_: str) -> Known:
            return self

        def append_data(self, *_: str) -> None:
            pass

        async def call_async(self, _: Known) -> Known:
            return self

        def get_contents(self) -> dict[str, Any]:
            return {"UnixUserID": ("u", 7)}

    monkeypatch.setattr(limits, "BUS_CALLERS", 3)
    service = Service(Known(), None)  # type: ignore[arg-type]
    for number in range(5):
        assert asyncio.run(service._caller(f":1.{number}")) == {"uid": 7, "pid": 0, "groups": []}
    assert list(service._credentials) == [":1.2", ":1.3", ":1.4"]


def test_calls_of_all_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmneg.service.bus.dbus import Service

    class Call:
        """A call whose caller is not known yet."""

        expect_reply = True
        told: tuple[str, str] | None = None

        def __init__(self, sender: str) -> None:
            self.sender = sender

        def parse_to_tuple(self) -> tuple[()]:
            return ()

        def create_error_reply(self, name: str, text: str) -> Call:
            self.told = name, text
            return self

        def send(self) -> None:
            pass

    class Slow:
        method_call_timeout_usec = 0

        def new_method_call_message(self, *_: str) -> Slow:
            return self

        def append_data(self, *_: str) -> None:
            pass

        async def call_async(self, _: Slow) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(limits, "BUS_CALLS", 4)

    async def calls() -> list[Any]:
        service = Service(Slow(), None)  # type: ignore[arg-type]
        made = [Call(f":1.{number}") for number in range(6)]
        for one in made:
            service._called("org.kvmneg.Fence", "Get", one)  # type: ignore[arg-type]
        assert [limit for _, limit in service._over] == ["BUS_CALLS"] * 2
        for task in (*service._tasks, *service._over.values()):
            task.cancel()
        return [one.told for one in made]

    told = asyncio.run(calls())
    assert told[:4] == [None] * 4
    assert all(name == "org.kvmneg1.Error.LimitExceeded" and "BUS_CALLS" in text for name, text in told[4:])
