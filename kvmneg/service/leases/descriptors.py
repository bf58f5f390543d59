# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where descriptors lie while no daemon runs: a service manager keeps them over a restart, if there is one that can."""

from __future__ import annotations


class Descriptors:
    """Without a manager: nothing is kept. A manager's (FDSTORE of sd_notify(3)) has the same methods."""

    def kept(self) -> list[tuple[str, int]]:
        """The descriptors that an earlier daemon left, by name; from now on they are the caller's."""
        return []

    def keep(self, name: str, fd: int) -> None:
        """Have a copy of a descriptor kept under a name of its own."""

    def drop(self, name: str) -> None:
        """Forget what was kept under a name."""
