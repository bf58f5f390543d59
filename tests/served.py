# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kvmnegd for tests that use one as its users do: a process, of which they know the socket."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvmneg.client import Client
from kvmneg.errors import Unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def daemon_in(folder: Path, *options: str) -> Iterator[str]:
    """The socket of a kvmnegd that keeps everything in this folder; it ends with the block."""
    path = str(folder / "run" / "org.kvmneg")
    where = ("--socket", path, "--state", str(folder / "state"))
    process = subprocess.Popen([sys.executable, "-P", "-m", "kvmneg.service.daemon", *where, *options])
    try:
        for _ in range(500):
            assert process.poll() is None
            try:
                with Client(path) as client:
                    client.get_info()
                break
            except Unreachable:
                time.sleep(0.02)
        yield path
    finally:
        process.terminate()
        process.wait(20)
