# SPDX-License-Identifier: LGPL-2.1-or-later
"""Contracts and grants inside the embedded store: each function is one step of a caller's transaction.

Finished grants stay for the record, the newest limits.GRANTS_FINISHED of them, with their contracts: a client
that begins and ends without end does not fill the disk.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import LimitExceeded, StoreError, UsageError
from kvmneg.store.interface import Grant

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sqlite3 import Connection
    from typing import Any

    from kvmneg.store.interface import GrantState

_COLUMNS = "vm, digest, generation, uid, pid, begun_at, deadline, state"
_HELD = "finished IS NULL"  # spelt as in the partial indexes, which serve a query only then


def held_by(connection: Connection, vm: str) -> Grant | None:
    """The outstanding grant of a VM."""
    row = connection.execute(f"SELECT {_COLUMNS} FROM grants WHERE vm = ? AND {_HELD}", (vm,)).fetchone()
    return Grant(*row) if row else None


def holds(connection: Connection, digest: str) -> bool:
    """Whether a contract is held by an outstanding grant."""
    query = f"SELECT EXISTS (SELECT 1 FROM grants WHERE digest = ? AND {_HELD})"
    return bool(connection.execute(query, (digest,)).fetchone()[0])


def outstanding(connection: Connection) -> list[Grant]:
    """Every outstanding grant, oldest first."""
    return [
        Grant(*row) for row in connection.execute(f"SELECT {_COLUMNS} FROM grants WHERE {_HELD} ORDER BY id")
    ]


def begin(connection: Connection, grant: Grant, body: bytes) -> Grant:
    """Insert a grant and its contract, or find the same one; see Store.begin."""
    held = held_by(connection, grant.vm)
    if held is not None:
        if held.digest == grant.digest:
            return held
        message = f"VM {grant.vm} holds contract {held.digest} already"
        hint = "end that one first; another VM needs another UUID"
        raise UsageError(message, hint=hint, vm=grant.vm, held=held.digest, asked=grant.digest)
    _check_room(connection, grant.uid)
    _keep_contract(connection, grant.digest, body)
    stored = grant._replace(state="begun")
    connection.execute(f"INSERT INTO grants ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", stored)
    return stored


def _count(connection: Connection, where: str, *values: Any) -> int:
    row = connection.execute(f"SELECT COUNT(*) FROM grants WHERE {_HELD} {where}", values).fetchone()
    return int(row[0])


def _check_room(connection: Connection, uid: int) -> None:
    # a user's own limit first: it tells one who runs away that it is them
    if _count(connection, "AND uid = ?", uid) >= limits.GRANTS_PER_UID:
        raise LimitExceeded("GRANTS_PER_UID", limits.GRANTS_PER_UID, hint=f"uid {uid} must end some first")
    if _count(connection, "") >= limits.GRANTS:
        raise LimitExceeded("GRANTS", limits.GRANTS, hint="some must end first")


def _keep_contract(connection: Connection, digest: str, body: bytes) -> None:
    known = contract(connection, digest)
    if known is None:
        connection.execute("INSERT INTO contracts (digest, body) VALUES (?, ?)", (digest, body))
    elif known != body:
        raise StoreError(f"contract {digest} is stored with other bytes", hint="one of the two is damaged")


def contract(connection: Connection, digest: str) -> bytes | None:
    """The bytes of a contract."""
    row = connection.execute("SELECT body FROM contracts WHERE digest = ?", (digest,)).fetchone()
    return bytes(row[0]) if row else None


def contracts_outstanding(connection: Connection) -> list[tuple[str, bytes]]:
    """Digest and bytes of each contract that is held, sorted."""
    query = f"SELECT digest, body FROM contracts WHERE digest IN (SELECT digest FROM grants WHERE {_HELD})"
    return [(str(digest), bytes(body)) for digest, body in connection.execute(f"{query} ORDER BY digest")]


def start(connection: Connection, vm: str) -> Grant:
    """Mark a VM's grant as started; see Store.started."""
    held = held_by(connection, vm)
    if held is None:
        hint = "it expired or was ended: negotiate and begin again"
        raise UsageError(f"VM {vm} holds no contract", hint=hint, vm=vm)
    if held.state != "started":  # else nothing is written, and nothing synced
        connection.execute(f"UPDATE grants SET state = 'started' WHERE vm = ? AND {_HELD}", (vm,))
    return held._replace(state="started")


def finish(connection: Connection, vms: list[str], state: GrantState) -> None:
    """End outstanding grants as 'ended' or 'expired', for good, and forget the oldest finished ones."""
    last = _last_finished(connection)
    connection.executemany(
        f"UPDATE grants SET state = ?, finished = ? WHERE vm = ? AND {_HELD}",
        [(state, last + place, vm) for place, vm in enumerate(vms, 1)],
    )
    _forget(connection, last + len(vms) - limits.GRANTS_FINISHED)


def _last_finished(connection: Connection) -> int:
    row = connection.execute("SELECT MAX(finished) FROM grants WHERE finished IS NOT NULL").fetchone()
    return int(row[0] or 0)


def _forget(connection: Connection, until: int) -> None:
    """Delete grants finished in that place or before, and the contracts that no other grant has."""
    query = "SELECT id, digest FROM grants WHERE finished IS NOT NULL AND finished <= ?"
    old = connection.execute(query, (until,)).fetchall()
    connection.executemany("DELETE FROM grants WHERE id = ?", [(number,) for number, _ in old])
    connection.executemany(
        "DELETE FROM contracts WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM grants WHERE digest = ?1)",
        [(digest,) for digest in {digest for _, digest in old}],
    )


def due(connection: Connection, now: float) -> list[str]:
    """VMs whose grant was begun and not started by its deadline."""
    query = "SELECT vm FROM grants WHERE state = 'begun' AND deadline <= ? ORDER BY vm"
    return [str(vm) for (vm,) in connection.execute(query, (now,))]


def latest_deadline(connection: Connection) -> float | None:
    """The latest deadline of a grant not yet started."""
    row = connection.execute("SELECT MAX(deadline) FROM grants WHERE state = 'begun'").fetchone()
    return None if row[0] is None else float(row[0])


def cap_deadlines(connection: Connection, latest: float) -> None:
    """Bring deadlines beyond `latest` back to it."""
    connection.execute(
        "UPDATE grants SET deadline = ? WHERE state = 'begun' AND deadline > ?", (latest, latest)
    )
