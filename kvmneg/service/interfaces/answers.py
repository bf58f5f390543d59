# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the interfaces' answers have in common, and whose word it is that changes something."""

from __future__ import annotations

import os

from kvmneg import limits
from kvmneg.clock import now
from kvmneg.errors import LimitExceeded, UsageError
from kvmneg.service.authorization import require_admin
from kvmneg.service.varlink.message import reply
from kvmneg.store.interface import Audit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from kvmneg.service.varlink.connection import Connection
    from kvmneg.store.interface import Lease

    Handler = Callable[[Connection, dict[str, Any]], dict[str, Any]]


def granted(lease: Lease, path: str) -> dict[str, Any]:
    """What a VM was given, as Begin and Guests.Receive answer it: `path` is the file with the binary form."""
    return {
        "digest": "sha256:" + lease.digest,
        "generation": lease.generation,
        "path": path,
        "expiresInSeconds": int(limits.LEASE_UNSTARTED_SECONDS),
        "incarnation": lease.incarnation,
    }


def that_fit(entries: Iterable[dict[str, Any]], room: int) -> list[dict[str, Any]]:
    """The first entries, as many as one reply may hold."""
    kept: list[dict[str, Any]] = []
    for entry in entries:
        room -= len(reply(entry))
        if room < 0:
            break
        kept.append(entry)
    return kept


def audit(connection: Connection, what: str, reason: str, action: str) -> Audit:
    """Who asks, and why. Raises NotPermitted, UsageError (no reason), LimitExceeded (a long one)."""
    peer = connection.peer
    require_admin(peer, what, action)
    if not reason.strip():
        raise UsageError(f"a reason is needed to {what}", hint="a later admin will ask for it")
    if len(reason) > limits.REASON_CHARACTERS:
        raise LimitExceeded("REASON_CHARACTERS", limits.REASON_CHARACTERS, "say it shorter")
    return Audit(peer.uid, peer.pid, now(), reason, _process_name(peer.pid))


def _process_name(pid: int) -> str:
    """The peer's name as ps shows it, for the record only: any process may choose its own."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return os.fsdecode(file.read(64)).strip()
    except OSError:
        return ""
