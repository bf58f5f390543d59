# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leases: which VM holds which contract, which processes keep it, and what its VMM says it has set.

Every call may raise StoreError, after which nothing has changed.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.store import audit as audits
from kvmneg.store import lease_rows as rows
from kvmneg.store.interface import Holder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmneg.store.interface import Audit, Lease
    from kvmneg.store.transactions import Database


class Leases:
    """Those of one host."""

    __slots__ = ("_database",)

    def __init__(self, database: Database) -> None:
        self._database = database

    # -- changing ---------------------------------------------------------------------------------

    def begin(
        self, lease: Lease, contract_bytes: bytes, holder: Holder | None = None, audit: Audit | None = None
    ) -> Lease:
        """Give a contract to a VM, and keep both; the state it begins with is 'begun'.

        A VM of that user that holds the same contract keeps the lease it has, which is what is returned; the holder
        is added to it. Raises UsageError (fields vm, held, asked) where the VM holds another contract, LimitExceeded
        (LEASES, CONTRACTS, both of a uid too, HOLDERS_PER_LEASE).
        """
        with self._database.changing("store the lease") as connection:
            stored = rows.begin(connection, lease, contract_bytes)
            if holder is not None:
                rows.hold(connection, stored.incarnation, holder)
            if audit is not None:  # an admin's act: a guest that was unknown is taken on
                detail = {"vm": lease.vm, "incarnation": stored.incarnation, "digest": lease.digest}
                audits.append(connection, "import", lease.generation, audit, detail)
            return stored

    def started(self, lease: Lease, boot: str) -> Lease:
        """The VM runs: its lease no longer expires. UsageError if it holds no contract any more."""
        with self._database.changing("store that the VM started") as connection:
            return rows.change(connection, lease.incarnation, "started", boot)

    def saved(self, lease: Lease) -> Lease:
        """The VM lies in an image: it counts, and nothing keeps it but itself. UsageError as for `started`."""
        with self._database.changing("store that the VM was saved") as connection:
            connection.execute("DELETE FROM holders WHERE lease = ?", (lease.incarnation,))
            return rows.change(connection, lease.incarnation, "saved", "")

    def end(self, *leases: Lease) -> int:
        """These VMs are gone; how many leases were outstanding."""
        with self._database.changing("store that a VM ended") as connection:
            return rows.finish(connection, (lease.incarnation for lease in leases), "ended")

    def hold(self, lease: Lease, holder: Holder) -> None:
        """Have one more process keep a lease. Raises LimitExceeded (HOLDERS_PER_LEASE)."""
        with self._database.changing("store who holds the lease") as connection:
            rows.hold(connection, lease.incarnation, holder)

    def let_go(self, holders: Iterable[tuple[int, Holder]]) -> list[int]:
        """These processes keep leases (by incarnation) no more; those whose last one it was end, and are returned."""
        ended = []
        with self._database.changing("store who holds no lease any more") as connection:
            for incarnation, holder in holders:
                key = (incarnation, holder.pid, holder.started)
                query = "DELETE FROM holders WHERE lease = ? AND pid = ? AND started = ?"
                if not connection.execute(query, key).rowcount:
                    continue
                query = "SELECT EXISTS (SELECT 1 FROM holders WHERE lease = ?)"
                if not connection.execute(query, (incarnation,)).fetchone()[0]:
                    ended.append(incarnation)
            rows.finish(connection, ended, "ended")
        return ended

    def report(self, lease: Lease, digest: str, body: bytes) -> None:
        """Keep what the VMM says it has set: its digest (64 digits), its bytes. Raises LimitExceeded (CONTRACTS)."""
        with self._database.changing("store what the VM has") as connection:
            rows.report(connection, lease.incarnation, digest, body)

    def expire(self, now: float) -> list[str]:
        """End what is due at `now` (seconds since 1970); nothing is written when nothing is due. Their VMs, sorted.

        A clock that is set back neither revives nor kills: expiry is a state that a lease enters once and for
        good, and a later `now` is never remembered and held against a younger deadline. What it would do is
        keep a lease for as long as the clock went back. No honest deadline is further off than
        limits.LEASE_UNSTARTED_SECONDS, so one that is gets exactly that from `now` on: at most one term more.

        A clock that is set forward looks like time that passed, and takes a lease early: its VMM is then
        refused at started() and negotiates again. A caller who anchors `now` once and counts on
        CLOCK_BOOTTIME from there has neither within its own life.
        """
        with self._database.reading("read the leases") as connection:
            latest = now + limits.LEASE_UNSTARTED_SECONDS
            furthest = rows.latest_deadline(connection)
            early = furthest is not None and furthest > latest
            if not early and not rows.due(connection, now):
                return []
        with self._database.changing("store that leases expired") as connection:
            due = rows.due(connection, now)
            rows.finish(connection, [number for number, _ in due], "expired")
            rows.cap_deadlines(connection, latest)
        return [vm for _, vm in due]

    # -- reading ----------------------------------------------------------------------------------

    def of(self, vm: str) -> list[Lease]:
        """The outstanding leases of a VM: one, unless several users have a VM of that UUID; by user."""
        with self._database.reading("read a lease") as connection:
            return rows.of_vm(connection, vm)

    def holds(self, digest: str) -> bool:
        """Whether an outstanding lease holds the contract of that digest."""
        with self._database.reading("read the leases") as connection:
            return rows.holds(connection, digest)

    def outstanding(self) -> list[Lease]:
        """The leases that count: begun, started or saved, oldest first."""
        with self._database.reading("read the leases") as connection:
            return rows.outstanding(connection)

    def holders(self) -> dict[int, list[Holder]]:
        """The processes that keep outstanding leases, by incarnation."""
        found: dict[int, list[Holder]] = {}
        with self._database.reading("read who holds leases") as connection:
            for lease, *holder in connection.execute("SELECT lease, pid, started, by FROM holders"):
                found.setdefault(lease, []).append(Holder(*holder))
        return found

    def speak_of(self, pid: int, started: int, boot: str) -> bool:
        """Whether a process of this boot keeps an outstanding lease, or is the one that began it."""
        query = (
            "SELECT EXISTS (SELECT 1 FROM holders WHERE pid = ?1 AND started = ?2) OR EXISTS "
            "(SELECT 1 FROM grants WHERE pid = ?1 AND pid_started = ?2 AND boot = ?3 AND finished IS NULL)"
        )
        with self._database.reading("read who holds leases") as connection:
            return bool(connection.execute(query, (pid, started, boot)).fetchone()[0])

    def contract(self, digest: str) -> bytes | None:
        """The contract of that digest: kept while a lease holds it, and for a while after."""
        with self._database.reading("read a contract") as connection:
            return rows.contract(connection, digest)

    def contracts_outstanding(self) -> list[tuple[str, bytes]]:
        """Digest and bytes of each contract an outstanding lease holds, sorted by digest."""
        with self._database.reading("read the contracts") as connection:
            return rows.contracts_outstanding(connection)

    def reported(self, digest: str) -> bytes | None:
        """The bytes of a set that an outstanding lease reported."""
        with self._database.reading("read what a VM has") as connection:
            return rows.reported_set(connection, digest)
