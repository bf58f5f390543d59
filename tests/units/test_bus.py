# SPDX-License-Identifier: LGPL-2.1-or-later
"""The installed service on the container's own bus, beside its own polkit: within the sandbox, by systemd's client."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.units.conftest import Installed

pytestmark = pytest.mark.hosts

NAME, PATH = "org.kvmneg1", "/org/kvmneg1"
RULE = """
polkit.addRule(function(action, subject) {
    if (action.id == "org.kvmneg1.pin" && subject.user == "anna") return polkit.Result.YES;
});
"""


FLOOD = Path(__file__).parents[1] / "bus/flood.py"


@pytest.fixture(params=["dbus-daemon", "dbus-broker"])
def bus(boot: Callable[..., Installed], request: pytest.FixtureRequest) -> Iterator[Installed]:
    """A container with this Python's sdbus, which Debian does not have; its extension is for every Python."""
    host = boot(bus="" if request.param == "dbus-daemon" else request.param)
    (main,) = host.show("dbus.service", "MainPID").values()
    assert host.run("cat", f"/proc/{main}/comm").stdout.strip().startswith(request.param)
    found = importlib.util.find_spec("sdbus")
    assert found and found.origin
    folder = Path(found.origin).parent
    assert list(folder.glob("*.abi3.so")), "built for one Python"
    shutil.copytree(folder, host.root / "usr/lib/python3/dist-packages/sdbus")
    host.serve_recorded()
    host.run("useradd", "--no-create-home", "anna")
    yield host


def test_a_call_by_the_bus_starts_it(bus: Installed) -> None:
    """Without its socket being enabled, and with systemd's own client."""
    told = bus.run("busctl", "introspect", NAME, PATH).stdout
    assert ".FenceChanged" in told and "signal" in told
    assert bus.run("busctl", "get-property", NAME, PATH, NAME, "State").stdout == 's "floating"\n'
    assert bus.show("kvmneg.service", "ActiveState") == {"ActiveState": "active"}


def test_what_changes_is_seen_by_who_monitors(bus: Installed) -> None:
    bus.run("busctl", "get-property", NAME, PATH, NAME, "State")
    with bus.start("busctl", "monitor", "--json=short", NAME) as monitor:
        assert monitor.stdout
        bus.wait("it watches", lambda: "busctl" in bus.run("busctl", "--list", "--no-legend").stdout)
        bus.run("kvmneg", "fence", "pin", "--from", "host", "--reason", "a test")
        members = set()
        while not {"FenceChanged", "PropertiesChanged"} <= members:
            line = monitor.stdout.readline()
            assert line, f"it saw {members}"
            members.add(json.loads(line).get("member"))
        monitor.kill()


@pytest.mark.parametrize("by", ["varlink", "D-Bus"])
def test_polkit_refuses_and_permits(bus: Installed, by: str) -> None:
    """A user of no group: refused by its default, permitted after a rule."""
    words = {
        "varlink": ("kvmneg", "fence", "pin", "--from", "host", "--reason", "hers"),
        "D-Bus": (
            "busctl",
            "call",
            NAME,
            PATH,
            f"{NAME}.Fence",
            "Pin",
            "sa{sv}",
            "hers",
            "1",
            "from",
            "s",
            "host",
        ),
    }[by]
    bus.enable()
    bus.run("busctl", "get-property", NAME, PATH, NAME, "State")
    refused = bus.run(*words, user="anna", check=False)
    assert refused.returncode and "may not pin" in refused.stderr
    (bus.root / "etc/polkit-1/rules.d/10-anna.rules").write_text(RULE)
    bus.wait("permitted", lambda: bus.run(*words, user="anna", check=False).returncode == 0)
    assert "generation 1" in bus.status_text()


def test_nobody_else_has_its_name(bus: Installed) -> None:
    program = """
from sdbus import sd_bus_internals as sd_bus
try:
    sd_bus.sd_bus_open_system().request_name("org.kvmneg1", 0)
except Exception as error:
    print(getattr(error, "dbus_error_name", error))
else:
    print("it has it")
"""
    assert "error number: 13" in bus.run("python3", "-c", program, user="anna").stdout  # EACCES
    assert "it has it" in bus.run("python3", "-c", program, user="kvmneg").stdout


def test_others_are_served_while_one_floods(bus: Installed) -> None:
    """By varlink and by the bus; and the journal has who it is."""
    bus.enable()
    bus.run("busctl", "get-property", NAME, PATH, NAME, "State")
    shutil.copy(FLOOD, bus.root / "tmp/flood.py")
    with bus.start("python3", "/tmp/flood.py", f"{NAME}.Fence", "Get", user="anna") as flood:
        try:
            assert flood.stdout and flood.stdout.readline() == "flooding\n"
            bus.run("kvmneg", "fence", "pin", "--from", "host", "--reason", "a test")
            assert bus.run("busctl", "get-property", NAME, PATH, NAME, "Generation").stdout == "t 1\n"
            uid = bus.run("id", "-u", "anna").stdout.strip()
            fields = ("KVMNEG_EVENT=limit-hit", "KVMNEG_LIMIT=BUS_CALLS_PER_CALLER", f"KVMNEG_UID={uid}")
            words = ("journalctl", "--no-pager", "--output=cat", *fields)
            bus.wait("it is told", lambda: "was refused" in bus.run(*words, check=False).stdout)
            assert flood.poll() is None
        finally:
            flood.kill()
    assert bus.show("kvmneg.service", "NRestarts") == {"NRestarts": "0"}


# In a session of hers, as polkit's agents are a session's; the terminal is this program's.
TYPED = """
import os, pty, select, sys
said, given = b"", False
child, terminal = pty.fork()
if not child:
    words = ["systemd-run", "--quiet", "--pty", "--wait", "--uid=anna", "--property=PAMName=login"]
    os.execvp("systemd-run", [*words, *sys.argv[2:]])
while True:
    quiet = not select.select([terminal], [], [], 1)[0]
    try:
        said += b"" if quiet else os.read(terminal, 1024)
    except OSError:
        break
    # what is typed before the agent has turned the echo off is dropped
    if said.rstrip().endswith(b"assword:") and quiet:
        os.write(terminal, sys.argv[1].encode() + b"\\n")
        given = True
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), given, said.decode())
"""


def test_a_password_on_a_terminal_permits(bus: Installed) -> None:
    """polkit's own agent asks for it, started by `kvmneg`: she may administer the host, and is no admin of ours."""
    bus.enable()  # and no more: it is started by a call that polkit is asked about
    bus.run("usermod", "--append", "--groups", "sudo", "anna")
    bus.run("chpasswd", given="anna:secret\n")
    pin = ("kvmneg", "fence", "pin", "--from", "host", "--reason", "hers")
    for typed, status in (("wrong", "6"), ("secret", "0")):
        done = bus.run("python3", "-c", TYPED, typed, *pin)
        assert done.stdout.split()[:2] == [status, "True"], done.stdout + done.stderr
    assert "generation 1" in bus.status_text()
    done = bus.run("python3", "-c", TYPED, "", *pin, "--no-ask-password")
    assert done.stdout.split()[:2] == ["6", "False"], done.stdout + done.stderr
    words = ("journalctl", "--no-pager", "--output=json", "KVMNEG_EVENT=peer-refused")
    reasons = [json.loads(line)["KVMNEG_REASON"] for line in bus.run(*words).stdout.splitlines()]
    assert reasons == [
        "polkit did not permit it",
        "polkit would ask for a password, and the caller did not allow that",
    ]
