# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMM builds are part of the combo, and looking them up starts each VMM: a child does it, nobody waits for it.

A VMM that is upgraded while the daemon runs is another one: its old version is forgotten with the measurement that
sees it, and the new one comes with the child. In between it has no version, and only what every version does counts.
"""

from __future__ import annotations

import os
import sys
import time

from kvmneg import limits
from kvmneg.host import vmm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.report import Report
    from kvmneg.host.measure import Measurer
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.loop import Loop

_PROGRAM = (
    "import sys; from kvmneg import settled; settled.take();"
    "from kvmneg.host import vmm; vmm.refresh(sys.argv[1])"
)
# Not before the calls that wait have their answers: a look-up takes a processor for a while.
_LATER_SECONDS = 0.5


class VmmLookup:
    """Measures by a measurer, with the VMM builds as the cache in the state directory has them."""

    def __init__(self, state: str, measurer: Measurer) -> None:
        self._cache = os.path.join(state, "vmm-builds.json")
        self._measurer = measurer
        self._loop: Loop | None = None
        self._node: Node | None = None
        self._looking_up = False
        self._looked = 0.0
        self._changed = False
        self._stamps: object = None
        self._take_stock()

    def measure(self) -> Report:
        """Measure now, with the builds that are known now. Raises NoKvm, KvmFault."""
        self.mark()
        return self.take()

    def mark(self) -> None:
        """Take the inputs as they are now, with the builds that are known now."""
        if self._now() != self._stamps:
            self._take_stock()
            if not vmm.settled(self._cache):
                self._look_up_later()
        self._changed = False
        self._measurer.mark()

    def take(self) -> Report:
        """Measure what was marked. Raises NoKvm, KvmFault."""
        return self._measurer.take()

    def doubt(self) -> None:
        """The measurement that was marked came to nothing."""
        self._measurer.doubt()

    def changed(self, *, fresh: bool = False) -> bool:
        """Whether an input of a measurement changed, a build among them (kvmneg.host.volatile)."""
        return self._replaced(fresh) or self._measurer.changed(fresh=fresh)

    def _replaced(self, fresh: bool) -> bool:
        """Looks again when the last look is older than limits.VOLATILE_SECONDS, with `fresh` always."""
        if self._changed or (not fresh and time.monotonic() - self._looked < limits.VOLATILE_SECONDS):
            return self._changed
        self._looked = time.monotonic()
        self._changed = self._now() != self._stamps
        return self._changed

    def _now(self) -> object:
        return vmm.stamps(self._cache, self._measurer.vmms)

    def _take_stock(self) -> None:
        """What the cache knows of the builds as they are. A change meanwhile is seen at the next look."""
        before = vmm.stamps(self._cache)
        self._measurer.vmms = vmm.known(self._cache)
        self._stamps = self._now() if vmm.stamps(self._cache) == before else None

    def start(self, loop: Loop, node: Node) -> None:
        """Look up builds that are new or were replaced, a little later, and whenever there are some again."""
        self._loop, self._node = loop, node
        self._look_up_later()

    def _look_up_later(self) -> None:
        if self._loop is not None and not self._looking_up:
            self._looking_up = True
            self._loop.after(_LATER_SECONDS, self._look_up)

    def _look_up(self) -> None:
        """Start the child; when it ends, measure again where the combo changed by it."""
        loop, node = self._loop, self._node
        assert loop is not None and node is not None  # it was started
        before, builds = vmm.stamps("", self._measurer.vmms), self._measurer.vmms
        ended = self._spawn()
        if ended is None:
            self._loop = (
                None  # nor the next time: a child that nobody waits for stays as long as this process
            )
            return
        child, descriptor = ended

        def take_up() -> None:
            loop.unwatch_fd(descriptor)
            os.close(descriptor)
            os.waitpid(child, 0)
            self._looking_up = False
            if vmm.stamps("", builds) != before:  # what it looked at may be gone by now
                self._look_up_later()
            known = self._measurer.vmms
            self._take_stock()
            if self._measurer.vmms != known:
                node.measure_again()

        loop.watch_fd(descriptor, take_up)

    def _spawn(self) -> tuple[int, int] | None:
        """A child that looks them up, and a descriptor that is readable when it has ended; None where there is none."""
        from kvmneg import settled  # as rarely as this

        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            child = os.posix_spawn(
                sys.executable,
                [sys.executable, "-P", "-c", _PROGRAM, self._cache],
                settled.environment(),
                file_actions=[(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)],
            )
        except OSError:
            return None  # no process to be had: the builds stay as they are known
        finally:
            os.close(null)
        try:
            return child, os.pidfd_open(child)
        except OSError:
            return None  # not allowed here, or out of descriptors: what it finds shows in the cache
