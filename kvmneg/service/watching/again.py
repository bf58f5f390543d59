# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measuring a running daemon's host again, in a child: an ioctl that hangs in the kernel must not hang the daemon.

The child is forked, not started: it has all modules, so that it costs 3 ms and not an interpreter's start. It closes
whatever descriptor it inherited first, as one that hangs for good must hold no lock, no connection and no lease of a
daemon that is restarted. What it found comes over a pipe.

Meanwhile everything is answered but what needs the measurement, which waits for it (`Measuring`), as the inputs of the
last one no longer hold. A child that does not end in MEASURE_SECONDS is killed, the host is unmeasured, and it is tried
again later, but never beside one that hangs. Looking whether an input changed (kvmneg.host.volatile) stays in the
daemon: it opens /dev/kvm and reads its feature MSRs, which waits for no lock of KVM's; making a VM does.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from kvmneg import errors, limits
from kvmneg.errors import BadInput, KvmnegError, NoKvm
from kvmneg.features.report import Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from kvmneg.service.node import Node
    from kvmneg.service.varlink.loop import Loop, Timer

    class Measurer(Protocol):
        """A measurer whose measurement can be made elsewhere (kvmneg.host.measure)."""

        def mark(self) -> None:
            """Take the inputs as they are, before the measurement."""

        def take(self) -> Report:
            """Measure. Raises NoKvm, KvmFault."""

        def doubt(self) -> None:
            """What was marked was not measured."""

        def changed(self, *, fresh: bool = False) -> bool:
            """Whether an input did since it was marked."""


_REPORT, _ERROR = b"R", b"E"
_PIPE = 3  # the child's one descriptor beside the standard ones
_CHUNK_BYTES = 64 * 1024
# from a measurement's end to the next turn of the call that waits for it, on a busy machine too
_AWAITED_SECONDS = 1.0
_END_SECONDS = 1.0  # from a child's last word to its end, on a busy machine too


class Measuring(NoKvm):
    """This host changed and is measured again at this moment: who asks gets the answer when that is done."""

    def __init__(self) -> None:
        super().__init__(
            "this host changed, and is measured again", hint="ask again in a moment", cause="measuring"
        )


