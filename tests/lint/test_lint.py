# SPDX-License-Identifier: LGPL-2.1-or-later
"""The linters are tests. A missing tool skips here and fails in CI (tests/conftest.py)."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def tracked(*patterns: str) -> list[str]:
    """The files of the project, as git has or would have them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=TOP, check=True, capture_output=True, text=True).stdout.splitlines()
    return [name for name in listed if (TOP / name).is_file()]


def run(tool: str, *arguments: str) -> None:
    program = BIN / tool if (BIN / tool).exists() else shutil.which(tool)
    if not program:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([program, *arguments], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{tool}:\n{done.stdout}{done.stderr}"


def test_ruff_check() -> None:
    run("ruff", "check", "--no-cache", ".")


def test_ruff_format() -> None:
    run("ruff", "format", "--no-cache", "--check", ".")


def test_mypy(tmp_path: Path) -> None:
    run("mypy", "--cache-dir", str(tmp_path), "kvmneg")


def test_codespell() -> None:
    run(
        "codespell",
        *tracked(
            "*.py", "*.c", "*.h", "*.md", "*.scd", "*.scd.in", "*.toml", "*.varlink", "Makefile", "*.sh"
        ),
    )


def test_shellcheck() -> None:
    scripts = [name for name in tracked("*.sh", ".ci/*") if (TOP / name).read_text().startswith("#!")]
    run("shellcheck", *scripts)


@pytest.mark.parametrize("compiler", ["gcc", "aarch64-linux-gnu-gcc"])
@pytest.mark.parametrize("source", tracked("csrc/*.c", "client/*.c", "examples/*.c"))
def test_gcc_analyzer(compiler: str, source: str, tmp_path: Path) -> None:
    """-fanalyzer -Werror on each file; a file of one architecture is the other compiler's empty unit or not its."""
    if ("arm64" in source) != compiler.startswith("aarch64") and ("arm64" in source or "x86" in source):
        return  # the other architecture's file: compiled by the other compiler's turn
    flags = ("-fanalyzer", "-Wall", "-Wextra", "-Werror", "-O1", "-std=gnu11")
    # json-c's headers are the same for every architecture, and installed for this machine's
    where = ("-Icsrc", "-Iclient", "-idirafter", "/usr/include")
    run(compiler, *flags, *where, "-c", source, "-o", str(tmp_path / "out.o"))


def test_every_file_has_a_licence_line() -> None:
    """SPDX in the first three lines of every source, script and table."""
    sources = tracked(
        "*.py",
        "*.c",
        "*.h",
        "*.sh",
        "*.toml",
        "*.varlink",
        "*.scd",
        "*.scd.in",
        "Makefile",
        "*.map",
        "*meson.build",
    )
    without = [
        name
        for name in sources
        if "SPDX-License-Identifier: "
        not in "".join((TOP / name).read_text("utf-8").splitlines(keepends=True)[:3])
    ]
    assert not without
