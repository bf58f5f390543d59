# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tool itself: archives that others can read, one maker of each file, and hosts that fail or hang."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.hosts import cache, catalogue, conftest, cpio, inside, kernel, start, test_moves, test_moves_arm64
from tests.hosts.errors import HostError
from tests.hosts.job import Collector, Job, parse
from tests.hosts.machine import Machine, arguments
from tests.hosts.test_rollback_experiment import N1
from tests.packages.errors import Unreachable
from tests.packages.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Iterator

ARM64, AMD = "arm64-6.12", "amd-6.12"
# Linux allocates for each pipe, and is interrupted more than a thousand times a second.
PIPES = b"""
import os, signal, sys, time
signal.signal(signal.SIGALRM, lambda number, frame: None)
signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
ends = time.monotonic() + float(sys.argv[1])
while time.monotonic() < ends:
    for end in os.pipe():
        os.close(end)
signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_every_host_has_a_name_of_its_own() -> None:
    names = [host.name for host in catalogue.hosts()]
    assert len(set(names)) == len(names)
    assert [catalogue.find(name).name for name in names] == names
    assert catalogue.find(ARM64, "neoverse-n1").cpu == "neoverse-n1"
    with pytest.raises(HostError, match=r"no host amd-2\.6; there are: .*amd-6\.12"):
        catalogue.find("amd-2.6")


def test_the_few_are_all_that_a_run_needs() -> None:
    """What `make test` builds before: a first boot within a test would count to the test's time."""
    cpu, *lines = test_moves_arm64.FEW
    needed = {*conftest.FEW, ARM64, AMD, test_moves.FEW, *(f"arm64-{line}:{cpu}" for line in lines)}
    needed |= {f"arm64-{line}:{N1[0].cpu}" for line in (N1[0].newer, N1[0].older)}
    assert needed == set(catalogue.FEW)


def test_an_archive_is_what_tar_reads(tmp_path: Path) -> None:
    """Folders first, links and modes kept, two archives joined are one: as libarchive or GNU cpio see it."""
    members = [
        cpio.Member("usr/bin/true", cpio.PROGRAM, b"#!/bin/sh\n"),
        cpio.Member("bin", cpio.LINK, b"usr/bin"),
        cpio.Member("etc/odd", cpio.DATA, b"abc"),
    ]
    data = cpio.archive(members)
    found = {name: (mode, content) for name, mode, content in read_newc(data)}
    assert list(found)[:3] == ["usr", "usr/bin", "usr/bin/true"]
    assert found["usr"] == (0o040755, b"")
    assert found["usr/bin/true"] == (0o100755, b"#!/bin/sh\n")
    assert found["bin"] == (0o120777, b"usr/bin")
    joined = tmp_path / "joined"
    with open(joined, "wb") as target:
        cpio.join(target, [b"abc", data])
    assert joined.read_bytes()[4:] == data


def read_newc(data: bytes) -> Iterator[tuple[str, int, bytes]]:
    """An independent reader, by buffer-format.rst: eight hexadecimal digits a field, names and data aligned to 4."""
    at = 0
    while True:
        fields = struct.unpack_from("6s" + "8s" * 13, data, at)
        assert fields[0] == b"070701"
        mode, size, name_size = (int(fields[place], 16) for place in (2, 7, 12))
        name = data[at + 110 : at + 110 + name_size].rstrip(b"\0").decode()
        start_of_data = (at + 110 + name_size + 3) & ~3
        if name == "TRAILER!!!":
            return
        yield name, mode, data[start_of_data : start_of_data + size]
        at = (start_of_data + size + 3) & ~3


