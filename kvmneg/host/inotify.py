# SPDX-License-Identifier: LGPL-2.1-or-later
"""inotify(7), which Python has not: files that come, go or are replaced in folders."""

from __future__ import annotations

import os
import struct

from kvmneg import limits
from kvmneg._libkvmneg import ffi, lib

# <sys/inotify.h>
ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x4, 0x8, 0x40, 0x80, 0x100, 0x200
OVERFLOW = 0x4000
_ONLYDIR = 0x0100_0000
_HEADER = struct.Struct("=iIII")  # wd, mask, cookie, length of the name


class Inotify:
    """Folders that are watched. Raises OSError where the kernel has no more for this user."""

    def __init__(self) -> None:
        self._fd: int = lib.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ffi.errno, os.strerror(ffi.errno))

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Twice is once."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def add(self, folder: str, mask: int) -> None:
        """Watch what happens to the names in a folder. Raises OSError."""
        if lib.inotify_add_watch(self._fd, os.fsencode(folder), mask | _ONLYDIR) < 0:
            raise OSError(ffi.errno, os.strerror(ffi.errno), folder)

    def read(self) -> tuple[set[str], bool]:
        """The names to which something happened, of INOTIFY_BYTES at most; and whether some were lost."""
        try:
            data = os.read(self._fd, limits.INOTIFY_BYTES)
        except BlockingIOError:
            return set(), False
        names, lost, place = set(), False, 0
        while place < len(data):
            _, mask, _, length = _HEADER.unpack_from(data, place)
            place += _HEADER.size
            name = os.fsdecode(data[place : place + length].partition(b"\0")[0])
            place += length
            lost |= bool(mask & OVERFLOW)
            if name:
                names.add(name)
        return names, lost
