# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host does by itself is seen and measured: uevents as kernels send them, files, and trees that change."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits
from kvmneg.errors import NoKvm
from kvmneg.features.report import Report
from kvmneg.host import software, uevents
from kvmneg.host.guests import Events
from kvmneg.host.inotify import CREATE, Inotify
from kvmneg.host.software import Roots
from kvmneg.host.uevents import Uevents, concerns
from kvmneg.host.volatile import Volatile
from kvmneg.policy import combos
from kvmneg.service.watching import changes, watch
from kvmneg.service.watching.again import Again
from kvmneg.service.watching.watch import Watcher
from tests.namespaces import unshare

from .test_again import Apart, InTree, Turning, end, lose, offers, watches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmneg.service.node import Node

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def message(action: str, path: str, subsystem: str, **values: str) -> bytes:
    """As lib/kobject_uevent.c puts it together."""
    first = {"ACTION": action, "DEVPATH": path, "SUBSYSTEM": subsystem}
    fields = {**first, **values, "SEQNUM": "4711"}
    return "\0".join(
        (f"{action}@{path}", *(f"{name}={value}" for name, value in fields.items()), "")
    ).encode()


MODULE = message("add", "/module/kvm_amd", "module")
KVM = message("add", "/devices/virtual/misc/kvm", "misc", MAJOR="10", MINOR="232", DEVNAME="kvm")
CREATED = message(
    "change", "/devices/virtual/misc/kvm", "misc", CREATED="7", COUNT="2", EVENT="create", PID="1",
    STATS_PATH="/kvm/1-5", MAJOR="10", MINOR="232", DEVNAME="kvm",
)  # fmt: skip
OFFLINE = message("offline", "/devices/system/cpu/cpu1", "cpu", DRIVER="processor", MODALIAS="cpu:type:x86")
CONCERN = {
    "loaded": MODULE,
    "unloaded": message("remove", "/module/kvm_intel", "module"),
    "CPU off": OFFLINE,
    "CPU on": message("online", "/devices/system/cpu/cpu1", "cpu"),
    "KVM": KVM,
    "KVM gone": message("remove", "/devices/virtual/misc/kvm", "misc", DEVNAME="kvm"),
    "tun": message("add", "/devices/virtual/misc/tun", "misc", DEVNAME="net/tun"),
    "vhost": message("add", "/devices/virtual/misc/vhost-net", "misc", DEVNAME="vhost-net"),
}
NO_CONCERN = {
    "VM": CREATED,
    "container": message("add", "/devices/virtual/net/veth0", "net", INTERFACE="veth0", IFINDEX="7"),
    "loop": message("change", "/devices/virtual/block/loop0", "block", DEVNAME="loop0"),
    "other": message("add", "/devices/virtual/misc/fuse", "misc", DEVNAME="fuse"),
    "named so": message("add", "/devices/virtual/net/module", "net", X="add@/module/kvm"),
    "thermal": message("change", "/devices/system/cpu/cpu1", "cpu"),
    "empty": b"",
    "udev": b"libudev\0\xfe\xed\xca\xfe/module/",
}


@pytest.fixture
def host() -> Apart:
    return Apart()


@pytest.fixture
def loop() -> Iterator[Turning]:
    found = Turning()
    yield found
    found.epoll.close()


@pytest.fixture
def apart(node: Node, host: Apart, loop: Turning, tmp_path: Path) -> Iterator[Again]:
    (tmp_path / "dev").mkdir()
    node.again = Again(loop, node, host, str(tmp_path / "dev/kvm"))
    (tmp_path / "dev/kvm").touch()
    yield node.again
    end(node.again)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where VMMs are installed."""
    found = tmp_path / "bin"
    found.mkdir()
    return found


@pytest.fixture
def watcher(node: Node, loop: Turning, apart: Again, folder: Path, tmp_path: Path) -> Watcher:
    found = Watcher(loop, node, str(tmp_path / "dev/kvm"), (str(folder), "/nowhere"))
    found.start()
    return found


def looks(host: Apart) -> list[bool]:
    """Every look at the inputs from now on."""
    found: list[bool] = []
    real = host.changed

    def count(*, fresh: bool = False) -> bool:
        found.append(fresh)
        return real(fresh=fresh)

    host.changed = count  # type: ignore[method-assign]
    return found


def settle(loop: Turning) -> None:
    loop.turn()
    loop.ahead += limits.WATCH_SETTLE_SECONDS
    loop.turn()


# -- uevents


@pytest.mark.parametrize("name", CONCERN)
def test_an_event_that_may_move_a_measurement(name: str) -> None:
    assert concerns(CONCERN[name])


@pytest.mark.parametrize("name", NO_CONCERN)
def test_an_event_that_does_not(name: str) -> None:
    assert not concerns(NO_CONCERN[name])


class Kernel:
    """The other end of a socket in the place of the kernel's netlink group: `sender` is the port of each message."""

    def __init__(self) -> None:
        self.mine, self.its = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.its.setblocking(False)
        self.sender = 0
        self.full = False

    def bind(self, address: tuple[int, int]) -> None:
        assert address == (0, 1)

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        if self.full:
            self.full = False
            raise OSError(105, "No buffer space available")
        return self.its.recv(size), (self.sender, 1)

    def fileno(self) -> int:
        return self.its.fileno()

    def close(self) -> None:
        self.mine.close()
        self.its.close()


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    found = Kernel()
    monkeypatch.setattr(uevents, "socket", SimpleNamespace(**{**vars(socket), "socket": lambda *_: found}))
    yield found
    found.close()


