# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one mutable truth of a daemon: this host's report, the pinned fence, what was offered and granted.

Decisions are the policy's; here is only when they are asked for, and with which inputs. `generation` is the
fence's. Whatever changes an answer (a pin, a new measurement) calls every function in `changed`.
"""

from __future__ import annotations

import time

from kvmneg import limits
from kvmneg.clock import now
from kvmneg.errors import (
    KvmnegError,
    NoKvm,
    NoSuchContract,
    StaleOffer,
    StoreError,
    UsageError,
)
from kvmneg.features.featureset import fits
from kvmneg.features.report import canonical_combo
from kvmneg.policy import grade, negotiation
from kvmneg.policy.contract import Contract
from kvmneg.service.leases.leases import Leases
from kvmneg.service.level.standing import Standing
from kvmneg.service.shares import Shares

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvmneg.features.report import Report
    from kvmneg.host.apart import Apart
    from kvmneg.policy.negotiation import Answer
    from kvmneg.policy.request import Request
    from kvmneg.service.leases.contracts import ContractFiles
    from kvmneg.service.leases.descriptors import Descriptors
    from kvmneg.service.leases.unknown import UnknownGuests
    from kvmneg.service.varlink.connection import Connection
    from kvmneg.service.varlink.peer import Peer
    from kvmneg.service.watching.again import Again
    from kvmneg.store.interface import Audit, FenceRow, HistoryRow, Lease, Store

    class Measurer(Protocol):
        """Measures one host, again and again (kvmneg.host.measure)."""

        def measure(self) -> Report:
            """Raises NoKvm, KvmFault."""

        def changed(self, *, fresh: bool = False) -> bool:
            """Whether an input that changes without an event did (fresh: looked at just now)."""


class Node(Standing):
    """One host under one fence. Not thread-safe: it belongs to the event loop."""

    def __init__(
        self,
        store: Store,
        measurer: Measurer,
        files: ContractFiles,
        on_trouble: Callable[[str], None] = lambda text: None,
        *,
        boot: str = "",
        descriptors: Descriptors | None = None,
    ) -> None:
        super().__init__(store, on_trouble)
        self.files = files
        # by digest: the contract offered and the generation it was offered in
        self.offers: Shares[str, tuple[Contract, int, str | None]] = Shares()
        self._unrecorded = False  # the report is not in the store yet
        self.news = False  # the report was not the one that was recorded last
        self._measurer = measurer
        self.again: Again | None = None  # measures again, once there is a loop
        self.doubted: list[Callable[[], None]] = []  # called when an input was seen to have changed
        self._why_not: KvmnegError = NoKvm("not measured yet")
        # Wall time anchored once and counted on: a clock that is set does not move the leases' deadlines,
        # and time asleep counts.
        self._anchor = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        self._unknown: UnknownGuests | None = None
        self.apart: Apart | None = None  # who looks into other users' processes for the daemon
        self.events = -1  # a descriptor with the kernel's events, where the service manager passed one
        self._boot = boot
        self.leases = Leases(
            store.leases, files, boot=boot, wall=self.wall, on_trouble=on_trouble, descriptors=descriptors,
            known=not store.recovered,
        )  # fmt: skip
        self.measure()

    def adopt(self, store: Store) -> None:
        """Go on with this store and what stands in it; the report is recorded there too."""
        self.leases.adopt(store.leases)
        if self._unknown is not None:
            self._unknown.adopt(store.waivers(self._boot))
        self._unrecorded = True
        self.store = store
        self._record()
        super().adopt(store)

    # -- the host ---------------------------------------------------------------------------------

    def measure(self) -> None:
        """Measure again; a host that cannot be measured keeps the reason and grants nothing.

        Raises kvmneg.service.watching.again.Measuring while a child does it.
        """
        if self.again is not None:
            self.again.now()
            return
        before = self._report
        self._report, self._why_not = None, KvmnegError("an internal error while this host was measured")
        try:
            self._report = self._measurer.measure()
            self.measurements += 1
        except KvmnegError as error:
            self._why_not = error
        finally:  # a fault of ours too leaves a host that is not measured, never an old report
            self._measured(before)

    def measure_again(self) -> None:
        """As `measure`, but where a child can do it nobody waits: something is known that was not."""
        if self.again is not None:
            self.again.begin()
        else:
            self.measure()

    def take_up(self, report: Report | None, why_not: KvmnegError | None) -> None:
        """What somebody else measured, or why that failed."""
        before, self._report = self._report, report
        if report is not None:
            self.measurements += 1
        elif why_not is not None:
            self._why_not = why_not
        self._measured(before)

    def _measured(self, before: Report | None) -> None:
        if (before and before.canonical()) != (self._report and self._report.canonical()):
            self._unrecorded = True
            self._low = None
            self._record()
            self.settle()
            self._tell()
        self._record()

    def _record(self) -> None:
        """Keep the report for the record. A full disk does not make a host that was measured useless."""
        report = self._report
        if report is None or not self._unrecorded or self.store.recovered:
            return
        import zlib  # only where a report is kept

        body, combo = zlib.compress(report.canonical()), canonical_combo(report.combo).decode()
        try:
            self.news = self.store.record_report(report.digest(), report.combo_digest(), now(), body, combo)
        except StoreError as error:
            self._on_trouble(f"this measurement is not recorded: {error}")
        else:
            self._unrecorded = False

    def refresh(self, *, fresh: bool = False) -> None:
        """Measure again where an input changed; inputs are looked at once a second, with `fresh` now.

        Raises kvmneg.service.watching.again.Measuring, with `fresh`, while a child measures.
        """
        if self.again is not None:
            self.again.refresh(fresh=fresh)
        elif self._report is None or self._measurer.changed(fresh=fresh):
            self.measure()

    @property
    def report(self) -> Report:
        """The current report; raises why there is none (NoKvm, KvmFault)."""
        if self._report is None:
            raise self._why_not.with_traceback(None)  # each raise adds to it, and it is kept
        return self._report

    @property
    def host_digest(self) -> str | None:
        """The current report's digest, None while there is none."""
        return self._report.digest() if self._report else None

    @property
    def combo_digest(self) -> str | None:
        """The digest of the current report's combo, None while there is none."""
        return self._report.combo_digest() if self._report else None

    # -- contracts --------------------------------------------------------------------------------

    def negotiate(self, request: Request, peer: Peer) -> Answer:
        """An offer of this generation; raises what kvmneg.policy.negotiation raises, NoKvm, KvmFault, StoreError."""
        answer = negotiation.negotiate(request, self.report, self.bound)
        offer = answer.contract, self.generation, request.vmm
        self.offers.put(answer.contract.digest, offer, peer.uid, limits.CACHED_OFFERS)
        return answer

    def begin(
        self,
        digest: str,
        vm: str,
        connection: Connection,
        *,
        hold: bool | None = None,
        pid: int | None = None,
    ) -> tuple[Lease, str]:
        """Grant an offered contract to a VM: the lease, and the path of the contract's file.

        The lease is kept by the connection (`hold`), by a process (`pid`), or until End. Looks at the host afresh
        first. Raises NoSuchContract (never offered, or too long ago), StaleOffer (another generation, or the host
        changed and cannot give it any more), Breached, UsageError (the VM holds another contract, no UUID, no such
        process), NotPermitted (another user's process), LimitExceeded.
        """
        vm, digits = uuid(vm), _hex(digest)
        holder = self.leases.holder(connection, hold, pid)
        held = self.leases.held(vm, digits, connection.peer)
        if held is not None:  # asked twice: the first reply may have been lost
            if held.state != "begun":
                self._require_below(held)
            return self.leases.again(held, connection, holder)
        contract, generation, vmm = self._offer("sha256:" + digits)
        self.refresh(fresh=True)
        if generation != self.generation:
            raise StaleOffer(
                f"offered at generation {generation}, the fence is at {self.generation}",
                hint="negotiate again",
                offered=generation,
                generation=self.generation,
            )
        # the ceiling again: it raises where the host fell below its fence since
        top = negotiation.ceiling(self.report, self.bound, vmm)
        blockers = [
            *fits(contract.granted, top, missing_on=f"host {self.report.host}"),
            *negotiation.unreachable(contract.granted, self.report, "the contract"),
        ]
        if blockers or grade.worse(contract, self.report):
            raise StaleOffer(
                "the host changed since the offer", hint="negotiate again", generation=self.generation
            )
        return self.leases.begin(contract, vm, generation, connection, holder=holder)

    def _require_below(self, lease: Lease) -> None:
        """A VM that ran already, and begins with what it has, is started anew: under the level of now.

        Raises StaleOffer, Breached.
        """
        from kvmneg.policy import leases  # a VM monitor that asks twice does it before it starts

        self.refresh(fresh=True)
        negotiation.ceiling(self.report, self.bound)  # as in begin
        bound, granted = self.bound, self.leases.granted(lease.digest)
        if bound is not None and leases.exceeding(granted, bound.granted, bound.name):
            raise StaleOffer(
                f"VM {lease.vm} holds a contract above {bound.name} from its life before",
                hint="end it, and negotiate again",
                generation=self.generation,
            )

    def lease(self, vm: str, peer: Peer, incarnation: int | None = None) -> Lease:
        """The lease of a VM (kvmneg.service.leases.leases)."""
        return self.leases.own(uuid(vm), peer, incarnation)

    def keep_up(self) -> None:
        """What is done when nobody asks: expire leases, see that the host changed, record what was not recorded."""
        self.refresh()
        self.store.retry()
        self._record()
        if not self._floats:
            self.settle()
        self.leases.expire()
        if self.proposal == "raise" and self.store.fault is None:
            from kvmneg.service.level import moves  # rarely

            moves.expire(self)

    def wall(self) -> float:
        return self._anchor + time.clock_gettime(time.CLOCK_BOOTTIME)

    def _offer(self, digest: str) -> tuple[Contract, int, str | None]:
        found = self.offers.values.get(digest)
        if found is None:
            raise NoSuchContract(f"no offer {digest} is known here", hint="negotiate again", digest=digest)
        return found

    def contract(self, digest: str) -> tuple[Contract, str]:
        """A contract offered or granted, and "offered", "granted" or "ended". Raises NoSuchContract."""
        digits = _hex(digest)
        offer = self.offers.values.get("sha256:" + digits)
        state = "granted" if self.store.leases.holds(digits) else "offered" if offer else "ended"
        if offer:
            return offer[0], state
        data = self.store.leases.contract(digits)
        if data is None:
            raise NoSuchContract(f"no contract {digest} is known here", digest=digest)
        return Contract.from_binary(data, file=digest), state

    @property
    def unknown(self) -> UnknownGuests:
        """The VMs that nobody negotiated for."""
        if self._unknown is None:
            from kvmneg.host.guests import Events
            from kvmneg.service.leases.unknown import UnknownGuests  # a daemon starts without them

            self._unknown = UnknownGuests(
                self.store.waivers(self._boot),
                self.leases.accounted,
                events=lambda: Events(self.events),
                apart=self.apart,
            )
        return self._unknown

    # -- the fence --------------------------------------------------------------------------------

    def pin(self, source: str | None, text: str | None, expected: int | None, audit: Audit) -> FenceRow:
        """Pin a fence from a source ("host", "level:NAME", …) or a text: kvmneg.service.level.moves.pin."""
        from kvmneg.service.level import moves  # of an admin's day

        return moves.pin(self, source, text, expected, audit)

    def unpin(self, expected: int | None, audit: Audit) -> int:
        """Take the fence down: kvmneg.service.level.moves.unpin."""
        from kvmneg.service.level import moves  # as in pin

        return moves.unpin(self, expected, audit)

    def history(self, limit: int) -> list[HistoryRow]:
        return self.store.history(min(limit, limits.HISTORY_ROWS))


def uuid(text: str) -> str:
    from uuid import UUID  # 3 ms: not before the first VM

    try:
        return str(UUID(text))
    except ValueError:
        raise UsageError(f"{text!r} is no UUID", hint="like 3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11") from None


def _hex(digest: str) -> str:
    """The 64 hexadecimal digits of a digest. Raises UsageError."""
    digits = digest.removeprefix("sha256:")
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise UsageError(f"{digest!r} is no digest", hint="like sha256: and 64 hexadecimal digits")
    return digits
