# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.kvmneg1 as its file, varlink's interfaces and busctl(1) see it."""

from __future__ import annotations

import asyncio
import json
import re
import select
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from varlink import scanner

from kvmneg import errors, limits
from kvmneg.service.authorization import ACTIONS
from kvmneg.service.bus import methods
from kvmneg.service.interfaces import introspection
from tests.bus import surface
from tests.bus.conftest import NO_ADMINS, Refused, Served, Wire, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bus.conftest import Bus

UNITS = Path(__file__).parents[2] / "units"
XML = (UNITS / "org.kvmneg1.xml").read_text("utf-8")
FENCE = "org.kvmneg1.Fence"
REASON = ("sa{sv}", "a test")
HOST = {"from": ("s", "host")}


def test_introspection(served: Served) -> None:
    surface.check_introspection(served.bus.busctl, XML)


def test_reading_and_pinning(served: Served) -> None:
    surface.check_reading(served.bus.busctl)
    surface.check_pinning(served.bus.busctl)


def test_refusal(make_served: Callable[..., Served]) -> None:
    surface.check_refusal(make_served(NO_ADMINS).bus.busctl)


def test_the_table_is_what_varlink_returns() -> None:
    """Each type of D-Bus follows from varlink's; what a VM monitor calls for itself is left out, and nothing else."""
    left = {
        "org.kvmneg.Begin", "org.kvmneg.Started", "org.kvmneg.Watch", "org.kvmneg.Guests.Report",
        "org.kvmneg.Guests.Saved", "org.kvmneg.Guests.Handover", "org.kvmneg.Guests.Receive",
    }  # fmt: skip
    for name in introspection.INTERFACES[1:]:
        members = scanner.Interface(introspection.description(name)).members
        spoken = {one: member for one, member in members.items() if isinstance(member, scanner._Method)}
        table = methods.METHODS[name]
        assert {f"{name}.{one}" for one in spoken} - {f"{name}.{one}" for one in table} == {
            one for one in left if one.rpartition(".")[0] == name
        }
        for one, outputs in table.items():
            fields = spoken[one].out_type.fields
            assert list(outputs) == list(fields)
            for field, kind in fields.items():
                assert outputs[field] == expected(kind), f"{name}.{one} {field}"


def expected(kind: Any) -> str:
    """D-Bus's type for a type as the package varlink reads it: basic ones are values of Python's."""
    if isinstance(kind, scanner._Maybe):
        return expected(kind.element_type)
    if isinstance(kind, scanner._Array):
        return "as" if isinstance(kind.element_type, str) else "s"
    if isinstance(kind, scanner._Dict):
        return "a{ss}"
    return {bool: "b", int: "t", str: "s"}.get(type(kind), "s")


def test_every_error_has_a_name_of_its_own() -> None:
    names = {error: errors.dbus_name(error.varlink) for error in errors.family()}
    assert len(set(names.values())) == len({error.varlink for error in names})
    assert all(re.fullmatch(r"org\.kvmneg1\.Error\.[A-Z][A-Za-z]+", name) for name in names.values())


@pytest.mark.parametrize(
    ("method", "arguments", "name", "said"),
    [
        ("Pin", (*REASON, {"from": ("s", "nowhere")}), "InvalidRequest", "no source 'nowhere'"),
        ("Pin", ("sa{sv}", " ", HOST), "InvalidRequest", "a reason is needed"),
        ("Pin", (*REASON, {"text": ("s", "nonsense")}), "BadInput", "fence:1: "),
        ("Unpin", (*REASON, {}), "NotPinned", "no fence"),
        ("Commit", (*REASON, {}), "WrongState", "proposed"),
        ("Unpin", (*REASON, {"expectedGeneration": ("x", 9)}), "GenerationMismatch", "generation"),
        ("Pin", ("sa{sv}", "x" * (limits.REASON_CHARACTERS + 1), HOST), "LimitExceeded", "REASON_CHARACTERS"),
        ("Pin", ("sa{sv}", "x" * limits.CALL_BYTES, HOST), "LimitExceeded", "CALL_BYTES"),
    ],
)
def test_errors_of_the_one_table(served: Served, method: str, arguments: Any, name: str, said: str) -> None:
    with pytest.raises(Refused) as caught:
        Wire().call(FENCE, method, *arguments)
    assert caught.value.name == f"org.kvmneg1.Error.{name}"
    assert said in caught.value.text