def test_one_reader_for_vms_and_for_the_rest(kernel: Kernel) -> None:
    events, others = Events(), []
    events.on_other = others.append
    for one in (CREATED, MODULE, OFFLINE):
        kernel.mine.send(one)
    (found,), lost = events.read()
    assert (found.kind, found.pid, found.vms, lost) == ("create", 1, 2, False)
    assert others == [MODULE, OFFLINE]


def test_only_the_kernel_is_believed(kernel: Kernel) -> None:
    kernel.mine.send(MODULE)
    kernel.sender = 4711
    assert Uevents().read() == ([], False)


def test_so_many_messages_in_one_turn(kernel: Kernel) -> None:
    reader, sent, found = Uevents(), 0, []
    kernel.mine.setblocking(False)
    while len(found) < limits.UEVENTS_PER_TURN * 2:
        try:
            kernel.mine.send(MODULE)
            sent += 1
        except BlockingIOError:  # its queue is shorter than a turn
            found += reader.read()[0]
    assert sent >= len(found)
    rest = [reader.read()[0] for _ in range(3)]
    assert max(map(len, rest)) <= limits.UEVENTS_PER_TURN


def test_a_module_that_is_loaded_is_measured_within_a_second(
    node: Node, host: Apart, loop: Turning, watcher: Watcher, kernel: Kernel
) -> None:
    node.unknown.start(loop)
    lose(host)
    kernel.mine.send(MODULE)
    settle(loop)  # which is all that is waited for
    assert node.again is not None and node.again.busy
    assert limits.WATCH_SETTLE_SECONDS < 1
    loop.until(lambda: not offers(node))


def test_events_that_come_together_are_one_look(
    host: Apart, loop: Turning, node: Node, watcher: Watcher, kernel: Kernel
) -> None:
    node.unknown.start(loop)
    found = looks(host)
    for number in range(100):
        kernel.mine.send(message("online", f"/devices/system/cpu/cpu{number}", "cpu"))
        if not number % 5:
            loop.turn()
    settle(loop)
    assert found == [True]
    kernel.mine.send(CREATED)
    settle(loop)
    assert found == [True]
    kernel.full = True  # some were lost: who knows which
    kernel.mine.send(CREATED)
    settle(loop)
    assert found == [True, True]


_IN_NAMESPACE = """
import select, sys
from pyroute2.netlink.uevent import UeventSocket
from kvmneg.host.uevents import Uevents
events, others = Uevents(), UeventSocket()
others.bind()
with open("/sys/class/net/lo/uevent", "w") as file:
    file.write("change")
assert select.select([events.fileno()], [], [], 20)[0]
messages, lost = events.read()
for message, other in zip(messages, others.get(), strict=True):
    header, *fields = message.decode().rstrip("\\0").split("\\0")
    other.pop("attrs")
    assert other.pop("header")["message"] == header
    assert other == dict(field.split("=", 1) for field in fields), (other, fields)
    print(header)
others.close()
"""