class Again:
    """Measures a node's host again. `done` is called after each attempt, however it ended."""

    def __init__(self, loop: Loop, node: Node, measurer: Measurer, path: str) -> None:
        self.done: list[Callable[[], None]] = []
        self._loop = loop
        self._node = node
        self._measurer = measurer
        self._path = path
        self._fd = -1  # the pipe of the child that measures, where there is one
        self._child = 0
        self._data = b""
        self._deadline: Timer | None = None
        self._once_more = False
        self._ending: list[int] = []  # children that have told, or were killed, and are not reaped yet
        self._wedged = False
        # whether another measurement hangs than a child's
        self._elsewhere: Callable[[], bool] = lambda: False
        # whether the one under way, or that has just ended, was begun for a call that waits for it
        self._awaited = False
        self._ended = 0.0  # when the last one did
        self._pause = 0.0  # after a measurement that hung, while one does
        self._not_before = 0.0

    @property
    def busy(self) -> bool:
        """Whether a child measures."""
        return self._fd >= 0

    def refresh(self, *, fresh: bool = False) -> None:
        """Measure again where an input changed. Raises Measuring where that is under way and `fresh` is asked for."""
        if not self.busy and not self._wedged:
            if self._node.last_report is not None:
                if not self._measurer.changed(fresh=fresh):
                    return
            elif self._loop.clock() < self._not_before:
                return  # whoever asks gets the reason
            self.begin()
        if fresh and self.busy:
            raise Measuring

    def begin(self) -> None:
        """Measure again, once more where that is under way; not while a measurement hangs."""
        if self._wedged:
            return
        if self.busy:
            self._once_more = True
            return
        self._reap()
        self._not_before = self._loop.clock() + limits.VOLATILE_SECONDS
        self._measurer.mark()
        # without a device there is nothing to hang, without a process to be had no other way
        if not os.path.exists(self._path) or not self._fork():
            self._adopt_own()
            return
        self._loop.watch_fd(self._fd, self._readable)
        self._deadline = self._loop.after(limits.MEASURE_SECONDS, self._late)
        for function in self._node.doubted:
            function()

    def now(self) -> None:
        """Measure for the call at hand: what an admin commits is judged by it.

        Raises Measuring while that is under way; asked again when it has ended it returns, whatever came of it.
        """
        if self._awaited and self.busy:
            raise Measuring
        awaited, self._awaited = self._awaited, False
        if awaited and self._loop.clock() - self._ended < _AWAITED_SECONDS:
            return  # else who waited for that one has gone
        if self.busy:  # begun before it was asked for
            self._forget_child(kill=True)
        self.begin()
        if self.busy:
            self._awaited = True
            raise Measuring

    def beside(self, hangs: Callable[[], bool]) -> None:
        """A measurement that somebody else began hangs: none is begun until it does not any more."""
        self._elsewhere, self._wedged = hangs, True
        self._pause = limits.MEASURE_RETRY_SECONDS
        self._loop.after(self._pause, self._retry)

    # -- the child --------------------------------------------------------------------------------

    def _fork(self) -> bool:
        try:
            read, write = os.pipe2(os.O_CLOEXEC)
        except OSError:
            return False
        try:
            child = os.fork()
        except OSError:
            os.close(read)
            os.close(write)
            return False
        if not child:
            _measure(self._measurer, write)
        os.close(write)
        os.set_blocking(read, False)
        self._fd, self._child, self._data = read, child, b""
        return True

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, _CHUNK_BYTES)
        except BlockingIOError:
            return
        self._data += data
        if data and len(self._data) <= limits.REPORT_BYTES:
            return
        data = self._data
        self._forget_child(kill=bool(self._data[limits.REPORT_BYTES :]))
        self._pause = 0.0
        try:
            self._adopt(_told(data))
        except KvmnegError as error:
            self._measurer.doubt()
            self._adopt(None, error)

    def _late(self) -> None:
        """It hangs. Killed, it ends as soon as the kernel lets it."""
        from kvmneg.host import wedged  # rarely

        fault = wedged.fault(limits.MEASURE_SECONDS, self._child)
        self._forget_child(kill=True)
        self._wedged = True
        self._measurer.doubt()
        self._pause = self._pause or limits.MEASURE_RETRY_SECONDS
        self._loop.after(self._pause, self._retry)
        self._adopt(None, fault)

    def _retry(self) -> None:
        self._pause = min(2 * self._pause, limits.MEASURE_RETRY_MOST_SECONDS)
        self._reap()
        if self._ending or self._elsewhere():  # it hangs still, and another one would too
            self._loop.after(self._pause, self._retry)
            return
        self._wedged = False
        self.begin()

    def _forget_child(self, *, kill: bool) -> None:
        fd, self._fd = self._fd, -1
        self._loop.unwatch_fd(fd)
        os.close(fd)
        if self._deadline is not None:
            self._loop.cancel(self._deadline)
        if kill:
            os.kill(self._child, signal.SIGKILL)
        self._ending.append(self._child)
        self._loop.after(_END_SECONDS, self._reap)

    def _reap(self) -> None:
        """Never waits: a process can hang while it ends, too."""
        self._ending = [child for child in self._ending if os.waitpid(child, os.WNOHANG) == (0, 0)]

    # -- what came of it --------------------------------------------------------------------------

    def _adopt_own(self) -> None:
        report, why_not = None, KvmnegError("an internal error while this host was measured")
        try:
            report = self._measurer.take()
        except KvmnegError as error:
            why_not = error
        finally:  # a fault of ours too leaves a host that is not measured
            self._adopt(report, why_not)

    def _adopt(self, report: Report | None, why_not: KvmnegError | None = None) -> None:
        self._not_before = self._loop.clock() + limits.VOLATILE_SECONDS
        try:
            self._node.take_up(report, why_not)
        finally:
            once_more, self._once_more = self._once_more, False
            if once_more:
                self.begin()
            if not self.busy:
                self._ended = self._loop.clock()
                for function in self.done:
                    function()


def _measure(measurer: Measurer, write: int) -> None:
    """The child's whole life."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(write, _PIPE)
        os.closerange(_PIPE + 1, os.sysconf("SC_OPEN_MAX"))
        try:
            data = _REPORT + json.dumps(measurer.take().to_json()).encode()
        except KvmnegError as error:
            told = {"message": error.message, "hint": error.hint, "fields": error.fields}
            data = _ERROR + json.dumps({"kind": type(error).__name__, **told}).encode()
        while data:
            data = data[os.write(_PIPE, data) :]
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _told(data: bytes) -> Report:
    """What a child told. Raises what it raised; KvmnegError where it ended without a word."""
    if data[:1] == _REPORT:
        try:
            return Report.loads(data[1:], file="the measurement")
        except BadInput as error:
            raise KvmnegError(f"an internal error while this host was measured: {error.message}") from error
    if data[:1] != _ERROR:
        raise KvmnegError("an internal error while this host was measured", hint="the daemon's log has more")
    told = json.loads(data[1:])
    kind = getattr(errors, told["kind"], KvmnegError)
    fault = KvmnegError.__new__(kind)  # their own arguments differ: they come as they were put together
    KvmnegError.__init__(fault, told["message"], hint=told["hint"], **told["fields"])
    raise fault
