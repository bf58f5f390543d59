# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prints the Python packages of the named groups as pyproject.toml lists them: build, run, install, test, lint, bench.

pip learned `--group` in 25.1; Debian 12's is older.
"""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8"))
    groups = {
        "build": project["build-system"]["requires"],
        "run": project["project"]["dependencies"],
        **project["dependency-groups"],
    }
    print(*(requirement.replace(" ", "") for name in sys.argv[1:] for requirement in groups[name]))


main()
