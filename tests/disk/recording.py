# SPDX-License-Identifier: LGPL-2.1-or-later
"""recorder.c built, a program run under it, and its log read back."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import kvmneg

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("", "create", "write", "truncate", "sync", "rename", "unlink", "mkdir", "link", "mark", "sent")
_RECORD = struct.Struct("=IIQQQ")
_CONTROL = struct.Struct("=5Q")
EVERY = 1 << 62  # so many failures: until it is told otherwise


class Operation(NamedTuple):
    """One record: see recorder.c. `path` and `to` are names, `file` an inode number, `offset` a new size too."""

    kind: str
    path: str
    file: int
    offset: int
    data: bytes

    @property
    def to(self) -> str:
        return os.fsdecode(self.data)


def build(folder: Path) -> Path:
    """The library to be preloaded, compiled into `folder`."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    output = folder / "recorder.so"
    flags = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC")
    command = ["gcc", *flags, str(Path(__file__).with_name("recorder.c")), "-o", str(output), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


class Disk:
    """A folder whose changes are recorded and can be made to fail, for the processes that have `environment`."""

    def __init__(self, library: Path, folder: Path) -> None:
        folder = folder.resolve()  # what the recorder sees has no links
        self.root = folder / "disk"
        self.root.mkdir()
        self.log = folder / "disk.log"
        control = folder / "disk.control"
        control.write_bytes(bytes(_CONTROL.size))
        with control.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), _CONTROL.size)
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(Path(kvmneg.__file__).parents[1]),
            "LD_PRELOAD": str(library),
            "DISK_ROOT": str(self.root),
            "DISK_LOG": str(self.log),
            "DISK_CONTROL": str(control),
        }

    @property
    def seen(self) -> int:
        """How many changes were tried so far."""
        return int(_CONTROL.unpack_from(self._control)[0])

    def fail(self, after: int, error: str, *, count: int = EVERY, half: bool = False) -> None:
        """Let `after` more changes pass, then fail `count` of them with that errno."""
        first = self.seen + after + 1
        struct.pack_into("=4Q", self._control, 8, first, count, getattr(errno, error), half)

    def heal(self) -> None:
        struct.pack_into("=4Q", self._control, 8, 0, 0, 0, 0)

    def operations(self) -> list[Operation]:
        return list(_parsed(self.log.read_bytes()))


def _parsed(data: bytes) -> Iterator[Operation]:
    at = 0
    while at < len(data):
        kind, first, file, offset, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        path = os.fsdecode(data[at : at + first])
        at += first
        yield Operation(KINDS[kind], path, file, offset, data[at : at + length])
        at += length
