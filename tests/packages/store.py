# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unpacked packages in the user's cache: made once, shared by every process, usable without the mirror.

Below ${XDG_CACHE_HOME:-~/.cache}/kvmneg/packages:

    lock                                       held while something is fetched or put in place
    SUITE.ARCHITECTURE/                        that suite's private apt
    trees/PACKAGE_VERSION_ARCHITECTURE/        a finished tree: root/ and tree.json, which lists its packages

A tree appears by one rename, so a reader never sees half of one. Nothing is ever changed in a finished tree.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from .archive import Archive, Suite
from .errors import Missing, NoTool, PackageError
from .tree import Tree
from .versions import nearest, numbers, satisfies

FORMAT = "kvmneg.package-tree/1"


class Wanted(NamedTuple):
    """What a caller asks for; `alone` is without dependencies (kernels, data, another architecture's parts)."""

    package: str
    version: str
    suite: str
    architecture: str = "amd64"
    alone: bool = False

    def describe(self) -> str:
        return f"{self.package} {self.version or 'of any version'} of {self.suite}"


def cache_directory() -> Path:
    """Where unpacked packages are kept (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kvmneg/packages"


class Store:
    """The cache. `archive` is where to fetch from, None for the mirror that this system's apt uses."""

    def __init__(self, directory: Path | None = None, archive: Archive | None = None) -> None:
        self.directory = directory or cache_directory()
        self._archive = archive
        self._updated: set[str] = set()

    def cached(self, wanted: Wanted) -> Tree | None:
        """A finished tree that satisfies the wish, the newest of several; the mirror is not asked."""
        found = [tree for tree in self.trees() if self._is(tree, wanted)]
        return max(found, key=lambda tree: numbers(tree.version), default=None)

    def trees(self) -> list[Tree]:
        """Every finished tree."""
        paths = sorted((self.directory / "trees").glob("[!.]*/tree.json"))
        return [tree for tree in map(_read, paths) if tree is not None]

    def get(self, wanted: Wanted, *, exact: bool = False) -> Tree:
        """The tree, from the cache or the mirror; where the suite has another version, the nearest.

        `Tree.version` says which one it is; with `exact`, another version is Missing too and not fetched.
        Raises Unreachable, Missing (with what the suite has), PackageError.
        """
        return self.cached(wanted) or self._fetched(wanted, exact)

    @staticmethod
    def _is(tree: Tree, wanted: Wanted) -> bool:
        same = (tree.package, tree.suite, tree.architecture) == (
            wanted.package,
            wanted.suite,
            wanted.architecture,
        )
        return same and satisfies(tree.version, wanted.version) and tree.alone <= wanted.alone

    def _fetched(self, wanted: Wanted, exact: bool) -> Tree:
        with self._lock():
            found = self.cached(wanted)  # another process may have made it while this one waited
            if found is not None:
                return found
            suite = self._suite(wanted.suite, wanted.architecture)
            available = suite.candidates(wanted.package)
            version = nearest(available, wanted.version)
            if version is None:
                raise Missing(f"{wanted.describe()}: the suite has no {wanted.package}")
            if exact and not satisfies(version, wanted.version):
                raise Missing(f"{wanted.describe()}: the suite has {', '.join(available)}")
            target = self.directory / "trees" / _folder(wanted, version)
            return _read(target / "tree.json") or self._make(wanted, version, suite, target)

    def names(self, suite: str, architecture: str, prefix: str) -> list[str]:
        """The packages of a suite whose names begin so; the mirror is asked. Raises Unreachable, PackageError."""
        with self._lock():
            return self._suite(suite, architecture).names(prefix)

    def _suite(self, name: str, architecture: str) -> Suite:
        """A suite with its index read; under the lock."""
        folder = f"{name}.{architecture}"
        suite = Suite(name, self.directory / folder, self._archive, architecture)
        if folder not in self._updated:
            suite.update()
            self._updated.add(folder)
        return suite

    def _make(self, wanted: Wanted, version: str, suite: Suite, target: Path) -> Tree:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
        try:
            files = suite.download(wanted.package, version, work / "archives", alone=wanted.alone)
            for file in files:
                unpack(file, work / "root")
            listed = {
                "format": FORMAT,
                **wanted._asdict(),
                "version": version,
                "packages": [file.name for file in files],
            }
            (work / "tree.json").write_text(json.dumps(listed, indent=1) + "\n", "utf-8")
            shutil.rmtree(work / "archives")
            work.chmod(0o755)
            shutil.rmtree(target, ignore_errors=True)  # what is there is no finished tree
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        tree = _read(target / "tree.json")
        assert tree is not None, "just written"
        return tree

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time fetches; the kernel frees the lock of one that dies."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.directory / "lock", "w", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._sweep()
            yield

    def _sweep(self) -> None:
        """What a process left that was killed while unpacking: whoever holds the lock is the only one."""
        for path in (self.directory / "trees").glob(".new-*"):
            shutil.rmtree(path, ignore_errors=True)


def _folder(wanted: Wanted, version: str) -> str:
    """suite included: the same package and version has other dependencies in another suite."""
    kind = "_alone" if wanted.alone else ""
    name = f"{wanted.package}_{version}_{wanted.suite}_{wanted.architecture}{kind}"
    return quote(name, safe="+~")


def _read(path: Path) -> Tree | None:
    """A finished tree's description, None for what is none (another format, or damaged)."""
    try:
        listed = json.loads(path.read_text("utf-8"))
        if listed.pop("format") != FORMAT:
            return None
        return Tree(path.parent / "root", **listed)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def unpack(package: Path, root: Path) -> None:
    """Unpack one .deb into a tree whose /lib and /bin are links below /usr. Raises PackageError.

    Not `dpkg-deb --extract`: where a package has /lib as a directory, that would replace the link by it.
    """
    for name in ("bin", "lib", "lib64", "sbin"):
        if not (root / name).is_symlink():
            (root / "usr" / name).mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(f"usr/{name}")
    keep = [
        "--keep-directory-symlink",
        "--no-same-owner",
        "--no-same-permissions",
        "--delay-directory-restore",
    ]
    try:
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as reader:
            command = ["tar", "--extract", *keep, "--directory", str(root)]
            done = subprocess.run(command, stdin=reader.stdout, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NoTool(f"{error.filename} is not installed") from None
    if reader.returncode or done.returncode:
        said = done.stderr.strip() or f"dpkg-deb ended with {reader.returncode}"
        raise PackageError(f"unpacking {package.name}: {said}")
