# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's life under a real systemd: started by a call, killed, hung, reloaded, upgraded, without /dev/kvm."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg import __version__
from kvmneg.client import Client
from kvmneg.service.journal import EVENTS
from tests.conftest import kvm_problem
from tests.units import trees
from tests.units.held import VM, guests, holding, stored

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.units.conftest import Installed

pytestmark = pytest.mark.hosts

OTHER_VM = "9b2f0d6b-1c9e-4c1e-8a57-3e4c2f6a9d3b"
SETTINGS = "etc/kvmneg/kvmneg.toml"
PACKAGE = "usr/lib/python3/dist-packages/kvmneg"


def kill(host: Installed, number: int = signal.SIGKILL) -> int:
    """Signal the daemon; its number."""
    pid = host.main_pid()
    host.run("kill", f"-{number}", str(pid))
    return pid


def events(host: Installed, name: str) -> list[dict[str, str]]:
    """The fields of what the journal has of one kind."""
    words = ("journalctl", "--no-pager", "--output=json", f"MESSAGE_ID={EVENTS[name][0]}")
    return [json.loads(line) for line in host.run(*words).stdout.splitlines()]


def test_the_first_call_starts_it(boot: Callable[..., Installed]) -> None:
    host = boot()
    host.serve_recorded()
    host.enable()
    assert host.show("kvmneg.service", "ActiveState") == {"ActiveState": "inactive"}
    host.run("kvmneg", "guests")
    assert host.show("kvmneg.service", "ActiveState") == {"ActiveState": "active"}
    host.run("systemctl", "stop", "kvmneg.service")
    assert host.show("kvmneg.service", "Result", "ExecMainStatus") == {
        "Result": "success",
        "ExecMainStatus": "0",
    }
    assert (host.root / "run/kvmneg/contracts").is_dir()  # and so is the socket, which starts it again
    host.run("kvmneg", "guests")


def test_killed_it_comes_back_with_its_leases_and_serves_them_on(served: Installed) -> None:
    with holding(served) as holder:
        before = guests(served)
        assert [one["vm"] for one in before] == [VM] and stored(served) == 1
        for _ in range(2):
            pid = kill(served)
            served.wait("another daemon", lambda pid=pid: served.restarted(pid))
            assert holder.do("ask") == __version__  # on the connection it had
            assert guests(served) == before and stored(served) == 1
        assert holder.do("close") == "closed"
        served.wait("its lease has ended", lambda: not guests(served))
        served.wait("nothing is kept", lambda: stored(served) == 0)


def test_who_is_in_another_pid_namespace_keeps_a_lease_of_their_own(served: Installed) -> None:
    """To the daemon they have no number: both outside, each with a connection, over a restart."""
    with Client(served.socket, timeout=30) as one, Client(served.socket, timeout=30) as two:
        for client, vm in ((one, VM), (two, OTHER_VM)):
            digest = client.negotiate({"level": "x86-64-v2"})["digest"]
            client.begin(digest, vm, hold=True)
        assert [guest["holders"] for guest in guests(served)] == [[{"pid": 0, "by": "connection"}]] * 2
        pid = kill(served)
        served.wait("another daemon", lambda: served.restarted(pid))
        assert one.get_info() == two.get_info() and len(guests(served)) == 2 and stored(served) == 2
        one.close()
        served.wait(
            "the first one's has ended", lambda: [guest["vm"] for guest in guests(served)] == [OTHER_VM]
        )
    served.wait("both have", lambda: not guests(served))


def test_a_connection_that_closes_while_it_is_down_lets_go(served: Installed) -> None:
    """Its process lives on, so only the stored descriptor can tell."""
    served.drop_in("RestartSec=3s")
    with holding(served) as holder:
        pid = kill(served)
        assert holder.do("close") == "closed"
        assert not served.restarted(pid)
        served.wait("another daemon", lambda: served.restarted(pid))
        assert guests(served) == [] and stored(served) == 0


def test_a_daemon_that_hangs_is_replaced(served: Installed) -> None:
    served.drop_in("WatchdogSec=3s")
    with holding(served) as holder:
        time.sleep(4)
        pid = kill(served, signal.SIGSTOP)  # it outlived its watchdog's time
        assert served.show("kvmneg.service", "NRestarts") == {"NRestarts": "0"}
        served.wait("another daemon", lambda: served.restarted(pid))
        assert "watchdog" in served.journal("kvmneg.service").lower()
        assert [one["vm"] for one in guests(served)] == [VM]
        assert holder.do("ask") == __version__


