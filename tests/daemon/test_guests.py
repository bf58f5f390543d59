# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leases through a real kvmnegd: who keeps them, what ends them, what a restart may and may not do to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits
from kvmneg.errors import BadInput, Blocked, LimitExceeded, UsageError
from kvmneg.policy.contract import Contract
from tests.namespaces import unshare

from .test_daemon import as_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmneg.client import Client

    from .conftest import Daemon

VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
OTHER_VM = "7c9a2d10-0f4e-4d8b-9a6e-2b1f3c4d5e6f"
V2 = {"level": "x86-64-v2"}


@pytest.fixture
def monitor() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts what stands in for a VMM: a process that lives until it is ended, at the latest with the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "600"]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def offered(client: Client) -> str:
    return str(client.negotiate(V2)["digest"])


def guests(daemon: Daemon) -> list[dict[str, Any]]:
    with daemon.client() as client:
        found: list[dict[str, Any]] = client.guests_list()["guests"]
    return found


def until_gone(daemon: Daemon) -> None:
    for _ in range(500):
        if not guests(daemon):
            return
        time.sleep(0.02)
    raise TimeoutError("a lease is still there")


def test_a_lease_ends_with_the_connection_that_holds_it(daemon: Daemon) -> None:
    with daemon.client() as vmm:
        granted = vmm.begin(offered(vmm), VM, hold=True)
        vmm.started(VM)
        (guest,) = guests(daemon)
        assert (guest["vm"], guest["state"], guest["certain"]) == (VM, "started", True)
        assert guest["holders"] == [{"pid": os.getpid(), "by": "connection"}]
        assert Path(granted["path"]).exists()
    until_gone(daemon)
    assert not Path(granted["path"]).exists()


def test_a_lease_ends_with_the_process_that_keeps_it(
    daemon: Daemon, monitor: Callable[[], subprocess.Popen[bytes]]
) -> None:
    vmm = monitor()
    with daemon.client() as client:
        client.begin(offered(client), VM, pid=vmm.pid)
        client.begin(offered(client), OTHER_VM, pid=vmm.pid)  # one process may run several
    assert [one["holders"] for one in guests(daemon)] == [[{"pid": vmm.pid, "by": "process"}]] * 2
    end(vmm)
    until_gone(daemon)


def test_without_a_keeper_a_lease_ends_when_it_is_said_to(daemon: Daemon) -> None:
    with daemon.client() as client:
        first = client.begin(offered(client), VM)["incarnation"]
    assert len(guests(daemon)) == 1
    with daemon.client() as client:
        client.end(VM, incarnation=first)
        second = client.begin(offered(client), VM)["incarnation"]
        assert second > first
        with pytest.raises(UsageError, match=f"runs as {second}"):
            client.end(VM, incarnation=first)  # said late, of the one before
    assert len(guests(daemon)) == 1


def test_a_process_that_keeps_must_be_there_and_ones_own(
    daemon: Daemon, monitor: Callable[[], subprocess.Popen[bytes]]
) -> None:
    vmm = monitor()
    with daemon.client() as client:
        digest = offered(client)
        with pytest.raises(UsageError, match="not by both"):
            client.begin(digest, VM, hold=True, pid=vmm.pid)
        for pid in (0, -1, 2**22 + 1):
            with pytest.raises(UsageError, match="no process"):
                client.begin(digest, VM, pid=pid)
        gone = monitor()
        end(gone)
        with pytest.raises(UsageError, match="no process"):
            client.begin(digest, VM, pid=gone.pid)
    assert guests(daemon) == []
    given = {"digest": as_user(65534, daemon, "org.kvmneg.Negotiate", {"request": V2})["digest"], "vm": VM}
    assert as_user(65534, daemon, "org.kvmneg.Begin", {**given, "pid": vmm.pid}) == {"error": "NotPermitted"}


_IN_A_CONTAINER = """
import os, sys
from kvmneg.client import Client
from kvmneg.errors import UsageError
client = Client(sys.argv[1])
digest = client.negotiate({"level": "x86-64-v2"})["digest"]
try:
    client.begin(digest, sys.argv[2], pid=os.getpid())
except UsageError as no:
    sys.stdout.write(no.message)
client.begin(digest, sys.argv[2], hold=True)
"""


def test_a_process_in_a_container_has_another_number_here(daemon: Daemon) -> None:
    """As root there its own number is the one of this system's init, which would keep the lease for ever."""
    if os.geteuid():
        pytest.skip("needs root: a pid namespace")
    words = [*unshare("--pid", "--fork"), sys.executable, "-P", "-c", _IN_A_CONTAINER, str(daemon.socket), VM]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "another pid namespace" in done.stdout
    until_gone(daemon)


