# SPDX-License-Identifier: LGPL-2.1-or-later
"""An unpacked tree and how to run its programs where they are: by their own dynamic linker and libraries."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .errors import PackageError

# The dynamic linker and the directory of libraries of each Debian architecture (multiarch tuples).
_LINKERS = {
    "amd64": ("lib64/ld-linux-x86-64.so.2", "x86_64-linux-gnu"),
    "arm64": ("lib/ld-linux-aarch64.so.1", "aarch64-linux-gnu"),
}
_LINKS = 40  # followed in one path, as Linux does (MAXSYMLINKS)
# Libraries that programs find by an absolute run path, which would be the installed system's.
_PRIVATE_LIBRARIES = ("pulseaudio", "libvirt")


class Tree(NamedTuple):
    """One unpacked package with what it depends on; `packages` are the file names of all of them."""

    root: Path
    package: str
    version: str
    suite: str
    architecture: str
    alone: bool
    packages: list[str]

    def path(self, name: str) -> Path:
        """A file of the tree by its path below /, links followed within it. Raises PackageError where it has none.

        Debian 12's /lib64/ld-linux-x86-64.so.2 is a link to /lib/…: to the installed system's linker, for who
        follows it out of the tree. With a newer system's linker, the tree's libc says "stack smashing detected".
        """
        found, links = self.root, 0
        rest = list(reversed(PurePosixPath("/", name).parts))
        while rest:
            part = rest.pop()
            step = found / part
            if part == "/":
                found = self.root
            elif part == "..":
                found = self.root if found == self.root else found.parent
            elif step.is_symlink() and links < _LINKS:
                links += 1
                rest += reversed(PurePosixPath(step.readlink()).parts)
            else:
                found = step
        if found.is_symlink() or not found.exists():
            raise PackageError(f"{self.package} {self.version} has no {name}")
        return found

    def linker(self) -> list[str]:
        """The tree's dynamic linker with its library path: the words before a program's own path."""
        name, tuple_ = _LINKERS[self.architecture]
        libraries = self.root / "usr/lib" / tuple_
        folders = [libraries, *(libraries / private for private in _PRIVATE_LIBRARIES)]
        found = ":".join(str(folder) for folder in folders if folder.is_dir())
        return [str(self.path(name)), "--inhibit-cache", "--library-path", found]

    def command(self, program: str) -> list[str]:
        """The words that run a program of the tree ("usr/bin/qemu-img"), to be followed by its arguments."""
        return [*self.linker(), str(self.path(program))]

    def qemu(self, program: str = "usr/bin/qemu-system-x86_64") -> list[str]:
        """The same for a QEMU, whose firmware and loadable modules are looked for in the tree too.

        env(1) comes first: -L does not reach modules, and an installed QEMU's would be of another build.
        """
        modules = self.root / "usr/lib" / _LINKERS[self.architecture][1] / "qemu"
        data = [self.root / "usr/share" / name for name in ("qemu", "seabios", "ipxe/qemu")]
        firmware = [word for folder in data if folder.is_dir() for word in ("-L", str(folder))]
        return ["env", f"QEMU_MODULE_DIR={modules}", *self.command(program), *firmware]

    def wrapper(self, command: Sequence[str], path: Path) -> Path:
        """Write a program at `path` that runs `command` with the arguments it is given: for who wants a path."""
        path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n', "utf-8")
        path.chmod(0o755)
        return path