def test_a_refusal_tells_its_reasons(served: Served) -> None:
    """As sentences: a GUI that wants their parts asks Plan."""
    with pytest.raises(Refused) as caught:
        Wire().call("org.kvmneg1", "Negotiate", "sa{sv}", json.dumps({"level": "x86-64-v4"}), {})
    assert caught.value.name == "org.kvmneg1.Error.Blocked"
    assert {"avx512f", "avx512bw"} <= set(re.findall(r"[a-z0-9-]+", caught.value.text))


@pytest.mark.parametrize(
    "arguments",
    [
        ("sa{sv}", "a test", {"form": ("s", "host")}),
        ("sa{sv}", "a test", {"from": ("b", True)}),
        ("sa{sv}", "a test", {"reason": ("s", "another")}),
        ("sa{sv}", "a test", {"expectedGeneration": ("d", 1.0)}),
        ("s", "a test"),
        ("sa{sv}s", "a test", {}, "more"),
    ],
)
def test_arguments_that_are_none(served: Served, arguments: Any) -> None:
    with pytest.raises(Refused) as caught:
        Wire().call(FENCE, "Pin", *arguments)
    assert caught.value.name == "org.freedesktop.DBus.Error.InvalidArgs"


@pytest.mark.parametrize(
    "document",
    ["", "{", "[1]", "7", "NaN", '{"level":NaN}', "[" * 100_000, "9" * 5_000, '{"a":' * 40 + "1" + "}" * 40],
)
def test_documents_that_are_none(served: Served, document: str) -> None:
    """What would make the daemon drop its child ends before it."""
    children = served.children()
    with pytest.raises(Refused) as caught:
        Wire().call("org.kvmneg1", "Negotiate", "sa{sv}", document, {})
    assert caught.value.name in ("org.freedesktop.DBus.Error.InvalidArgs", "org.kvmneg1.Error.LimitExceeded")
    assert Wire().call(FENCE, "Get")[0] is False
    assert served.children() == children


def test_the_text_of_a_fault_is_told_to_nobody(make_served: Callable[..., Served]) -> None:
    before = (
        "from kvmneg.service.interfaces import fence\n"
        "def fault(*_): raise RuntimeError('/a/secret/path')\n"
        "fence._history = fault\n"
    )
    served = make_served(before)
    with pytest.raises(Refused) as caught:
        Wire().call(FENCE, "History", "a{sv}", {})
    assert caught.value.name == "org.kvmneg1.Error.Internal"
    assert "secret" not in caught.value.text
    assert "/a/secret/path" in served.errors.read_text()


def test_calls_at_once(served: Served) -> None:
    """Twenty-four on one connection, each with its own answer."""

    async def ask() -> list[Any]:
        wire = Wire()
        requests = [{"level": "x86-64-v2"}, {"level": "x86-64-v1"}, {"max": True}]
        calls = [
            wire.bus.call_async(
                wire.message("org.kvmneg1", "Negotiate", "sa{sv}", json.dumps(requests[number % 3]), {})
            )
            for number in range(24)
        ]
        return [answer.get_contents() for answer in await asyncio.gather(*calls)]

    answers = asyncio.run(ask())
    kinds = [{answer[1] for answer in answers[start::3]} for start in range(3)]
    assert [len(kind) for kind in kinds] == [1, 1, 1]
    assert len(set.union(*kinds)) == 3


def test_a_property_is_never_older_than_an_answer(served: Served) -> None:
    wire = Wire()
    for _ in range(20):
        generation = wire.call(FENCE, "Pin", *REASON, HOST)[0]
        ask = wire.bus.new_property_get_message("org.kvmneg1", "/org/kvmneg1", "org.kvmneg1", "Generation")
        assert wire.bus.call(ask).get_contents() == ("t", generation)


