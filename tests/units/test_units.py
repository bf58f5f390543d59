# SPDX-License-Identifier: LGPL-2.1-or-later
"""The installed units in a real systemd: what they may, who they answer, and a client that no one here wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.client import Client
from kvmneg.service.journal import EVENTS
from tests.units import trees

if TYPE_CHECKING:
    from tests.units.conftest import Installed

pytestmark = pytest.mark.hosts

TOP = Path(__file__).parents[2]
SOCKET = "/run/kvmneg/org.kvmneg"
PACKAGE = "/usr/lib/python3/dist-packages/kvmneg"
UNITS = (
    "kvmneg.socket",
    "kvmneg.service",
    "kvmneg-uevents.socket",
    "kvmneg-measure.socket",
    "kvmneg-measure@x.service",
)
INTERFACES = sorted(
    path.name.removesuffix(".varlink")
    for path in (TOP / "kvmneg/service/interfaces").glob("org.kvmneg*.varlink")
)
assert INTERFACES, "no interface would be tested"
EXPOSURE = 0.8  # of ten


@pytest.fixture
def varlinkctl(shared: Installed, suite: str) -> None:
    if suite == "bookworm":
        pytest.skip("systemd 252 has no varlinkctl")


def test_what_a_container_stands_on_is_not_put_away(shared: Installed, tmp_path: Path) -> None:
    assert trees._stood_on(trees.layer(shared.suite)) and trees._stood_on(trees.tree(shared.suite))
    assert not trees._stood_on(tmp_path)


def test_verify(shared: Installed) -> None:
    """Not a word: no unknown setting in any release, no program that is missing."""
    done = shared.run("systemd-analyze", "verify", "--man=no", *UNITS)
    assert (done.stdout, done.stderr) == ("", "")


def test_exposure(shared: Installed) -> None:
    told = shared.run("systemd-analyze", "security", "--no-pager", "kvmneg.service").stdout
    found = re.search(r"Overall exposure level for kvmneg\.service: (\d+\.\d)", told)
    assert found and float(found[1]) <= EXPOSURE, told


def test_descriptors_kept_are_as_many_as_connections(shared: Installed) -> None:
    """Each held connection may lie with systemd."""
    shown = shared.show("kvmneg.service", "FileDescriptorStoreMax")
    assert shown == {"FileDescriptorStoreMax": str(limits.CONNECTIONS + limits.CONNECTIONS_RESERVED)}


def test_every_interface_is_in_the_registry(shared: Installed) -> None:
    found = shared.run("sh", "-c", "cd /run/varlink/registry && readlink -f org.kvmneg*").stdout.split()
    assert found == [SOCKET] * len(INTERFACES)
    names = shared.run(
        "ls", "/run/varlink/registry"
    ).stdout.split()  # systemd's own are there too, from 257 on
    assert sorted(name for name in names if name.startswith("org.kvmneg")) == INTERFACES


def test_users_and_folders(shared: Installed) -> None:
    shared.run("kvmneg", "fence", "show", check=False)
    assert "kvm" in shared.run("id", "--groups", "--name", "kvmneg").stdout.split()
    assert shared.run("getent", "group", "kvmneg-admin").stdout.startswith("kvmneg-admin:")
    modes = shared.run(
        "stat", "--format=%A %U %n", "/run/kvmneg", SOCKET, "/run/kvmneg/contracts", "/run/kvmneg/measure",
        "/var/lib/kvmneg",
    ).stdout.splitlines()  # fmt: skip
    assert modes == [
        "drwxr-xr-x root /run/kvmneg",
        f"srw-rw-rw- root {SOCKET}",
        "drwxr-xr-x kvmneg /run/kvmneg/contracts",
        "srw------- kvmneg /run/kvmneg/measure",
        "drwxr-x--- kvmneg /var/lib/kvmneg",
    ]


def test_status_says_generation_and_digest(shared: Installed) -> None:
    said = shared.run("kvmneg", "--json", "fence", "pin", "--from", "host", "--reason", "a test").stdout
    fence = json.loads(shared.run("kvmneg", "--json", "fence", "show").stdout)
    assert str(fence["generation"]) in said
    assert f"generation {fence['generation']}, fence {fence['digest'][:19]}" in shared.status_text()


@pytest.mark.usefixtures("varlinkctl")
def test_varlinkctl_info(shared: Installed) -> None:
    """Called by a client of systemd's; the output is a table for people, or JSON."""
    told = json.loads(shared.run("varlinkctl", "--json=short", "info", SOCKET).stdout)
    assert told["product"] == "kvmnegd"
    assert sorted(told["interfaces"]) == [*INTERFACES, "org.varlink.service"]


@pytest.mark.usefixtures("varlinkctl")
@pytest.mark.parametrize("interface", [*INTERFACES, "org.varlink.service"])
def test_varlinkctl_introspect_and_validate(shared: Installed, interface: str) -> None:
    """Its parser reads what the daemon says of itself, and the checked-in file."""
    told = shared.run("varlinkctl", "introspect", SOCKET, interface).stdout
    # with a terminal's colours or without; the parser writes it anew
    assert f"interface {interface}" in re.sub(r"\x1b\[[0-9;]*m", "", told)
    shared.run("varlinkctl", "validate-idl", f"{PACKAGE}/service/interfaces/{interface}.varlink")