def test_two_keep_a_guest_that_is_handed_over(
    daemon: Daemon, monitor: Callable[[], subprocess.Popen[bytes]]
) -> None:
    old, new, third = monitor(), monitor(), monitor()
    with daemon.client() as client:
        first = client.begin(offered(client), VM, pid=old.pid)["incarnation"]
        client.started(VM)
        assert client.guests_handover(VM, pid=new.pid) == first
        assert client.guests_handover(VM, pid=new.pid) == first  # a reply may get lost
        with pytest.raises(LimitExceeded, match="HOLDERS_PER_LEASE"):
            client.guests_handover(VM, pid=third.pid)
        with pytest.raises(UsageError, match="give hold or pid"):
            client.guests_handover(VM)
    end(old)
    for _ in range(500):
        (guest,) = guests(daemon)
        if len(guest["holders"]) == 1:
            break
        time.sleep(0.02)
    assert guest["holders"] == [{"pid": new.pid, "by": "process"}] and guest["state"] == "started"
    end(new)
    until_gone(daemon)


def test_a_saved_guest_counts_until_it_is_restored_and_ends(
    daemon: Daemon, monitor: Callable[[], subprocess.Popen[bytes]]
) -> None:
    vmm, restored = monitor(), monitor()
    with daemon.client() as client:
        client.begin(offered(client), VM, pid=vmm.pid)
        client.started(VM)
        client.guests_saved(VM)
    end(vmm)
    assert [one["state"] for one in guests(daemon)] == ["saved"]
    assert daemon.end() == 0
    daemon.start()
    assert [one["state"] for one in guests(daemon)] == ["saved"]
    with daemon.client() as client:
        client.guests_handover(VM, pid=restored.pid)
    assert [one["state"] for one in guests(daemon)] == ["started"]
    end(restored)
    until_gone(daemon)


def test_what_the_vmm_says_it_has_set_is_what_counts(daemon: Daemon) -> None:
    with daemon.client() as client:
        offer = client.negotiate(V2)
        client.begin(offer["digest"], VM)
        words = dict(offer["contract"]["words"])
        assert client.guests_report(VM, words)["exceeds"] == []
        rdseed = int(words.get("cpuid:0x7.0.ebx", "0x0"), 16) | 1 << 18
        reported = client.guests_report(VM, {**words, "cpuid:0x7.0.ebx": f"{rdseed:#x}"})
        assert [blocker["feature"] for blocker in reported["exceeds"]] == ["rdseed"]
        (guest,) = client.guests_list()["guests"]
        assert guest["reported"] == reported["digest"] and guest["digest"] == offer["digest"]
        for wrong in ({"cpuid:0x7.0.ebz": "0x0"}, {"cpuid:0x7.0.ebx": "many"}, {"cpuid:0x7.0.ebx": "1" * 40}):
            with pytest.raises(BadInput):
                client.guests_report(VM, wrong)
        assert client.guests_list()["guests"] == [guest]


def test_a_guest_from_elsewhere_brings_its_contract(daemon: Daemon) -> None:
    with daemon.client() as client:
        contract = client.negotiate(V2)["contract"]
        received = client.guests_receive(contract, VM)
        assert Path(received["path"]).exists()
        assert client.guests_receive(contract, VM)["incarnation"] == received["incarnation"]
        # what this host lacks: PKU's key and SGX-like bits never offered by the recorded host
        lacking = {**contract["words"], "cpuid:0x7.0.ecx": "0x8"}
        document = {**contract, "words": lacking, "digest": None}
        document.pop("digest")
        with pytest.raises((Blocked, BadInput)):
            client.guests_receive(document, OTHER_VM)
        with pytest.raises(BadInput):
            client.guests_receive({"format": "kvmneg.contract/1"}, OTHER_VM)
    assert [one["vm"] for one in guests(daemon)] == [VM]


def test_a_guest_from_elsewhere_brings_its_contract_in_binary(daemon: Daemon) -> None:
    """The same lease either way: JSON and the binary form are one contract."""
    with daemon.client() as client:
        offer = client.negotiate(V2)
        binary = Contract.from_json(offer["contract"]).binary()
        received = client.guests_receive(binary, VM)
        assert Path(received["path"]).read_bytes() == binary
        assert client.guests_receive(offer["contract"], VM) == received
        assert received["digest"] == offer["digest"]
        assert received["generation"] == offer["generation"]
        assert received["expiresInSeconds"] == limits.LEASE_UNSTARTED_SECONDS
        for changed in (b"", binary[:-1], binary[:-1] + bytes([binary[-1] ^ 1])):
            with pytest.raises(BadInput, match="contract"):
                client.guests_receive(changed, OTHER_VM)
        good = b64encode(binary).decode()
        for text in ("!" + good, good + "=", good[:-1], good[:8] + "\n" + good[8:]):
            with pytest.raises(BadInput, match="Base64"):
                client.call("org.kvmneg.Guests.Receive", {"binary": text, "vm": OTHER_VM})
        both = {"binary": good, "contract": offer["contract"], "vm": OTHER_VM}
        for given in (both, {"vm": OTHER_VM}):
            with pytest.raises(UsageError, match="as JSON or in its binary form"):
                client.call("org.kvmneg.Guests.Receive", given)
    assert [one["vm"] for one in guests(daemon)] == [VM]


