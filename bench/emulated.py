# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measuring an arm64 KVM, inside an emulated host, against a C program that makes the same ioctls there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.figures import Figure

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
HOST = "arm64-6.12"
COMPILER = "aarch64-linux-gnu-gcc"
FILES = ("__init__.py", "figures.py", "inside.py")
SECONDS = 300.0


def bare_probe(folder: Path) -> bytes:
    """The C program, cross-built with libkvmneg's sources, which tell it once what to do."""
    csrc, program = HERE.parent / "csrc", folder / "bare_probe.arm64"
    library = [path for path in sorted(csrc.rglob("*.[cS]")) if not path.name.startswith("x86")]
    sources = [HERE / "c/arm64/bare_probe.c", *library]
    flags = ["-O2", "-std=gnu11", "-Wall", "-Werror", f"-I{csrc}", "-Wl,--wrap=ioctl,--wrap=close"]
    try:
        subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(program)], check=True)
    except FileNotFoundError:
        raise LookupError(f"{COMPILER} is not installed") from None
    return program.read_bytes()


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """Without making and closing VMs, vCPUs and devices: that is the kernel's time, the same for both."""
    from tests.hosts import catalogue, project, start  # which `make test` needs and a bench may lack
    from tests.hosts.errors import HostError
    from tests.hosts.job import Job
    from tests.packages.errors import PackageError

    host = catalogue.find(HOST)
    files = {**project.files(host.architecture), "bare_probe": bare_probe(programs)}
    files |= {f"bench/{name}": (HERE / name).read_bytes() for name in FILES}
    job = Job(
        ["sh", "-c", "chmod +x bare_probe && exec python3 -m bench.inside ./bare_probe"],
        files,
        project.ENVIRONMENT,
        SECONDS,
    )
    try:
        with start.restored(start.Built(host)) as machine:
            result = machine.run(job)
    except (HostError, PackageError) as error:
        raise LookupError(str(error)) from None
    if result.status:
        raise LookupError(result.stderr.decode("utf-8", "replace"))
    found = json.loads(result.stdout)
    ratio = median((ours - making) / (bare - making) for ours, bare, making in found["rounds"])
    mine, theirs = (median(row[n] - row[2] for row in found["rounds"]) for n in (0, 1))
    detail = f"{mine * 1e3:.1f} ms to {theirs * 1e3:.1f} ms, {found['ioctls']} ioctls, in {HOST}"
    yield Figure("arm64 measurement as a feature set / its ioctls in C", ratio, 1.3, detail=detail)