@pytest.mark.usefixtures("varlinkctl")
@pytest.mark.parametrize(
    ("method", "given", "field"),
    [
        ("org.kvmneg.GetHost", {}, "generation"),
        ("org.kvmneg.Negotiate", {"request": {"level": "x86-64-v2"}}, "digest"),
        ("org.kvmneg.Fence.Get", {}, "state"),
        ("org.kvmneg.Guests.List", {}, "guests"),
        ("org.kvmneg.Rollback.List", {}, "entries"),
        ("org.varlink.service.GetInfo", {}, "vendor"),
    ],
)
def test_varlinkctl_call(shared: Installed, method: str, given: dict[str, object], field: str) -> None:
    shared.run("kvmneg", "fence", "pin", "--from", "host", "--reason", "to have one")
    told = shared.run("varlinkctl", "--json=short", "call", SOCKET, method, json.dumps(given)).stdout
    assert field in json.loads(told)


@pytest.mark.usefixtures("varlinkctl")
def test_varlinkctl_reads_errors(shared: Installed) -> None:
    done = shared.run("varlinkctl", "call", SOCKET, "org.kvmneg.End", '{"vm": "x"}', check=False)
    assert done.returncode and "org.kvmneg.InvalidRequest" in done.stderr


def test_the_daemon_cannot_write_its_settings(shared: Installed) -> None:
    """They say who is an admin: nobody but root, not even the daemon, whose sandbox is joined here."""
    shared.run("mkdir", "-p", "/etc/kvmneg")
    shared.run("kvmneg", "guests")
    assert shared.run("stat", "--format=%U %G", "/etc/kvmneg").stdout == "root root\n"
    enter = ("nsenter", "-t", str(shared.main_pid()), "-m")
    done = shared.run(*enter, "touch", "/etc/kvmneg/kvmneg.toml", check=False)  # by root, even
    assert done.returncode and "ead-only file system" in done.stderr


class TestUnprivileged:
    """A user of no group."""

    def test_asks(self, shared: Installed) -> None:
        assert "fence" in shared.run("kvmneg", "fence", "show", user="nobody", check=False).stdout

    @pytest.mark.parametrize("words", [("pin", "--from", "host"), ("unpin",), ("lower", "--from", "host")])
    def test_cannot_move_the_fence(self, shared: Installed, words: tuple[str, ...]) -> None:
        before = shared.run("kvmneg", "--json", "fence", "history", check=False).stdout
        done = shared.run("kvmneg", "fence", *words, "--reason", "mine", user="nobody", check=False)
        assert done.returncode == 6 and "kvmneg-admin" in done.stderr
        assert shared.run("kvmneg", "--json", "fence", "history", check=False).stdout == before

    def test_a_member_of_the_admin_group_may(self, shared: Installed) -> None:
        shared.run("useradd", "--no-create-home", "--groups", "kvmneg-admin", "anna")
        shared.run("kvmneg", "fence", "pin", "--from", "host", "--reason", "hers", user="anna")

    @pytest.mark.parametrize("path", ["/run/kvmneg/measure", "/var/lib/kvmneg/kvmneg.sqlite"])
    def test_cannot_touch_what_is_the_daemons(self, shared: Installed, path: str) -> None:
        code = "import socket,sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
        words = ("python3", "-c", code, path) if path.endswith("measure") else ("touch", path)
        done = shared.run(*words, user="nobody", check=False)
        assert done.returncode and "ermission denied" in done.stderr

    def test_cannot_see_others_guests(self, shared: Installed) -> None:
        vm = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"
        code = (
            "from kvmneg.client import Client; c = Client();"
            f"print(c.begin(c.negotiate({{'level': 'x86-64-v2'}})['digest'], '{vm}')['path'])"
        )
        shared.run("python3", "-c", code)
        listed = "from kvmneg.client import Client; import json; print(json.dumps(Client().guests_list()))"
        assert vm in shared.run("python3", "-c", listed).stdout
        done = shared.run("python3", "-c", listed, user="nobody", check=False)
        assert vm not in done.stdout
        got = f"from kvmneg.client import Client; Client().guests_get('{vm}')"
        assert "NotPermitted" in shared.run("python3", "-c", got, user="nobody", check=False).stderr

    def test_cannot_crowd_out_others(self, shared: Installed) -> None:
        """Its share is full, root is served; what it then gets is told to it."""
        code = (
            "import socket, json, sys\n"
            'call = b\'{"method":"org.varlink.service.GetInfo"}\\0\'\n'
            "held, refused = [], 0\n"
            f"for _ in range({limits.CONNECTIONS_PER_UID + 50}):\n"
            "    one = socket.socket(socket.AF_UNIX); one.connect(sys.argv[1])\n"
            "    try:\n"
            "        one.sendall(call); answer = one.recv(65536)\n"
            "    except ConnectionError:\n"
            "        answer = b'LimitExceeded'\n"
            "    refused += b'LimitExceeded' in answer; held.append(one)\n"
            "print(refused, flush=True); sys.stdin.readline()\n"
        )
        with shared.start("python3", "-c", code, SOCKET, user="nobody") as crowd:
            assert crowd.stdin and crowd.stdout
            assert int(crowd.stdout.readline()) == 50
            with Client(shared.socket, timeout=20) as client:
                assert client.get_info()["product"] == "kvmnegd"
            crowd.stdin.close()

    def test_cannot_crowd_out_others_as_many_users(self, shared: Installed) -> None:
        """Who has a range of uids (subuid(5)) is many users: not to root, to services, and to administrators."""
        shared.run("useradd", "--no-create-home", "--groups", "kvmneg-admin", "lotte")
        code = (
            "import os, select, socket, sys\n"
            'call = b\'{"method":"org.varlink.service.GetInfo"}\\0\'\n'
            "def crowd(uid):\n"
            "    held, tried = [], 0\n"
            "    while not select.select([sys.stdin], [], [], 0.02 if tried > int(sys.argv[2]) else 0)[0]:\n"
            "        one = socket.socket(socket.AF_UNIX); one.connect(sys.argv[1]); tried += 1\n"
            "        try:\n"
            "            one.sendall(call)\n"
            "            if b'LimitExceeded' not in one.recv(65536): held.append(one)\n"
            "        except ConnectionError:\n"
            "            pass\n"
            "        if tried == int(sys.argv[2]): print('refused' if len(held) < tried else 'served', flush=True)\n"
            "for uid in range(100000, 100000 + int(sys.argv[3])):\n"
            "    if not os.fork():\n"
            "        os.setuid(uid); crowd(uid); os._exit(0)\n"
            "sys.stdin.readline()\n"
        )
        users = limits.CONNECTIONS // limits.CONNECTIONS_PER_UID + 1
        each = str(limits.CONNECTIONS_PER_UID)
        with shared.start("python3", "-c", code, SOCKET, each, str(users)) as crowd:
            assert crowd.stdout and crowd.stdin
            assert "refused\n" in [crowd.stdout.readline() for _ in range(users)]  # it is full
            asked = ("kvmneg", "fence", "show")
            # some places were others' for a moment; the crowd goes on trying, and has them soon
            shared.wait(
                "no place is left",
                lambda: "CONNECTIONS" in shared.run(*asked, user="nobody", check=False).stderr,
            )
            for user in ("", "lotte", "systemd-network"):
                shared.run(*asked, user=user)
            crowd.stdin.close()


