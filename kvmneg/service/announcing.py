# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the daemon stands, told to systemd and to the journal: at its start, and when that changes."""

from __future__ import annotations

from kvmneg.errors import KvmnegError
from kvmneg.service import lifecycle, systemd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.report import Report
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.server import Server

# Not before the calls that wait have their answers.
LATER_SECONDS = 1.0
_TROUBLE = ("unmeasured", "breached", "unreadable", "readonly")


def status(node: Node) -> str:
    """The line of `systemctl status`: state, generation, and the beginning of the fence's digest."""
    fence = f"fence {node.fence_digest[:19]}" if node.fence_digest else "no fence"
    return f"{node.state}, generation {node.generation}, {fence}"


def announce(node: Node) -> None:
    """READY=1, and why no contract is given, where none is."""
    systemd.ready(status(node))
    if node.state in _TROUBLE:
        _tell_state(node)


def tell_systemd(node: Node) -> None:
    """Where the node stands now."""
    systemd.status(status(node))


def follow(server: Server, node: Node) -> None:
    """What a new measurement changed, and whether changes are written, into the journal.

    What the fence makes of a measurement kvmneg.service.level.levels tells.
    """
    first = last = _report_of(node)
    failed = node.store.fault is not None

    def tell() -> None:
        nonlocal last, failed
        fault = node.store.fault
        if failed != (fault is not None):
            failed = fault is not None
            from kvmneg.service import telling  # no start needs it

            telling.store(fault)
        before, last = last, _report_of(node)
        if before is last:
            return
        from kvmneg.service.watching import changes  # no start needs it

        changes.tell(before, last, _why_not(node))

    def tell_of_start() -> None:
        from kvmneg.service.watching import changes

        before = changes.before_start(node, first) if first is not None else None
        if before is not None:
            changes.tell(before, first)

    node.changed.append(tell)
    if node.news:
        server.after(LATER_SECONDS, tell_of_start)


def _report_of(node: Node) -> Report | None:
    return node.report if node.host_digest else None


def _why_not(node: Node) -> KvmnegError | None:
    try:
        node.report  # noqa: B018 (it raises its reason)
    except KvmnegError as error:
        return error
    return None


def _tell_state(node: Node) -> None:
    """Why no contract is given."""
    from kvmneg.policy import coverage
    from kvmneg.service import telling

    if node.store.fault is not None:
        telling.store(node.store.fault)
        return
    try:
        node.fence  # noqa: B018 (it raises its reason)
    except KvmnegError as error:
        telling.trouble(str(error))
        return
    try:
        coverage.require(node.report)
    except KvmnegError as error:
        telling.unmeasured(error, str(error))
        return
    if node.breach_told:
        return  # this measurement found it
    lost = list(dict.fromkeys(one.feature for one in node.below))
    telling.breached(node.report.host, node.report.combo_digest(), node.generation, lost)


def tell_start(node: Node) -> None:
    """Into the journal."""
    from kvmneg.service import telling  # when the calls that wait have their answers

    telling.started(node, status(node))
    lifecycle.tell_store()