def test_the_kernel_s_own_messages() -> None:
    """In a network namespace, whose devices' events stay there; pyroute2 reads the same in them."""
    if os.geteuid():
        pytest.skip("needs root: a network namespace")
    command = [*unshare("--net", "--mount"), "sh", "-ec", 'mount -t sysfs none /sys; exec "$@"', "sh"]
    program = [sys.executable, "-P", "-c", _IN_NAMESPACE]
    done = subprocess.run([*command, *program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stderr, done.stdout) == ("", "change@/devices/virtual/net/lo\n")


# -- files


def test_a_vmm_that_is_installed_replaced_and_removed(
    host: Apart, loop: Turning, watcher: Watcher, folder: Path
) -> None:
    found = looks(host)
    (folder / "qemu.dpkg-new").touch()
    (folder / "less").touch()
    settle(loop)
    assert found == []
    (folder / "qemu.dpkg-new").rename(folder / "firecracker")
    settle(loop)
    assert found == [True]
    (folder / "firecracker").write_bytes(b"in place")
    settle(loop)
    assert len(found) == 2
    (folder / "firecracker").unlink()
    settle(loop)
    assert len(found) == 3


def test_events_of_files_that_were_lost(
    host: Apart, loop: Turning, watcher: Watcher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = looks(host)
    real = Inotify.read
    monkeypatch.setattr(Inotify, "read", lambda self: (real(self)[0], True))
    (folder / "less").touch()
    settle(loop)
    assert found == [True]


@pytest.mark.usefixtures("apart")
def test_only_so_many_folders(
    node: Node, host: Apart, loop: Turning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WATCHED_FOLDERS", 1)
    folders = [tmp_path / name for name in ("first", "second")]
    for one in folders:
        one.mkdir()
    Watcher(loop, node, str(tmp_path / "dev/kvm"), map(str, folders)).start()
    found = looks(host)
    (folders[1] / "firecracker").touch()
    settle(loop)
    assert found == []
    (folders[0] / "firecracker").touch()
    settle(loop)
    assert found == [True]


def test_events_of_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INOTIFY_BYTES", 512)
    watched = Inotify()
    watched.add(str(tmp_path), CREATE)
    wanted = {f"file{number}" for number in range(100)}
    for name in wanted:
        (tmp_path / name).touch()
    parts = []
    while (part := watched.read()) != (set(), False):
        parts.append(part[0])
    watched.close()
    watched.close()
    assert set().union(*parts) == wanted
    assert len(parts) > 3 and max(map(len, parts)) <= 512 // 32  # a header and a padded name


def test_an_odd_folder(tmp_path: Path) -> None:
    watched = Inotify()
    for odd in (tmp_path / "none", Path("/dev/null")):
        with pytest.raises(OSError, match=str(odd)):
            watched.add(str(odd), CREATE)
    watched.close()


def test_without_inotify_there_is_the_poll(
    node: Node, host: Apart, loop: Turning, apart: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Inotify:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(watch, "Inotify", refuse)
    Watcher(loop, node, "/dev/kvm").start()
    lose(host)
    node.keep_up()
    loop.until(lambda: not apart.busy)
    assert not offers(node)


def test_kvm_that_arrives(node: Node, host: Apart, loop: Turning, watcher: Watcher, tmp_path: Path) -> None:
    device = tmp_path / "dev/kvm"
    opened = len(os.listdir("/proc/self/fd"))
    device.unlink()
    host.error, host.moved = NoKvm("gone"), True
    node.refresh()
    assert node.state == "unmeasured"
    assert len(os.listdir("/proc/self/fd")) == opened + 1
    found: list[int] = []
    node.changed.append(lambda: found.append(1))
    (tmp_path / "dev/other").touch()
    settle(loop)
    assert host.marks == 1
    device.touch(0o600)  # as the kernel makes it: udev lets others in a little later
    host.error = NoKvm("may not be opened")
    settle(loop)
    loop.until(lambda: not node.again.busy)  # type: ignore[union-attr]
    assert node.state == "unmeasured"
    host.error = None
    device.chmod(0o660)
    settle(loop)
    loop.until(lambda: node.state == "floating")
    assert found and len(os.listdir("/proc/self/fd")) == opened


# -- trees

CPU = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC 7763 64-Core Processor
stepping\t: 1
microcode\t: {microcode}
flags\t\t: fpu vme de pse
"""
BEFORE = {
    "proc/cpuinfo": CPU.format(microcode="0xa0011d1"),
    "proc/cmdline": "root=/dev/sda1 ro\n",
    "proc/sys/kernel/osrelease": "6.12.43+deb13-amd64\n",
    "proc/sys/kernel/version": "#1 SMP PREEMPT_DYNAMIC Debian 6.12.43-1 (2025-08-27)\n",
    "proc/sys/kernel/hostname": "node7\n",
    "proc/sys/kernel/random/boot_id": "3d6f0a3c-0000-4000-8000-000000000001\n",
    "sys/class/dmi/id/bios_vendor": "Dell Inc.\n",
    "sys/class/dmi/id/bios_version": "2.6.6\n",
    "sys/class/dmi/id/bios_date": "01/13/2022\n",
    "sys/devices/system/cpu/smt/control": "on\n",
    "sys/devices/system/cpu/smt/active": "1\n",
    "sys/devices/system/cpu/present": "0-1\n",
    "sys/devices/system/cpu/online": "0-1\n",
    "sys/devices/system/cpu/cpu0/microcode/version": "0xa0011d1\n",
    "sys/kernel/security/lockdown": "[none] integrity confidentiality\n",
    "sys/module/kvm/initstate": "live\n",
    "sys/module/kvm/parameters/ignore_msrs": "N\n",
    "sys/module/kvm_amd/initstate": "live\n",
    "sys/module/kvm_amd/parameters/nested": "1\n",
    "dev/kvm": "",
}
# what a kernel's files say afterwards, and the dimensions of the combo that are another's
CHANGES: dict[str, tuple[dict[str, str], set[str]]] = {
    # echo 1 > /sys/devices/system/cpu/microcode/reload
    "late microcode": (
        {
            "proc/cpuinfo": CPU.format(microcode="0xa0011d5"),
            "sys/devices/system/cpu/cpu0/microcode/version": "0xa0011d5\n",
        },
        {"microcode", "cpus.0.microcode"},
    ),
    # a firmware update is another boot
    "BIOS": (
        {
            "sys/class/dmi/id/bios_version": "2.17.2\n",
            "sys/class/dmi/id/bios_date": "11/08/2024\n",
            "proc/sys/kernel/random/boot_id": "3d6f0a3c-0000-4000-8000-000000000002\n",
        },
        {"bios"},
    ),
    # echo integrity > /sys/kernel/security/lockdown
    "lockdown": ({"sys/kernel/security/lockdown": "none [integrity] confidentiality\n"}, {"lockdown"}),
    "SMT off": (
        {
            "sys/devices/system/cpu/smt/control": "off\n",
            "sys/devices/system/cpu/smt/active": "0\n",
            "sys/devices/system/cpu/online": "0\n",
        },
        {"smt"},
    ),
    "parameter": ({"sys/module/kvm/parameters/ignore_msrs": "Y\n"}, {"modules.kvm.ignore_msrs"}),
}


class Tree(Apart):
    """A host whose inputs and combo are read from a tree."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.put(BEFORE)
        self.roots = Roots(str(root / "sys"), str(root / "proc"), str(root / "dev"))
        self.inputs = Volatile(f"{root}/dev/kvm", self.roots, lambda path: None)

    def put(self, *files: Any) -> None:  # type: ignore[override]
        for path, text in files[0].items():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_text(text, "utf-8")

    def mark(self) -> None:
        self.inputs.mark()

    def measure(self) -> Report:
        self.mark()
        return self.take()

    def take(self) -> Report:
        combo = software.combo((), roots=self.roots, classes=software.cpu_classes(self.roots))
        return Report.from_json({**self.document, "combo": combo})

    def doubt(self) -> None:
        self.inputs.forget()

    def changed(self, *, fresh: bool = False) -> bool:
        return self.inputs.changed(fresh=fresh)


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_without_an_event(
    what: str, tmp_path: Path, loop: Turning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by the poll, measured in a child, and told by its name."""
    from kvmneg.policy.fence_text import Fence
    from kvmneg.service.leases.contracts import ContractFiles
    from kvmneg.service.node import Node
    from kvmneg.store.sqlite import SqliteStore

    host = Tree(tmp_path / "tree")
    with SqliteStore(str(tmp_path / "state"), verify=lambda text: Fence.parse(text).digest) as store:
        node = Node(store, host, ContractFiles(str(tmp_path / "contracts")))
        node.again = Again(loop, node, host, f"{tmp_path}/tree/dev/kvm")
        before = node.report
        loop.every(limits.WATCH_POLL_SECONDS, node.keep_up)
        files, dimensions = CHANGES[what]
        host.put(files)
        loop.turn()
        assert node.report is before
        loop.ahead += limits.WATCH_POLL_SECONDS
        # a look that is younger than VOLATILE_SECONDS is not taken again
        monkeypatch.setattr(host.inputs, "_looked", host.inputs._looked - limits.WATCH_POLL_SECONDS)
        loop.until(lambda: node.report is not before)
        names = {one.name for one in combos.between(before.combo, node.report.combo)}
        assert names == dimensions
        (line,) = changes.told(before, node.report)
        assert all(name in line for name in dimensions)
        assert ("another boot" in line) == (what == "BIOS")


# -- a whole daemon


@pytest.fixture
def in_tree(tmp_path: Path) -> Iterator[InTree]:
    daemon = InTree(tmp_path)
    yield daemon
    if daemon.process is not None:
        daemon.end(signal.SIGKILL)


def test_a_daemon_without_kvm_measures_when_it_arrives(in_tree: InTree) -> None:
    device = in_tree.folder / "dev/kvm"
    device.unlink()
    in_tree.start()
    with in_tree.client() as client, in_tree.client() as watching:
        events = watching.watch()
        assert next(events)["state"] == "unmeasured"
        with pytest.raises(NoKvm, match="there is no /dev/kvm"):
            client.get_host()
        watches(in_tree)
        device.touch()
        assert next(events)["state"] == "floating"
        assert client.negotiate({"max": True})["generation"] == 0
    in_tree.end()
    told = in_tree.errors.read_text()
    assert told.index("there is no /dev/kvm") < told.index("this host is measured again")
