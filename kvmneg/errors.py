# SPDX-License-Identifier: LGPL-2.1-or-later
"""One family of errors, and the one table that says how each leaves the house.

Every error carries a message for a person (what is wrong), a `hint` (what to do) and machine-readable
`fields`. `exit_code` is the command line's (kvmneg(1), "EXIT STATUS"); `varlink` is the error's name on the
wire, `fields` its parameters there.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kvmneg.features.difference import Blocker


class KvmnegError(Exception):
    """Something kvmneg can name. Anything that is not one of these is a bug and exits with 70."""

    exit_code = 70
    varlink = "org.kvmneg.Internal"

    def __init__(self, message: str, *, hint: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message

    def parameters(self) -> dict[str, Any]:
        """The error's parameters on the wire and, as `error`, in `--json` output."""
        return {"message": self.message, "hint": self.hint or None, **self.fields}


class UsageError(KvmnegError):
    """The request itself makes no sense: an unknown feature, two modes at once, a malformed UUID."""

    exit_code = 2
    varlink = "org.kvmneg.InvalidRequest"


class LimitExceeded(KvmnegError):
    """A quantity the client controls went over its named limit (kvmneg.limits)."""

    exit_code = 2
    varlink = "org.kvmneg.LimitExceeded"

    def __init__(self, limit: str, allowed: int, hint: str = "") -> None:
        super().__init__(
            f"limit {limit} exceeded: at most {allowed}", hint=hint, limit=limit, allowed=allowed
        )


class Blocked(KvmnegError):
    """The answer is no, and these are all the reasons."""

    exit_code = 1
    varlink = "org.kvmneg.Blocked"

    def __init__(self, message: str, blockers: Sequence[Blocker], *, hint: str = "", **fields: Any) -> None:
        super().__init__(message, hint=hint, **fields)
        self.blockers = tuple(blockers)

    def parameters(self) -> dict[str, Any]:
        return {**super().parameters(), "blockers": [blocker.to_varlink() for blocker in self.blockers]}


class Breached(Blocked):
    """The host offers less than the pinned fence promises: no new contract until an admin lowers it."""

    varlink = "org.kvmneg.Breached"


class Incompatible(Blocked):
    """These hosts have no common baseline at all (different vendors, say)."""

    varlink = "org.kvmneg.Incompatible"


class StaleOffer(KvmnegError):
    """An offer was begun that the fence or the host has moved on from: negotiate again."""

    exit_code = 1
    varlink = "org.kvmneg.StaleOffer"


class NoSuchContract(KvmnegError):
    """No contract of that digest is known here."""

    exit_code = 1
    varlink = "org.kvmneg.NoSuchContract"


class GenerationMismatch(KvmnegError):
    """The fence is not at the generation the caller expected; nothing was changed."""

    exit_code = 1
    varlink = "org.kvmneg.Fence.GenerationMismatch"


class NotPinned(KvmnegError):
    """There is no fence to show or to unpin."""

    exit_code = 1
    varlink = "org.kvmneg.Fence.NotPinned"


class WrongState(KvmnegError):
    """The fence is in a state from which this is not done: it names the state, and what is to be done before."""

    exit_code = 1
    varlink = "org.kvmneg.Fence.WrongState"


class HostsMissing(KvmnegError):
    """Hosts whose word is needed are not reachable, or were not measured since: each with the reason."""

    exit_code = 1
    varlink = "org.kvmneg.Fence.HostsMissing"


class GuestsAbove(KvmnegError):
    """Guests or outstanding contracts hold more than the level to be: each with what it has more."""

    exit_code = 1
    varlink = "org.kvmneg.Fence.GuestsAbove"


class ReadOnly(KvmnegError):
    """The last committed fence is served, and nothing is changed: its store cannot be written, or has no quorum."""

    exit_code = 7
    varlink = "org.kvmneg.ReadOnly"


class NoKvm(KvmnegError):
    """KVM is missing, may not be opened, or is not the API this project knows."""

    exit_code = 3
    varlink = "org.kvmneg.NoKvm"


class Unreachable(KvmnegError):
    """The daemon does not answer."""

    exit_code = 4
    varlink = "org.kvmneg.Unreachable"


class BadInput(KvmnegError):
    """A file is not what it should be. The message names the file and, where it has lines, the line."""

    exit_code = 5
    varlink = "org.kvmneg.BadInput"

    def __init__(self, message: str, *, file: str = "", line: int = 0, hint: str = "") -> None:
        place = f"{file}:{line}: " if line else f"{file}: " if file else ""
        super().__init__(place + message, hint=hint, file=file or None, line=line or None)


class SlowWatcher(KvmnegError):
    """The watcher did not read what was sent to it; it has to watch anew."""

    exit_code = 4
    varlink = "org.kvmneg.SlowWatcher"


class NotPermitted(KvmnegError):
    """The caller may not do this. `action` is polkit's that would permit it, "" for none; no client is told it.

    Nor is it told `why` polkit did not permit it, which is for the journal.
    """

    exit_code = 6
    varlink = "org.kvmneg.NotPermitted"

    def __init__(self, message: str, *, hint: str = "", action: str = "", **fields: Any) -> None:
        super().__init__(message, hint=hint, **fields)
        self.action = action
        self.why = ""


class KvmFault(KvmnegError):
    """A KVM ioctl failed where it must not."""

    exit_code = 7
    varlink = "org.kvmneg.KvmFault"

    def __init__(self, ioctl: str, error: int, what: str = "", *, hint: str = "") -> None:
        import os  # not needed by any other error: keep this module free to import

        text = f"{ioctl} failed: {os.strerror(error)} (errno {error})"
        super().__init__(f"{what}: {text}" if what else text, hint=hint, ioctl=ioctl, errno=error)


class StoreError(KvmnegError):
    """The state directory cannot be read or written, or is another daemon's."""

    exit_code = 7
    varlink = "org.kvmneg.StoreFault"


class VmmFault(KvmnegError):
    """An installed VMM is missing, does not answer, or does not start. It never goes over the wire."""

    exit_code = 7
    varlink = "org.kvmneg.VmmFault"


class NotApplied(KvmnegError):
    """KVM did not take what a contract says. It never goes over the wire: only the VMM itself can apply."""

    exit_code = 7
    varlink = "org.kvmneg.NotApplied"


def family() -> tuple[type[KvmnegError], ...]:
    """Every error that has a place of its own, for the table in kvmneg(1) and for the tests."""
    found: list[type[KvmnegError]] = []
    queue: list[type[KvmnegError]] = [KvmnegError]
    while queue:
        error = queue.pop(0)
        found.append(error)
        # what a room raises of its own goes by its parent's name
        queue.extend(one for one in error.__subclasses__() if one.__module__ == __name__)
    return tuple(found)


def dbus_name(varlink: str) -> str:
    """What the D-Bus interface calls an error: "org.kvmneg.Fence.NotPinned" is "org.kvmneg1.Error.NotPinned"."""
    return "org.kvmneg1.Error." + varlink.rpartition(".")[2]


BY_VARLINK_NAME = {error.varlink: error for error in family()}
