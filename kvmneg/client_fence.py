# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's calls of org.kvmneg.Fence (kvmneg.client)."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any


class FenceCalls:
    """A part of kvmneg.client.Client. What moves the fence takes a `dry_run` that changes nothing."""

    if TYPE_CHECKING:

        def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]: ...

    def fence_get(self) -> dict[str, Any]:
        """pinned, generation, digest, text, state, heldBack, proposal, stale."""
        return self.call("org.kvmneg.Fence.Get")

    def fence_pin(
        self,
        reason: str,
        *,
        source: str | None = None,
        text: str | None = None,
        expected_generation: int | None = None,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """generation, digest, text of the new fence, from `source` ("host", "level:NAME", …) or a fence's text.

        Raises NotPermitted, Blocked, BadInput, GenerationMismatch, StoreError.
        """
        wanted = {**_level(source, text, ()), **_move(reason, expected_generation, dry_run)}
        return self.call("org.kvmneg.Fence.Pin", wanted)

    def fence_unpin(
        self, reason: str, *, expected_generation: int | None = None, dry_run: bool = False
    ) -> dict[str, Any]:
        """generation. Raises NotPermitted, NotPinned, GuestsAbove, GenerationMismatch, StoreError."""
        return self.call("org.kvmneg.Fence.Unpin", _move(reason, expected_generation, dry_run))

    def fence_plan(
        self, *, source: str | None = None, text: str | None = None, without: Sequence[str] = ()
    ) -> dict[str, Any]:
        """plan: kind, gained, lost, blockers, left, missing, guests. Of the open proposal where nothing is named."""
        return self.call("org.kvmneg.Fence.Plan", _level(source, text, without))

    def fence_raise(
        self,
        reason: str,
        *,
        source: str | None = None,
        text: str | None = None,
        expected_generation: int | None = None,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Propose a higher fence: generation, state, digest, plan. Raises NotPinned, WrongState, Blocked."""
        wanted = {**_level(source, text, ()), **_move(reason, expected_generation, dry_run)}
        return self.call("org.kvmneg.Fence.Raise", wanted)

    def fence_lower(
        self,
        reason: str,
        *,
        source: str | None = None,
        text: str | None = None,
        without: Sequence[str] = (),
        expected_generation: int | None = None,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Propose a lower fence, in force at once: generation, state, digest, plan. Raises as fence_raise."""
        wanted = {**_level(source, text, without), **_move(reason, expected_generation, dry_run)}
        return self.call("org.kvmneg.Fence.Lower", wanted)

    def fence_emergency(
        self,
        reason: str,
        *,
        source: str | None = None,
        text: str | None = None,
        without: Sequence[str] = (),
        expected_generation: int | None = None,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """As fence_lower, over whatever else is proposed; by default down to what the host still offers."""
        wanted = {**_level(source, text, without), **_move(reason, expected_generation, dry_run)}
        return self.call("org.kvmneg.Fence.Emergency", wanted)

    def fence_commit(
        self,
        reason: str,
        *,
        consent: Sequence[str] = (),
        override: Sequence[str] = (),
        digest: str | None = None,
        expected_generation: int | None = None,
        dry_run: bool = False,
    ) -> dict[str, Any]:
        """Bring the proposal (of that digest) to its end. Raises WrongState, HostsMissing, Blocked, GuestsAbove."""
        lists = given(consent=list(consent) or None, override=list(override) or None, digest=digest)
        wanted = {**lists, **_move(reason, expected_generation, dry_run)}
        return self.call("org.kvmneg.Fence.Commit", wanted)

    def fence_abort(
        self, reason: str, *, expected_generation: int | None = None, dry_run: bool = False
    ) -> dict[str, Any]:
        """Drop the proposal: generation, state, digest, plan. Raises WrongState, Blocked, HostsMissing."""
        return self.call("org.kvmneg.Fence.Abort", _move(reason, expected_generation, dry_run))

    def fence_progress(self) -> dict[str, Any]:
        """proposal (None where none is open), guests in order with what became of each, done, count."""
        return self.call("org.kvmneg.Fence.Progress")

    def fence_audit(self, limit: int | None = None, *, before: int | None = None) -> dict[str, Any]:
        """entries, the newest first: id, generation, action, at, uid, pid, process, reason, detail."""
        return self.call("org.kvmneg.Fence.Audit", given(limit=limit, before=before))

    def fence_restore(self, reason: str, *, above: int | None = None) -> dict[str, Any]:
        """generation, digest, text: go on from the fence's copy. Raises NotPermitted, UsageError, StoreError."""
        return self.call("org.kvmneg.Fence.Restore", given(reason=reason, above=above))

    def fence_history(self, limit: int | None = None) -> dict[str, Any]:
        """entries, the newest first: generation, action, at, uid, pid, reason, digest."""
        return self.call("org.kvmneg.Fence.History", given(limit=limit))


def _level(source: str | None, text: str | None, without: Sequence[str]) -> dict[str, Any]:
    """How a level is named."""
    return given(**{"from": source, "text": text, "without": list(without) or None})


def _move(reason: str, expected_generation: int | None, dry_run: bool) -> dict[str, Any]:
    """What all moves of the fence have in common."""
    return given(reason=reason, expectedGeneration=expected_generation, dryRun=dry_run or None)


def given(**parameters: Any) -> dict[str, Any]:
    """The parameters that are not null."""
    return {name: value for name, value in parameters.items() if value is not None}
