# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that are made once and used by every process: each under its own lock, put in place by one rename."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..packages.store import cache_directory

KEPT = 2  # of a kind; when a new one is made, what was not used for longest goes


def directory() -> Path:
    """Where this tool keeps its files."""
    found = cache_directory().parent / "hosts"
    found.mkdir(parents=True, exist_ok=True)
    return found


def digest(*parts: str | bytes) -> str:
    """A name for what is made from these parts."""
    hasher = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.hexdigest()[:24]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that dies."""
    with open(directory() / f"{name}.lock", "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def made(kind: str, key: str, make: Callable[[Path], None], kept: int = KEPT) -> Path:
    """The file `kind`.`key`, made by `make(path)` where it is missing; `kept` files of that kind stay."""
    target = directory() / f"{kind}.{key}"
    if target.exists():
        return used(target)
    with locked(kind):
        if target.exists():
            return used(target)
        handle, name = tempfile.mkstemp(prefix=f".new-{kind}.", dir=directory())
        os.close(handle)
        try:
            make(Path(name))
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _drop_older(kind, target, kept)
    return target


def used(path: Path) -> Path:
    """Mark a file as used just now: what was not used for longest goes first."""
    os.utime(path)
    return path


def _drop_older(kind: str, newest: Path, kept: int) -> None:
    lock = directory() / f"{kind}.lock"
    found = sorted(directory().glob(f"{kind}.*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [path for path in found if path not in (newest, lock)][kept - 1 :]:
        path.unlink(missing_ok=True)
    for path in directory().glob(f".new-{kind}.*"):  # of a process that was killed: the lock is ours
        path.unlink(missing_ok=True)
