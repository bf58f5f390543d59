# SPDX-License-Identifier: LGPL-2.1-or-later
"""debian/ and the project say the same. Building and using the packages is tests/units/test_debian.py."""

import re
import tomllib
from pathlib import Path

import pytest

from kvmneg import __version__
from tests.units import debian

TOP = Path(__file__).parents[2]


def test_one_version() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"version: '{project}'" in (TOP / "meson.build").read_text("utf-8")
    assert debian.version().split("+")[0] == __version__ == project


@pytest.mark.parametrize(
    ("package", "script"),
    [("libkvmneg0", "csrc/libkvmneg.map"), ("libkvmneg-client0", "client/libkvmneg-client.map")],
)
def test_the_symbols_of_the_libraries(package: str, script: str) -> None:
    """The version script's, of either architecture; the build holds which one has which."""
    version, symbols = "", set()
    for line in (TOP / script).read_text("utf-8").splitlines():
        if block := re.fullmatch(r"(KVMNEG\w*) \{", line):
            version = block[1]
            symbols.add(f"{version}@{version}")
        elif name := re.fullmatch(r"\s+(kvmneg_\w+);", line):
            symbols.add(f"{name[1]}@{version}")
    listed = (TOP / f"debian/{package}.symbols").read_text("utf-8")
    found = re.findall(r"^ (?:\(arch=\w+\))?(\w+@\w+) [\d.]+$", listed, re.MULTILINE)
    assert set(found) == symbols and len(found) == len(symbols) > 5


def test_no_suite_of_containers_is_forgotten() -> None:
    """debian/README.source says of each suite that is tested what it lacks."""
    told = (TOP / "debian/README.source").read_text("utf-8")
    (head,) = (line for line in told.splitlines() if line.lstrip().startswith("needed"))
    assert set(debian.trees.SUITES) <= set(head.split())


def test_what_is_needed_is_in_the_table() -> None:
    """Of what packages are built with and need, versions differ by suite: those with a version are in the table."""
    told = (TOP / "debian/README.source").read_text("utf-8")
    control = (TOP / "debian/control").read_text("utf-8")
    bounds = dict(re.findall(r"^ ([\w-]+) \(>?= ([\d.]+)\),$", control, re.MULTILINE))
    assert bounds
    for name, bound in bounds.items():
        row = name.removesuffix("-compat")
        if row != "python3-dev":  # Python itself: every suite has 3.11
            assert re.search(rf"^ *{row} +(?:compat )?{re.escape(bound)}\s", told, re.MULTILINE), name
