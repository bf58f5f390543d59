# SPDX-License-Identifier: LGPL-2.1-or-later
"""What runs inside every host: Debian's Python of this interpreter's version, busybox, pytest, the agent.

The interpreter inside has the version of the one outside, so that bytecode is compiled here: importing pytest
takes 1.4 s in an emulated host with it, 13 s without. Python packages are this environment's own; those that are
not pure come as wheels of the same version where the architecture differs.
"""

from __future__ import annotations

import compileall
import importlib.metadata
import platform
import py_compile
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from ..packages.errors import Unreachable
from ..packages.store import Store, Wanted
from ..packages.tree import Tree
from . import cache, cpio
from .errors import HostError

HERE = Path(__file__).parent
SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}
MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}
NEEDED = ("cffi", "pytest", "hypothesis", "ioctl-opt", "pyroute2")
# Of the unpacked trees only what runs: no documents, no locales but C.UTF-8, no tests, no package managers.
_KEEP = (
    "usr/bin/python3*",
    "usr/bin/busybox",
    "usr/lib/*-linux-gnu*",
    "usr/lib/ld-linux*",
    "usr/lib64",
    "usr/lib/python3*",
    "usr/lib/locale",
)
_DROP = (
    *(
        "test",
        "tests",
        "idlelib",
        "tkinter",
        "turtledemo",
        "lib2to3",
        "ensurepip",
        "pydoc_data",
        "lexers",
        "__pycache__",
    ),
    *("gconv", "krb5", "perl-base", "audit"),
)
# What tests may expect of any system.
APPLETS = (
    "cat",
    "chmod",
    "cp",
    "date",
    "env",
    "false",
    "grep",
    "head",
    "id",
    "kill",
    "ls",
    "mkdir",
    "mount",
    "mv",
    "ps",
    "rm",
    "sed",
    "sh",
    "sleep",
    "tar",
    "touch",
    "true",
    "umount",
    "uname",
)
_NO_CONNECTION = "Failed to establish a new connection"  # pip's words
VERSION = "2"  # of this recipe


def native(architecture: str) -> bool:
    """Whether programs of that architecture run here."""
    return MACHINES[architecture] == platform.machine()


def suite() -> str:
    """The Debian suite whose Python is this one. Raises HostError."""
    found = SUITES.get(sys.version_info[:2])
    if found is None:
        ours = ".".join(map(str, sys.version_info[:2]))
        raise HostError("packages", f"no Debian suite is listed here that has Python {ours}")
    return found


def trees(architecture: str, store: Store | None = None) -> list[Tree]:
    """The unpacked packages. Raises PackageError."""
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    wanted = [
        Wanted(python, "", suite(), architecture),
        Wanted("busybox-static", "", suite(), architecture, True),
    ]
    store = store or Store()
    return [store.get(one) for one in wanted]


def initramfs(architecture: str) -> Path:
    """The archive with all of it, without modules; made where it is missing (10 s)."""
    used = trees(architecture)
    packages = [importlib.metadata.distribution(name) for name in _distributions()]
    key = cache.digest(
        VERSION,
        architecture,
        *(f"{tree.package} {tree.version}" for tree in used),
        *(f"{package.metadata['Name']} {package.version}" for package in packages),
        *((HERE / name).read_bytes() for name in ("agent.py", "init.sh")),
    )

    def make(path: Path) -> None:
        with TemporaryDirectory(dir=cache.directory(), prefix=".stage-") as name:
            stage = Path(name)
            _copy_trees(used, stage)
            site = stage / "usr/lib/python3/dist-packages"
            _copy_packages(packages, architecture, site)
            _compile(stage)
            _own(stage)
            path.write_bytes(cpio.archive(cpio.tree(stage)))

    return cache.made(f"userspace-{architecture}", key, make)


def _distributions() -> list[str]:
    """The packages of NEEDED and all they need here."""
    from packaging.requirements import Requirement

    found: dict[str, None] = {}
    queue = list(NEEDED)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        found[name] = None
        for line in importlib.metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                queue.append(needed.name)
    return sorted(found)


def _copy_trees(used: list[Tree], stage: Path) -> None:
    ignore = shutil.ignore_patterns(*_DROP)
    for tree in used:
        for pattern in _KEEP:
            for source in tree.root.glob(pattern):
                target = stage / source.relative_to(tree.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir() and not source.is_symlink():
                    shutil.copytree(source, target, symlinks=True, ignore=ignore, dirs_exist_ok=True)
                else:
                    shutil.copy2(source, target, follow_symlinks=False)
    for name in ("bin", "lib", "lib64", "sbin"):
        (stage / "usr" / name).mkdir(exist_ok=True)
        (stage / name).symlink_to(f"usr/{name}")
    (stage / "usr/bin/python3").unlink(missing_ok=True)
    (stage / "usr/bin/python3").symlink_to(f"python{sys.version_info[0]}.{sys.version_info[1]}")


def _copy_packages(packages: list[importlib.metadata.Distribution], architecture: str, site: Path) -> None:
    """This environment's packages, with their metadata (pytest finds its plugins by it)."""
    for package in packages:
        files = [file for file in package.files or () if ".." not in file.parts and file.suffix != ".pyc"]
        if any(file.suffix == ".so" for file in files) and not native(architecture):
            with zipfile.ZipFile(_wheel(package.metadata["Name"], package.version, architecture)) as wheel:
                wheel.extractall(site)
            continue
        for file in files:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(package.locate_file(file)), target)


def _wheel(name: str, version: str, architecture: str) -> Path:
    """A package's wheel for another architecture, by pip."""
    machine, minor = MACHINES[architecture], f"{sys.version_info[0]}.{sys.version_info[1]}"

    def fetch(path: Path) -> None:
        with TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += [
                "--no-deps",
                "--only-binary=:all:",
                "--implementation=cp",
                f"--python-version={minor}",
            ]
            command += [f"--platform=manylinux_2_{glibc}_{machine}" for glibc in (17, 26, 28, 34)]
            command += [f"--platform=manylinux2014_{machine}", f"--dest={folder}", f"{name}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = f"pip has no {name} {version} for {machine}: {done.stderr.strip()[-400:]}"
                raise Unreachable(said) if _NO_CONNECTION in said else HostError("packages", said)
            shutil.copyfile(next(Path(folder).glob("*.whl")), path)

    return cache.made(f"wheel-{name}-{architecture}", cache.digest(version, minor), fetch)


def _compile(stage: Path) -> None:
    """Bytecode instead of sources, used unchecked: half the size, and nothing in a host looks at times."""
    compileall.compile_dir(
        stage / "usr/lib",
        quiet=2,
        stripdir=str(stage),
        prependdir="/",
        legacy=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        workers=2,
    )
    for path in list((stage / "usr/lib").rglob("*.py")):
        if path.with_suffix(".pyc").exists():
            path.unlink()


def _own(stage: Path) -> None:
    """The tool's own files."""
    shutil.copyfile(HERE / "init.sh", stage / "init")
    (stage / "init").chmod(0o755)
    shutil.copyfile(HERE / "agent.py", stage / "agent.py")
    for name in APPLETS:
        (stage / "usr/bin" / name).symlink_to("busybox")
    for name in ("dev", "proc", "sys", "etc", "tmp", "run", "root", "job", "modules"):
        (stage / name).mkdir(exist_ok=True)
    (stage / "etc/passwd").write_text(
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n", "ascii"
    )
    (stage / "etc/group").write_text("root:x:0:\nkvm:x:104:\nnogroup:x:65534:\n", "ascii")
