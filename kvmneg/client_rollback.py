# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's calls of org.kvmneg.Rollback (kvmneg.client)."""

from __future__ import annotations

from kvmneg.client_fence import given

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class RollbackCalls:
    """Methods by the names of the interface."""

    def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The client's."""
        raise NotImplementedError

    def rollback_history(self, limit: int | None = None) -> dict[str, Any]:
        """entries: the combos ever measured, the one recorded last first."""
        return self.call("org.kvmneg.Rollback.History", given(limit=limit))

    def rollback_get_report(self, combo: str) -> dict[str, Any]:
        """combo, report: the newest report of a combo (a digest, the beginning of one, "running")."""
        return self.call("org.kvmneg.Rollback.GetReport", {"combo": combo})

    def rollback_add(self, combo: str, reason: str) -> dict[str, Any]:
        """combo, changed. Raises Blocked where the combo is below the fence."""
        return self.call("org.kvmneg.Rollback.Add", {"combo": combo, "reason": reason})

    def rollback_remove(self, combo: str, reason: str) -> dict[str, Any]:
        """combo, changed."""
        return self.call("org.kvmneg.Rollback.Remove", {"combo": combo, "reason": reason})

    def rollback_list(self) -> dict[str, Any]:
        """entries: the roll-back set and how each member stands now; scope."""
        return self.call("org.kvmneg.Rollback.List")

    def rollback_plan(self, combo: str) -> dict[str, Any]:
        """combo, take, text, blockers: how far the fence would have to be lowered."""
        return self.call("org.kvmneg.Rollback.Plan", {"combo": combo})

    def rollback_check(self, combo: str | None = None, **changes: Any) -> dict[str, Any]:
        """allowed, and every reason why not: for a recorded combo, or for a kernel, vmm, dimensions; predict."""
        return self.call("org.kvmneg.Rollback.Check", given(combo=combo, **changes))
