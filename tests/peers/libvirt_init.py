# SPDX-License-Identifier: LGPL-2.1-or-later
"""PID 1 of the namespaces in which a libvirtd runs apart: `unshare … python libvirt_init.py FOLDER KVM TREE…`.

Lays the unpacked trees under a tmpfs and makes that the root, with device nodes, /proc and configuration of its
own, so that nothing libvirtd writes or chowns is the machine's; starts libvirtd; reaps what is handed to it (a
PID 1 that does not costs libvirt seconds a probe). Then each line of standard input is one virsh call of many
commands, whose output, errors in their order, is followed by a line END. The end of the input, or of this process,
is the end of all others: the kernel sees to it. Only the standard library, and programs of Debian's base.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

END = "-- end of call --"
SOCKET = "/run/libvirt/libvirt-sock"
START_SECONDS = 20.0
CALL_SECONDS = 60
_DEVICES = ("null", "zero", "full", "random", "urandom")
_DRIVERS = "usr/lib/*/libvirt/connection-driver/*.so"
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C"}
_FILES = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nlibvirt-qemu:x:64055:64055::/var/lib/libvirt:/bin/sh\n",
    "/etc/group": "root:x:0:\nkvm:x:104:\nlibvirt:x:105:\nlibvirt-qemu:x:64055:\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "/etc/libvirt/libvirtd.conf": 'auth_unix_ro = "none"\nauth_unix_rw = "none"\nunix_sock_group = "root"\n',
    "/etc/libvirt/qemu.conf": 'user = "root"\ngroup = "root"\nsecurity_driver = "none"\n',
}


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"mount {' '.join(words)}: {done.stderr.strip()}")


def _root(folder: Path, trees: list[str]) -> Path:
    """The root: a writable layer over the trees, of which the first wins."""
    _mount("-t", "tmpfs", "-o", "mode=0755", "none", str(folder))
    for name in ("upper", "work", "root"):
        (folder / name).mkdir()
    layers = f"lowerdir={':'.join(trees)},upperdir={folder}/upper,workdir={folder}/work"
    root = folder / "root"
    _mount("-t", "overlay", "-o", layers, "none", str(root))
    return root


def _mounts(root: Path, given: Path, devices: tuple[str, ...]) -> None:
    """What a root needs besides packages, and the given folder as /in."""
    for name in ("in", "dev", "proc", "sys"):
        (root / name).mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", "mode=0755", "none", str(root / "dev"))
    for name in devices:
        os.mknod(root / "dev" / name, 0o666 | stat.S_IFCHR, os.stat(f"/dev/{name}").st_rdev)
    _mount("-t", "proc", "none", str(root / "proc"))
    _mount("--bind", "/sys", str(root / "sys"))
    _mount("-o", "remount,bind,ro", str(root / "sys"))
    _mount("--bind", str(given), str(root / "in"))


def _files() -> None:
    """Configuration and folders. Only within the new root: a link to an absolute path leads no way out."""
    if os.path.isdir("/var/run") and not os.path.islink("/var/run"):
        shutil.rmtree("/var/run")
    for name in ("/run", "/tmp", "/root", "/var/lib/libvirt", "/var/cache", "/var/log"):
        os.makedirs(name, exist_ok=True)
    if not os.path.lexists("/var/run"):
        os.symlink("/run", "/var/run")
    for name, text in _FILES.items():
        Path(name).write_text(text, "utf-8")  # no codec could be loaded any more
    # the other drivers look for firewalls, udev, dnsmasq, and have nothing to say of CPUs
    for driver in Path("/").glob(_DRIVERS):
        if driver.name != "libvirt_driver_qemu.so":
            driver.unlink()


def _listens() -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(SOCKET) == 0


def _start(log: Path) -> subprocess.Popen[bytes]:
    """libvirtd, when it listens."""
    with log.open("wb") as file:
        daemon = subprocess.Popen(["/usr/sbin/libvirtd"], stdout=file, stderr=file, env=_ENVIRONMENT)
    end = time.monotonic() + START_SECONDS
    while not _listens():
        _reap(daemon)
        if daemon.returncode is not None or time.monotonic() > end:
            sys.exit(f"libvirtd does not listen: {log.read_text('utf-8', 'replace')[-2000:]}")
        time.sleep(0.02)
    return daemon


def _reap(*own: subprocess.Popen[bytes]) -> None:
    """Take the exit status of every child that has one: processes whose parents ended are ours now."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        for process in own:
            if process.pid == pid:
                process.returncode = os.waitstatus_to_exitcode(status)


def _call(text: str, daemon: subprocess.Popen[bytes]) -> None:
    virsh = subprocess.Popen(
        ["/usr/bin/virsh", "--quiet", "--connect", "qemu:///system", text],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        env=_ENVIRONMENT,
    )
    end = time.monotonic() + CALL_SECONDS
    while virsh.returncode is None:
        _reap(daemon, virsh)
        if time.monotonic() > end:
            sys.exit(f"virsh took more than {CALL_SECONDS} s")
        time.sleep(0.002)
    if daemon.returncode is not None:
        sys.exit(f"libvirtd ended with {daemon.returncode}")


def main() -> int:
    folder = Path(sys.argv[1])
    given = folder / "in"
    base = folder / "base"
    root = _root(base, sys.argv[3:])
    # a /dev/kvm that QEMU cannot use makes libvirt ask QEMU again at each call
    _mounts(root, given, (*_DEVICES, "kvm") if sys.argv[2] == "kvm" else _DEVICES)
    os.chroot(root)
    os.chdir("/")
    _files()
    daemon = _start(Path("/in/libvirtd.log"))
    for line in sys.stdin:
        _call(line.rstrip("\n"), daemon)
        sys.stdout.write(f"{END}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
