# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors and timers beside the connections: what the daemon adds to the one loop it runs."""

from __future__ import annotations

import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

FOREVER = 86400.0  # seconds; epoll takes no infinity


class Timer:
    """Something to be called every so many seconds, or once where `seconds` is None."""

    __slots__ = ("callback", "due", "seconds")

    def __init__(self, callback: Callable[[], None], due: float, seconds: float | None) -> None:
        self.callback, self.due, self.seconds = callback, due, seconds


class Loop:
    """The epoll descriptor, what it watches besides connections, and the timers.

    A callback that raises is reported to `on_internal_error` and does not end the loop.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.on_internal_error: Callable[[BaseException], None] = lambda error: None
        self.clock = clock
        self.epoll = select.epoll()  # close-on-exec, as all of Python's
        self._watched: dict[int, Callable[[], None]] = {}
        self._timers: list[Timer] = []
        self._due = 0.0  # of the next timer

    def watch_fd(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever `fd` has something to read, until it is unwatched; the descriptor stays the caller's."""
        self.epoll.register(fd, select.EPOLLIN)
        self._watched[fd] = callback

    def unwatch_fd(self, fd: int) -> None:
        """To be called before the descriptor is closed."""
        del self._watched[fd]
        self.epoll.unregister(fd)

    def every(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back every so many seconds; first when they have passed. Due timers run before a turn's calls."""
        return self._add(Timer(callback, self.clock() + seconds, seconds))

    def after(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call back once."""
        return self._add(Timer(callback, self.clock() + seconds, None))

    def cancel(self, timer: Timer) -> None:
        """Forget a timer; one that is past is no error."""
        if timer in self._timers:
            self._timers.remove(timer)

    def _add(self, timer: Timer) -> Timer:
        self._timers.append(timer)
        self._due = min(self._due, timer.due)
        return timer

    def _run_timers(self) -> None:
        now = self.clock()
        for timer in [timer for timer in self._timers if timer.due <= now]:
            if timer not in self._timers:
                continue  # cancelled by one before it
            if timer.seconds is None:
                self._timers.remove(timer)
            else:
                timer.due = now + timer.seconds
            self.guarded(timer.callback)
        self._due = min((timer.due for timer in self._timers), default=now + FOREVER)

    def guarded(self, callback: Callable[[], None]) -> None:
        """Call, and report a fault instead of letting it through."""
        try:
            callback()
        except Exception as error:
            self.report(error)

    def _call_back(self, descriptors: list[int]) -> None:
        """Those of the descriptors that are (still) watched have something to read."""
        for fd in descriptors:
            if fd in self._watched:
                self.guarded(self._watched[fd])

    def report(self, error: BaseException) -> None:
        """Hand a fault of ours to whoever logs."""
        try:
            self.on_internal_error(error)
        except Exception:
            pass  # the log itself is broken: go on serving
