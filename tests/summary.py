# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a run of the tests did on which KVM: counted, written down inside a host, put together outside."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

# Where a run inside a host leaves its part.
VARIABLE = "KVMNEG_TEST_SUMMARY"


class Part(NamedTuple):
    """One KVM's part: `name` is the host's ("" for this machine), `problem` why KVM was not used, or "".

    `files` is how many tests of which file passed or failed there; skipped ones are none.
    """

    name: str
    kind: str
    problem: str
    ioctls: Counter[tuple[str, int]]
    outcomes: dict[str, int]
    files: dict[str, int]

    def to_json(self) -> bytes:
        ioctls = [[ioctl, error, count] for (ioctl, error), count in sorted(self.ioctls.items())]
        return json.dumps({**self._asdict(), "ioctls": ioctls}).encode()

    def succeeded(self) -> set[str]:
        """The ioctls that succeeded at least once."""
        return {ioctl for ioctl, error in self.ioctls if error == 0}


def read(data: bytes, name: str) -> Part:
    """A part written by to_json() in the host `name`."""
    listed: dict[str, Any] = json.loads(data)
    ioctls = Counter({(ioctl, error): count for ioctl, error, count in listed["ioctls"]})
    return Part(name, listed["kind"], listed["problem"], ioctls, listed["outcomes"], listed["files"])


def kind() -> str:
    """Which KVM this is: its modules, kernel and architecture."""
    listed = os.listdir("/sys/module") if Path("/sys/module").is_dir() else []
    modules = sorted(name for name in listed if name.startswith("kvm_"))
    return f"{'+'.join(modules) or 'kvm'} of Linux {platform.release()} on {platform.machine()}"


def lines(parts: Iterable[Part]) -> list[str]:
    """The summary: a line for each KVM, then for each ioctl and outcome how often it was made on which."""
    parts = list(parts)
    text = []
    for part in parts:
        outcomes = ", ".join(f"{count} {what}" for what, count in sorted(part.outcomes.items()))
        where = f"in {part.name}: " if part.name else ""
        text.append(f"{where}not used: {part.problem}" if part.problem else f"{where}ran on {part.kind}")
        text[-1] += f" ({outcomes})" if part.name else ""
    for ioctl, error in sorted({key for part in parts for key in part.ioctls}):
        outcome = os.strerror(error) if error else "succeeded"
        counts = [(part.name or "here", part.ioctls[ioctl, error]) for part in parts]
        total = sum(count for _, count in counts)
        where = ", ".join(f"{name} {count}" for name, count in counts if count)
        text.append(f"  {ioctl:<34} {total:>7} × {outcome:<30}" + (f" {where}" if len(parts) > 1 else ""))
    return [line.rstrip() for line in text]
