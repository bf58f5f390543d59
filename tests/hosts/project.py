# SPDX-License-Identifier: LGPL-2.1-or-later
"""This project as files for a host: the package as it is imported here, with an extension for the host, and tests.

Bytecode goes along, compiled here (see userspace.py), each file's kept by its content.
"""

from __future__ import annotations

import py_compile
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory

from . import cache
from .errors import HostError
from .userspace import MACHINES, native

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ENVIRONMENT = {"PYTHONPATH": "/job", "PYTHONUNBUFFERED": "1"}
_TAG = sys.implementation.cache_tag
# What C sources have in their names that are the other architecture's.
FOREIGN = {"arm64": "x86", "amd64": "arm64"}
_OTHER = {".toml", ".json", ".varlink", ".csv", ".txt", ".typed", ".h", ".c"}


def files(architecture: str) -> dict[str, bytes]:
    """kvmneg/, tests/, csrc/ and pyproject.toml, by their paths below /job."""
    found = package(architecture)
    for path in sorted((ROOT / "tests").rglob("*")):
        if path.is_file() and path.suffix in {".py", *_OTHER}:
            found[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    for path in sorted(CSRC.glob("*.[ch]")):
        found[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    found["pyproject.toml"] = (ROOT / "pyproject.toml").read_bytes()
    return found


def package(architecture: str) -> dict[str, bytes]:
    """The installed package: what is tested is what was built."""
    import kvmneg

    folder = Path(kvmneg.__file__).parent
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix == ".pyc":
            continue
        name = f"kvmneg/{path.relative_to(folder).as_posix()}"
        if path.suffix == ".so":
            if native(architecture):
                found[name] = path.read_bytes()
            continue
        found[name] = path.read_bytes()
        if path.suffix == ".py":
            where, _, file = name.rpartition("/")
            found[f"{where}/__pycache__/{Path(file).stem}.{_TAG}.pyc"] = _bytecode(path, f"/job/{name}")
    if not any(name.endswith(".so") for name in found) and native(architecture):
        raise HostError("build", f"{folder} has no extension: make build, or tools/inplace.sh for a checkout")
    if not native(architecture):
        found["kvmneg/_libkvmneg.abi3.so"] = extension(architecture).read_bytes()
    return found


def _bytecode(path: Path, shown: str) -> bytes:
    """Unchecked bytecode of a module, kept in the cache by its content and name."""
    folder = cache.directory() / "bytecode"
    target = folder / cache.digest(path.read_bytes(), shown, str(_TAG))
    try:
        return target.read_bytes()
    except FileNotFoundError:
        folder.mkdir(exist_ok=True)
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(path), str(target), shown, doraise=True, invalidation_mode=mode)  # by one rename
    return target.read_bytes()


def sources(architecture: str) -> list[Path]:
    """What libkvmneg is made of there."""
    foreign = FOREIGN[architecture]
    return [path for path in sorted(CSRC.rglob("*.[cS]")) if not path.name.startswith(foreign)]


def extension(architecture: str) -> Path:
    """The extension, cross-compiled as csrc/meson.build builds it; a second, once for each state of csrc/."""
    compiled = sources(architecture)
    compiler = f"{MACHINES[architecture]}-linux-gnu-gcc"
    if not shutil.which(compiler):
        raise HostError("build", f"{compiler} is not installed")
    contents = [path.read_bytes() for path in (*compiled, *sorted(CSRC.rglob("*.h")))]

    def make(target: Path) -> None:
        with TemporaryDirectory() as name:
            work = Path(name)
            declarations = _run([compiler, "-E", "-P", "-w", "-DKVMNEG_CDEF", str(CSRC / "kvmneg.h")])
            (work / "cdef").write_text(declarations, "utf-8")
            generator = Path(sys.executable).parent / "cffi-gen-src"
            words = ["read-sources", "kvmneg._libkvmneg", str(work / "cdef"), str(CSRC / "binding.h")]
            _run([str(generator), *words, str(work / "binding.c")])
            flags = ["-shared", "-fPIC", "-O2", "-std=gnu11", "-DPy_LIMITED_API=0x030b0000", f"-I{CSRC}"]
            flags += [f"-I{folder}" for folder in _python_headers(work, architecture)]
            _run([compiler, *flags, str(work / "binding.c"), *map(str, compiled), "-o", str(target)])

    return cache.made(f"extension-{architecture}", cache.digest(compiler, str(_TAG), *contents), make)


def _python_headers(work: Path, architecture: str) -> list[Path]:
    """This Python's headers; where pyconfig.h leads to one for each architecture, this one stands in for the other.

    Under the limited API what it says is what any 64-bit Linux has.
    """
    include = Path(sysconfig.get_path("include"))
    own = include.parent / f"{sysconfig.get_config_var('MULTIARCH')}/{include.name}/pyconfig.h"
    if own.is_file():
        other = work / f"{MACHINES[architecture]}-linux-gnu/{include.name}"
        other.mkdir(parents=True)
        shutil.copyfile(own, other / "pyconfig.h")
    return [work, include]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError("build", f"{Path(command[0]).name}: {done.stderr.strip()[-2000:]}")
    return done.stdout
