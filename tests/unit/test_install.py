# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `make install` asks before it installs; what it installs is what the containers of tests/units run."""

import configparser
import subprocess
import sys
import tomllib
from email.parser import Parser
from pathlib import Path

import pytest

from kvmneg import __version__

TOP = Path(__file__).parents[2]


def tool(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOP / "tools" / name, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("slash", ["", "/"])
def test_packages_go_where_that_python_looks(slash: str) -> None:
    done = tool("site_packages.py", sys.prefix + slash)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in sys.path


@pytest.mark.parametrize("prefix", ["/nowhere", sys.prefix + "-other", "/"])
def test_a_prefix_where_it_does_not_look_is_refused(prefix: str) -> None:
    done = tool("site_packages.py", prefix)
    assert done.returncode == 1 and not done.stdout
    assert sys.executable in done.stderr and "RUN_PYTHON=" in done.stderr


def test_the_metadata_is_the_projects() -> None:
    told = Parser().parsestr(tool("dist_info.py", "METADATA").stdout)
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]
    assert (told["Name"], told["Version"], told["License-Expression"]) == (
        "kvmneg",
        __version__,
        project["license"],
    )
    assert not told.defects and not told.get_payload()


def test_the_entry_points_are_the_projects() -> None:
    """All but the commands, which are files of their own."""
    told = configparser.ConfigParser(delimiters="=")
    told.read_string(tool("dist_info.py", "entry_points.txt").stdout)
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]
    assert {name: dict(told[name]) for name in told.sections()} == project["entry-points"]
