# SPDX-License-Identifier: LGPL-2.1-or-later
"""A recorded disk, and programs that run on it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.disk.recording import Disk, build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library to be preloaded."""
    return build(tmp_path_factory.mktemp("recorder"))


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: what a sync does there is nothing, and nobody waits for it."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def disk(recorder: Path, scratch: Path) -> Disk:
    """A folder whose changes are recorded."""
    return Disk(recorder, scratch)


@pytest.fixture
def run(disk: Disk) -> Callable[..., str]:
    """run(script, *arguments, status=0) → what a Python program on that disk printed."""

    def run_it(script: str, *arguments: object, status: int = 0) -> str:
        command = [sys.executable, "-P", "-c", script, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=disk.environment, check=False, timeout=120
        )
        assert done.returncode == status, done.stderr
        return done.stdout

    return run_it
