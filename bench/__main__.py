# SPDX-License-Identifier: LGPL-2.1-or-later
"""`make bench`: every figure with its target, as a ratio within this run, median of interleaved rounds.

Absolute times on a shared machine say little; a ratio to the bare ioctls, to a C server, or to the interpreter
alone says what kvmneg adds. Exit status 1 where a target was missed.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import (
    applying,
    asking,
    checking,
    emulated,
    measuring,
    merging,
    pinning,
    proving,
    returning,
    serving,
    starting,
)
from bench.figures import Figure

HERE = Path(__file__).parent
FOREIGN = {"x86_64": "arm64", "aarch64": "x86"}


def compiled(folder: Path) -> Path:
    """The C programs of bench/c, compiled into `folder`."""
    foreign, csrc, client = FOREIGN[platform.machine()], HERE.parent / "csrc", HERE.parent / "client"
    library = [path for path in sorted(csrc.rglob("*.[cS]")) if not path.name.startswith(foreign)]
    applies = ["-Wl,--wrap=ioctl", *map(str, library)]
    asks = [*applies, f"-I{client}", *map(str, sorted(client.glob("*.c"))), *(json_c := asking.json_c())]
    with_library = {"applying": applies, "negotiating": asks}
    sources = {source.name: source for source in sorted((HERE / "c").glob("*.c"))}
    if foreign == "x86":  # the twins of those that are x86's
        sources |= {source.name: source for source in sorted((HERE / "c/arm64").glob("*.c"))}
        with_library["bare_probe"] = [*applies, "-Wl,--wrap=close"]
    for source in sources.values():
        if source.stem == "negotiating" and not json_c:
            continue  # `asking` says so
        program = folder / source.stem
        command = [
            "gcc",
            "-O2",
            "-Wall",
            "-Werror",
            f"-I{HERE.parent / 'csrc'}",
            "-o",
            str(program),
            str(source),
            *with_library.get(source.stem, []),
        ]
        subprocess.run(command, check=True)
    return folder


def file_system(path: Path) -> str:
    """The type of the file system that `path` lies on, from /proc/mounts."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return max(holding, key=lambda row: len(row[0]), default=("", "unknown"))[1]


def state_directory() -> str:
    """Where the daemon under test keeps its state: a disk, not /tmp in memory, unless told otherwise."""
    folder = os.environ.get("KVMNEG_BENCH_STATE") or str(HERE.parent / "build")
    Path(folder).mkdir(exist_ok=True)
    return tempfile.mkdtemp(prefix="bench-", dir=folder)


def main() -> int:
    state = Path(state_directory())
    print(
        f"kvmneg bench: Python {platform.python_version()}, Linux {platform.release()}, {os.cpu_count()} CPUs"
    )
    print(f"state directory on {file_system(state)}")
    print(f"{'figure':<58} {'measured':>9} {'target':>8}")
    missed = False
    with tempfile.TemporaryDirectory() as scratch:
        programs = compiled(Path(scratch))
        for part in (
            measuring,
            applying,
            asking,
            proving,
            checking,
            starting,
            serving,
            pinning,
            merging,
            returning,
            emulated,
        ):
            try:
                for figure in part.figures(programs, state):
                    print(figure.line(), flush=True)
                    missed |= not figure.met
            except LookupError as why:
                print(f"{part.__name__.removeprefix('bench.')}: not measured: {why.args[0]}")
    subprocess.run(["rm", "-r", str(state)], check=True)
    return int(missed)


__all__ = ["Figure"]

if __name__ == "__main__":
    sys.exit(main())
