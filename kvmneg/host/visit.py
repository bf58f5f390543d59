# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts with several kinds of CPU: which CPU stands for each kind, how it is visited, and which kinds cannot be.

    plan(classes)        one CPU of each kind that this process may run on, and the kinds of which it may use none
    on(cpu, function)    the function's outcome on that CPU

A process keeps to the affinity it was given (taskset, CPUAffinity=, a cgroup's cpuset): who isolates CPUs has a
reason. A kind that it keeps this process from is not measured, and the report says so (combo, "unvisited"): what
kvmneg.policy.coverage makes of it is no yes at all.
"""

from __future__ import annotations

import _thread  # threading costs a millisecond at import, and has nothing that is needed here
import os

from kvmneg.errors import KvmFault
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet
    from typing import Any, TypeVar

    from kvmneg.host.software import CpuClass

    T = TypeVar("T")

_EAGAIN = 11
_NOT_ALLOWED = "this process may not run there: its affinity or cpuset leaves them out"
_NOT_LISTED = "/proc/cpuinfo lists none of the CPUs that this process may run on"


class Plan(NamedTuple):
    """Where to measure: the kinds that can be visited with a CPU of each, and those that cannot with the reason.

    Without any kind that can be visited there is one CPU to measure all the same, and no kind.
    """

    kinds: tuple[CpuClass, ...]
    cpus: tuple[int, ...]
    unvisited: tuple[tuple[CpuClass, str], ...]

    def to_combo(self) -> list[dict[str, Any]]:
        """The combo's "unvisited": [{"cpus": "4-7", "kind": identity, "because"}], empty where all were visited."""
        return [
            {"cpus": cpulist(one.cpus), "kind": one.identity, "because": why} for one, why in self.unvisited
        ]


def plan(classes: Sequence[CpuClass], allowed: AbstractSet[int] | None = None) -> Plan:
    """One CPU of each kind, the first that this thread may use; `allowed` stands for its affinity."""
    allowed = os.sched_getaffinity(0) if allowed is None else allowed
    first = [next((cpu for cpu in one.cpus if cpu in allowed), None) for one in classes]
    rows = [(one, cpu) for one, cpu in zip(classes, first, strict=True) if cpu is not None]
    kinds, cpus = tuple(one for one, _ in rows), tuple(cpu for _, cpu in rows)
    why = _NOT_ALLOWED if rows else _NOT_LISTED
    unvisited = tuple((one, why) for one, cpu in zip(classes, first, strict=True) if cpu is None)
    return Plan(kinds, cpus or (min(allowed),), unvisited)


def on(cpu: int, function: Callable[[], T]) -> T:
    """What a function returns or raises on one CPU. Raises KvmFault where that CPU cannot be used (any more).

    It runs in a thread of its own. A thread that was pinned and set back has its affinity from then on as its own
    choice: CPUs that come online later, or that its cpuset gains, would never be among them.
    """
    found: list[T] = []
    raised: list[BaseException] = []
    ended = _thread.allocate_lock()

    def visit() -> None:
        try:
            os.sched_setaffinity(0, {cpu})
        except OSError as error:
            raised.append(KvmFault("sched_setaffinity", error.errno or 0, f"CPU {cpu}"))
        else:
            try:
                found.append(function())
            except BaseException as error:  # it belongs to who waits
                raised.append(error)
        finally:
            ended.release()

    ended.acquire()
    try:
        _thread.start_new_thread(visit, ())
    except RuntimeError:  # no more threads for this user or this cgroup
        raise KvmFault("clone", _EAGAIN, f"CPU {cpu}") from None
    ended.acquire()
    if raised:
        raise raised[0]
    return found[0]


def cpulist(cpus: Sequence[int]) -> str:
    """CPU numbers as the kernel writes them: "0-3,8"."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and cpu == parts[-1][1] + 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)
