# SPDX-License-Identifier: LGPL-2.1-or-later
"""Handles on the real KVM, and C programs compiled for a test.

Tests for one architecture are in test_x86_*.py and test_arm64_*.py, or marked only_on: on another one they are not
collected, for nobody there has to know of them.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg.host.kvm import Kvm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MACHINE = platform.machine()
_FILES = {"x86_64": "test_x86_*.py", "aarch64": "test_arm64_*.py"}
collect_ignore_glob = [pattern for machine, pattern in _FILES.items() if machine != MACHINE]
ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a word: what is deselected is counted in the summary."""
    items[:] = [
        item for item in items if all(mark.args == (MACHINE,) for mark in item.iter_markers("only_on"))
    ]


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    """The real KVM, for tests that are marked so: they are skipped where there is none."""
    with Kvm.open() as handle:
        yield handle


@pytest.fixture(scope="session")
def compile_c(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compile_c(name, *arguments) → the program; warnings are errors, csrc/ is searched for headers.

    Programs have the sanitizers: what is out of bounds, undefined or leaks ends them with an error.
    """
    folder = tmp_path_factory.mktemp("c")

    def compile_it(name: str, *arguments: str | Path) -> Path:
        if not shutil.which("gcc"):
            pytest.skip("gcc is not installed")
        flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-I", ROOT / "csrc"]
        if "-shared" not in arguments:
            flags += SANITIZERS
        command = ["gcc", *flags, *arguments, "-o", folder / name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return folder / name

    return compile_it
