# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rows of leases, their contracts and holders: each function is one step of a caller's transaction.

Finished leases stay for the record, the newest limits.LEASES_FINISHED of them, with their contracts: a client
that begins and ends without end does not fill the disk.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import LimitExceeded, StoreError, UsageError
from kvmneg.store.interface import Lease

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from sqlite3 import Connection
    from typing import Any

    from kvmneg.store.interface import Holder, LeaseState

_COLUMNS = "vm, digest, generation, uid, pid, begun_at, deadline, state, id, boot, reported, pid_started"
_HELD = "finished IS NULL"  # spelt as in the partial indexes, which serve a query only then


def of_vm(connection: Connection, vm: str) -> list[Lease]:
    """The outstanding leases of a VM: one, unless several users have a VM of that UUID; by user."""
    query = f"SELECT {_COLUMNS} FROM grants WHERE vm = ? AND {_HELD} ORDER BY uid"
    return [Lease(*row) for row in connection.execute(query, (vm,))]


def held_by(connection: Connection, vm: str, uid: int) -> Lease | None:
    """The outstanding lease of a user's VM."""
    query = f"SELECT {_COLUMNS} FROM grants WHERE vm = ? AND uid = ? AND {_HELD}"
    row = connection.execute(query, (vm, uid)).fetchone()
    return Lease(*row) if row else None


def holds(connection: Connection, digest: str) -> bool:
    """Whether a contract is held by an outstanding lease."""
    query = f"SELECT EXISTS (SELECT 1 FROM grants WHERE digest = ? AND {_HELD})"
    return bool(connection.execute(query, (digest,)).fetchone()[0])


def outstanding(connection: Connection) -> list[Lease]:
    """Every outstanding lease, oldest first."""
    query = f"SELECT {_COLUMNS} FROM grants WHERE {_HELD} ORDER BY id"
    return [Lease(*row) for row in connection.execute(query)]


