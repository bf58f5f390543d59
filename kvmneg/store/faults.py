# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place where what SQLite and the file system say becomes a StoreError."""

from __future__ import annotations

import errno
import sqlite3
from contextlib import contextmanager

from kvmneg.errors import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# By primary result code (https://www.sqlite.org/rescode.html), what an admin can do; {0} is the directory.
_HINTS = {
    "SQLITE_FULL": "nothing was changed; free space on the file system of {0} and try again",
    "SQLITE_IOERR": "the file system of {0} refused: a quota, a size limit, or a disk that fails (see dmesg)",
    "SQLITE_READONLY": "{0} must be writable for the daemon's user",
    "SQLITE_CANTOPEN": "{0} and the files in it must be the daemon's user's, and there must be room for more",
    "SQLITE_BUSY": "another program has the database in {0} open",
    "SQLITE_CORRUPT": "restart the daemon: it examines the database in {0} and sets a damaged one aside",
}
_DISK = frozenset(_HINTS) - {"SQLITE_BUSY"} | {"SQLITE_NOTADB", "ENOSPC", "EDQUOT", "EIO", "EROFS"}
_HINTS["SQLITE_NOTADB"] = _HINTS["SQLITE_CORRUPT"]


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the file itself is broken (SQLITE_CORRUPT, SQLITE_NOTADB and their kin)."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the primary result code
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_disk(error: StoreError) -> bool:
    """Whether the disk under the store refused: full, failing, read-only, or what is on it is damaged."""
    primary = "_".join(str(error.fields.get("cause")).split("_")[:2])
    return primary in _DISK


def _hint(name: str, directory: str) -> str:
    primary = "_".join(name.split("_")[:2])  # SQLITE_IOERR_WRITE and forty more say SQLITE_IOERR here
    return _HINTS.get(primary, "").format(directory)


@contextmanager
def translated(directory: str, doing: str) -> Iterator[None]:
    """Whatever SQLite or the file system raises inside leaves as StoreError "cannot <doing>: <why>".

    Its field `cause` is SQLite's name of the error ("SQLITE_FULL") or the errno's ("EACCES").
    """
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        message = f"cannot {doing}: {error}"
        raise StoreError(message, hint=_hint(name, directory), cause=name or None) from error
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        hint = f"{directory} must be a writable directory of the daemon's user"
        raise StoreError(f"cannot {doing}: {error}", hint=hint, cause=name or None) from error