def test_a_child_that_does_not_end_holds_up_no_restart(served: Installed) -> None:
    """As the one that serves D-Bus, while callers keep it from seeing that the daemon has gone."""
    served.drop_in("TimeoutStopSec=infinity", "ExecStartPost=sh -c 'trap \"\" TERM; sleep 600 &'")
    served.run("kvmneg", "guests")
    pid = kill(served)
    served.wait("another daemon", lambda: served.restarted(pid))
    served.run("systemctl", "stop", "kvmneg.service")


def test_reload(served: Installed) -> None:
    """A good file is taken without a restart; a bad one fails the reload, and changes nothing."""
    served.run("kvmneg", "guests")
    pid = served.main_pid()
    settings = served.root / SETTINGS
    settings.parent.mkdir()
    settings.write_text("[limits]\nREASON_CHARACTERS = 20\n")
    long = ("kvmneg", "fence", "pin", "--from", "host", "--reason", "more than twenty characters")
    served.run("systemctl", "reload", "kvmneg.service")
    served.wait("the new limit", lambda: served.run(*long, check=False).returncode)
    assert "REASON_CHARACTERS" in served.run(*long, check=False).stderr

    settings.write_text("# a mistake\n[limits]\nREASON_CHARACTERS = 20\nCONNECTION = 7\n")
    done = served.run("systemctl", "reload", "kvmneg.service", check=False)
    assert done.returncode
    said = served.journal("kvmneg.service")
    assert f"/{SETTINGS}:4: limits.CONNECTION: there is no such setting" in said
    assert "did you mean CONNECTIONS?" in said

    kill(served, signal.SIGHUP)  # past the check: the daemon keeps what it has
    served.wait("why", lambda: "settings not reloaded" in served.status_text())
    assert served.run(*long, check=False).returncode
    assert "the settings stay as they were" in served.journal("kvmneg.service")

    for told, fields in (("reloaded", {"FILE"}), ("reload-refused", {"FILE", "LINE", "KEY", "REASON"})):
        entries = events(served, told)
        assert all({f"KVMNEG_{name}" for name in fields} <= set(one) for one in entries)
        assert len(entries) == (1 if told == "reloaded" else 2)  # refused by the check, then by the daemon
        assert "KVMNEG_" not in served.run("journalctl", "-x", f"MESSAGE_ID={EVENTS[told][0]}").stdout

    settings.unlink()
    served.run("systemctl", "reload", "kvmneg.service")
    served.wait("the delivered limit", lambda: served.run(*long, check=False).returncode == 0)
    assert served.main_pid() == pid
    shown = served.show("kvmneg.service", "ActiveState", "SubState", "NRestarts")
    assert shown == {"ActiveState": "active", "SubState": "running", "NRestarts": "0"}


def test_a_bad_file_at_start_says_where(boot: Callable[..., Installed]) -> None:
    host = boot()
    (host.root / "etc/kvmneg").mkdir(exist_ok=True)
    (host.root / SETTINGS).write_text("socket = '/run/x'\nsocket = 3\n")
    host.run("systemctl", "start", "kvmneg.service", check=False)
    assert f"/{SETTINGS}:2: not TOML" in host.journal("kvmneg.service")


def test_upgraded_in_place(served: Installed) -> None:
    """Other files, a restart as a package does it: fence, leases and their connections are as before."""
    served.run("kvmneg", "fence", "pin", "--from", "host", "--reason", "a test")
    with holding(served) as holder:
        fence, before = served.run("kvmneg", "--json", "fence", "show").stdout, guests(served)
        source = served.root / PACKAGE / "__init__.py"
        source.write_text(source.read_text().replace(f'"{__version__}"', '"99.0"'))
        served.run("systemctl", "try-restart", "kvmneg.service")
        assert holder.do("ask") == "99.0"
        assert served.run("kvmneg", "--json", "fence", "show").stdout == fence
        assert guests(served) == before and stored(served) == 1


def test_without_kvm_it_stays_up_and_measures_when_kvm_comes(boot: Callable[..., Installed]) -> None:
    host = boot(kvm=False)
    host.enable()
    done = host.run("kvmneg", "negotiate", "--json", given='{"level": "x86-64-v2"}', check=False)
    assert done.returncode == 3, done.stderr
    assert "unmeasured" in host.status_text()
    assert "/dev/kvm" in host.journal("kvmneg.service")
    pid = host.main_pid()
    if kvm_problem():
        pytest.skip(f"no usable KVM: {kvm_problem()}")
    node = Path("/dev/kvm").stat()
    host.run(
        "mknod", "--mode=0660", "/dev/kvm", "c", str(os.major(node.st_rdev)), str(os.minor(node.st_rdev))
    )
    host.run("chgrp", "kvm", "/dev/kvm")
    host.wait("a measurement that nobody asked for", lambda: "floating" in host.status_text())
    assert host.main_pid() == pid


