# SPDX-License-Identifier: LGPL-2.1-or-later
"""The audit: one row for each change of the fence, its proposals, roll-back sets and leases. It only grows.

A row is written in the transaction of the change it tells of, so that none is without the other. Triggers refuse
to change or to delete one, and to leave out a number: a row that was taken away by hand is seen as a gap.
"""

from __future__ import annotations

from kvmneg.errors import StoreError
from kvmneg.store.interface import AuditRow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from sqlite3 import Connection
    from typing import Any

    from kvmneg.store.interface import Audit

_COLUMNS = "id, generation, action, at, uid, pid, process, reason, detail"


def append(
    connection: Connection,
    action: str,
    generation: int,
    audit: Audit,
    detail: Mapping[str, Any] | None = None,
) -> int:
    """Write the next row, in the caller's transaction; returns its number, 1 for the first.

    `action` is a short word ("raise-commit", "roll-add"), `generation` the fence's once the change is made, `detail`
    what a later reader needs to understand it: JSON, without the sets themselves where a digest names them.
    """
    import json  # only where something is changed

    text = json.dumps(dict(detail or {}), sort_keys=True, separators=(",", ":"))
    number = newest(connection) + 1
    who = (audit.at, audit.uid, audit.pid, storable(audit.process), storable(audit.reason))
    connection.execute(
        f"INSERT INTO audit ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (number, generation, action, *who, text),
    )
    return number


def newest(connection: Connection) -> int:
    """The number of the last row, 0 before the first."""
    return int(connection.execute("SELECT COALESCE(MAX(id), 0) FROM audit").fetchone()[0])


def rows(connection: Connection, limit: int, *, before: int | None = None) -> list[AuditRow]:
    """The last `limit` rows, newest first; with `before` those below that number.

    Raises StoreError where a detail is no JSON object: somebody wrote into the database.
    """
    query = f"SELECT {_COLUMNS} FROM audit WHERE ?1 IS NULL OR id < ?1 ORDER BY id DESC LIMIT ?2"
    return [_row(row) for row in connection.execute(query, (before, max(0, limit)))]


def _row(row: tuple[Any, ...]) -> AuditRow:
    import json  # as in append

    try:
        detail = json.loads(row[-1])
    except ValueError as error:
        raise StoreError(f"row {row[0]} of the audit cannot be read: {error}") from error
    return AuditRow._make((*row[:-1], detail))


def storable(words: str) -> str:
    """A client's words as UTF-8 can hold them: JSON may carry half a surrogate pair, a name any byte."""
    return words.encode("utf-8", "replace").decode("utf-8")