def begin(connection: Connection, lease: Lease, body: bytes) -> Lease:
    """Insert a lease and its contract, or find the same one; see Leases.begin."""
    held = held_by(connection, lease.vm, lease.uid)
    if held is not None:
        if held.digest == lease.digest:
            return held
        message = f"VM {lease.vm} holds contract {held.digest} already"
        hint = "end that one first; another VM needs another UUID"
        raise UsageError(message, hint=hint, vm=lease.vm, held=held.digest, asked=lease.digest)
    _check_room(connection, lease.uid)
    if not holds(connection, lease.digest):
        _check_distinct(connection, "digest", lease.uid)
    _keep_contract(connection, lease.digest, body)
    row = (*lease[:7], "begun", lease.boot, lease.pid_started)
    columns = "vm, digest, generation, uid, pid, begun_at, deadline, state, boot, pid_started"
    added = connection.execute(f"INSERT INTO grants ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    return lease._replace(state="begun", incarnation=int(added.lastrowid or 0))


def _count(connection: Connection, where: str, *values: Any) -> int:
    row = connection.execute(f"SELECT COUNT(*) FROM grants WHERE {_HELD} {where}", values).fetchone()
    return int(row[0])


def _check_room(connection: Connection, uid: int) -> None:
    # a user's own limit first: it tells one who runs away that it is them
    if _count(connection, "AND uid = ?", uid) >= limits.LEASES_PER_UID:
        raise LimitExceeded("LEASES_PER_UID", limits.LEASES_PER_UID, hint=f"uid {uid} must end some first")
    if _count(connection, "") >= limits.LEASES + (limits.LEASES_RESERVED if uid < limits.SYSTEM_UIDS else 0):
        raise LimitExceeded("LEASES", limits.LEASES, hint="some must end first")


def _check_distinct(connection: Connection, column: str, uid: int) -> None:
    """Whether one more contract, or reported set, has room. Raises LimitExceeded."""
    query = f"SELECT COUNT(DISTINCT {column}) FROM grants WHERE {_HELD}"
    if connection.execute(f"{query} AND uid = ?", (uid,)).fetchone()[0] >= limits.CONTRACTS_PER_UID:
        raise LimitExceeded(
            "CONTRACTS_PER_UID", limits.CONTRACTS_PER_UID, hint=f"uid {uid} must end some first"
        )
    reserved = limits.CONTRACTS_PER_UID if uid < limits.SYSTEM_UIDS else 0
    if connection.execute(query).fetchone()[0] >= limits.CONTRACTS + reserved:
        raise LimitExceeded("CONTRACTS", limits.CONTRACTS, hint="some must end first")


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


def change(connection: Connection, incarnation: int, state: LeaseState, boot: str) -> Lease:
    """Bring an outstanding lease into another outstanding state. UsageError where it is none any more."""
    query = f"SELECT {_COLUMNS} FROM grants WHERE id = ? AND {_HELD}"
    row = connection.execute(query, (incarnation,)).fetchone()
    if row is None:
        hint = "it expired or was ended: negotiate and begin again"
        raise UsageError("this VM holds no contract any more", hint=hint)
    held = Lease(*row)
    if held.state != state or held.boot != boot:  # else nothing is written, and nothing synced
        connection.execute("UPDATE grants SET state = ?, boot = ? WHERE id = ?", (state, boot, incarnation))
    return held._replace(state=state, boot=boot)


def finish(connection: Connection, incarnations: Iterable[int], state: LeaseState) -> int:
    """End outstanding leases as 'ended' or 'expired', for good, and forget the oldest finished ones; how many ended."""
    last, count = _last_finished(connection), 0
    for number in incarnations:
        query = f"UPDATE grants SET state = ?, finished = ? WHERE id = ? AND {_HELD}"
        count += connection.execute(query, (state, last + count + 1, number)).rowcount
        connection.execute("DELETE FROM holders WHERE lease = ?", (number,))
    _forget(connection, last + count - limits.LEASES_FINISHED)
    return count


def _last_finished(connection: Connection) -> int:
    row = connection.execute("SELECT MAX(finished) FROM grants WHERE finished IS NOT NULL").fetchone()
    return int(row[0] or 0)


def _forget(connection: Connection, until: int) -> None:
    """Delete leases finished in that place or before, and contracts and reported sets that no other one has."""
    query = "SELECT id, digest, reported FROM grants WHERE finished IS NOT NULL AND finished <= ?"
    old = connection.execute(query, (until,)).fetchall()
    connection.executemany("DELETE FROM grants WHERE id = ?", [(row[0],) for row in old])
    connection.executemany(
        "DELETE FROM contracts WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM grants WHERE digest = ?1)",
        [(digest,) for digest in {row[1] for row in old}],
    )
    _forget_reported(connection, {row[2] for row in old if row[2]})


def _forget_reported(connection: Connection, digests: Iterable[str]) -> None:
    connection.executemany(
        "DELETE FROM reported_sets WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM grants WHERE reported = ?1)",
        [(digest,) for digest in digests],
    )


def report(connection: Connection, incarnation: int, digest: str, body: bytes) -> None:
    """Keep the set that a VMM says it has set, in the place of an earlier one. LimitExceeded."""
    row = connection.execute("SELECT reported, uid FROM grants WHERE id = ?", (incarnation,)).fetchone()
    if row is None or row[0] == digest:
        return
    alone = "SELECT NOT EXISTS (SELECT 1 FROM grants WHERE reported = ? AND id != ?)"
    replaces = row[0] and connection.execute(alone, (row[0], incarnation)).fetchone()[0]
    if not replaces and reported_set(connection, digest) is None:
        _check_distinct(connection, "reported", int(row[1]))
    connection.execute("INSERT OR IGNORE INTO reported_sets (digest, body) VALUES (?, ?)", (digest, body))
    connection.execute("UPDATE grants SET reported = ? WHERE id = ?", (digest, incarnation))
    _forget_reported(connection, [row[0]] if row[0] else [])


def reported_set(connection: Connection, digest: str) -> bytes | None:
    """The bytes of a set that a lease reported."""
    row = connection.execute("SELECT body FROM reported_sets WHERE digest = ?", (digest,)).fetchone()
    return bytes(row[0]) if row else None


def hold(connection: Connection, incarnation: int, holder: Holder) -> None:
    """Add a process to those that keep a lease. LimitExceeded (HOLDERS_PER_LEASE)."""
    query = "SELECT pid, started FROM holders WHERE lease = ?"
    rows = connection.execute(query, (incarnation,)).fetchall()
    if (holder.pid, holder.started) not in rows and len(rows) >= limits.HOLDERS_PER_LEASE:
        hint = "one of them must end first"
        raise LimitExceeded("HOLDERS_PER_LEASE", limits.HOLDERS_PER_LEASE, hint=hint)
    connection.execute(
        "INSERT OR REPLACE INTO holders (lease, pid, started, by) VALUES (?, ?, ?, ?)", (incarnation, *holder)
    )


def due(connection: Connection, now: float) -> list[tuple[int, str]]:
    """Number and VM of the leases begun, not started by their deadline, and held by no process."""
    query = (
        "SELECT id, vm FROM grants WHERE state = 'begun' AND deadline <= ? "
        "AND NOT EXISTS (SELECT 1 FROM holders WHERE lease = grants.id) ORDER BY vm, uid"
    )
    return [(int(number), str(vm)) for number, vm in connection.execute(query, (now,))]


def latest_deadline(connection: Connection) -> float | None:
    """The latest deadline of a lease not yet started."""
    row = connection.execute("SELECT MAX(deadline) FROM grants WHERE state = 'begun'").fetchone()
    return None if row[0] is None else float(row[0])


def cap_deadlines(connection: Connection, latest: float) -> None:
    """Bring deadlines beyond `latest` back to it."""
    connection.execute(
        "UPDATE grants SET deadline = ? WHERE state = 'begun' AND deadline > ?", (latest, latest)
    )
