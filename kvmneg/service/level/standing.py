# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a host stands: under which fence, in which state, and what bounds its new guests.

What moves it is levels.py (a measurement) and moves.py (an admin); they are imported when it moves, and not on the
way to a contract.
"""

from __future__ import annotations

from kvmneg.errors import StoreError
from kvmneg.policy import coverage, negotiation
from kvmneg.policy.fence_text import Fence

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.features.difference import Blocker
    from kvmneg.features.report import Report
    from kvmneg.store.interface import FenceRow, Store

_STATES = {"": "pinned", "raise": "raising", "lower": "lowering"}


class Standing:
    """The fence's side of a node. `generation` is the fence's, `proposal` "raise", "lower" or "".

    `floor` bounds new guests of a host that floats and by now offers more; `changed` is called with every change.
    """

    def __init__(self, store: Store, on_trouble: Callable[[str], None]) -> None:
        self.store = store
        self.changed: list[Callable[[], None]] = []
        self._on_trouble = on_trouble  # told what went wrong beside an answer that is right
        self._report: Report | None = None
        self._fence: Fence | None = None
        self._fence_fault: StoreError | None = None
        self._low: tuple[Blocker, ...] | None = (
            None  # by what the host is below its fence, where that is known
        )
        self._load_fence()
        self.generation = store.generation()
        self.floor: Fence | None = None
        self._floats = True  # whether `floor` is known; else it is the store's fault, and may be mended
        self._row = store.level()
        self.proposal = self._row.proposal
        self.proposed_at = 0  # the number of measurements when that was proposed
        self.measurements = 0
        self.breach_told = False  # that the host is below its fence, by this daemon
        store.on_fault(self._tell)

    def adopt(self, store: Store) -> None:
        """Go on with this store and what stands in it."""
        self.store = store
        store.on_fault(self._tell)
        self.moved(_fence_of(store.fence()), store.generation(), store.level().proposal)

    def _load_fence(self) -> None:
        try:
            self._fence = _fence_of(self.store.fence())
        except StoreError as error:
            # One that was tampered with, or that this build's catalogue reads in another way: serve to say so, and
            # to have it replaced. Any other fault of the store is no reason to serve.
            if "generation" not in error.fields:
                raise
            self._fence_fault = error

    @property
    def last_report(self) -> Report | None:
        """The current report, None where this host cannot be measured."""
        return self._report

    @property
    def fence_digest(self) -> str | None:
        """The pinned fence's digest, None where none is pinned or it cannot be understood."""
        return self._fence.digest if self._fence else None

    @property
    def fence(self) -> Fence | None:
        """The pinned fence; raises StoreError where it cannot be understood: no fence is not what it means."""
        if self._fence_fault is not None:
            raise self._fence_fault.with_traceback(None)  # each raise adds to it, and it is kept
        return self._fence

    @property
    def unreadable(self) -> bool:
        """Whether the stored fence cannot be understood: `fence` raises why."""
        return self._fence_fault is not None

    @property
    def bound(self) -> Fence | None:
        """What bounds new guests beside the host itself: the fence, or the level that floats below what it offers."""
        return self.fence or self.floor

    @property
    def below(self) -> tuple[Blocker, ...]:
        """What the fence promises and the host, which was measured, does not offer."""
        if self._low is None:
            fence, report = self._fence, self._report
            self._low = negotiation.below(report, fence) if fence and report else ()
        return self._low

    @property
    def state(self) -> str:
        """floating, pinned, raising, lowering; breached (below its fence), unmeasured (or not all CPUs), unreadable.

        readonly: the disk refused the last change, or the database is lost (`stale` says why). What is served is the
        last committed fence, whatever else holds.
        """
        if self._fence_fault is not None:
            return "unreadable"
        if self.store.fault is not None:
            return "readonly"
        if self._report is None or coverage.unvisited(self._report):
            return "unmeasured"
        if self._fence is None:
            return "floating"
        return "breached" if self.below else _STATES[self.proposal]

    @property
    def stale(self) -> str | None:
        """Why there may be a newer fence than the one served, or none can be pinned; None where all is well."""
        fault = self.store.fault
        return fault.message if fault else None

    def moved(self, fence: Fence | None, generation: int, proposal: str = "") -> None:
        """The store has another fence, or another proposal."""
        self._fence, self.generation, self._fence_fault = fence, generation, None
        self.proposal, self.proposed_at = proposal, self.measurements
        self.floor = self._low = None
        self._floats = True
        self._row = self.store.level()
        self.settle()
        self._tell()

    def floats(self, floor: Fence | None) -> None:
        """What bounds new guests while no fence is pinned; None: nothing but the host."""
        self.floor, self._floats = floor, True

    def settle(self) -> None:
        """What a measurement does to the level: most often nothing, and then nothing more is imported."""
        report = self._report
        if not self._floats:
            self._fence_fault = None  # what could not be read a while ago
        if report is None or self._fence_fault is not None or coverage.unvisited(report):
            return
        try:
            if self._row.report is None:  # nothing was recorded yet when that was read
                self._row = self.store.level()
            if self._fence is None:
                self.floor, moves = None, self._row.report not in (None, report.digest())
                self._floats = not moves
            else:
                moves = bool(self.below) != self._row.breached
            if moves:
                from kvmneg.service.level import levels  # a host that changed

                levels.settle(self, report)
                self._row = self.store.level()
        except StoreError as error:
            self._on_trouble(str(error))
            # where it is not known what bounds new guests, nothing is granted
            if "generation" in error.fields:  # for good, until an admin acts
                self._fence_fault, self._floats = error, True
            elif not self._floats:
                self._fence_fault = error

    def _tell(self) -> None:
        for function in self.changed:
            function()


def _fence_of(row: FenceRow | None) -> Fence | None:
    return Fence.parse(row.text, generation=row.generation, file="the pinned fence") if row else None
