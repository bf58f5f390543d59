# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state directory: one process has it, a damaged database is set aside in it, its entries are durable."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

from kvmneg.errors import StoreError
from kvmneg.store.faults import translated

DATABASE = "kvmneg.sqlite"
LOCK = "lock"
COPY = "fence.copy"  # kvmneg.store.copies


def prepare(directory: str) -> None:
    """Make the state directory (0700) where it is missing. StoreError if it cannot be made or trusted."""
    with translated(directory, f"use the state directory {directory}"):
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            pass
        else:
            # Its name must be on the disk before anything inside is called durable.
            sync_directory(os.path.dirname(directory.rstrip("/")) or os.curdir)
        mode = os.stat(directory).st_mode
    if not stat.S_ISDIR(mode):
        raise StoreError(f"the state directory {directory} is not a directory", hint="name another one")
    if mode & stat.S_IWOTH:
        hint = f"chmod o-w {directory}"
        raise StoreError(
            f"anybody may write to the state directory {directory}: its fence is worth nothing", hint=hint
        )


def lock(directory: str) -> int:
    """Take the directory for this process; return the descriptor that holds it until it is closed.

    flock(2) and not a pid file: the kernel lets go of it however the process ends. The holder's pid in the
    file is for the message to the second opener only. StoreError with field pid if another has it. On a read-only file
    system the lock holds too.
    """
    path = f"{directory}/{LOCK}"
    with translated(directory, f"lock the state directory {directory}"):
        # Not followed: a link planted here would have another file emptied.
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sign(descriptor)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise _taken(directory, holder) from None
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def _sign(descriptor: int) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except OSError:
        pass  # a full disk: the lock holds all the same, and serving the fence must not fail for a courtesy


def _taken(directory: str, holder: str) -> StoreError:
    pid = int(holder) if holder.isdecimal() else None
    who = f"process {pid}" if pid is not None else "another process"
    hint = "one daemon per state directory: stop that one, or give this one another --state"
    return StoreError(f"the state directory {directory} is in use by {who}", hint=hint, pid=pid)


def sync_directory(directory: str) -> None:
    """Make renames and new names in it durable (fsync(2): a file's own fsync does not cover its name)."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_aside(directory: str) -> str:
    """Rename a damaged database and its write-ahead log to `kvmneg.sqlite.corrupt-<UTC>`; return the name.

    The database goes first: were it left behind without its log, it would pass for an older state. A log left
    behind without its database is refused at the next open.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = stem = f"{DATABASE}.corrupt-{stamp}"
    count = 1
    while os.path.lexists(f"{directory}/{name}"):
        count += 1
        name = f"{stem}.{count}"
    os.rename(f"{directory}/{DATABASE}", f"{directory}/{name}")
    sync_directory(directory)  # two renames may reach the disk in any order
    log = f"{directory}/{DATABASE}-wal"
    if os.path.lexists(log) and os.stat(log).st_size > 0:
        os.rename(log, f"{directory}/{name}-wal")
    elif os.path.lexists(log):
        os.unlink(log)  # made by SQLite while it looked
    sync_directory(directory)
    return name


def leftovers(directory: str) -> list[str]:
    """What a database that is not there any more left behind: set aside ones, a log with content, the fence's copy."""
    found = []
    for entry in sorted(os.listdir(directory)):
        log = entry == f"{DATABASE}-wal" and os.stat(f"{directory}/{entry}").st_size > 0
        if log or is_aside(entry) or entry == COPY:
            found.append(entry)
    return found


def is_aside(name: str) -> bool:
    """Whether a file of that name is a database that was set aside, or its log."""
    return name.startswith(f"{DATABASE}.corrupt-")


def on_read_only_disk(directory: str) -> bool:
    """Whether the file system of a directory takes no writes; False where nobody can tell."""
    try:
        return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)
    except OSError:
        return False
