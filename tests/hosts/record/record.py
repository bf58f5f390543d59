# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records what KVM says inside an emulated AMD host.

    record.py KERNEL-PACKAGE.deb CPU-MODEL > dump.json

Boots the Debian kernel of that package (linux-image-*-cloud-amd64) under QEMU's TCG, which emulates SVM,
with init.c as its only program, and prints the raw answers as JSON. 5 seconds; needs dpkg, gcc and
qemu-system-x86, and no privilege.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
MODULES = ("irqbypass", "kvm", "ccp", "kvm-amd", "tun", "tap", "vhost_iotlb", "vhost", "vhost_net")
FOLDER, PROGRAM, DATA = 0o040755, 0o100755, 0o100644
BOOT_SECONDS = 120


def cpio(members: list[tuple[str, int, bytes]]) -> bytes:
    """An initramfs: (path, mode, content) in the "newc" format (Documentation/driver-api/early-userspace)."""
    parts = []
    for inode, (path, mode, content) in enumerate([*members, ("TRAILER!!!", 0, b"")], 1):
        name = path.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        parts += [head, bytes(-len(head) % 4), content, bytes(-len(content) % 4)]
    return b"".join(parts)


def initramfs(package: Path, work: Path) -> bytes:
    """init.c with libkvmneg, linked statically, and the modules of KVM, TUN and vhost-net."""
    init = work / "init"
    sources = [HERE / "init.c", *(CSRC / name for name in ("system.c", "x86.c", "x86-cpuid.c"))]
    subprocess.run(["gcc", "-O2", "-static", f"-I{CSRC}", "-o", init, *sources], check=True)
    members = [(folder, FOLDER, b"") for folder in ("proc", "sys", "dev", "modules")]
    members.append(("init", PROGRAM, init.read_bytes()))
    for name in MODULES:
        members += [(f"modules/{name}.ko", DATA, file.read_bytes()) for file in package.rglob(f"{name}.ko")]
    return cpio(members)


def boot(kernel: Path, initrd: Path, console: Path, model: str) -> str:
    """What the machine printed until it powered off."""
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    command += ["-serial", f"file:{console}", "-M", "q35", "-accel", "tcg", "-cpu", model, "-m", "512"]
    command += ["-kernel", str(kernel), "-initrd", str(initrd)]
    command += ["-append", "console=ttyS0 panic=-1 quiet loglevel=4"]
    subprocess.run(command, check=True, timeout=BOOT_SECONDS, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    return console.read_text("ascii", "replace").replace("\r\n", "\n")


def record(package: Path, model: str) -> dict[str, object]:
    """The dump: the host's raw answers as init.c prints them, and what it was."""
    with TemporaryDirectory() as name:
        work = Path(name)
        subprocess.run(["dpkg", "-x", package, work / "package"], check=True)
        (work / "initramfs").write_bytes(initramfs(work / "package", work))
        kernel = next((work / "package/boot").glob("vmlinuz-*"))
        text = boot(kernel, work / "initramfs", work / "console", model)
    parts = text.split("\n=====\n")
    if len(parts) != 3:
        sys.exit(f"the machine did not report:\n{text}")
    version = subprocess.run(["qemu-system-x86_64", "--version"], check=True, capture_output=True, text=True)
    made = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "package": package.name,
        "cpu": model,
        "emulator": version.stdout.splitlines()[0],
    }
    return {"made": made, **json.loads(parts[1])}


if __name__ == "__main__":
    dump = record(Path(sys.argv[1]), sys.argv[2])
    text = json.dumps(dump, indent=1)
    # a row of registers in one line: a table people can read and diff
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text)
    sys.stdout.write(text + "\n")
