# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C libraries and the examples as files for a host: compiled for it, linked as `make install` puts them there.

json-c comes from the Debian suite whose C library the hosts have.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from ..packages.store import Store, Wanted
from . import cache
from .errors import HostError
from .project import CSRC, FOREIGN, ROOT, sources
from .userspace import MACHINES, suite

CLIENT, EXAMPLES = ROOT / "client", ROOT / "examples"
ENVIRONMENT = {"LD_LIBRARY_PATH": "/job/lib"}
_FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O2")


class _Json(NamedTuple):
    headers: Path
    library: Path


def files(architecture: str) -> dict[str, bytes]:
    """lib/*.so.* and bin/NAME of each examples/NAME.c that is for it. Raises HostError, PackageError."""
    compiler = f"{MACHINES[architecture]}-linux-gnu-gcc"
    if not shutil.which(compiler):
        raise HostError("build", f"{compiler} is not installed")
    json = _json(architecture)
    core = _library(compiler, "kvmneg", CSRC, sources(architecture), [])
    asks = [f"-isystem{json.headers}", core, json.library]
    client = _library(compiler, "kvmneg-client", CLIENT, sorted(CLIENT.glob("*.c")), asks)
    found = {
        f"lib/{name}.so.0": path.read_bytes()
        for name, path in (("libkvmneg", core), ("libkvmneg-client", client))
    }
    found[f"lib/{json.library.name}"] = json.library.read_bytes()
    for source in sorted(path for path in EXAMPLES.glob("*.c") if FOREIGN[architecture] not in path.name):
        found[f"bin/{source.stem}"] = _program(compiler, source, [client, core, json.library]).read_bytes()
    return found


def _json(architecture: str) -> _Json:
    """json-c's headers and library."""
    store = Store()
    headers = store.get(Wanted("libjson-c-dev", "", suite(), architecture, True))
    library = store.get(Wanted("libjson-c5", "", suite(), architecture, True))
    place = f"usr/lib/{MACHINES[architecture]}-linux-gnu/libjson-c.so.5"
    return _Json(headers.root / "usr/include", library.root / place)


def _library(compiler: str, name: str, folder: Path, given: list[Path], more: list[str | Path]) -> Path:
    """A shared library with its version script and its name, as folder/meson.build has them."""
    script = folder / f"lib{name}.map"
    linking = ("-shared", "-fPIC", f"-Wl,--version-script={script}", f"-Wl,-soname,lib{name}.so.0")
    return _made(compiler, f"lib{name}", [*linking, *given, *more], [script, *given])


def _program(compiler: str, source: Path, libraries: list[Path]) -> Path:
    return _made(compiler, source.stem, [source, *libraries], [source])


def _made(compiler: str, name: str, words: list[str | Path], read: list[Path]) -> Path:
    """What the compiler makes of it, once for each content of what it reads."""
    headers = sorted([*CSRC.rglob("*.h"), *CLIENT.glob("*.h"), *EXAMPLES.glob("*.h")])
    built = [
        str(word) for word in words if isinstance(word, Path) and word not in read
    ]  # named by their digests
    key = cache.digest(
        compiler, *_FLAGS, *map(str, built), *(path.read_bytes() for path in (*read, *headers))
    )

    def make(target: Path) -> None:
        with TemporaryDirectory() as work:
            made = Path(work) / "made"
            command = [compiler, *_FLAGS, f"-I{CSRC}", f"-I{CLIENT}", *map(str, words), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise HostError("build", f"{name}: {done.stderr.strip()[-2000:]}")
            shutil.copyfile(made, target)

    return cache.made(f"{name}-{compiler.partition('-')[0]}", key, make)
