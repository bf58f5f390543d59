# SPDX-License-Identifier: LGPL-2.1-or-later
"""A lease in a container: the VM monitor that keeps it (holder.py runs inside), and what the daemon has of it."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from subprocess import Popen
    from typing import Any

    from .conftest import Installed

VM = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"
HOLDER = Path(__file__).parent / "holder.py"


class Holder:
    """A VM monitor inside (tests/units/holder.py) that keeps a lease by its connection."""

    def __init__(self, process: Popen[str]) -> None:
        self._process = process

    def do(self, *words: str) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@contextmanager
def holding(host: Installed, vm: str = VM) -> Iterator[Holder]:
    shutil.copy(HOLDER, host.root / "tmp/holder.py")
    with host.start("python3", "/tmp/holder.py") as process:
        holder = Holder(process)
        try:
            assert holder.do("begin", vm).startswith("/run/kvmneg/contracts/")
            yield holder
        finally:
            process.kill()


def guests(host: Installed) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(host.run("kvmneg", "--json", "guests").stdout)["guests"]
    return found


def stored(host: Installed) -> int:
    """How many descriptors lie with systemd."""
    return int(host.show("kvmneg.service", "NFileDescriptorStore")["NFileDescriptorStore"])
