# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inputs of a measurement that change without an event, and whether they did.

Module parameters that may be written (vmentry_l1d_flush moves MSR 0x10a), late microcode, SMT, CPUs online,
the CPUs that this process may use (its cpuset can be changed from outside), a kvm module that is reloaded, loaded
besides or about to go, another /dev/kvm, tun or vhost-net, lockdown, a live patch, a suspend, another boot (of a
process that was frozen and restored). Looking at all of them takes about 0.1 ms, so a daemon can afford it before
every grant. Nothing is kept open meanwhile: an open /dev/kvm would pin KVM's modules, and an administrator
could not reload them.
"""

from __future__ import annotations

import os
import time

from kvmneg import limits
from kvmneg.errors import KvmnegError
from kvmneg.host.software import Roots, listing, module_names, read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_CPU = "devices/system/cpu"
_FILES = (
    f"{_CPU}/smt/control", f"{_CPU}/smt/active", f"{_CPU}/present", f"{_CPU}/online", f"{_CPU}/cpu0/microcode/version",
)  # fmt: skip
_LOCKDOWN, _BOOT = "kernel/security/lockdown", "sys/kernel/random/boot_id"
_DEVICES = ("net/tun", "vhost-net")
_STATE = "initstate"  # of a module that is loaded: live, coming or going (kernel/module/sysfs.c)
_WRITABLE = 0o222
# CLOCK_BOOTTIME runs on while the machine sleeps. Reading two clocks takes microseconds, a suspend a second.
_SLEPT_NS = 100_000_000


class Volatile:
    """The inputs as they were when `mark` was called last, and whether they are still so."""

    __slots__ = ("_changed", "_files", "_folders", "_looked", "_marked", "_msrs", "_path", "_roots", "_slept")

    def __init__(self, path: str, roots: Roots, msrs: Callable[[str], object]) -> None:
        """`msrs(path)` reads KVM's feature MSRs; raises KvmnegError. On arm64 it has nothing to say."""
        self._path = path
        self._roots = roots
        self._msrs = msrs
        self._files: tuple[str, ...] = ()
        self._folders: tuple[str, ...] = ()
        self._marked: object = None
        self._slept = 0
        self._looked = 0.0
        self._changed = True

    def mark(self) -> None:
        """Take the inputs as they are now. Call it *before* measuring, so that a change during it is seen."""
        names = module_names(self._roots)
        self._folders = tuple(f"{self._roots.sys}/module/{name}" for name in names)
        writable = (file for folder in self._folders for file in _writable(f"{folder}/parameters"))
        self._files = (
            *(f"{self._roots.sys}/{file}" for file in (*_FILES, _LOCKDOWN)),
            f"{self._roots.proc}/{_BOOT}",
            *(f"{folder}/{_STATE}" for folder in self._folders),
            *writable,
        )
        self._marked, self._slept = self._look(names), _slept()
        self._looked = time.monotonic()
        self._changed = False

    def forget(self) -> None:
        """What was marked was not measured after all: `changed` is true until the next mark."""
        self._changed = True

    def changed(self, *, fresh: bool = False) -> bool:
        """Whether an input differs from when it was marked; true before the first mark.

        Looks again when the last look is older than limits.VOLATILE_SECONDS, with `fresh` always. A change
        that was seen stays seen until the next mark.
        """
        if self._changed or (not fresh and time.monotonic() - self._looked < limits.VOLATILE_SECONDS):
            return self._changed
        self._looked = time.monotonic()
        self._changed = abs(_slept() - self._slept) > _SLEPT_NS or self._look() != self._marked
        return self._changed

    def _look(self, modules: list[str] | None = None) -> object:
        """Everything that is compared, in one value; `modules` are KVM's, where they were looked for already."""
        try:
            msrs = self._msrs(self._path)
        except KvmnegError as error:
            msrs = error.message
        return (
            [read(file, 4096) for file in self._files],
            # a module that was reloaded has new folders in sysfs, with new inodes
            [_inode(folder) for folder in self._folders],
            module_names(self._roots) if modules is None else modules,
            [_inode(path) for path in (self._path, *(f"{self._roots.dev}/{name}" for name in _DEVICES))],
            sorted(listing(f"{self._roots.sys}/kernel/livepatch")),
            os.sched_getaffinity(0),
            msrs,
        )


def _slept() -> int:
    """Nanoseconds this boot spent in suspend."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def _inode(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_rdev


def _writable(folder: str) -> list[str]:
    """The parameters that somebody may write."""
    files = [f"{folder}/{name}" for name in sorted(listing(folder))]
    return [file for file in files if _mode(file) & _WRITABLE]


def _mode(file: str) -> int:
    try:
        return os.stat(file).st_mode
    except OSError:
        return 0
