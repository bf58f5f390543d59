# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packages side by side, by hand: `python -m tests.packages PACKAGE [VERSION] --suite SUITE [--run PROGRAM …]`.

Prints where the unpacked tree is, or runs a program of it. Exits 3 where the mirror is not reachable, 4 where
the archive has no such package, 1 for anything else that fails.
"""

from __future__ import annotations

import argparse
import os
import sys

from .errors import Missing, PackageError, Unreachable
from .store import Store, Wanted
from .tree import Tree
from .versions import satisfies


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.packages", description=__doc__)
    parser.add_argument("package", nargs="?", help="without one: what the cache has")
    parser.add_argument("version", nargs="?", default="", help="like 10.0; the nearest the suite has")
    parser.add_argument("--suite", default="trixie")
    parser.add_argument("--architecture", default="amd64")
    parser.add_argument("--alone", action="store_true", help="without its dependencies")
    parser.add_argument("--run", nargs=argparse.REMAINDER, help="a program of the tree, with its arguments")
    return parser.parse_args()


def _command(tree: Tree, words: list[str]) -> list[str]:
    program, *rest = words
    runner = tree.qemu if "qemu-system-" in program else tree.command
    return [*runner(program), *rest]


def main() -> int:
    given = _arguments()
    store = Store()
    if not given.package:
        for tree in store.trees():
            sys.stdout.write(
                f"{tree.package} {tree.version} ({tree.suite}, {tree.architecture}): {tree.root}\n"
            )
        return 0
    wanted = Wanted(given.package, given.version, given.suite, given.architecture, given.alone)
    try:
        tree = store.get(wanted)
        command = _command(tree, given.run) if given.run else []
    except PackageError as error:
        sys.stderr.write(f"{error}\n")
        return 3 if isinstance(error, Unreachable) else 4 if isinstance(error, Missing) else 1
    if not satisfies(tree.version, wanted.version):
        sys.stderr.write(f"{wanted.describe()} is missing; nearest: {tree.version}\n")
    if command:
        os.execvp(command[0], command)
    sys.stdout.write(f"{tree.root}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
