# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every store offers the daemon: plain data in and out, no policy.

The store knows a fence as a text with a digest, a contract and a report as bytes with a digest. What they
say, who may change them and when a grant is due is decided above it. Times written for people are ISO 8601
in UTC; times that are compared are seconds since 1970 (float).
"""

from __future__ import annotations

from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal, Protocol

    from kvmneg.errors import StoreError
    from kvmneg.store.leases import Leases
    from kvmneg.store.levels import Levels
    from kvmneg.store.rolls import Rolls
    from kvmneg.store.waivers import Waivers

    FenceAction = Literal["pin", "unpin", "raise", "lower", "lower-abort"]
    LeaseState = Literal["begun", "started", "saved", "ended", "expired"]
    HolderKind = Literal["connection", "process"]


class Audit(NamedTuple):
    """Who changes the fence, and why: written in the same transaction as the change.

    `uid` and `pid` are the peer's (SO_PEERCRED), `process` its name, `at` the time, `reason` its words.
    """

    uid: int
    pid: int
    at: str
    reason: str
    process: str


class FenceRow(NamedTuple):
    """A fence as it was pinned: its generation, the digest the caller gave it, its text, its audit record."""

    generation: int
    digest: str
    text: str
    pinned_at: str
    uid: int
    pid: int
    reason: str


class HistoryRow(NamedTuple):
    """One change of the effective fence. `digest` is that of the fence now in force, or of the one taken down."""

    action: FenceAction
    generation: int
    at: str
    uid: int
    pid: int
    reason: str
    digest: str
    process: str


class AuditRow(NamedTuple):
    """One row of the audit (kvmneg.store.audit): its number, what was done, who did it and why, what came of it."""

    id: int
    generation: int
    action: str
    at: str
    uid: int
    pid: int
    process: str
    reason: str
    detail: dict[str, Any]


class LevelRow(NamedTuple):
    """Where the level stands beside the fence: whether a breach is told, what is proposed ("", "raise", "lower").

    `report` and `text` are what an unpinned pool remembers: the digest of the report that offers just its level ("" or
    None where there is none), and the level as text, None where it is what that report's host offers.
    """

    breached: bool
    proposal: str
    report: str | None
    text: str | None


class ProposalRow(NamedTuple):
    """An open proposal: "raise" or "lower", the fence to be, the generation whose fence it shall replace.

    `generation` is the one it was opened at, `deadline` when it is aborted (seconds since 1970, None: never), `plan`
    JSON: what a dry run said then, and the guests to follow.
    """

    kind: str
    digest: str
    text: str
    base: int
    generation: int
    urgent: bool
    at: str
    deadline: float | None
    uid: int
    pid: int
    process: str
    reason: str
    plan: str


class Lease(NamedTuple):
    """A contract that one VM was given: it counts like a guest until its state is ended or expired.

    `vm` is the VM's UUID in its canonical spelling, `digest` the contract's (64 lower-case hex digits),
    `generation` the fence's when it was begun, `uid` and `pid` the asker's. A lease still begun after `deadline`
    (seconds since 1970) that no process holds expires; one that has started does not. `incarnation` is given by the
    store and never used again: the same UUID begun anew is another one. `boot` is the host's boot id when the guest
    last ran, "" where it is not known, `reported` the digest of the set that its VMM says it has set, None before it;
    `pid_started` tells the asker from later processes of its number (clock ticks since boot, 0 where it is not known).
    """

    vm: str
    digest: str
    generation: int
    uid: int
    pid: int
    begun_at: str
    deadline: float
    state: LeaseState
    incarnation: int = 0
    boot: str = ""
    reported: str | None = None
    pid_started: int = 0


class Holder(NamedTuple):
    """A process that keeps a lease: it ends with its last one. `started` (clock ticks since boot) tells it from others.

    `by` is "connection" where it holds a connection to the daemon, "process" where its life alone counts.
    """

    pid: int
    started: int
    by: HolderKind


class ReportRow(NamedTuple):
    """A report once measured: its digest, its combo's digest, when it was first seen, its bytes as given."""

    digest: str
    combo_digest: str
    at: str
    body: bytes


if TYPE_CHECKING:

    class Store(Protocol):
        """A store that is open. Every call may raise StoreError, after which nothing has changed.

        The one exception is a store that fails while it makes a change durable: then the change may be there
        or not after the next open, whole in either case.
        """

        @property
        def recovered(self) -> bool:
            """Whether this is the copy of a fence whose database is lost (kvmneg.store.recovered)."""

        @property
        def fault(self) -> StoreError | None:
            """Why the disk refused the last change, until one is on it again: what is read is the last committed."""

        def on_fault(self, function: Callable[[], None]) -> None:
            """Call `function` when a fault begins and when it is over."""

        def retry(self) -> None:
            """With a fault, try whether the disk takes changes again. Raises nothing."""

        def generation(self) -> int:
            """0 before the first pin, then one more with each pin and each unpin, never less."""

        def fence(self) -> FenceRow | None:
            """The pinned fence, or None. StoreError names the generation of one that was tampered with."""

        def past_fence(self, generation: int) -> FenceRow | None:
            """The fence as that generation pinned it, or None where it pinned none. Kept for ever."""

        def pin(self, text: str, digest: str, *, expected_generation: int | None, audit: Audit) -> FenceRow:
            """Make `text` the fence. Durable, with its audit record, when this returns.

            Raises GenerationMismatch (fields expected, actual) unless the generation is the expected one;
            None accepts any.
            """

        def unpin(self, *, expected_generation: int | None, audit: Audit, floating: bool = False) -> int:
            """Take the fence down, float at what the latest report offers, and return the new generation.

            Raises GenerationMismatch, and NotPinned where none is pinned, unless `floating` allows to float anew.
            """

        def history(self, limit: int) -> list[HistoryRow]:
            """The last `limit` changes of the fence, newest first."""

        def audit(self, limit: int, *, before: int | None = None) -> list[AuditRow]:
            """The last `limit` rows of the audit, newest first; with `before` those below that number."""

        def level(self) -> LevelRow:
            """Where the level stands beside the fence."""

        @property
        def levels(self) -> Levels:
            """The proposals, and what a pool that floats remembers."""

        @property
        def leases(self) -> Leases:
            """Who holds which contract."""

        def waivers(self, boot: str) -> Waivers:
            """The unknown guests of this boot that an admin waived."""

        @property
        def rolls(self) -> Rolls:
            """The combos ever measured, and the roll-back set."""

        def record_report(
            self, digest: str, combo_digest: str, at: str, body: bytes, combo: str | None = None
        ) -> bool:
            """Keep a report for ever, and the JSON of its combo. False where it is the latest already.

            A known digest is not kept twice, it becomes the latest again.
            """

        def latest_report(self) -> ReportRow | None:
            """The report recorded last (by order, not by its time)."""

        def report(self, digest: str) -> ReportRow | None:
            """The report of that digest."""

        def copy_out(self, at: str) -> bool:
            """Have the copy beside the store say what the store says; False where it does already. `at` is now."""

        def close(self) -> None:
            """Let go of everything. No other call may follow."""