# --- signals


class Monitor:
    """busctl monitor, and what it has told."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        command = ["busctl", f"--address={bus.address}", "--json=short", "monitor", "org.kvmneg1"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        # it says when it is there in some versions only: a call that it shows says so in all
        deadline = time.monotonic() + 20
        while not select.select([self.process.stdout], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, "busctl shows nothing"
            bus.busctl("call", *surface.OBJECT, "org.freedesktop.DBus.Peer", "GetMachineId")

    def signals(self) -> list[tuple[str, list[Any]]]:
        """Those since the last time. A call marks the end: the bus keeps the order."""
        assert self.process.stdout is not None
        ask = ("org.freedesktop.DBus.Peer", "Ping")
        assert self.bus.busctl("call", *surface.OBJECT, *ask).returncode == 0
        lines = []
        for line in self.process.stdout:
            if '"Ping"' in line:
                break
            lines.append(line)
        return surface.signals(lines)


@pytest.fixture
def monitor(served: Served) -> Iterator[Monitor]:
    made = Monitor(served.bus)
    yield made
    made.process.kill()
    made.process.communicate()


def test_each_change_is_told_once(served: Served, monitor: Monitor) -> None:
    wire = Wire()
    generation, digest, _ = wire.call(FENCE, "Pin", *REASON, HOST)
    assert monitor.signals() == [
        (
            "PropertiesChanged",
            [
                "org.kvmneg1",
                {
                    "FenceDigest": {"type": "s", "data": digest},
                    "Generation": {"type": "t", "data": generation},
                    "State": {"type": "s", "data": "pinned"},
                },
                [],
            ],
        ),
        ("FenceChanged", [generation, digest, "pinned"]),
    ]
    with pytest.raises(Refused):
        wire.call(FENCE, "Pin", *REASON, {"from": ("s", "nowhere")})
    wire.call(FENCE, "Pin", *REASON, {**HOST, "dryRun": ("b", True)})
    assert monitor.signals() == []
    with served.client() as client:  # by varlink, it is told too
        client.call("org.kvmneg.Fence.Unpin", {"reason": "a test"})
    assert [name for name, _ in monitor.signals()] == ["PropertiesChanged", "FenceChanged"]


CHANGING = """
import json, os
from kvmneg.features.report import Report
from kvmneg.service.watching import recorded

class Changing(recorded.RecordedMeasurer):
    def __init__(self, file):
        super().__init__(file)
        self.file, self.seen = file, os.stat(file).st_mtime_ns
    def measure(self):
        with open(self.file, "rb") as opened:
            return Report.loads(opened.read())
    def changed(self, *, fresh=False):
        before, self.seen = self.seen, os.stat(self.file).st_mtime_ns
        return before != self.seen