def test_this_host_is_measured(boot: Callable[..., Installed]) -> None:
    """/dev/kvm by the service itself, TAP by the unit that may open it; and a VM of another user is seen."""
    if kvm_problem():
        pytest.skip(f"no usable KVM: {kvm_problem()}")
    host = boot()
    host.enable()
    code = "from kvmneg.client import Client; import json; print(json.dumps(Client().get_host()['host']))"
    report = json.loads(host.run("python3", "-c", code).stdout)
    assert report["measured"]["source"] == "kvm"
    if (host.root / "dev/net/tun").exists():
        assert int(report["offer"]["tap:features"], 16)
    program = (  # KVM_CREATE_VM
        "import os, fcntl, sys; kvm = os.open('/dev/kvm', os.O_RDWR); vm = fcntl.ioctl(kvm, 0xAE01, 0);"
        "print(vm, flush=True); sys.stdin.read()"
    )
    with host.start("python3", "-c", program, user="kvmneg") as stranger:
        assert stranger.stdout and stranger.stdin
        stranger.stdout.readline()
        with host.start("python3", "-c", program) as other:
            assert other.stdout and other.stdin
            other.stdout.readline()
            answer = json.loads(host.run("kvmneg", "--json", "guests").stdout)
            assert sorted(one["uid"] for one in answer["unknown"])[0] == 0
            assert answer["missed"] is None
            other.stdin.close()
        stranger.stdin.close()
    host.wait(
        "they are gone", lambda: not json.loads(host.run("kvmneg", "--json", "guests").stdout)["unknown"]
    )


WEDGED = """
import os as _os
Measurer.take = lambda self: _os.open("/var/fifo", _os.O_WRONLY)  # waits in the kernel for a reader
"""


def test_a_kvm_that_hangs_at_start(boot: Callable[..., Installed]) -> None:
    """It becomes ready all the same, says why nothing is granted, and can be restarted beside what hangs."""
    host = boot()
    source = host.root / PACKAGE / "host/measure.py"
    source.write_text(source.read_text() + WEDGED)
    (host.root / "etc/kvmneg").mkdir(exist_ok=True)
    (host.root / SETTINGS).write_text("[limits]\nMEASURE_SECONDS = 2\n")
    host.run("mkfifo", "--mode=0666", "/var/fifo")
    host.enable()
    for _ in range(2):
        done = host.run("kvmneg", "negotiate", "--level", "x86-64-v2", check=False)
        assert done.returncode == 3 and "its KVM does not answer" in done.stderr
        assert "unmeasured" in host.status_text()
        assert host.run("kvmneg", "fence", "show").returncode == 0
        host.run("systemctl", "restart", "kvmneg.service")
    fields = ("KVMNEG_EVENT=host-unmeasured", "KVMNEG_CAUSE=wedged")
    said = "measuring this host did not end in 2 seconds: its KVM does not answer"

    def told() -> int:
        return host.run("journalctl", "--no-pager", "--output=cat", *fields).stdout.count(said)

    host.wait("each start says so", lambda: told() == 3)  # after it is ready
    assert host.show("kvmneg.service", "NRestarts") == {"NRestarts": "0"}


def test_more_connections_than_the_manager_keeps(served: Installed) -> None:
    """Said at start, until the unit has room for as many."""
    (served.root / "etc/kvmneg").mkdir(exist_ok=True)
    (served.root / SETTINGS).write_text("[limits]\nCONNECTIONS = 2000\nCONNECTIONS_PER_UID = 1500\n")
    served.run("kvmneg", "guests")
    said = "up to 2128 connections may keep a lease, and the service manager has room for 1152"
    served.wait("it is told", lambda: said in served.journal("kvmneg.service"))
    served.run("systemctl", "reload", "kvmneg.service")
    served.wait("again", lambda: served.journal("kvmneg.service").count(said) == 2)
    if trees.SUITES[served.suite] < 254:
        return  # its manager does not tell the daemon how many it keeps
    served.drop_in("FileDescriptorStoreMax=2128")
    served.run("systemctl", "restart", "kvmneg.service")
    served.wait("another start", lambda: served.journal("kvmneg.service").count("started: ") == 2)
    served.run("systemctl", "reload", "kvmneg.service")
    served.wait("another reload", lambda: served.journal("kvmneg.service").count("reloaded") == 2)
    assert served.journal("kvmneg.service").count(said) == 2
