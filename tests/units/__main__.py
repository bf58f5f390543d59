# SPDX-License-Identifier: LGPL-2.1-or-later
"""`python -m tests.units [SUITE…]`: make the containers' file systems ready; if none is named, of every suite, and the
Debian packages.

`python -m tests.units shell SUITE` boots one and enters it; it ends with the shell.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.packages.errors import PackageError

from . import debian, trees
from .container import Container


def main(words: list[str]) -> int:
    if os.geteuid() != 0:
        sys.stderr.write("containers are made as root\n")
        return 1
    if words[:1] == ["shell"]:
        with tempfile.TemporaryDirectory() as folder, Container(words[1], Path(folder)) as one:
            return subprocess.run(one.entered("bash"), check=False).returncode
    try:
        for suite in words or trees.SUITES:
            sys.stdout.write(f"{trees.layer(suite)}\n")
        if not words:
            sys.stdout.write(f"{debian.bare()}\n{debian.packages()}\n")
    except PackageError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
