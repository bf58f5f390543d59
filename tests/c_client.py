# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkvmneg-client for tests: built, and called by a small program (tests/ipc/client_driver.c)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

TOP = Path(__file__).parent
CSRC = TOP.parent / "csrc"
CLIENT = TOP.parent / "client"
LIBRARY = [CSRC / f"{name}.c" for name in ("contract", "contract-check", "sha256", "words", "system")]
"""What it takes of libkvmneg: the reader of contracts."""


@pytest.fixture(scope="session")
def build_client() -> Callable[..., Path]:
    """build_client(output, *arguments) → the output, compiled against libkvmneg-client's header and json-c."""

    def build(output: Path, *arguments: str | Path) -> Path:
        for tool in ("gcc", "pkg-config"):
            if not shutil.which(tool):
                pytest.skip(f"{tool} is not installed")
        asked = ["pkg-config", "--cflags", "--libs", "json-c"]
        found = subprocess.run(asked, capture_output=True, text=True, check=False)
        if found.returncode:
            pytest.skip("libjson-c-dev is not installed")
        flags = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-I", CLIENT, "-I", CSRC)
        command = ["gcc", *flags, *arguments, *found.stdout.split(), "-o", output]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return output

    return build


@pytest.fixture(scope="session")
def c_client(
    build_client: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., dict[str, str]]:
    """c_client(socket, method, *arguments, timeout=seconds): what the function of libkvmneg-client returned and gave.

    Built with the sanitizers: what leaks or is out of bounds fails the test, as does a descriptor left open.
    """
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
    sources = (TOP / "ipc/client_driver.c", *sorted(CLIENT.glob("*.c")), *LIBRARY)
    driver = build_client(tmp_path_factory.mktemp("client") / "driver", *sanitizers, *sources)

    def call(socket: str | Path, *arguments: str | bytes, timeout: float = 20) -> dict[str, str]:
        command = [driver, socket, str(int(timeout * 1000)), *arguments]
        done = subprocess.run(command, capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr.decode()
        parts = done.stdout.decode("utf-8").split("\0")
        given = dict(zip(parts[::2], parts[1::2], strict=False))
        assert given["descriptors"] == "0"
        return given

    return call
