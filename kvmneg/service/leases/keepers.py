# SPDX-License-Identifier: LGPL-2.1-or-later
"""What keeps a lease, and lets it go by itself: a connection that is held open, or a process, watched by its pidfd.

After a restart of the daemon every keeper is looked at again. One that is certainly gone (no such process, another one
of its number, an earlier boot) lets go; one of which nothing can be said keeps: no lease is dropped on doubt.
"""

from __future__ import annotations

import errno
import os

from kvmneg.errors import NotPermitted, StoreError, UsageError
from kvmneg.service.authorization import is_admin, permitted, polkit_name
from kvmneg.store.interface import Holder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmneg.service.leases.descriptors import Descriptors
    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.loop import Loop
    from kvmneg.service.varlink.peer import Peer
    from kvmneg.service.varlink.server import Server
    from kvmneg.store.leases import Leases

    Key = tuple[int, int]  # number and start of a process


class Watch:
    """One process that is watched, and the leases (by incarnation) that it keeps. `fd` is -1 where it cannot be."""

    __slots__ = ("fd", "holders")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.holders: dict[int, Holder] = {}


class Keepers:
    """Those of one daemon. `ended` is told the incarnations whose last keeper has gone."""

    def __init__(
        self,
        records: Leases,
        ended: Callable[[list[int]], None],
        on_trouble: Callable[[str], None],
        *,
        descriptors: Descriptors,
        proc: str = "/proc",
    ) -> None:
        self.records = records
        self._ended = ended
        self._on_trouble = on_trouble
        self._proc = proc
        self._descriptors = descriptors
        self._loop: Loop | None = None
        self._processes: dict[Key, Watch] = {}
        self._connections: dict[Connection, dict[int, Holder]] = {}
        self._names: dict[Connection, str] = {}  # of the connections where a manager keeps them
        self._left: dict[tuple[int, Key], Holder] = {}  # gone, and not in the store yet
        self._stopped = False

    # -- who may keep -----------------------------------------------------------------------------

    def of_connection(self, connection: Connection) -> Holder:
        """The peer as a keeper by its connection."""
        peer = connection.peer
        from kvmneg.host import guests  # with the first lease

        process = guests.process(peer.pid, self._proc) if peer.pid > 0 else None
        return Holder(peer.pid, process.started if process else 0, "connection")

    def require_our_numbers(self, peer: Peer) -> None:
        """Whoever names a process must see the same numbers. In a container its own is somebody else's here.

        Raises UsageError.
        """
        if peer.pid <= 0 or _is_nested(peer.pid, self._proc):
            raise UsageError(
                "the caller is in another pid namespace: its numbers of processes are not this daemon's",
                hint="hold the lease by the connection",
            )

    def of_process(self, pid: int, peer: Peer) -> Holder:
        """A process as a keeper by its life. Raises UsageError (there is none), NotPermitted (another user's)."""
        from kvmneg.host import guests

        process = guests.process(pid, self._proc) if pid > 0 else None
        if process is None:
            raise UsageError(
                f"there is no process {pid}", hint="name the process that runs the VM, while it runs"
            )
        if process.uid != peer.uid and not (is_admin(peer) or permitted(peer, "register")):
            raise NotPermitted(
                f"process {pid} belongs to uid {process.uid}",
                hint="ask as that user or as an admin",
                action=polkit_name("register"),
            )
        return Holder(pid, process.started, "process")

    # -- keeping ----------------------------------------------------------------------------------

    def start(self, loop: Loop) -> None:
        """Watch whoever keeps a lease, from now on."""
        self._loop = loop
        for watch in self._processes.values():
            self._watch(watch)

    def stop(self) -> None:
        """The daemon ends: connections that close now let nothing go."""
        self._stopped = True
        for watch in self._processes.values():
            self._unwatch(watch)

    def keep(self, incarnation: int, holder: Holder, connection: Connection | None = None) -> None:
        """Watch one more keeper, which the store has. UsageError where its process has ended already."""
        if connection is not None:
            self._keep_connection(connection, {incarnation: holder})
        elif not self._keep_process(incarnation, holder):
            self._leave([(incarnation, holder)])
            raise UsageError(f"process {holder.pid} has ended")

    def forget(self, incarnation: int) -> None:
        """A lease has ended: nobody keeps it any more."""
        for kept in self._connections.values():
            kept.pop(incarnation, None)
        for key, watch in list(self._processes.items()):
            if watch.holders.pop(incarnation, None) is not None and not watch.holders:
                self._unwatch(self._processes.pop(key))

    def resume(self, holders: Iterable[tuple[int, Holder]]) -> None:
        """After a restart: watch those of this boot that the store has, and let those go that are gone."""
        gone = [(number, holder) for number, holder in holders if not self._keep_process(number, holder)]
        self._leave(gone)

    def _keep_connection(self, connection: Connection, holders: dict[int, Holder], kept_as: str = "") -> None:
        """`kept_as` is the name under which the manager has it already."""
        if connection not in self._connections:
            self._connections[connection] = {}
            connection.on_closed = self._closed
            if not kept_as:
                self._descriptors.keep(_name(holders), connection.fd)
            self._names[connection] = kept_as or _name(holders)
        self._connections[connection].update(holders)

    def adopt(self, server: Server) -> None:
        """After a restart: serve the connections on that were held before it.

        A connection keeps whatever its process held by a connection: with several, all do, and the last one counts.
        """
        adopted: set[int] = set()
        gone: list[tuple[int, Holder]] = []
        stored = self._descriptors.kept()
        names = {name for name, _ in stored}
        for name, fd in stored:
            try:
                connection = server.acceptor.adopt(fd)
            except OSError:
                self._descriptors.drop(name)
                continue  # it was closed meanwhile: its process tells
            holder = self.of_connection(connection)
            watch = self._processes.get((holder.pid, holder.started))
            held = {
                number: one
                for number, one in (watch.holders if watch else {}).items()
                if one.by == "connection" and (holder.pid > 0 or _is_of(number, name, names))
            }
            if not held:
                self._descriptors.drop(name)
                server.close_connection(connection)  # its leases have ended
                continue
            adopted |= set(held)
            if connection.closed:  # while no daemon was there to see it
                self._descriptors.drop(name)
                gone += held.items()
            else:
                self._keep_connection(connection, held, name)
        for key, watch in list(self._processes.items()):
            for number in adopted & set(watch.holders):
                if watch.holders[number].by == "connection":
                    del watch.holders[number]
            if not watch.holders:
                self._unwatch(self._processes.pop(key))
        kept = {number for one in self._connections.values() for number in one}
        self._leave((number, holder) for number, holder in gone if number not in kept)

    def _keep_process(self, incarnation: int, holder: Holder) -> bool:
        """Watch a process; false where it has certainly ended."""
        key = (holder.pid, holder.started)
        watch = self._processes.get(key)
        if watch is None:
            opened = self._open(holder)
            if opened is None:
                return False
            watch = self._processes[key] = Watch(opened)
            self._watch(watch)
        watch.holders[incarnation] = holder
        return True

    def _open(self, holder: Holder) -> int | None:
        """A pidfd, -1 where it cannot be had, None where the process has ended."""
        if holder.pid <= 0:
            return -1  # of another pid namespace: nothing is known of it
        try:
            fd = os.pidfd_open(holder.pid)
        except ProcessLookupError:
            return None
        except OSError as error:
            # EINVAL: the number of a thread now, so of another task
            return None if error.errno == errno.EINVAL else -1
        from kvmneg.host import guests

        process = guests.process(holder.pid, self._proc)
        if process is not None and holder.started and process.started != holder.started:
            os.close(fd)
            return None
        return fd  # without its start (a hidden /proc) the number has to do

    def _watch(self, watch: Watch) -> None:
        if self._loop is not None and watch.fd >= 0:
            self._loop.watch_fd(watch.fd, lambda: self._process_ended(watch))

    def _unwatch(self, watch: Watch) -> None:
        fd, watch.fd = watch.fd, -1
        if fd >= 0:
            if self._loop is not None:
                self._loop.unwatch_fd(fd)
            os.close(fd)

    # -- letting go -------------------------------------------------------------------------------

    def _process_ended(self, watch: Watch) -> None:
        self._unwatch(watch)
        for key, one in list(self._processes.items()):
            if one is watch:
                del self._processes[key]
        self._leave(watch.holders.items())

    def _closed(self, connection: Connection) -> None:
        kept = self._connections.pop(connection, {})
        if self._stopped:
            return
        self._descriptors.drop(self._names.pop(connection))
        others = {
            (number, (holder.pid, holder.started))
            for one in self._connections.values()
            for number, holder in one.items()
        }
        watched = {(number, key) for key, watch in self._processes.items() for number in watch.holders}
        self._leave(
            (number, holder)
            for number, holder in kept.items()
            if (number, (holder.pid, holder.started)) not in others | watched
        )

    def _leave(self, gone: Iterable[tuple[int, Holder]]) -> None:
        for number, holder in gone:
            self._left[number, (holder.pid, holder.started)] = holder
        self.settle()

    def settle(self) -> None:
        """Write down who has gone; a store that refuses is asked again the next time."""
        if not self._left:
            return
        try:
            ended = self.records.let_go([(number, holder) for (number, _), holder in self._left.items()])
        except StoreError as error:
            self._on_trouble(f"a VM has ended, and its lease counts on: {error}")
            return
        self._left.clear()
        for number in ended:
            self.forget(number)
        if ended:
            self._ended(ended)

    def look_again(self) -> None:
        """Look at those that no descriptor tells of; and try what could not be written."""
        for key, watch in list(self._processes.items()):
            if watch.fd < 0 and key[0] > 0:
                holders = dict(watch.holders)
                del self._processes[key]
                self.resume(holders.items())
        self.settle()

    def unwatched(self) -> set[int]:
        """Leases (by incarnation) of which nobody can say whether their keeper still is."""
        return {number for watch in self._processes.values() if watch.fd < 0 for number in watch.holders}


def _is_nested(pid: int, proc: str) -> bool:
    """Whether a process has a number in a namespace below this one's too (NSpid, proc_pid_status(5))."""
    try:
        with open(f"{proc}/{pid}/status", encoding="utf-8", errors="replace") as file:
            return any(line.startswith("NSpid:") and len(line.split()) > 2 for line in file)
    except OSError:
        return False  # it has ended, or /proc is another one


def _name(holders: dict[int, Holder]) -> str:
    """A connection's name is its first lease's number, which is nobody else's."""
    return f"held-{min(holders)}"


def _is_of(number: int, name: str, names: set[str]) -> bool:
    """Whether a connection of that name may hold a lease, of those that are kept: not one that another is named by.

    All that can be said of peers in other pid namespaces, who are one and the same by their numbers.
    """
    return f"held-{number}" == name or f"held-{number}" not in names
