# SPDX-License-Identifier: LGPL-2.1-or-later
"""The daemon's events in words: what is said of a change, a refusal, a stranger (kvmneg.service.journal).

Nothing here is on the way to a contract: each is imported where there is something to tell.
"""

from __future__ import annotations

from kvmneg import __version__, limits
from kvmneg.errors import KvmnegError, LimitExceeded, NotPermitted, StoreError
from kvmneg.service import journal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.host.guests import Process
    from kvmneg.service.leases.unknown import UnknownGuests
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.loop import Loop
    from kvmneg.service.varlink.peer import Peer
    from kvmneg.store.interface import Audit

# Methods that would have changed the fence.
_CHANGES = frozenset(
    f"org.kvmneg.Fence.{name}" for name in ("Pin", "Unpin", "Raise", "Lower", "Emergency", "Commit", "Abort")
)
_DONE = {
    "fence-pinned": "pinned a fence",
    "fence-unpinned": "took the fence down",
    "fence-proposed": "proposed a higher fence",
    "fence-raised": "raised the fence",
    "fence-lowered": "lowered the fence for new guests",
    "fence-settled": "ended the lowering of the fence",
    "fence-aborted": "dropped what was proposed for the fence",
}


def trouble(text: str) -> None:
    """What went wrong beside an answer that is right; the lines after the first are hints."""
    lines = text.split("\n")
    journal.event("trouble", *lines, reason=lines[0])


def started(node: Node, status: str) -> None:
    """The daemon serves."""
    journal.event(
        "started",
        f"started: {status}",
        state=node.state,
        generation=node.generation,
        fence_digest=node.fence_digest,
        host_digest=node.host_digest,
        version=__version__,
    )


def reloaded(file: str, found: bool, waiting: list[str]) -> None:
    """The settings hold; those that wait do from the next start on. Where there is no file, they are as delivered."""
    lines = [f"settings of {file} reloaded" if found else f"no {file}: settings as delivered"]
    if waiting:
        lines.append(f"{', '.join(waiting)}: changed, and taken at the next start")
    journal.event("reloaded", *lines, file=file, settings=waiting or None)


def not_reloaded(file: str, error: KvmnegError) -> None:
    """What is wrong with the file."""
    lines = f"the settings stay as they were: {error}".split("\n")
    line, key = error.fields.get("line"), error.fields.get("key")
    journal.event("reload-refused", *lines, file=file, line=line, key=key, reason=error.message)


def store(fault: StoreError | None) -> None:
    """The state directory takes no changes any more, or takes them again (None)."""
    if fault is None:
        journal.event("store-recovered", "the state is kept again: a change was written")
    else:
        lines = str(fault).split("\n")
        journal.event("store-failing", *lines, reason=lines[0], cause=fault.fields.get("cause"))


def moved(name: str, node: Node, audit: Audit, *, urgent: bool = False) -> None:
    """Somebody changed the fence, or what is proposed for it; `name` is the event's."""
    journal.event(
        name,
        f"uid {audit.uid} {_DONE[name]}, generation {node.generation}: {audit.reason}",
        generation=node.generation,
        fence_digest=node.fence_digest,
        uid=audit.uid,
        pid=audit.pid,
        reason=audit.reason,
        urgent=int(urgent) if name == "fence-lowered" else None,
    )


def breached(host: str, combo: str, generation: int, lost: list[str]) -> None:
    """A host offers less than its fence promises: the features that it lacks; none where it offers them again."""
    names = ", ".join(lost[:8])
    if lost:
        journal.event(
            "breached",
            f"{host} offers less than fence generation {generation} promises: {names}",
            host=host,
            generation=generation,
            combo_digest=combo,
            features=lost,
            count=len(lost),
        )
    else:
        text = f"{host} offers again what fence generation {generation} promises"
        journal.event("healed", text, host=host, generation=generation, combo_digest=combo)


def unmeasured(reason: KvmnegError, text: str) -> None:
    """A host cannot be measured, and grants nothing."""
    cause = reason.fields.get("cause")
    journal.event("host-unmeasured", *text.split("\n"), reason=reason.message, cause=cause)


def refused(method: str, peer: Peer, error: KvmnegError, generation: int, *, dry_run: bool = False) -> None:
    """A call was refused. Told where an operator cares: an administrator's act, a limit, a change of the fence."""
    if isinstance(error, NotPermitted):
        because = f" ({error.why})" if error.why else ""
        text = f"{method} was refused to uid {peer.uid} (pid {peer.pid}): {error.message}{because}"
        why = error.why or error.message
        journal.event("peer-refused", text, method=method, uid=peer.uid, pid=peer.pid, reason=why)
    elif isinstance(error, LimitExceeded):
        limit(error, peer, method)
    elif method in _CHANGES and not dry_run and not isinstance(error, StoreError):
        short = error.varlink.rpartition(".")[2]
        journal.event(
            "fence-refused",
            f"{method} of uid {peer.uid} (pid {peer.pid}) was refused, {short}: {error.message}",
            method=method,
            error=short,
            uid=peer.uid,
            pid=peer.pid,
            generation=generation,
        )


def limit(error: LimitExceeded, peer: Peer, method: str | None = None) -> None:
    """A client went over a limit."""
    journal.event(
        "limit-hit",
        f"uid {peer.uid} (pid {peer.pid}) was refused: {error.message}",
        limit=error.fields["limit"],
        allowed=error.fields["allowed"],
        method=method,
        uid=peer.uid,
        pid=peer.pid,
    )


class Strangers:
    """Tells of each guest that nobody negotiated for: some VM monitors make their VM first, and ask then."""

    def __init__(self, loop: Loop, guests: UnknownGuests) -> None:
        self._loop = loop
        self._guests = guests
        self._new: list[Process] = []
        guests.on_found = self._found

    def _found(self, process: Process) -> None:
        if not self._new:
            self._loop.after(limits.STRANGER_SECONDS, self._tell)
        if len(self._new) < limits.UNKNOWN_GUESTS:
            self._new.append(process)

    def _tell(self) -> None:
        new, self._new = set(self._new), []
        for one in self._guests.all():
            if one.process in new and not one.waived:
                process, called = one.process, one.called
                name = f", {called['name']}" if "name" in called else ""
                who = f"process {process.pid} ({process.name}{name}) of uid {process.uid}"
                journal.event(
                    "unknown-guest",
                    f"{who} has a VM that nobody negotiated for",
                    process_pid=process.pid,
                    process_uid=process.uid,
                    process=process.name,
                    vm=called.get("uuid"),
                    vm_name=called.get("name"),
                )