def test_the_journal_has_events_with_their_fields_and_their_text(shared: Installed) -> None:
    """As journald has them, by systemd's own reader; in the text no field is missing."""
    shared.run("kvmneg", "fence", "pin", "--from", "host", "--reason", "for the record")
    shared.run("kvmneg", "fence", "pin", "--from", "host", "--reason", "mine", user="nobody", check=False)
    shared.run("kvmneg", "fence", "pin", "--from", "host", "--reason", "x" * 1025, check=False)
    shared.run("kvmneg", "fence", "pin", "--from", "level:none", "--reason", "a mistake", check=False)
    nobody = shared.run("id", "-u", "nobody").stdout.strip()
    for name, fields in {
        "fence-pinned": {"UID": "0", "REASON": "for the record"},
        "peer-refused": {"UID": nobody, "METHOD": "org.kvmneg.Fence.Pin"},
        "limit-hit": {"UID": "0", "LIMIT": "REASON_CHARACTERS", "ALLOWED": "1024"},
        "fence-refused": {"UID": "0", "METHOD": "org.kvmneg.Fence.Pin", "ERROR": "InvalidRequest"},
    }.items():
        number, priority, *_ = EVENTS[name]
        words = ("journalctl", "--no-pager", "--lines=1", f"MESSAGE_ID={number}")
        told = json.loads(shared.run(*words, "--output=json").stdout)
        assert {field: told[f"KVMNEG_{field}"] for field in fields} == fields
        assert (told["_SYSTEMD_UNIT"], told["PRIORITY"]) == ("kvmneg.service", str(priority))
        text = shared.run(*words, "--catalog").stdout
        assert "Defined-By: kvmneg" in text and "@KVMNEG" not in text
    # what was done and refused is an administrator's to read
    done = shared.run("journalctl", "--unit=kvmneg.service", "--output=cat", user="nobody", check=False)
    assert "for the record" not in done.stdout


def test_dbus_polkit_and_the_journal_know_it(shared: Installed) -> None:
    """Their files are where they look; what the interfaces do has tests of its own."""
    names = shared.run("busctl", "--list", "--activatable", "--no-legend").stdout
    assert "org.kvmneg1 " in names
    assert "org.kvmneg1.pin" in shared.run("pkaction").stdout
    told = shared.run("journalctl", "--list-catalog", "--no-pager").stdout
    ids = re.findall(r"^-- ([0-9a-f]{32})$", (TOP / "units/kvmneg.catalog").read_text("utf-8"), re.MULTILINE)
    assert len(ids) > 10 and all(one in told for one in ids)
