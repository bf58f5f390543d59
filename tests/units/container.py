# SPDX-License-Identifier: LGPL-2.1-or-later
"""A container with a systemd of its own, made with unshare(1) alone: it boots in a second and ends with its test.

Its root is an overlay: a suite's tree, the project over it, and a tmpfs for what it writes. All its mounts are in a
mount namespace of its own, all its processes in a pid namespace: when the one that started it goes, nothing is left but
an empty cgroup, which `end` removes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from . import trees

BOOT_SECONDS = 60.0
SECONDS = 60.0  # for anything that is done inside

# $1 the lower folders, $2 an empty folder, $3 the cgroup to be in, $4 "without-kvm" or "", $5 the unit that is its bus
# in the place of dbus-daemon's, or ""
_START = r"""
set -eu
echo $$ >"$3/cgroup.procs"
exec unshare --pid --fork --kill-child --mount --cgroup --uts --ipc --net --propagation private sh -euc '
mount -t tmpfs -o mode=755 tmpfs "$2"
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
cd "$2/root"
mount -t proc proc proc
# read-only: its systemd must not make this machine udev events
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm dev/net
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty dev
[ "$3" = without-kvm ] || [ ! -e /dev/kvm ] || {
    # a copy: who owns the real one is not ours to say
    cp -a /dev/kvm dev/kvm
    chroot . chgrp kvm dev/kvm
    chmod 0660 dev/kvm
}
[ ! -e /dev/net/tun ] || { cp -a /dev/net/tun dev/net; chmod 0666 dev/net/tun; }
[ -z "$4" ] || ln -s "/usr/lib/systemd/system/$4.service" etc/systemd/system/dbus.service
mkdir -p old
pivot_root . old
umount -l old
mount --make-rshared /
hostname kvmneg-test
exec env -i container=unshare PATH=/usr/sbin:/usr/bin /usr/lib/systemd/systemd --system --log-level=info
' sh "$1" "$2" "$4" "$5"
"""


class Broken(Exception):
    """The container did not do what it must; what it said."""


class Container:
    """One container, booted when made. A context manager. Raises Broken, and what kvmneg's trees raise."""

    def __init__(self, suite: str, folder: Path, *, kvm: bool = True, lower: str = "", bus: str = "") -> None:
        """`lower`: the folders that it sees, the upper one first; without any the project in its suite's tree."""
        self.suite = suite
        lower = lower or f"{trees.layer(suite)}:{trees.tree(suite)}"
        empty = folder / "container"
        empty.mkdir()
        self._console = folder / "console"
        self._cgroup = cgroup2() / f"kvmneg-test-{os.getpid()}-{time.monotonic_ns()}"
        self._cgroup.mkdir()
        chosen = ["" if kvm else "without-kvm", bus]
        words = ["sh", "-c", _START, "sh", lower, str(empty), str(self._cgroup), *chosen]
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        try:
            self.pid = self._wait_for_init()
            self._wait_for_boot()
        except BaseException:
            self.end()
            raise

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def root(self) -> Path:
        """Its root as this system sees it."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def socket(self) -> str:
        """kvmnegd's socket, for clients outside; to the daemon these are processes of no number."""
        return f"{self.root}/run/kvmneg/org.kvmneg"

    def _wait_for_init(self) -> int:
        """The number of its systemd out here."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            for word in children.read_text().split():
                if Path(f"/proc/{word}/exe").resolve().name == "systemd":
                    return int(word)
            time.sleep(0.01)
        raise Broken(f"no systemd came up: {self.console()}")

    def _wait_for_boot(self) -> None:
        end = time.monotonic() + BOOT_SECONDS
        state = ""
        while time.monotonic() < end and self._process.poll() is None:
            state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
            if state in ("running", "degraded"):
                return
            time.sleep(0.05)
        raise Broken(f"it did not boot, it is {state!r}: {self.console()}")

    def run(
        self,
        *words: str,
        user: str = "",
        given: str | None = None,
        check: bool = True,
        seconds: float = SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside, as root or a user of its. Raises Broken where it fails and that is not expected."""
        done = subprocess.run(
            self.entered(*words, user=user), input=given, stdin=None if given is not None else subprocess.DEVNULL,
            capture_output=True, text=True, timeout=seconds, check=False,
        )  # fmt: skip
        if check and done.returncode:
            raise Broken(f"{' '.join(words)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def start(self, *words: str, user: str = "") -> subprocess.Popen[str]:
        """Start a program inside that goes on; its standard input and output are pipes. The caller ends it."""
        return subprocess.Popen(
            self.entered(*words, user=user), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def entered(self, *words: str, user: str = "") -> list[str]:
        """The words that run a program inside."""
        enter = ["nsenter", "-t", str(self.pid), "-p", "-m", "-C", "-u", "-i", "-n", "-r", "-w"]
        become = ["runuser", "-u", user, "--"] if user else []
        return [*enter, "env", "-i", "PATH=/usr/sbin:/usr/bin", "LC_ALL=C.UTF-8", *become, *words]

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Properties of a unit (systemctl show)."""
        text = self.run("systemctl", "show", *(f"--property={name}" for name in names), unit).stdout
        return dict(line.partition("=")[::2] for line in text.splitlines())

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit", unit).stdout

    def console(self) -> str:
        return self._console.read_text("utf-8", "replace")[-4000:]

    def end(self) -> None:
        """Kill it. Whatever was mounted goes with its last process."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)  # unshare(1)'s --kill-child: its systemd dies with it
        self._process.wait(SECONDS)
        end = time.monotonic() + SECONDS
        while True:
            try:
                _remove(self._cgroup)
                return
            except OSError:  # its last processes are being killed
                if time.monotonic() >= end:
                    raise
                time.sleep(0.02)


def cgroup2() -> Path:
    """Where this system's unified hierarchy is mounted. Raises Broken."""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise Broken("no cgroup2 is mounted here")


def _remove(cgroup: Path) -> None:
    for folder, names, _ in os.walk(cgroup, topdown=False):
        for name in names:
            os.rmdir(os.path.join(folder, name))
    if cgroup.exists():
        cgroup.rmdir()
