# SPDX-License-Identifier: LGPL-2.1-or-later
"""Unknown guests that an admin waived: kept for as long as the process can live, which is until the next boot."""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import LimitExceeded
from kvmneg.store import audit as audits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.host.guests import Process
    from kvmneg.store.interface import Audit
    from kvmneg.store.transactions import Database


class Waivers:
    """Those of one boot of this host (`boot`: /proc/sys/kernel/random/boot_id)."""

    def __init__(self, database: Database, boot: str) -> None:
        self._database = database
        self._boot = boot

    def all(self) -> dict[tuple[int, int], str]:
        """The reason of each, by the process's number and start."""
        with self._database.reading("read which guests were waived") as connection:
            query = "SELECT pid, started, reason FROM waivers WHERE boot = ?"
            return {
                (pid, started): reason for pid, started, reason in connection.execute(query, (self._boot,))
            }

    def add(self, process: Process, audit: Audit, generation: int) -> None:
        """Waive one; again replaces the reason. Raises LimitExceeded (WAIVERS)."""
        with self._database.changing("store that a guest was waived") as connection:
            connection.execute("DELETE FROM waivers WHERE boot <> ?", (self._boot,))
            if connection.execute("SELECT COUNT(*) FROM waivers").fetchone()[0] >= limits.WAIVERS:
                raise LimitExceeded("WAIVERS", limits.WAIVERS, "end some of these guests")
            connection.execute(
                "INSERT OR REPLACE INTO waivers (boot, pid, started, reason) VALUES (?, ?, ?, ?)",
                (self._boot, process.pid, process.started, audits.storable(audit.reason)),
            )
            detail = {"pid": process.pid, "started": process.started, "uid": process.uid}
            audits.append(connection, "waive", generation, audit, {**detail, "process": process.name})
