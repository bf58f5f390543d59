# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmnegd as its clients meet it: fence, contracts, life and death."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits
from kvmneg.errors import (
    BadInput,
    Blocked,
    GenerationMismatch,
    KvmnegError,
    LimitExceeded,
    NoSuchContract,
    NotPinned,
    StaleOffer,
    StoreError,
    Unreachable,
    UsageError,
)
from kvmneg.policy.contract import Contract

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.client import Client

    from .conftest import Daemon

VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
OTHER_VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5f"
V2 = {"level": "x86-64-v2"}


def as_user(uid: int, daemon: Daemon, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Call as another user; the reply, or {"error": class name}. The socket's folder is opened to all."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it calls as another user")
    for folder in Path(daemon.socket).parents[:-1]:
        if str(folder).startswith("/tmp/") and folder.stat().st_uid == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    program = """
import json, os, sys
from kvmneg.client import Client
from kvmneg.errors import KvmnegError
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
try:
    print(json.dumps(Client(sys.argv[2]).call(sys.argv[3], json.loads(sys.argv[4]))))
except KvmnegError as error:
    print(json.dumps({"error": type(error).__name__}))
"""
    command = [sys.executable, "-P", "-c", program, str(uid), daemon.socket, method, json.dumps(parameters)]
    reply: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return reply


def test_a_host_without_a_fence_floats(daemon: Daemon) -> None:
    with daemon.client() as client:
        host = client.get_host()
        assert (host["state"], host["generation"], host["fence"]) == ("floating", 0, None)
        assert host["host"]["format"] == "kvmneg.report/1"
        assert client.fence_get()["pinned"] is False


def test_a_pin_is_seen_by_everybody(daemon: Daemon) -> None:
    with daemon.client() as admin, daemon.client() as other, daemon.client() as watching:
        events = watching.watch()
        assert next(events)["generation"] == 0
        pinned = admin.fence_pin("before the roll-out", source="level:x86-64-v2")
        assert pinned["generation"] == 1
        assert other.fence_get()["digest"] == pinned["digest"]
        event = next(events)
        assert (event["generation"], event["state"], event["fenceDigest"]) == (1, "pinned", pinned["digest"])
        with pytest.raises(Blocked) as caught:
            other.negotiate({"level": "x86-64-v2", "require": ["rdrand"]})
        assert [(b.feature, b.cause) for b in caught.value.blockers] == [("rdrand", "fence")]


def test_the_text_of_a_fence_pins_the_same_fence(daemon: Daemon) -> None:
    with daemon.client() as client:
        first = client.fence_pin("one", source="host")
        second = client.fence_pin("two", text=first["text"], expected_generation=1)
        assert (second["generation"], second["digest"]) == (2, first["digest"])
        with pytest.raises(GenerationMismatch):
            client.fence_pin("three", text=first["text"], expected_generation=1)
        assert client.fence_get()["generation"] == 2
        history = client.call("org.kvmneg.Fence.History")["entries"]
        assert [(row["generation"], row["reason"], row["uid"]) for row in history] == [
            (2, "two", os.geteuid()),
            (1, "one", os.geteuid()),
        ]


def test_unpin_counts_on(daemon: Daemon) -> None:
    with daemon.client() as client:
        with pytest.raises(NotPinned):
            client.fence_unpin("nothing there")
        client.fence_pin("one", source="host")
        assert client.fence_unpin("done")["generation"] == 2
        assert client.fence_get()["pinned"] is False
        assert client.fence_pin("again", source="host")["generation"] == 3


def test_a_wrong_fence_changes_nothing(daemon: Daemon) -> None:
    with daemon.client() as client:
        with pytest.raises(BadInput, match=r"fence:2: .*no word of the catalogue"):
            client.fence_pin("edited", text="architecture x86_64\ncpuid:0x7.0.exx 0b1\n")
        with pytest.raises(UsageError):
            client.fence_pin("both", source="host", text="architecture x86_64\n")
        with pytest.raises(UsageError, match="reason"):
            client.fence_pin("  ", source="host")
        with pytest.raises(LimitExceeded):
            client.fence_pin("x" * (limits.REASON_CHARACTERS + 1), source="host")
        with pytest.raises(LimitExceeded):
            client.call("org.kvmneg.Fence.History", {"limit": limits.HISTORY_ROWS + 1})
        assert client.fence_get()["generation"] == 0


def test_a_fence_above_the_host_is_refused_with_each_feature(daemon: Daemon) -> None:
    with daemon.client() as client:
        bits = "_".join(["0000"] * 7 + ["0001"])
        words = client.negotiate({"max": True})["contract"]["words"]
        assert not int(words["cpuid:0x40000001.0.edx"], 16) & 1  # a hint no host offers
        above = "architecture x86_64\ncpuid:0xc0000001.0.edx 0b" + bits.replace("0001", "0100") + "\n"
        with pytest.raises(Blocked) as caught:
            client.fence_pin("too much", text=above)
        assert [(b.word, b.bit) for b in caught.value.blockers] == [("cpuid:0xc0000001.0.edx", 2)]


def test_a_contract_from_offer_to_end(daemon: Daemon) -> None:
    with daemon.client() as client:
        offer = client.negotiate(V2)
        assert any(line.startswith("not judged: ") for line in offer["scope"])
        assert client.get_contract(offer["digest"])["state"] == "offered"
        assert not list(daemon.contracts.iterdir())
        granted = client.begin(offer["digest"], VM)
        assert client.begin(offer["digest"], VM.upper())["path"] == granted["path"]  # a reply may get lost
        path = Path(granted["path"])
        assert path.name == offer["digest"].removeprefix("sha256:")
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
        contract = Contract.from_binary(path.read_bytes())
        assert contract.digest == offer["digest"]
        assert contract.to_json()["words"] == offer["contract"]["words"]
        client.started(VM)
        assert client.check(digest=offer["digest"]) == {**client.check(digest=offer["digest"]), "fits": True}
        client.end(VM)
        assert not path.exists()
        assert client.get_contract(offer["digest"])["state"] != "granted"
        with pytest.raises(UsageError, match="holds no contract"):
            client.started(VM)


def test_begin_needs_an_offer_of_this_generation(daemon: Daemon) -> None:
    with daemon.client() as client:
        offer = client.negotiate(V2)
        client.fence_pin("meanwhile", source="host")
        with pytest.raises(StaleOffer):
            client.begin(offer["digest"], VM)
        with pytest.raises(NoSuchContract):
            client.begin("sha256:" + "0" * 64, VM)
        with pytest.raises(UsageError, match="no digest"):
            client.begin("latest", VM)
        with pytest.raises(UsageError, match="no UUID"):
            client.begin(offer["digest"], "my-vm")
        again = client.negotiate(V2)
        assert again["digest"] != offer["digest"]  # it names the fence it was made under
        client.begin(again["digest"], VM)
        with pytest.raises(UsageError, match="already"):
            client.begin(client.negotiate({"max": True})["digest"], VM)


def test_check_stores_nothing(daemon: Daemon) -> None:
    with daemon.client() as client:
        assert client.check(V2)["fits"] is True
        refused = client.check({"level": "x86-64-v4"})
        assert refused["fits"] is False
        assert "avx512f" in {blocker["feature"] for blocker in refused["blockers"]}
        with pytest.raises(UsageError):
            client.check()
        with pytest.raises(UsageError):
            client.check(V2, digest="sha256:" + "0" * 64)
        assert client.call("org.kvmneg.Fence.History") == {"entries": []}
    assert not list(daemon.contracts.iterdir())


def test_only_admins_pin(daemon: Daemon) -> None:
    refused = as_user(65534, daemon, "org.kvmneg.Fence.Pin", {"from": "host", "reason": "mine"})
    assert refused == {"error": "NotPermitted"}
    assert as_user(65534, daemon, "org.kvmneg.Fence.Unpin", {"reason": "mine"}) == {"error": "NotPermitted"}
    assert as_user(65534, daemon, "org.kvmneg.Fence.Get", {})["generation"] == 0


def test_a_grant_is_its_users(daemon: Daemon) -> None:
    offer = as_user(65534, daemon, "org.kvmneg.Negotiate", {"request": V2})
    as_user(65534, daemon, "org.kvmneg.Begin", {"digest": offer["digest"], "vm": VM})
    assert as_user(65533, daemon, "org.kvmneg.End", {"vm": VM}) == {"error": "NotPermitted"}
    assert as_user(65533, daemon, "org.kvmneg.Started", {"vm": VM}) == {"error": "NotPermitted"}
    assert as_user(65534, daemon, "org.kvmneg.Started", {"vm": VM}) == {}
    with daemon.client() as admin:
        admin.end(VM)


def test_a_restart_keeps_fence_and_contracts(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    with daemon.client() as client:
        pinned = client.fence_pin("kept", source="level:x86-64-v2")
        path = Path(client.begin(client.negotiate(V2)["digest"], VM)["path"])
    assert daemon.end(signal.SIGKILL) == -signal.SIGKILL
    content = path.read_bytes()
    path.unlink()  # a reboot empties /run
    (daemon.contracts / ("0" * 64)).write_bytes(b"left over")
    daemon.start()
    with daemon.client() as client:
        assert client.fence_get()["digest"] == pinned["digest"]
        assert path.read_bytes() == content
        assert [one.name for one in daemon.contracts.iterdir()] == [path.name]
        assert client.negotiate(V2)["generation"] == 1


def test_two_daemons(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    first = make_daemon().start()
    same_state = [*first.command()[:-6], "--socket", str(tmp_path / "other"), *first.command()[-4:]]
    done = subprocess.run(same_state, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == StoreError.exit_code
    assert first.process is not None
    assert str(first.process.pid) in done.stderr
    done = subprocess.run(first.command(), capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == StoreError.exit_code
    assert "another kvmnegd" in done.stderr
    with first.client() as client:
        assert client.get_host()["state"] == "floating"


def test_a_socket_that_was_left_behind_is_no_obstacle(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon().start()
    daemon.end(signal.SIGKILL)
    assert Path(daemon.socket).exists()
    daemon.start()
    assert daemon.end() == 0
    assert not Path(daemon.socket).exists()


def test_sigterm_ends_after_the_reply(make_daemon: Callable[..., Daemon]) -> None:
    """A pin that was sent before the signal is either done and answered, or not done."""
    daemon = make_daemon().start()
    answered: list[dict[str, Any] | KvmnegError] = []

    def pin() -> None:
        try:
            with daemon.client() as client:
                answered.append(client.fence_pin("now", source="host"))
        except KvmnegError as error:
            answered.append(error)

    thread = threading.Thread(target=pin)
    thread.start()
    assert daemon.end() == 0
    thread.join(20)
    daemon.start()
    with daemon.client() as client:
        generation = client.fence_get()["generation"]
    assert generation == 1 if isinstance(answered[0], dict) else generation in (0, 1)


def test_sigkill_while_pinning_and_granting_leaves_the_old_or_the_new_state(
    make_daemon: Callable[..., Daemon], pytestconfig: pytest.Config
) -> None:
    """Of the 50 kills (1000 with --long) these take longest; the others are the store's (tests/hostile)."""
    daemon = make_daemon()
    acknowledged = 0
    granted: dict[str, str] = {}  # VM → the name of its contract's file
    for round_ in range(300 if pytestconfig.getoption("long") else 15):
        daemon.start()
        assert set(granted.values()) <= {path.name for path in daemon.contracts.iterdir()}
        with daemon.client() as client:
            before = client.fence_get()
            assert before["generation"] in (acknowledged, acknowledged + 1)
            # one that is waited for: on a busy machine none might come before the kill
            acknowledged = client.fence_pin("first", source="host")["generation"]
            killer = threading.Timer(0.01 + 0.007 * (round_ % 20), daemon.end, (signal.SIGKILL,))
            killer.start()
            try:
                for number in range(10_000):
                    source = "host" if number % 2 else "level:x86-64-v2"
                    acknowledged = client.fence_pin("again", source=source)["generation"]
                    offer = client.negotiate({"level": "x86-64-v1"})["digest"]
                    vm = f"{round_:08x}-0000-4000-8000-{number:012x}"
                    granted[vm] = os.path.basename(client.begin(offer, vm)["path"])
                    while len(granted) > 2:
                        vm = min(granted)
                        del granted[vm]  # from here on it may be gone
                        client.end(vm)
            except Unreachable:
                pass
            killer.join()
    daemon.start()
    with daemon.client() as client:
        assert client.fence_get()["generation"] in (acknowledged, acknowledged + 1)
        assert client.fence_get()["state"] == "pinned"


def test_a_full_disk_while_pinning(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Nothing changes, the caller is told, others are served, and with room again it works."""
    small = tmp_path / "small"
    small.mkdir()
    wrapped = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    mount = f'mount -t tmpfs -o size=512k none {small} && exec "$@"'
    probe = subprocess.run([*wrapped, f"mount -t tmpfs none {small}"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this user may not mount a tmpfs of its own")
    daemon = make_daemon()
    daemon.state = str(small / "state")
    daemon.start(*wrapped, mount, "sh")
    assert daemon.process is not None
    inside = Path(f"/proc/{daemon.process.pid}/root{small}")
    with daemon.client() as client, daemon.client() as other:
        pinned = client.fence_pin("while there is room", source="host")
        filler = inside / "filler"
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(StoreError):
            for _ in range(1000):  # what SQLite had allocated already is used up first
                client.fence_pin("no room", source="level:x86-64-v2")
                pinned = client.fence_get()
        assert other.fence_get()["digest"] == pinned["digest"]
        assert other.negotiate({"max": True})["generation"] == pinned["generation"]
        filler.unlink()
        assert (
            client.fence_pin("room again", source="level:x86-64-v1")["generation"] == pinned["generation"] + 1
        )


def test_a_damaged_report_file_is_refused(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"format": "kvmneg.report/2"}')
    done = subprocess.run(
        make_daemon("--report", str(bad)).command(), capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == BadInput.exit_code
    assert "newer kvmneg" in done.stderr


def test_without_kvm_it_stays_up_and_says_why(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = make_daemon("--kvm", str(tmp_path / "no-kvm")).start()
    with daemon.client() as client:
        with pytest.raises(KvmnegError) as caught:
            client.negotiate(V2)
        assert caught.value.exit_code == 3
        assert client.fence_get()["state"] == "unmeasured"
        assert next(client.watch())["hostDigest"] is None
    assert "no-kvm" in daemon.errors.read_text()


@pytest.mark.kvm
def test_a_real_kvm(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--kvm", "/dev/kvm").start()
    with daemon.client() as client:
        host = client.get_host()
        assert host["host"]["measured"]["source"] == "kvm"
        client.fence_pin("this host as it is", source="host")
        offer = client.negotiate({"max": True})
        assert client.begin(offer["digest"], OTHER_VM)["generation"] == 1
        assert client.check(digest=offer["digest"])["fits"]


def test_socket_activation(make_daemon: Callable[..., Daemon]) -> None:
    """An inherited listener is served and outlives the daemon: it is the service manager's."""
    daemon = make_daemon()
    path = Path(daemon.socket)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        os.set_inheritable(listener.fileno(), True)
        command = [
            sys.executable,
            "-P",
            "-m",
            "kvmneg.service.daemon",
            "--state",
            daemon.state,
            *daemon.options,
        ]
        shell = f'exec 3<&{listener.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
        daemon.process = subprocess.Popen(
            ["/bin/bash", "-c", shell, "bash", *command], pass_fds=(listener.fileno(),)
        )
        with daemon.client() as client:
            assert client.get_host()["state"] == "floating"
        assert daemon.end() == 0
        assert path.exists()
        daemon.process = subprocess.Popen(
            ["/bin/bash", "-c", shell, "bash", *command], pass_fds=(listener.fileno(),)
        )
        with daemon.client() as client:
            assert client.get_host()["state"] == "floating"


def test_notifies_systemd(
    make_daemon: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY=1 only after the first measurement, STATUS with the generation, WATCHDOG, STOPPING."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        daemon = make_daemon().start()
        seen = [manager.recv(4096).decode()]
        assert "READY=1" in seen[0]
        assert "STATUS=floating, generation 0" in seen[0]
        with daemon.client() as client:
            client.fence_pin("told", source="host")
        while not ({"WATCHDOG=1"} <= set(seen) and any("generation 1" in text for text in seen)):
            seen.append(manager.recv(4096).decode())
        daemon.end()
        while seen[-1] != "STOPPING=1":
            seen.append(manager.recv(4096).decode())


@pytest.mark.kvm
def test_vmm_builds_are_found_and_never_waited_for(
    make_daemon: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VMM that takes its time to say its version does not hold up the first answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    vmm = folder / "firecracker"
    vmm.write_text("#!/bin/sh\nsleep 1\necho Firecracker v9.8.7\n")
    vmm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    daemon = make_daemon("--kvm", "/dev/kvm").start()
    with daemon.client() as client, daemon.client() as watching:
        known = client.get_host()["host"]["combo"].get("vmms", [])
        assert "9.8.7" not in {build["version"] for build in known}
        events = watching.watch()
        while "9.8.7" not in {
            build["version"] for build in client.get_host()["host"]["combo"].get("vmms", [])
        }:
            next(events)


@pytest.mark.kvm
def test_a_vmm_that_is_upgraded_under_the_daemon_is_another_one(
    make_daemon: Callable[..., Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its old version is forgotten at once, and the new one is looked up: nobody restarts the daemon for it."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(version: str) -> None:
        new = folder / ".new"
        new.write_text(f"#!/bin/sh\necho Firecracker v{version}\n")
        new.chmod(0o755)
        new.rename(folder / "firecracker")

    def versions(client: Client) -> set[str]:
        return {
            build["version"]
            for build in client.get_host()["host"]["combo"].get("vmms", [])
            if build["path"] == str(folder / "firecracker")
        }

    install("9.8.7")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    daemon = make_daemon("--kvm", "/dev/kvm").start()
    with daemon.client() as client, daemon.client() as watching:
        events = watching.watch()
        while versions(client) != {"9.8.7"}:
            next(events)
        offer = client.negotiate({"level": "x86-64-v1"})
        install("9.9.0")
        client.begin(offer["digest"], "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e")  # it always looks
        seen = [versions(client)]
        while seen[-1] != {"9.9.0"}:
            next(events)
            seen.append(versions(client))
    assert {"9.8.7"} not in seen
