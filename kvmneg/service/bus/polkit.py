# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether polkit permits an action to somebody: org.freedesktop.PolicyKit1.Authority on the same bus.

Whatever is not a yes is a no: no polkit, an action it does not know, an answer that does not come. A no is the reason
for it, in words for the journal; a yes is "".
"""

from __future__ import annotations

import asyncio
import os
import sys

from kvmneg import limits
from kvmneg.errors import LimitExceeded
from kvmneg.service.bus.verdicts import DENIED, LATE, NEEDS_PERSON, NO_AGENT

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sdbus import sd_bus_internals as sd_bus

_AUTHORITY = (
    "org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority", "org.freedesktop.PolicyKit1.Authority",
)  # fmt: skip
_ALLOW_USER_INTERACTION = 1  # CheckAuthorizationFlags
_LATER_SECONDS = 10


class Polkit:
    """Questions to polkit, as many at once as limits let there be."""

    def __init__(self, bus: sd_bus.SdBus) -> None:
        self._bus = bus
        self._open: dict[int, int] = {}  # by user
        self._number = 0
        self._quiet_until = 0.0  # that it cannot be asked is told once in a while

    async def permits(
        self, subject: tuple[str, dict[str, tuple[str, Any]]], uid: int, action: str, interactive: bool
    ) -> str:
        """Why the subject may not do it, "" where it may. With `interactive` a person may be asked, which takes long.

        Raises LimitExceeded.
        """
        count = self._open.get(uid, 0)
        if count >= limits.POLKIT_QUESTIONS_PER_UID:
            raise LimitExceeded("POLKIT_QUESTIONS_PER_UID", limits.POLKIT_QUESTIONS_PER_UID)
        if sum(self._open.values()) >= limits.POLKIT_QUESTIONS:
            raise LimitExceeded("POLKIT_QUESTIONS", limits.POLKIT_QUESTIONS)
        self._open[uid] = count + 1
        self._number += 1
        number = f"kvmneg-{os.getpid()}-{self._number}"
        try:
            return await self._ask(subject, action, interactive, number)
        finally:
            self._open[uid] -= 1
            if not self._open[uid]:
                del self._open[uid]

    async def _ask(self, subject: tuple[str, Any], action: str, interactive: bool, number: str) -> str:
        # sd-bus's own end of waiting comes after ours, which takes the question back
        self._bus.method_call_timeout_usec = int(1e6 * (limits.POLKIT_SECONDS + _LATER_SECONDS))
        ask = self._bus.new_method_call_message(*_AUTHORITY, "CheckAuthorization")
        flags = _ALLOW_USER_INTERACTION if interactive else 0
        ask.append_data("(sa{sv})sa{ss}us", subject, action, {}, flags, number)
        try:
            answer = await asyncio.wait_for(self._bus.call_async(ask), limits.POLKIT_SECONDS)
            authorized, challenge, _ = answer.get_contents()
            if authorized is True:
                return ""
            if challenge is True:
                return NO_AGENT if interactive else NEEDS_PERSON
            return DENIED
        except (TimeoutError, asyncio.CancelledError) as error:
            self._take_back(number)
            if isinstance(error, TimeoutError):
                return LATE
            raise
        except Exception as error:  # sdbus has one of its own for each of D-Bus's errors
            why = f"polkit cannot be asked: {' '.join(map(str, error.args))}"
            now = asyncio.get_running_loop().time()
            # an admin who wrote a rule would look for its fault; a caller that ends meanwhile brings it about too
            if now >= self._quiet_until:
                self._quiet_until = now + limits.TROUBLE_SECONDS
                sys.stderr.write(f"kvmnegd: {why}\n")
            return why

    def _take_back(self, number: str) -> None:
        """Nobody waits for it any more: let the agent put its question away."""
        cancel = self._bus.new_method_call_message(*_AUTHORITY, "CancelCheckAuthorization")
        cancel.append_data("s", number)
        cancel.expect_reply = False
        cancel.send()
