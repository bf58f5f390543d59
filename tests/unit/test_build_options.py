# SPDX-License-Identifier: LGPL-2.1-or-later
"""The build installs every manual page and completion, or says that it cannot. Set up only: nothing is compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SHELLS = ("share/bash-completion/completions/{}", "share/zsh/site-functions/_{}")


def pages() -> set[str]:
    """The manual pages by the files in man/, whatever its meson.build lists."""
    found = {path.name.removesuffix(".in").removesuffix(".scd") for path in (TOP / "man").glob("*.scd*")}
    return {f"share/man/man{page.rpartition('.')[2]}/{page}" for page in found}


def completions() -> set[str]:
    return {place.format(program) for place in SHELLS for program in ("kvmneg", "kvmnegd")}


def meson(*arguments: str | Path, path: str) -> subprocess.CompletedProcess[str]:
    program = BIN / "meson"
    if not program.exists():
        pytest.skip("meson is not installed")
    environment = {**os.environ, "PATH": path}
    return subprocess.run([program, *arguments], env=environment, capture_output=True, text=True, check=False)


def installed(build: Path) -> set[str]:
    """What would be installed of pages and completions, below the prefix."""
    listed = json.loads(meson("introspect", "--targets", build, path=os.environ["PATH"]).stdout)
    files = {Path(name) for target in listed for name in target.get("install_filename", [])}
    shared = {str(file.relative_to("/usr")) for file in files if file.is_relative_to("/usr/share")}
    return {file for file in shared if "/man/" in file or "completion" in file or "/zsh/" in file}


@pytest.fixture
def poor(tmp_path: Path) -> str:
    """A PATH of this one's programs but scdoc."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for place in [str(BIN), *os.environ["PATH"].split(":")]:
        for program in Path(place).iterdir() if Path(place).is_dir() else ():
            link = folder / program.name
            if program.name != "scdoc" and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


def test_everything_is_installed(tmp_path: Path) -> None:
    if not shutil.which("scdoc") or not importlib.util.find_spec("shtab"):
        pytest.skip("scdoc or shtab is not installed")
    options = ("--prefix=/usr", "-Dman=enabled", "-Dcompletion=enabled", "-Dclient=disabled")
    made = meson("setup", *options, tmp_path / "build", TOP, path=f"{BIN}:{os.environ['PATH']}")
    assert made.returncode == 0, made.stdout + made.stderr
    assert installed(tmp_path / "build") == pages() | completions()
    assert len(pages()) > 7


@pytest.mark.parametrize(("option", "asked"), [("auto", 0), ("enabled", 1)])
def test_without_scdoc_it_is_said(tmp_path: Path, poor: str, option: str, asked: int) -> None:
    options = ("--prefix=/usr", f"-Dman={option}", "-Dcompletion=disabled", "-Dclient=disabled")
    made = meson("setup", *options, tmp_path / "build", TOP, path=poor)
    assert made.returncode == asked, made.stdout + made.stderr
    if asked:
        assert "'scdoc' not found" in made.stdout
    else:
        assert re.search(r"manual pages *: NO", made.stdout)
        assert installed(tmp_path / "build") == set()


@pytest.mark.parametrize(("option", "asked"), [("auto", 0), ("enabled", 1)])
def test_without_shtab_it_is_said(
    tmp_path: Path, option: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shtab.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = ("--prefix=/usr", f"-Dcompletion={option}", "-Dman=disabled", "-Dclient=disabled")
    made = meson("setup", *options, tmp_path / "build", TOP, path=f"{BIN}:{os.environ['PATH']}")
    assert made.returncode == asked, made.stdout + made.stderr
    if asked:
        assert "missing modules: shtab" in made.stdout
    else:
        assert re.search(r"shell completions *: NO", made.stdout)
        assert installed(tmp_path / "build") == set()