# -- restarts


def test_a_daemon_that_was_killed_looks_again_at_who_keeps(
    make_daemon: Callable[..., Daemon], monitor: Callable[[], subprocess.Popen[bytes]]
) -> None:
    """The lease of a process that lives stays and still ends with it; that of one that ended meanwhile does not."""
    daemon = make_daemon().start()
    living, dying = monitor(), monitor()
    with daemon.client() as client:
        digest = offered(client)
        client.begin(digest, VM, pid=living.pid)
        client.begin(digest, OTHER_VM, pid=dying.pid)
    assert daemon.end(signal.SIGKILL) == -signal.SIGKILL
    end(dying)
    daemon.start()
    assert [one["vm"] for one in guests(daemon)] == [VM]
    end(living)
    until_gone(daemon)


_VMM = """
import sys
from kvmneg.client import Client
with Client(sys.argv[1]) as kvmnegd:
    kvmnegd.begin(sys.argv[2], sys.argv[3], hold=True)
    kvmnegd.started(sys.argv[3])
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_held_connection_that_the_daemon_lost_is_its_process(
    make_daemon: Callable[..., Daemon], number: int
) -> None:
    """However the daemon ended, the VMM at the other end still runs: its process keeps the lease from then on."""
    daemon = make_daemon().start()
    with daemon.client() as client:
        digest = offered(client)
    command = [sys.executable, "-P", "-c", _VMM, daemon.socket, digest, VM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as vmm:
        assert vmm.stdout is not None and vmm.stdin is not None
        assert vmm.stdout.readline() == b"holds\n"
        daemon.end(number)
        daemon.start()
        (guest,) = guests(daemon)
        assert guest["holders"] == [{"pid": vmm.pid, "by": "connection"}] and guest["certain"]
        vmm.stdin.close()
        vmm.wait(20)
    until_gone(daemon)


# -- guests that nobody negotiated for

_MAKES_A_VM = """
import fcntl, os, sys
kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
vm = fcntl.ioctl(kvm, 0xAE01, 0)  # KVM_CREATE_VM
print("made", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process with a VM that asked nobody."""
    command = [sys.executable, "-P", "-c", _MAKES_A_VM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"made\n"
        yield process
        process.stdin.close()


def unknown(client: Client, pid: int) -> list[dict[str, Any]]:
    return [one for one in client.guests_list()["unknown"] if one["pid"] == pid]


@pytest.mark.kvm
def test_an_unknown_guest_is_waived_or_taken_on(daemon: Daemon, stranger: subprocess.Popen[bytes]) -> None:
    with daemon.client() as admin:
        (found,) = unknown(admin, stranger.pid)
        assert found["uid"] == os.getuid() and found["waived"] is None
        for call in (admin.guests_waive, lambda pid, why: admin.guests_import(pid, VM, why)):
            with pytest.raises(UsageError, match="no VM that is unknown"):
                call(os.getpid(), "it is none")
            with pytest.raises(UsageError, match="a reason is needed"):
                call(stranger.pid, " ")
        admin.guests_waive(stranger.pid, "a test machine, it may break")
        assert unknown(admin, stranger.pid)[0]["waived"] == "a test machine, it may break"
        taken = admin.guests_import(stranger.pid, VM, "it is ours")
        assert unknown(admin, stranger.pid) == []
        (guest,) = admin.guests_list()["guests"]
        assert (guest["vm"], guest["state"], guest["digest"]) == (VM, "started", taken["digest"])
    stranger.kill()
    until_gone(daemon)


def test_only_admins_waive_and_import(daemon: Daemon) -> None:
    waive = {"pid": 1, "reason": "mine"}
    assert as_user(65534, daemon, "org.kvmneg.Guests.Waive", waive) == {"error": "NotPermitted"}
    assert as_user(65534, daemon, "org.kvmneg.Guests.Import", {**waive, "vm": VM}) == {
        "error": "NotPermitted"
    }
