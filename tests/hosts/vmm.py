# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real QEMU as files for an amd64 host, where it runs by its own dynamic linker: /job/bin/qemu-system-x86_64."""

from __future__ import annotations

import subprocess
from pathlib import Path

from ..packages.store import Store, Wanted
from .errors import HostError

PROGRAM = "usr/bin/qemu-system-x86_64"
_FIRMWARE = (
    "usr/share/seabios/bios-256k.bin",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot_dma.bin",
)
_WRAPPER = """\
#!/bin/sh
export QEMU_MODULE_DIR=/job/qemu
exec /job/qemu/{linker} --inhibit-cache --library-path /job/qemu /job/qemu/qemu -L /job/qemu "$@"
"""


def qemu(version: str, suite: str) -> dict[str, bytes]:
    """The program, the libraries it names (by ldd's way: the dynamic linker's --list), its firmware."""
    tree = Store().get(Wanted("qemu-system-x86", version, suite))
    linker = tree.linker()
    done = subprocess.run(
        [linker[0], "--list", *linker[1:], str(tree.path(PROGRAM))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise HostError("build", f"{tree.package} {tree.version}: {done.stderr.strip()}")
    rows = [line.split() for line in done.stdout.splitlines()]
    libraries = [Path(row[2]) for row in rows if len(row) >= 3 and row[1] == "=>"]
    sources = [*libraries, Path(linker[0]), *(tree.root / name for name in _FIRMWARE)]
    files = {f"qemu/{path.name}": path.read_bytes() for path in sources if path.exists()}
    accelerators = (tree.root / "usr/lib").glob("*/qemu/accel-*.so")
    files |= {f"qemu/{path.name}": path.read_bytes() for path in accelerators}
    files["qemu/qemu"] = tree.path(PROGRAM).read_bytes()
    files["bin/qemu-system-x86_64"] = _WRAPPER.format(linker=Path(linker[0]).name).encode()
    return files