def test_modules_load_in_order(tmp_path: Path) -> None:
    """A module comes after those that its .modinfo names; what a kernel lacks is left out."""
    folder = tmp_path / "usr/lib/modules/6.1"
    folder.mkdir(parents=True)
    (folder / "virtio_console.ko").write_bytes(b"\0license=GPL\0depends=virtio,virtio_ring\0")
    (folder / "virtio.ko").write_bytes(b"\0depends=virtio_ring\0")
    (folder / "virtio_ring.ko").write_bytes(b"\0depends=\0")
    (folder / "kvm-intel.ko").write_bytes(b"\0depends=kvm\0")
    tree = Tree(tmp_path, "linux-image", "6.1", "bookworm", "amd64", True, [])
    found = kernel.Kernel(tmp_path, [tree], "6.1", "6.1").modules("qemu")
    names = [name for name, mode, _ in read_newc(found) if mode == cpio.DATA]
    assert [name.partition("-")[2] for name in names] == ["virtio_ring.ko", "virtio.ko", "virtio_console.ko"]


def test_a_file_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many at a time, one maker; half a file is never seen; the oldest of a kind go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    makers: list[str] = []

    def make(path: Path) -> None:
        makers.append(path.name)
        path.write_bytes(b"x" * 100_000)

    threads = [threading.Thread(target=cache.made, args=("thing", "one", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1
    for key in ("two", "three"):
        assert cache.made("thing", key, make).stat().st_size == 100_000
    kept = sorted(path.name for path in cache.directory().glob("thing.*"))
    assert kept == ["thing.lock", "thing.three", "thing.two"]


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def make(path: Path) -> None:
        path.write_bytes(b"half")
        raise HostError("build", "no")

    with pytest.raises(HostError, match="build: no"):
        cache.made("thing", "one", make)
    assert [path.name for path in cache.directory().iterdir()] == ["thing.lock"]


def test_messages_are_found_between_other_words() -> None:
    packed = b64encode(zlib.compress(b"hello"))
    assert parse(b"[ 1.2] usb 1-1: reset=kvmneg= out " + packed + b"\r\n") == ("out", b"hello")
    assert parse(b"=kvmneg= out not/base64 at all") is None
    assert parse(b"login: ") is None


def test_results_are_put_together() -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        member = tarfile.TarInfo("./sub/file")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"ab"))
    heard: list[tuple[str, bytes]] = []
    collector = Collector({"release": "6"}, lambda kind, data: heard.append((kind, data)))
    for message in (("out", b"a"), ("err", b"b"), ("out", b"c"), ("file", archive.getvalue())):
        collector.take(*message)
    assert collector.result is None
    collector.take("end", b'{"status": 3}')
    assert collector.result is not None
    assert collector.result[:4] == (3, b"ac", b"b", {"sub/file": b"ab"})
    assert heard == [("out", b"a"), ("err", b"b"), ("out", b"c")]


@pytest.fixture(scope="module")
def arm64() -> Iterator[start.Built]:
    if not shutil.which("qemu-system-aarch64"):
        pytest.skip("qemu-system-aarch64 is not installed")
    try:
        yield start.Built(catalogue.find(ARM64))
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")


@pytest.fixture
def machine(arm64: start.Built) -> Iterator[Machine]:
    with start.restored(arm64) as found:
        yield found


@pytest.mark.hosts
def test_a_job_and_the_next(machine: Machine) -> None:
    """Arguments, environment and files go in; status, both streams and files come out; nothing of it stays."""
    script = b'echo "$1 $WORD"; echo oops >&2; cp data out/copy; exit 7'
    job = Job(["sh", "script", "a b"], {"script": script, "data": bytes(range(256)) * 4000}, {"WORD": "w"})
    result = machine.run(job)
    assert result[:4] == (7, b"a b w\n", b"oops\n", {"copy": bytes(range(256)) * 4000})
    assert machine.run(Job(["ls"])).stdout == b"job.json\nout\n"
    assert machine.run(Job(["no-such-program"])).status == 127


@pytest.mark.hosts
def test_a_job_that_does_not_end(machine: Machine) -> None:
    """It is ended at its limit, with all it started, and the host takes the next one."""
    result = machine.run(Job(["sh", "-c", "echo begun; sleep 1000 & sleep 1000"], seconds=1))
    assert (result.status, result.stdout) == (124, b"begun\n")
    assert b"sleep" not in machine.run(Job(["ps"])).stdout


@pytest.mark.hosts
def test_a_host_that_hangs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told by its step, and ended: here the agent is stopped, which no limit inside could notice."""
    monkeypatch.setattr("tests.hosts.machine.GRACE_SECONDS", 1.0)
    stop = "for p in /proc/[0-9]*; do grep -q agent.py $p/cmdline && kill -STOP ${p#/proc/}; done"
    with pytest.raises(HostError, match=r"^job: no answer within 2 s"):
        machine.run(Job(["/usr/bin/busybox", "sh", "-c", stop], seconds=1))
    with pytest.raises(HostError, match=r"^job: the host (is gone|ended)"):
        machine.run(Job(["true"]))


@pytest.mark.hosts
def test_no_host_outlasts_the_run(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a run ends sooner than a job's own limit, that counts: a later one would never be told."""
    monkeypatch.setattr(Machine, "ends", time.monotonic() + 1)
    with pytest.raises(HostError, match=r"^job: no answer within (0|1|0\.\d) s"):
        machine.run(Job(["sleep", "1000"], seconds=600))


@pytest.mark.hosts
def test_an_amd_host_that_allocates() -> None:
    """Where QEMU 7.2's CMPXCHG16B is used, this ends in a panic within six seconds."""
    try:
        built = start.Built(catalogue.find(AMD))
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")
    with start.restored(built) as amd:
        result = amd.run(Job(["python3", "pipes.py", "8"], {"pipes.py": PIPES}, seconds=60))
    assert result.status == 0, result.why()


@pytest.mark.hosts
def test_a_host_that_dies(machine: Machine) -> None:
    """The kernel's last words come along."""
    job = Job(["sh", "-c", "echo 8 >/proc/sys/kernel/printk; echo c >/proc/sysrq-trigger"])
    with pytest.raises(HostError, match=r"(?s)^job: the host ended.*sysrq triggered crash"):
        machine.run(job)


@pytest.mark.hosts
def test_a_kernel_that_panics_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than once: what a test does to a kernel it does each time."""
    crash = b"def test_crash():\n    open('/proc/sysrq-trigger', 'w').write('c')\n"
    restored, tries = start.restored, []
    monkeypatch.setattr(start, "restored", lambda built: (tries.append(built), restored(built))[1])
    with pytest.raises(HostError, match="Kernel panic") as caught:
        inside.run(catalogue.find(ARM64), "test_crash.py", seconds=60, extra={"test_crash.py": crash})
    assert caught.value.panicked
    assert len(tries) == 2


@pytest.mark.hosts
def test_each_restored_host_is_another_one(arm64: start.Built) -> None:
    """Side by side from one snapshot: a boot id and random numbers of their own, and today's clock."""
    job = Job(
        ["sh", "-c", "cat /proc/sys/kernel/random/boot_id; date +%s; head -c 16 /dev/urandom >out/random"]
    )
    before = os.stat(arm64.kernel.image).st_ctime
    with start.restored(arm64) as one, start.restored(arm64) as other:
        results = [one.run(job), other.run(job)]
    lines = [result.text.split() for result in results]
    assert lines[0][0] != lines[1][0]
    assert results[0].files["random"] != results[1].files["random"]
    assert all(int(line[1]) >= before for line in lines)


@pytest.mark.hosts
def test_a_kernel_that_does_not_boot(arm64: start.Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is named, with what the console last showed."""
    without_init = arguments(arm64.host, "rdinit=/nothing")
    monkeypatch.setattr("tests.hosts.machine.arguments", lambda host: without_init)
    with pytest.raises(HostError, match=r"(?s)^boot: the host ended.*Kernel panic"), start.booted(arm64):
        pass


def test_the_command_line() -> None:
    """A host that is not there is named, by exit status 125."""
    command = [sys.executable, "-m", "tests.hosts", "run", "arm64-2.6", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 125
    assert done.stderr.startswith("packages: no host arm64-2.6")
