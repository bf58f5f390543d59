# SPDX-License-Identifier: LGPL-2.1-or-later
"""The project's Debian packages, built in sid and kept in the user's cache beside the trees (tests/units/trees.py):

    building.DIGEST/     sid with what debian/control builds with, and lintian
    bare.DIGEST/         sid with a systemd; what the packages depend on lies in its apt's cache, not installed
    packages.DIGEST/     FIRST/ and NEXT/: the packages, and the same of the next version

All is fetched when it is made. Building and installing need no network, and have none.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from ..hosts.cache import digest
from . import trees

SUITE = "sid"
FIRST, NEXT = "first", "next"
# What debian/control does not say: a C compiler and what its users have, lintian to judge the packages.
_BUILDING = ("build-essential", "lintian", "tar")
_BARE = ("systemd", "systemd-sysv", "dbus", "man-db")
# Of an administrator with a bus, and of somebody who writes a VM monitor in C.
_FETCHED = ("gcc", "libc6-dev", "pkgconf")
_CONTROL = trees.TOP / "debian/control"
_PACKAGED = (
    "debian", "meson.build", "meson.options", "pyproject.toml", "kvmneg", "csrc", "client", "units", "man",
    "completion", "tools", "examples", "README.md", "CHANGELOG.md",
)  # fmt: skip


def version() -> str:
    """The version that debian/changelog begins with."""
    first = (trees.TOP / "debian/changelog").read_text("utf-8").split("\n", 1)[0]
    return first.split("(")[1].split(")")[0]


def next_version() -> str:
    return f"{version()}+next"


def field(name: str) -> list[str]:
    """The packages that a field of debian/control names, in all its paragraphs; the first of alternatives."""
    text = re.sub(r"^#.*\n", "", _CONTROL.read_text("utf-8"), flags=re.MULTILINE)
    values = re.findall(rf"^{name}:((?:.*\n)(?:[ \t].*\n)*)", text, re.MULTILINE)
    named = [
        re.split(r"[\s(|<\[]", one.strip(), maxsplit=1)[0] for value in values for one in value.split(",")
    ]
    own = re.findall(r"^Package: (\S+)$", text, re.MULTILINE)
    return [one for one in dict.fromkeys(named) if one and not one.startswith("$") and one not in own]


def building() -> Path:
    """The tree that the packages are built in. Raises as `trees.tree` does; so do the others."""
    packages = (*_BUILDING, *field("Build-Depends"))
    return trees.made("building", digest(*packages), lambda path: trees.bootstrap(SUITE, path, packages))


def bare() -> Path:
    """The tree that they are installed in."""
    fetched = (*_FETCHED, *field("Depends"), *field("Recommends"), "libjson-c-dev")
    hooks = (
        # apt of outside, with the tree as its root: the indices and the packages stay there
        "--skip=cleanup/apt",
        "--customize-hook=APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get --quiet --yes --download-only install "
        + " ".join(fetched),
        "--customize-hook=chroot $1 systemctl --quiet mask console-getty.service systemd-modules-load.service",
    )
    return trees.made(
        "bare", digest(*_BARE, *hooks), lambda path: trees.bootstrap(SUITE, path, _BARE, *hooks)
    )


def packages() -> Path:
    """The folder with FIRST and NEXT: .deb, .changes and .buildinfo of each."""
    tree, key = building(), trees.sources(*_PACKAGED)
    return trees.made("packages", digest(tree.name, key), lambda path: _build(tree, path))


# $1 the tree, $2 an empty folder, $3 what is its /build; the rest a program
_ENTER = r"""
set -eu
tree=$1 empty=$2 folder=$3
shift 3
mount -t tmpfs -o mode=755 tmpfs "$empty"
mkdir "$empty/work" "$empty/upper" "$empty/all"
mount -t overlay -o "lowerdir=$tree,upperdir=$empty/upper,workdir=$empty/work" overlay "$empty/all"
mkdir "$empty/all/build"
mount --bind "$folder" "$empty/all/build"
mount -t proc proc "$empty/all/proc"
exec chroot "$empty/all" env -i PATH=/usr/sbin:/usr/bin LC_ALL=C.UTF-8 HOME=/build "$@"
"""


def enter(tree: Path, folder: Path, step: str, *words: str) -> str:
    """Run a program in the tree, with `folder` as its /build and without a network; what it printed."""
    with tempfile.TemporaryDirectory() as empty:
        apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--propagation=private"]
        return trees.run([*apart, "sh", "-c", _ENTER, "sh", str(tree), empty, str(folder), *words], step)


def _build(tree: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        for which in (FIRST, NEXT):
            folder = Path(name, which)
            source = folder / "kvmneg"
            source.mkdir(parents=True)
            for tracked in trees.tracked():
                if (trees.TOP / tracked).is_file():
                    (source / tracked).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(trees.TOP / tracked, source / tracked)
            if which == NEXT:
                _raise_version(source)
            options = "nocheck" if which == NEXT else ""  # once is enough
            build = 'cd /build/kvmneg && DEB_BUILD_OPTIONS="$1" dpkg-buildpackage -us -uc -b 2>&1'
            enter(tree, folder, f"building {which}", "sh", "-c", build, "sh", options)
            shutil.rmtree(source)
            shutil.copytree(folder, path / which)


def _raise_version(source: Path) -> None:
    """Another version of the package, and of the daemon in it, which tells it."""
    changelog, module = source / "debian/changelog", source / "kvmneg/__init__.py"
    before = changelog.read_text("utf-8")
    changelog.write_text(before.replace(f"({version()})", f"({next_version()})", 1) + "\n" + before, "utf-8")
    text, count = re.subn(
        r'^__version__ = ".*"$', f'__version__ = "{next_version()}"', module.read_text("utf-8"), flags=re.M
    )
    assert count == 1
    module.write_text(text, "utf-8")
