# SPDX-License-Identifier: LGPL-2.1-or-later
"""Leases: what VMs of this host hold, from Begin until they are gone. The node decides what may be granted.

A lease belongs to a VM of a user: its UUID, and its incarnation, a number that is given once. What keeps it besides its
VMM's word is kvmneg.service.leases.keepers'; the contracts' files are a view of what is held.
"""

from __future__ import annotations

from kvmneg import limits
from kvmneg.clock import now
from kvmneg.errors import KvmnegError, NotPermitted, StoreError, UsageError
from kvmneg.service.authorization import is_admin
from kvmneg.service.leases.descriptors import Descriptors
from kvmneg.service.leases.keepers import Keepers
from kvmneg.store.interface import Lease

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from kvmneg.features.difference import Blocker
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.host.guests import Process
    from kvmneg.policy.contract import Contract
    from kvmneg.policy.leases import Holding
    from kvmneg.service.leases.contracts import ContractFiles
    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.peer import Peer
    from kvmneg.service.varlink.server import Server
    from kvmneg.store.interface import Audit, Holder
    from kvmneg.store.leases import Leases as Records


class Leases:
    """Those of one host. `boot` is the host's boot id and the daemon's pid namespace; `wall` a clock that is never set.

    `ended` are called whenever a VM holds nothing any more.
    """

    def __init__(
        self,
        records: Records,
        files: ContractFiles,
        *,
        boot: str,
        wall: Callable[[], float],
        on_trouble: Callable[[str], None],
        descriptors: Descriptors | None = None,
        proc: str = "/proc",
        known: bool = True,
    ) -> None:
        self.records = records
        self.files = files
        self.ended: list[Callable[[], None]] = []
        self._boot = boot
        self._wall = wall
        self._on_trouble = on_trouble
        self.keepers = Keepers(
            records, self._let_go, on_trouble, descriptors=descriptors or Descriptors(), proc=proc
        )
        self._known: dict[str, FeatureSet] = {}  # by digest of a contract or a reported set
        self._doubtful: set[int] = set()  # of another pid namespace
        if known:  # else the records are lost, and no file is put away that may be held
            self._resume()
            self.files.keep(records.contracts_outstanding())

    def _resume(self) -> None:
        """After a restart: no guest outlives a boot, a saved one none at all; look at who keeps the others."""
        boot, _, namespace = self._boot.partition(" ")
        dead, holders = [], self.records.holders()
        mine: list[tuple[int, Holder]] = []
        for lease in self.records.outstanding():
            kept_boot, _, kept_namespace = lease.boot.partition(" ")
            if lease.state == "saved" or not kept_boot:
                continue
            if boot and kept_boot != boot:
                dead.append(lease)
            elif kept_namespace != namespace:
                self._doubtful.add(lease.incarnation)  # its numbers are not ours: nothing is known of it
            else:
                mine += [(lease.incarnation, holder) for holder in holders.get(lease.incarnation, ())]
        if dead:
            self.records.end(*dead)
        self.keepers.resume(mine)

    def adopt(self, records: Records) -> None:
        """Go on with other records."""
        self.records = self.keepers.records = records

    def start(self, server: Server) -> None:
        """Watch the processes that keep leases, and serve the connections on that do."""
        self.keepers.start(server)
        self.keepers.adopt(server)

    def stop(self) -> None:
        """The daemon ends: what is held stays held."""
        self.keepers.stop()

    # -- a VM's life ------------------------------------------------------------------------------

    def holder(self, connection: Connection, hold: bool | None, pid: int | None) -> Holder | None:
        """Who is to keep a lease, as a call asks for it. Raises UsageError, NotPermitted."""
        if hold and pid is not None:
            raise UsageError("a lease is held by the connection or by a process, not by both")
        if pid is not None:
            self.keepers.require_our_numbers(connection.peer)
        if hold:
            return self.keepers.of_connection(connection)
        return self.keepers.of_process(pid, connection.peer) if pid is not None else None

    def held(self, vm: str, digits: str, peer: Peer) -> Lease | None:
        """The lease of this user's VM where it holds that contract already."""
        found = (one for one in self.records.of(vm) if one.uid == peer.uid and one.digest == digits)
        return next(found, None)

    def again(self, lease: Lease, connection: Connection, holder: Holder | None) -> tuple[Lease, str]:
        """What `begin` gave already, and its file: it was asked twice. With one more holder."""
        if holder is not None:
            self._add_holder(lease, holder, connection)
        return lease, self.files.write(lease.digest, self.records.contract(lease.digest) or b"")

    def begin(
        self,
        contract: Contract,
        vm: str,
        generation: int,
        connection: Connection,
        *,
        holder: Holder | None,
        audit: Audit | None = None,
    ) -> tuple[Lease, str]:
        """Give a contract to a VM: the lease, and the path of the contract's file.

        Raises UsageError (the VM holds another contract; its keeper has ended), LimitExceeded, StoreError.
        """
        peer, digits = connection.peer, contract.digest.removeprefix("sha256:")
        deadline = self._wall() + limits.LEASE_UNSTARTED_SECONDS
        asker = self.keepers.of_connection(connection)
        wanted = Lease(
            vm, digits, generation, peer.uid, peer.pid, now(), deadline, "begun",
            boot=self._boot, pid_started=asker.started,
        )  # fmt: skip
        # the file first: once the store has the lease, nothing may fail any more
        path = self.files.write(digits, contract.binary())
        try:
            lease = self.records.begin(wanted, contract.binary(), holder, audit)
        except KvmnegError:
            self._put_away([digits])
            raise
        if holder is not None:
            self.keepers.keep(lease.incarnation, holder, connection if holder.by == "connection" else None)
        return lease, path

    def started(self, lease: Lease) -> None:
        """The VM runs: its lease no longer expires."""
        self.records.started(lease, self._boot)

    def saved(self, lease: Lease) -> None:
        """The VM lies in an image, and runs nowhere: it counts until it is restored and ends, or the image is gone."""
        self.records.saved(lease)
        self.keepers.forget(lease.incarnation)

    def end(self, lease: Lease) -> None:
        """The VM is gone."""
        self.records.end(lease)
        self.keepers.forget(lease.incarnation)
        self._let_go([lease.incarnation])

    def hand_over(self, lease: Lease, connection: Connection, holder: Holder) -> None:
        """Have another process keep the lease too: a live upgrade of a VMM, a migration inside this host.

        It ends with the last of them. Raises LimitExceeded (HOLDERS_PER_LEASE), UsageError, StoreError.
        """
        if lease.state == "saved":  # restored from its image
            self.records.started(lease, self._boot)
        self._add_holder(lease, holder, connection)

    def _add_holder(self, lease: Lease, holder: Holder, connection: Connection) -> None:
        self.records.hold(lease, holder)
        self.keepers.keep(lease.incarnation, holder, connection if holder.by == "connection" else None)

    def report(self, lease: Lease, applied: FeatureSet) -> tuple[Blocker, ...]:
        """Keep the set that the VMM says it has set: it is what counts. What it has more than its contract."""
        import json  # not for those who only negotiate

        from kvmneg.features.featureset import fits

        digest = applied.digest().removeprefix("sha256:")
        body = {"architecture": applied.architecture, "words": applied.to_json()}
        self.records.report(lease, digest, json.dumps(body, sort_keys=True).encode())
        self._know(digest, applied)
        return fits(applied, self.granted(lease.digest), missing_on="its contract")

    # -- asking -----------------------------------------------------------------------------------

    def own(self, vm: str, peer: Peer, incarnation: int | None = None) -> Lease:
        """The lease of a VM of this user's, for an admin of anybody's. Raises UsageError, NotPermitted.

        With an incarnation, of exactly that one: what is said of one that has gone does not hit the next.
        """
        found = self.records.of(vm)
        leases = [one for one in found if one.uid == peer.uid] or found
        if len(leases) > 1 and incarnation is not None:  # an admin who names one of several users'
            leases = [one for one in leases if one.incarnation == incarnation] or leases
        if not leases:
            raise UsageError(
                f"VM {vm} holds no contract", hint="it was ended, or expired before it was started"
            )
        if leases[0].uid != peer.uid and not is_admin(peer):
            raise NotPermitted(f"VM {vm} belongs to another user", hint="ask as that user or as an admin")
        if len(leases) > 1:
            uids = ", ".join(str(lease.uid) for lease in leases)
            hint = "name its incarnation, or ask as the one whose VM it is"
            raise UsageError(f"users {uids} have a VM {vm}", hint=hint)
        (lease,) = leases
        if incarnation not in (None, lease.incarnation):
            raise UsageError(
                f"incarnation {incarnation} of VM {vm} is gone, it runs as {lease.incarnation}",
                hint="`kvmneg guests` shows what each VM holds",
            )
        return lease

    def holdings(self) -> list[Holding]:
        """What each outstanding lease holds: the set its VMM reported, until then its contract's."""
        return [self.holding(lease) for lease in self.records.outstanding()]

    def holding(self, lease: Lease) -> Holding:
        """What one holds."""
        from kvmneg.policy import leases as policy  # nobody who only negotiates asks

        states = {"begun": policy.BEGUN, "started": policy.RUNNING, "saved": policy.SAVED}
        held = self.held_set(lease)
        return policy.Holding(lease.vm, "sha256:" + lease.digest, held, states[lease.state], lease.uid)

    def held_set(self, lease: Lease) -> FeatureSet:
        """The set its VMM reported, until then its contract's."""
        return self._reported(lease.reported) if lease.reported else self.granted(lease.digest)

    def granted(self, digest: str) -> FeatureSet:
        """The set of a contract that is held, by its digest's 64 digits."""
        found = self._known.get(digest)
        if found is None:
            from kvmneg.policy.contract import Contract

            body = self.records.contract(digest) or b""
            found = self._know(digest, Contract.from_binary(body, file=digest).granted)
        return found

    def _know(self, digest: str, found: FeatureSet) -> FeatureSet:
        """Keep a set that was read: a VMM reports as often as it likes, each time something else."""
        if len(self._known) >= limits.SETS_KEPT:
            self._known.clear()
        self._known[digest] = found
        return found

    def _reported(self, digest: str) -> FeatureSet:
        found = self._known.get(digest)
        if found is None:
            import json

            from kvmneg.features import words
            from kvmneg.features.featureset import FeatureSet

            body = json.loads(self.records.reported(digest) or b"")
            values = {word: words.parse_value(word, text) for word, text in body["words"].items()}
            found = self._know(digest, FeatureSet.of(body["architecture"], values))
        return found

    def accounted(self, process: Process) -> bool:
        """Whether a process with a VM is one that a lease speaks of: its keeper, or whoever began it in this boot."""
        return self.records.speak_of(process.pid, process.started, self._boot)

    def doubtful(self) -> set[int]:
        """Incarnations of which nobody can say whether they still run."""
        return self._doubtful | self.keepers.unwatched()

    # -- ends -------------------------------------------------------------------------------------

    def expire(self) -> None:
        """End the leases that were never started in time, and look at keepers that tell nothing by themselves."""
        self.keepers.look_again()
        if self.records.expire(self._wall()):
            self._let_go([])

    def _let_go(self, incarnations: Iterable[int]) -> None:
        self._doubtful.difference_update(incarnations)
        self._put_away(self.files.digests())
        for function in self.ended:
            function()

    def _put_away(self, digests: Iterable[str]) -> None:
        """Remove the files of contracts that no VM holds. One that stays is put away at the next start."""
        try:
            for digest in digests:
                if not self.records.holds(digest):
                    self.files.remove(digest)
                    self._known.pop(digest, None)
        except StoreError as error:
            self._on_trouble(str(error))

    def to_json(self) -> list[dict[str, Any]]:
        """Each lease with who keeps it, as org.kvmneg.Guests.List has it."""
        holders, doubtful = self.records.holders(), self.doubtful()
        return [
            {
                "vm": lease.vm,
                "incarnation": lease.incarnation,
                "digest": "sha256:" + lease.digest,
                "reported": "sha256:" + lease.reported if lease.reported else None,
                "generation": lease.generation,
                "uid": lease.uid,
                "state": lease.state,
                "begunAt": lease.begun_at,
                "holders": [
                    {"pid": holder.pid, "by": holder.by} for holder in holders.get(lease.incarnation, ())
                ],
                "certain": lease.incarnation not in doubtful,
            }
            for lease in self.records.outstanding()
        ]
