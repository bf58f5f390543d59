# SPDX-License-Identifier: LGPL-2.1-or-later
"""An arm64 KVM, inside an emulated host: its measurement and its proof, each against a C program there."""

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


def bare(folder: Path) -> dict[str, bytes]:
    """The C programs, cross-built; bare_probe with libkvmneg's sources, which tell it once what to do."""
    csrc = HERE.parent / "csrc"
    library = [path for path in sorted(csrc.rglob("*.[cS]")) if not path.name.startswith("x86")]
    recording = [*map(str, library), f"-I{csrc}", "-Wl,--wrap=ioctl,--wrap=close"]
    programs = {}
    for name, more in (("bare_probe", recording), ("bare_verify", [])):
        program, source = folder / f"{name}.arm64", HERE / f"c/arm64/{name}.c"
        flags = ["-O2", "-std=gnu11", "-Wall", "-Werror"]
        try:
            subprocess.run([COMPILER, *flags, str(source), *more, "-o", str(program)], check=True)
        except FileNotFoundError:
            raise LookupError(f"{COMPILER} is not installed") from None
        programs[name] = program.read_bytes()
    return programs


def figures(programs: Path, state: Path) -> Iterator[Figure]:
    """The measurement without making and closing VMs, vCPUs and devices: that is the kernel's time, for both."""
    from tests.hosts import catalogue, project, start  # which `make test` needs and a bench may lack
    from tests.hosts.errors import HostError
    from tests.hosts.job import Job
    from tests.packages.errors import PackageError

    host = catalogue.find(HOST)
    files = {**project.files(host.architecture), **bare(programs)}
    files |= {f"bench/{name}": (HERE / name).read_bytes() for name in FILES}
    command = "chmod +x bare_probe bare_verify && exec python3 -m bench.inside ./bare_probe ./bare_verify"
    job = Job(["sh", "-c", command], files, project.ENVIRONMENT, SECONDS)
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
    ratio = median(ours / bare for ours, bare in found["proofs"])
    mine, theirs = (median(row[n] for row in found["proofs"]) for n in (0, 1))
    detail = f"{mine * 1e3:.0f} ms to {theirs * 1e3:.0f} ms, in {HOST}"
    yield Figure("arm64 verify of a host / its VMs and guest runs in C", ratio, 20, detail=detail)