recorded.RecordedMeasurer = Changing
"""


def test_a_host_that_changes_and_falls_below_its_fence(
    make_served: Callable[..., Served], tmp_path: Path
) -> None:
    from tests.daemon.conftest import RECORDED

    document = json.loads(RECORDED.read_text())
    file = tmp_path / "host.json"
    file.write_text(json.dumps(document))
    served = make_served(CHANGING, "--report", str(file))
    wire = Wire()
    generation, digest, _ = wire.call(FENCE, "Pin", *REASON, HOST)
    monitor = Monitor(served.bus)
    word = "cpuid:0x1.0.ecx"
    value = int(document["offer"][word], 16)
    less = {**document, "offer": {**document["offer"], word: f"{value & (value - 1):#010x}"}}
    try:
        for content, state, told in (
            (less, "breached", ["PropertiesChanged", "FenceChanged", "HostChanged", "Breached"]),
            (document, "pinned", ["PropertiesChanged", "FenceChanged", "HostChanged"]),
        ):
            written = tmp_path / "next.json"
            written.write_text(json.dumps(content))
            written.rename(file)
            until(lambda state=state: wire.call("org.kvmneg1", "GetHost")[2] == state)
            found = monitor.signals()
            assert [name for name, _ in found] == told
            assert ("FenceChanged", [generation, digest, state]) in found
    finally:
        monitor.process.kill()
        monitor.process.communicate()


# --- files


def test_the_policy_has_the_actions_that_are_asked_for() -> None:
    from xml.etree import ElementTree

    root = ElementTree.parse(UNITS / "org.kvmneg1.policy").getroot()
    actions = {one.get("id"): one for one in root.iter("action")}
    assert set(actions) == {f"org.kvmneg1.{name}" for name in ACTIONS}
    for action in actions.values():
        assert action.findtext("message") and action.findtext("description")
        assert [one.text for one in action.iterfind("defaults/*")] == [
            "auth_admin",
            "auth_admin",
            "auth_admin_keep",
        ]
        notes = {one.get("key"): one.text for one in action.iter("annotate")}
        assert notes == {"org.freedesktop.policykit.owner": "unix-user:kvmneg"}


def test_activation_is_systemds() -> None:
    from configparser import ConfigParser

    parser = ConfigParser()
    parser.read(UNITS / "org.kvmneg1.service")
    section = parser["D-BUS Service"]
    assert (section["Name"], section["SystemdService"]) == ("org.kvmneg1", "kvmneg.service")


def test_a_bus_reads_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that it does not know owns nothing: so nobody has the name here, and everybody may call it."""
    from tests.bus.conftest import Bus

    bus = Bus(tmp_path)
    policy = UNITS / "org.kvmneg1.conf"
    text = (
        bus.configuration.read_text()
        .replace('<allow own="*"/>', "")
        .replace('<allow send_destination="*"/>', "")
    )
    bus.configuration.write_text(text.replace("</busconfig>", f"<include>{policy}</include></busconfig>"))
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
    bus.start()
    try:
        with pytest.raises(Refused) as caught:
            Wire().call(FENCE, "Get")
        assert caught.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"  # not AccessDenied
    finally:
        bus.end()


def test_every_member_is_on_its_page() -> None:
    page = (UNITS.parent / "man" / "org.kvmneg1.7.scd").read_text("utf-8")
    for interface, members in surface.shape(XML).items():
        part = re.search(rf"^## {re.escape(interface)}$(.*?)(?=^#|\Z)", page, re.S | re.M)
        assert part, interface
        for member, (arguments, _, _) in members.items():
            kind, name = member.split()
            told = re.search(rf"^\*{name}\*(.*)$", part[1], re.M)
            assert told, member
            if kind != "property":
                assert re.findall(r"_([A-Za-z]+)_", told[1]) == [one[1] for one in arguments], member
    for error in errors.family():
        assert f"*{errors.dbus_name(error.varlink)}*" in page or error.varlink in NEVER_SENT, error


@pytest.mark.parametrize(
    "number",
    [
        limits.BUS_CALLS, limits.BUS_CALLS_PER_CALLER, limits.BUS_CALLS_PER_UID, limits.POLKIT_QUESTIONS,
        limits.POLKIT_QUESTIONS_PER_UID, int(limits.POLKIT_SECONDS), limits.CALL_BYTES // 1024,
    ],
)  # fmt: skip
def test_the_limits_on_the_page_are_the_limits(number: int) -> None:
    page = (UNITS.parent / "man" / "org.kvmneg1.7.scd").read_text("utf-8")
    told = page.partition("# AUTHORIZATION")[2].partition("# ERRORS")[0]
    assert re.search(rf"(?<!\d){number}(?!\d)", told)


# by no method that D-Bus has
NEVER_SENT = {
    "org.kvmneg.Unreachable", "org.kvmneg.VmmFault", "org.kvmneg.NotApplied", "org.kvmneg.SlowWatcher",
    "org.kvmneg.StaleOffer", "org.kvmneg.Incompatible",
}  # fmt: skip
