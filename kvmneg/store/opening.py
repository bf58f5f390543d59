# SPDX-License-Identifier: LGPL-2.1-or-later
"""The store of a state directory: its database, or what is left of it."""

from __future__ import annotations

from kvmneg.errors import StoreError
from kvmneg.store import statedir
from kvmneg.store.sqlite import SqliteStore

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def open_store(directory: str, verify: Callable[[str], str]) -> SqliteStore:
    """The store of `directory`: SqliteStore, or where its database is lost, RecoveredStore over the last copy.

    So too where its file system is read-only, as one becomes whose disk fails. Raises StoreError where there is
    neither, or the directory cannot be used.
    """
    try:
        return SqliteStore(directory, verify=verify)
    except StoreError as error:
        if "aside" not in error.fields and not statedir.on_read_only_disk(directory):
            raise
        from kvmneg.store.recovered import RecoveredStore  # a bad day only

        return RecoveredStore(directory, error, verify)
