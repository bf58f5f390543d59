# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence's copy: made a moment after each change, and the way back from it when the database is lost."""

from __future__ import annotations

from kvmneg import limits
from kvmneg.clock import now
from kvmneg.errors import KvmnegError, LimitExceeded, StoreError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from kvmneg.service.node import Node
    from kvmneg.service.varlink.server import Server
    from kvmneg.store.interface import Audit


class Copier:
    """Has the store copy its fence when it changed, after the reply: two syncs more that no caller waits for.

    COPY_SECONDS later, and many changes in a row are one copy; one that cannot be written is tried again.
    """

    def __init__(self, server: Server, node: Node, on_trouble: Callable[[str], None]) -> None:
        self._server, self._node, self._on_trouble = server, node, on_trouble
        self._waiting = False
        node.changed.append(self.later)
        self.later()

    def later(self) -> None:
        self._after(limits.COPY_SECONDS)

    def _after(self, seconds: float) -> None:
        if not self._waiting:
            self._waiting = True
            self._server.after(seconds, self._due)

    def _due(self) -> None:
        self._waiting = False
        if not self.copy():
            self._after(limits.COPY_AGAIN_SECONDS)

    def copy(self) -> bool:
        """Whether the copy is there as it should be."""
        try:
            self._node.store.copy_out(now())
        except StoreError as error:
            self._on_trouble(f"the copy of the fence is an old one: {error}")
            return False
        return True


def restore(node: Node, above: int | None, audit: Audit) -> dict[str, Any]:
    """Go on from the copy that is served, at a generation above `above` and every one known here.

    Known are those of the copy, of the contracts' files, and of what can be read of a database set aside. Raises
    UsageError where the database is sound, LimitExceeded, StoreError.
    """
    from kvmneg.store.recovered import RecoveredStore  # a bad day only

    store = node.store
    if not isinstance(store, RecoveredStore):
        raise UsageError("the database is sound: there is nothing to restore")
    if above is not None and not 0 <= above < limits.GENERATIONS:
        raise LimitExceeded("GENERATIONS", limits.GENERATIONS, hint="no fence had that generation")
    node.adopt(store.restored(max(above or 0, *_generations(node), 0), audit))
    fence = node.fence
    return {
        "generation": node.generation,
        "digest": fence.digest if fence else None,
        "text": fence.text() if fence else None,
    }


def _generations(node: Node) -> Iterator[int]:
    """Those of the contracts that lie beside the socket: a guest may have been started with each."""
    from kvmneg.policy.contract import Contract

    yield 0
    for digest in node.files.digests():
        try:
            with open(node.files.path(digest), "rb") as file:
                contract = Contract.from_binary(file.read(limits.CONTRACT_BYTES + 1), file=digest)
        except (OSError, KvmnegError):
            continue  # not one of ours any more
        if contract.fence[0] < limits.GENERATIONS:
            yield contract.fence[0]
