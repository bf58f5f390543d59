# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first measurement, which a daemon makes before it serves, and which must not keep it from that for ever.

A child as later ones have (kvmneg.service.watching.again) would cost a start more than the measurement itself. So this
one runs in a thread: where KVM does not answer, the daemon serves what it has, grants nothing, and says so, beside a
thread that hangs. It measures again once that has ended. What a child would spare it: such a process outlives its own
SIGKILL, until KVM lets the thread go. It gives up socket and state directory when it is stopped in order.
"""

from __future__ import annotations

import _thread  # threading costs a millisecond at import

from kvmneg import limits
from kvmneg.errors import KvmnegError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.report import Report
    from kvmneg.service.node import Measurer

# At most, whatever MEASURE_SECONDS is: systemd waits 90 seconds for READY=1 (DefaultTimeoutStartSec=).
_MOST_SECONDS = 60.0


class First:
    """A measurer until the loop has its own: `measure` waits for a while, and then tells that KVM does not answer."""

    __slots__ = ("_ended", "_fault", "_measurer", "_report")

    def __init__(self, measurer: Measurer) -> None:
        self._measurer = measurer
        self._ended = _thread.allocate_lock()  # held while a thread measures
        self._report: Report | None = None
        self._fault: BaseException | None = None

    def hangs(self) -> bool:
        """Whether the thread still waits."""
        return self._ended.locked()

    def measure(self) -> Report:
        """Raises NoKvm, KvmFault; NoKvm with the cause "wedged"."""
        seconds = min(limits.MEASURE_SECONDS, _MOST_SECONDS)
        if not self.hangs():
            self._report = self._fault = None
            self._ended.acquire()
            try:
                _thread.start_new_thread(self._measure, ())
            except RuntimeError:  # no thread for this user or this cgroup
                self._measure()
            if self._ended.acquire(timeout=seconds):
                self._ended.release()
                if self._fault is not None:
                    raise self._fault
                if self._report is not None:
                    return self._report
                raise KvmnegError("an internal error while this host was measured")
        from kvmneg.host import wedged  # rarely

        raise wedged.fault(seconds)

    def changed(self, *, fresh: bool = False) -> bool:
        """Whether an input did."""
        return not self.hangs() and self._measurer.changed(fresh=fresh)

    def _measure(self) -> None:
        try:
            self._report = self._measurer.measure()
        except BaseException as error:  # it belongs to who waits
            self._fault = error
        finally:
            self._ended.release()
