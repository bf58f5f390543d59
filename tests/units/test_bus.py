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


@pytest.fixture
def bus(boot: Callable[..., Installed]) -> Iterator[Installed]:
    """A container with this Python's sdbus, which Debian does not have; its extension is for every Python."""
    host = boot()
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
