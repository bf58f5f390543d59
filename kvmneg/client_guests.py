# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client's twins of org.kvmneg.Guests, with the same fields in parameters and replies."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


class GuestCalls:
    """A part of kvmneg.client.Client."""

    if TYPE_CHECKING:

        def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]: ...

    def guests_list(self) -> dict[str, Any]:
        """guests, unknown, missed, others: those of this user, of all for admins; the others are counted."""
        found = self.call("org.kvmneg.Guests.List")
        while (after := found.pop("next", None)) is not None:
            more = self.call("org.kvmneg.Guests.List", {"after": after})
            found["guests"] += more["guests"]  # as unknown ones are all in the first reply
            found["next"] = more.get("next")
        return found

    def guests_get(self, vm: str) -> dict[str, Any]:
        """guest, contract, holds. Raises UsageError where it holds no contract, NotPermitted."""
        return self.call("org.kvmneg.Guests.Get", {"vm": vm})

    def guests_report(
        self, vm: str, words: Mapping[str, str], *, incarnation: int | None = None
    ) -> dict[str, Any]:
        """digest, exceeds: what the VMM has set, word by word, counts from now on. Raises UsageError, BadInput."""
        given = {"vm": vm, "words": dict(words), "incarnation": incarnation}
        return self.call("org.kvmneg.Guests.Report", given)

    def guests_saved(self, vm: str, *, incarnation: int | None = None) -> None:
        """The VM lies in an image, and its contract goes on to count. Raises UsageError, NotPermitted."""
        self.call("org.kvmneg.Guests.Saved", {"vm": vm, "incarnation": incarnation})

    def guests_handover(
        self, vm: str, *, hold: bool | None = None, pid: int | None = None, incarnation: int | None = None
    ) -> int:
        """The VM goes on in another process: the incarnation. Raises UsageError, NotPermitted, LimitExceeded."""
        given = {"vm": vm, "hold": hold, "pid": pid, "incarnation": incarnation}
        return int(self.call("org.kvmneg.Guests.Handover", given)["incarnation"])

    def guests_receive(
        self,
        contract: Mapping[str, Any] | bytes,
        vm: str,
        *,
        vmm: str | None = None,
        hold: bool | None = None,
        pid: int | None = None,
    ) -> dict[str, Any]:
        """As begin(), and above: a VM comes from another host with its contract, as JSON or in its binary form.

        Raises Blocked, BadInput, UsageError.
        """
        given: dict[str, Any]
        if isinstance(contract, bytes):
            from base64 import b64encode  # most bring it as JSON

            given = {"binary": b64encode(contract).decode("ascii")}
        else:
            given = {"contract": dict(contract)}
        more = {"vmm": vmm, "hold": hold, "pid": pid}
        given |= {"vm": vm, **{name: value for name, value in more.items() if value is not None}}
        return self.call("org.kvmneg.Guests.Receive", given)

    def guests_import(
        self, pid: int, vm: str, reason: str, *, contract: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """digest, incarnation: an unknown guest holds a contract from now on. Raises NotPermitted, UsageError."""
        given = {"pid": pid, "vm": vm, "reason": reason, "contract": contract}
        return self.call("org.kvmneg.Guests.Import", given)

    def guests_waive(self, pid: int, reason: str) -> None:
        """An unknown guest does not block any more. Raises NotPermitted, UsageError, LimitExceeded."""
        self.call("org.kvmneg.Guests.Waive", {"pid": pid, "reason": reason})
