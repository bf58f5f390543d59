# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkvmneg's SHA-256, in C and by the CPU's instructions, against hashlib's."""

from __future__ import annotations

import hashlib
import platform
import random
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
BY_CPU = [CSRC / "sha256-x86.c"] if platform.machine() == "x86_64" else []
# around the ends of blocks, and of the padding in the last one
SIZES = (0, 1, 31, 32, 33, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 129, 160, 1000, 7568)


@pytest.fixture(scope="module", params=["c", "cpu"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """digest.c, and who computes: "cpu" where this one can."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    out = tmp_path_factory.mktemp("sha") / "digest"
    sources = [CSRC / "sha256.c", *(BY_CPU if request.param == "cpu" else [])]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["gcc", "-O2", "-Wall", "-Werror", *sanitizers, "-I", CSRC, "-o", out]
    subprocess.run([*command, Path(__file__).with_name("digest.c"), *sources], check=True)
    flags = Path("/proc/cpuinfo").read_text("utf-8").split()
    return out, "cpu" if request.param == "cpu" and BY_CPU and "sha_ni" in flags else "c"


def digest(program: Path, data: bytes, zeroed: int) -> list[str]:
    done = subprocess.run([program, str(zeroed)], input=data, capture_output=True, check=True)
    return done.stdout.decode().split()


@pytest.mark.parametrize("size", SIZES)
def test_of_bytes(program: tuple[Path, str], size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert digest(program[0], data, size) == [hashlib.sha256(data).hexdigest(), program[1]]


@pytest.mark.parametrize("at", [0, 1, 32, 33, 63, 64, 100])
@pytest.mark.parametrize("size", [132, 160, 200])
def test_with_a_field_taken_for_zeros(program: tuple[Path, str], size: int, at: int) -> None:
    data = bytearray(random.Random(size).randbytes(size))
    found = digest(program[0], bytes(data), at)
    data[at : at + 32] = bytes(32)
    assert found == [hashlib.sha256(data).hexdigest(), program[1]]
