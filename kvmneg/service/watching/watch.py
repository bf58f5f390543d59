# SPDX-License-Identifier: LGPL-2.1-or-later
"""What happens on the host while nobody asks: a change is seen, and measured again, within a second.

The kernel tells of modules, CPUs and devices (uevents), inotify of VMMs that are installed or replaced and of a
/dev/kvm that was missing. Each is only a reason to look at the inputs (kvmneg.host.volatile), once for all that come
together.
What sends no event (a module's parameters, microcode, SMT, a suspend) is looked at every WATCH_POLL_SECONDS, and when
somebody asks.
"""

from __future__ import annotations

import os

from kvmneg import limits
from kvmneg.host import inotify, vmm
from kvmneg.host.inotify import Inotify
from kvmneg.host.uevents import concerns
from kvmneg.service.watching.again import Measuring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmneg.service.node import Node
    from kvmneg.service.varlink.loop import Loop, Timer

_FILES = inotify.CREATE | inotify.CLOSE_WRITE | inotify.MOVED_FROM | inotify.MOVED_TO | inotify.DELETE
# with its owner and mode, which come after it
_DEVICE = inotify.CREATE | inotify.MOVED_TO | inotify.ATTRIB


class Watcher:
    """Looks at a node's host when something happens. `folders` are searched for VMMs, each once."""

    def __init__(self, loop: Loop, node: Node, path: str, folders: Iterable[str] | None = None) -> None:
        self._loop = loop
        self._node = node
        self._path = os.path.abspath(path)
        self._folders = vmm.searched() if folders is None else folders
        self._soon: Timer | None = None
        self._device: Inotify | None = None

    def start(self) -> None:
        """Watch from now on."""
        self._node.unknown.on_uevent = self._uevent
        self._watch_vmms()
        self._node.changed.append(self._watch_device)
        self._watch_device()

    def _look_soon(self) -> None:
        if self._soon is None:
            self._soon = self._loop.after(limits.WATCH_SETTLE_SECONDS, self._look)

    def _look(self) -> None:
        self._soon = None
        if self._node.last_report is None:  # whatever was tried a moment ago
            self._node.measure_again()
            return
        try:
            self._node.refresh(fresh=True)
        except Measuring:
            pass

    # -- what tells -------------------------------------------------------------------------------

    def _uevent(self, message: bytes | None) -> None:
        """One that is no VM's; None: some were lost."""
        if message is None or concerns(message):
            self._look_soon()

    def _watch_vmms(self) -> None:
        real = [path for path in map(os.path.realpath, self._folders) if os.path.isdir(path)]
        self._watch(dict.fromkeys(real), _FILES, vmm.NAMES)

    def _watch_device(self) -> None:
        """Only while there is nothing to measure: much happens in /dev."""
        if self._node.last_report is not None:
            if self._device is not None:
                self._loop.unwatch_fd(self._device.fileno())
                self._device.close()
                self._device = None
        elif self._device is None:
            folder, name = os.path.split(self._path)
            self._device = self._watch((folder,), _DEVICE, {name})
            if self._device is not None and os.path.exists(self._path):
                self._look_soon()  # it came before it was watched

    def _watch(self, folders: Iterable[str], mask: int, names: Iterable[str]) -> Inotify | None:
        """Look when something happens to a name in a folder; None where only the poll is left."""
        wanted = frozenset(names)
        try:
            watched = Inotify()
        except OSError:
            return None
        for folder in list(folders)[: limits.WATCHED_FOLDERS]:
            try:
                watched.add(folder, mask)
            except OSError:
                pass  # gone meanwhile, or no watch left for this user

        def read() -> None:
            happened, lost = watched.read()
            if lost or not wanted.isdisjoint(happened):
                self._look_soon()

        self._loop.watch_fd(watched.fileno(), read)
        return watched
