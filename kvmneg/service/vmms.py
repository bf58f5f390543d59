# SPDX-License-Identifier: LGPL-2.1-or-later
"""VMM builds are part of the combo, and looking them up starts each VMM: a child does it, nobody waits for it."""

from __future__ import annotations

import os
import sys

from kvmneg.host import vmm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.host.measure import Measurer
    from kvmneg.service.loop import Loop
    from kvmneg.service.node import Node

_PROGRAM = "import sys; from kvmneg.host import vmm; vmm.refresh(sys.argv[1])"


class VmmLookup:
    """Keeps a measurer's VMM builds as the cache in the state directory has them."""

    def __init__(self, state: str, measurer: Measurer) -> None:
        self._cache = os.path.join(state, "vmm-builds.json")
        self._measurer = measurer
        measurer.vmms = vmm.known(self._cache)

    def start(self, loop: Loop, node: Node) -> None:
        """Look up builds that are new or were replaced; measure again where the combo changed by it."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            child = os.posix_spawn(
                sys.executable,
                [sys.executable, "-P", "-c", _PROGRAM, self._cache],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)],
            )
        except OSError:
            return  # no process to be had: the builds stay as they are known
        finally:
            os.close(null)
        try:
            ended = os.pidfd_open(child)
        except OSError:
            return  # not allowed here, or out of descriptors: what it finds counts from the next start on

        def take_up() -> None:
            loop.unwatch_fd(ended)
            os.close(ended)
            os.waitpid(child, 0)
            found = vmm.known(self._cache)
            if found != self._measurer.vmms:
                self._measurer.vmms = found
                node.measure()

        loop.watch_fd(ended, take_up)
