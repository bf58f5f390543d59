# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests that never asked: VMs on this host that no lease accounts for.

One of them makes every "you may roll back" wrong, so they block until they are gone, imported, or waived by name. KVM's
uevents tell of each that comes and goes; those that were there before are found by one look through /proc, in slices
between the calls, and again where the kernel had to drop events.

The daemon's own scratch VMs, and those of its children that look for it (kvmneg.service.watching.proofs), are none.
"""

from __future__ import annotations

import os
import time

from kvmneg import limits
from kvmneg.errors import UsageError
from kvmneg.host import guests
from kvmneg.host.guests import Process
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.host.apart import Apart, Question
    from kvmneg.service.varlink.loop import Loop, Timer
    from kvmneg.store.interface import Audit
    from kvmneg.store.waivers import Waivers

# Without events there is only looking, as often as the daemon does what nobody asks for.
_LOOK_AGAIN_SECONDS = 30.0


class Unknown(NamedTuple):
    """A process with a VM that nobody negotiated for. `waived` is the reason of the admin who did, else ""."""

    process: Process
    waived: str
    called: dict[str, str]

    def to_json(self) -> dict[str, object]:
        """{"pid", "started", "uid", "process", "name", "uuid", "waived"}: the last three null where there is none."""
        process = self.process
        return {
            "pid": process.pid,
            "started": process.started,
            "uid": process.uid,
            "process": process.name,
            "name": self.called.get("name"),
            "uuid": self.called.get("uuid"),
            "waived": self.waived or None,
        }


class UnknownGuests:
    """Those of one host. `accounted` says whether a lease has a process; it is asked anew each time."""

    def __init__(
        self,
        waivers: Waivers,
        accounted: Callable[[Process], bool] = lambda process: False,
        *,
        proc: str = "/proc",
        events: Callable[[], guests.Events] = guests.Events,
        apart: Apart | None = None,
    ) -> None:
        """`apart` is who looks into other users' processes, where this one may not (kvmneg.host.apart)."""
        self.on_found: Callable[[Process], None] = lambda process: None  # told of each that comes
        # told of each uevent that is none of KVM's VMs, and of None where some were lost
        self.on_uevent: Callable[[bytes | None], None] = lambda message: None
        self.accounted = accounted
        self._waivers = waivers
        self._proc = proc
        self._open_events = events
        self._apart = apart
        self._asked: Question | None = None
        self._listening = False  # to what was asked, in the loop
        self._answered = 0.0  # when `_holders` came, by the monotonic clock
        # (pid, started) → VMs of those that had one then; and those whose event came since it was asked
        self._holders: dict[tuple[int, int], int] = {}
        self._since: set[tuple[int, int]] = set()
        self._events: guests.Events | None = None
        self._loop: Loop | None = None
        self._look: guests.Look | None = None
        self._unreadable = 0  # processes that the last whole look could not look into
        self._hides = False  # /proc shows the daemon no processes of others
        self._looked = False  # a look ended, and no event was lost since
        self._count: int | None = None  # VMs of the whole host, as the last event had it
        self._found: dict[int, Process] = {}
        self._ours: set[int] = set()  # processes of the daemon's own that made VMs
        self._again: Timer | None = None

    # -- following --------------------------------------------------------------------------------

    def start(self, loop: Loop) -> None:
        """Follow KVM's events from now on, and look for what was there before."""
        self._loop = loop
        try:
            self._events = self._open_events()
        except OSError:
            loop.every(
                _LOOK_AGAIN_SECONDS, self._begin_look
            )  # a network namespace without the kernel's events
        else:
            self._events.on_other = self._other
            loop.watch_fd(self._events.fileno(), self._take_events)
        loop.after(0.0, self._begin_look)

    def adopt(self, waivers: Waivers) -> None:
        """Go on with other records."""
        self._waivers = waivers

    def stop(self) -> None:
        """Follow no more."""
        if self._events is not None and self._loop is not None:
            self._loop.unwatch_fd(self._events.fileno())
            self._events.close()
            self._events = None
        asked = self._unheard()
        if asked is not None:
            asked.close()

    def _begin_look(self) -> None:
        assert self._loop is not None
        if self._asked is not None or self._look is not None:
            return
        if self._ask():
            assert self._asked is not None
            self._loop.watch_fd(self._asked.fileno(), self._heard)
            self._listening = True
        else:
            self._look = guests.Look(self._proc)
            self._go_on()

    def _ask(self) -> bool:
        """Ask who looks apart; false where nobody can be asked: then what can be seen from here has to do."""
        if self._apart is None:
            return False
        try:
            self._asked = self._apart.ask("guests")
        except OSError:
            return False
        self._since.clear()
        return True

    def _heard(self) -> None:
        if self._asked is not None and self._asked.take():
            self._take_answer(wait=False)

    def _unheard(self) -> Question | None:
        """What was asked, not watched any more."""
        asked, self._asked = self._asked, None
        if asked is not None and self._listening and self._loop is not None:
            self._loop.unwatch_fd(asked.fileno())
        self._listening = False
        return asked

    def _take_answer(self, *, wait: bool) -> None:
        """The end of what was asked; where no answer came, what can be seen from here has to do."""
        asked = self._unheard()
        assert asked is not None
        if wait:
            asked.wait()
        asked.close()
        from kvmneg.host.apart import holders  # only where there is one

        answer = holders(asked.answer)
        if answer is None:
            self._look = guests.Look(self._proc)
            self._slice(None)
            return
        found, self._unreadable = answer
        self._looked, self._hides = True, False
        self._holders = {(process.pid, process.started): vms for process, vms in found}
        self._answered = time.monotonic()
        for process, _ in found:
            self._add(process)

    def _go_on(self) -> None:
        """One slice; the next one when the loop has seen to the others."""
        assert self._loop is not None
        if self._look is not None and not self._slice(limits.LOOK_SLICE_SECONDS):
            self._loop.after(0.0, self._go_on)

    def _slice(self, seconds: float | None) -> bool:
        look = self._look
        assert look is not None
        done = look.step(seconds)
        if done:
            self._look = None
            self._looked = True
            self._unreadable, self._hides = look.unreadable, look.hidden
            if self._apart is not None:
                self._holders |= {(process.pid, process.started): 1 for process in look.found}
            for process in look.found:
                self._add(process)
        return done

    def _other(self, message: bytes) -> None:
        self.on_uevent(message)

    def _take_events(self) -> None:
        assert self._events is not None
        events, lost = self._events.read()
        for event in events:
            self._count = event.vms
            if event.kind == "create":
                process = guests.process(event.pid, self._proc)
                if process is not None:
                    self._remember(process)
                    self._add(process)
        if lost:
            self.on_uevent(None)
            self._looked, self._look = False, None
            self._begin_look()

    def _remember(self, process: Process) -> None:
        """What was asked before it was made says nothing of it."""
        if self._apart is None:
            return
        if len(self._since) >= limits.UNKNOWN_GUESTS:
            # nobody has asked for long: then whoever does asks anew
            self._since.clear()
            self._looked = False
        self._since.add((process.pid, process.started))

    def _add(self, process: Process) -> None:
        if self._is_ours(process):
            self._ours.add(process.pid)
            return
        if self._found.get(process.pid) == process:
            return
        if len(self._found) < limits.UNKNOWN_GUESTS:
            self._found[process.pid] = process
            if not self.accounted(process):
                self.on_found(process)
        else:
            self._looked = False  # told as: not all are known

    def _is_ours(self, process: Process) -> bool:
        return os.getpid() in (process.pid, process.parent)

    # -- asking -----------------------------------------------------------------------------------

    def all(self) -> list[Unknown]:
        """Those that there are now, waived ones too, by pid."""
        self._catch_up()
        waived = self._waivers.all()
        found = []
        for pid, process in sorted(self._found.items()):
            if not self._still(process):
                del self._found[pid]
            elif not self.accounted(process):
                reason = waived.get((pid, process.started), "")
                found.append(Unknown(process, reason, guests.named(pid, self._proc)))
        return found

    def blocking(self) -> list[Unknown]:
        """Those that are not waived."""
        return [one for one in self.all() if not one.waived]

    def missed(self) -> str:
        """Why there may be more than `all` gives, "" where there are not: for a scope, or a refusal."""
        self._catch_up()
        if not self._looked:
            return f"more than {limits.UNKNOWN_GUESTS} processes have a VM"
        hidden = self._hidden()
        if self._unreadable and (hidden or self._count is None):
            return (
                f"VMs that ran before kvmnegd, among {self._unreadable} processes whose descriptors it may not "
                "read (CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH)"
            )
        if self._hides and (hidden or self._count is None):
            return (
                "VMs that ran before kvmnegd, as processes of others are hidden from it (/proc with hidepid)"
            )
        if hidden:
            return f"KVM counts {hidden} VMs more than processes have that can be seen from here"
        return ""

    def _hidden(self) -> int:
        """How many VMs KVM counts that no process which is known here can have."""
        # each that was found has one at least; to count all descriptors takes long
        if self._count is None or self._count <= len(self._found):
            return 0
        self._ours = {pid for pid in self._ours if guests.vms(pid, self._proc)}
        seen = sum(guests.vms(pid, self._proc) for pid in {*self._ours, os.getpid()} - self._found.keys())
        for pid, process in self._found.items():
            told = self._holders.get((pid, process.started), 0)  # by who could count them
            seen += max(told, guests.vms(pid, self._proc))
        return max(self._count - seen, 0)

    def _catch_up(self) -> None:
        """Whoever asks gets the present: events that wait are taken, and a look is taken to its end."""
        if self._events is not None:
            for _ in range(limits.UEVENT_TURNS):
                self._take_events()
                if not self._events.waits():
                    break
            else:  # faster than they are read: what there is only a look tells
                self._looked = False
        if self._apart is not None:
            self._hear_now()
            return
        if self._look is None and (not self._looked or self._events is None):
            self._look = guests.Look(self._proc)
        if self._look is not None:
            self._slice(None)

    def _hear_now(self) -> None:
        """Where somebody else looks: once a second at most while events tell the rest, as it takes a tenth of one."""
        recent = time.monotonic() - self._answered < limits.VOLATILE_SECONDS
        needless = self._looked and self._events is not None and (recent or not self._found)
        if self._asked is None and not needless and not self._ask():
            self._look = self._look or guests.Look(self._proc)
        if self._asked is not None:
            self._take_answer(wait=True)
        elif self._look is not None:
            self._slice(None)

    def _still(self, process: Process) -> bool:
        """Whether it is the same process and has a VM; one that may not be looked into is taken to have it."""
        now = guests.process(process.pid, self._proc)
        if now is None or now.started != process.started:  # its name and its parent may change
            return False
        try:
            return guests.has_vm(process.pid, self._proc)
        except PermissionError:
            key = process.pid, process.started
            return self._apart is None or key in self._holders or key in self._since

    def waive(self, pid: int, audit: Audit, generation: int) -> Unknown:
        """Let one not block any more, by an admin's word. Raises UsageError where it is none, StoreError."""
        one = self.of(pid)
        self._waivers.add(one.process, audit, generation)
        return one._replace(waived=audit.reason)

    def of(self, pid: int) -> Unknown:
        """The one of a process, waived or not. Raises UsageError where it is none."""
        for one in self.all():
            if one.process.pid == pid:
                return one
        raise UsageError(f"process {pid} has no VM that is unknown", hint="`kvmneg guests` lists them")
