# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests are run once for each combo, by a child, when the calls that wait have their answers.

A measurement must not wait for them: it sets tables and reads them back, which is cheap. What guests saw is added from
the next measurement on, where it is worse; offers that promised more are stale then.
"""

from __future__ import annotations

import os
import sys

from kvmneg.features.report import combo_digest
from kvmneg.host import proof

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kvmneg.host.measure import Measurer
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.loop import Loop

_PROGRAM = (
    "import sys; from kvmneg import settled; settled.take();"
    "from kvmneg.host import proof; proof.refresh(*sys.argv[1:])"
)
# After the look-up of VMMs, which moves the combo.
_LATER_SECONDS = 1.0


class Prover:
    """Gives a measurer what is known of its combo, and finds out what is not."""

    def __init__(self, state: str, path: str, measurer: Measurer) -> None:
        self._cache = os.path.join(state, "proofs.json")
        self._path = path
        self._kept = proof.known(self._cache)
        self._last: tuple[Mapping[str, Any], str] = ({}, "")
        self._tried: set[str] = set()  # in this process: a KVM on which guests fail is left alone
        self._waiting = False
        self._loop: Loop | None = None
        self._node: Node | None = None
        measurer.proven = self.known

    def known(self, combo: Mapping[str, Any]) -> proof.Kept | None:
        """What guests saw under this combo, None where none ran. Digesting a combo takes longer than comparing it."""
        if combo != self._last[0]:
            self._last = combo, combo_digest(combo)
        return self._kept.get(self._last[1])

    def start(self, loop: Loop, node: Node) -> None:
        """Run guests for the combo of now, a little later, and for each that comes."""
        self._loop, self._node = loop, node
        node.changed.append(self._later)
        self._later()

    def _later(self) -> None:
        if self._loop is not None and not self._waiting:
            self._waiting = True
            self._loop.after(_LATER_SECONDS, self._prove)

    def _prove(self) -> None:
        """Start the child where the combo is new; when it has ended, measure again with what it found."""
        loop, node = self._loop, self._node
        assert loop is not None and node is not None  # it was started
        self._waiting = False
        digest = node.combo_digest
        if digest is None or digest in self._tried or digest in self._kept:
            return
        self._tried.add(digest)
        ended = self._spawn(digest)
        if ended is None:
            return
        self._waiting = True
        child, descriptor = ended

        def take_up() -> None:
            loop.unwatch_fd(descriptor)
            os.close(descriptor)
            os.waitpid(child, 0)
            self._waiting = False
            self._kept = proof.known(self._cache)
            if node.combo_digest == digest and digest in self._kept:
                node.measure_again()
            self._later()  # the combo may have moved meanwhile

        loop.watch_fd(descriptor, take_up)

    def _spawn(self, digest: str) -> tuple[int, int] | None:
        """A child that runs them, and a descriptor that is readable when it has ended; None where there is none."""
        from kvmneg import settled  # as rarely as this

        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            child = os.posix_spawn(
                sys.executable,
                [sys.executable, "-P", "-c", _PROGRAM, self._cache, self._path, digest],
                settled.environment(),
                file_actions=[(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)],
            )
        except OSError:
            return None  # no process to be had: words stay graded by what KVM reads back
        finally:
            os.close(null)
        try:
            return child, os.pidfd_open(child)
        except OSError:
            return None  # what it finds is known at the next start
