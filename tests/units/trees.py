# SPDX-License-Identifier: LGPL-2.1-or-later
"""The file systems of the containers, made once and kept in the user's cache. As root only.

Below ${XDG_CACHE_HOME:-~/.cache}/kvmneg/containers:

    SUITE.DIGEST/            Debian with systemd, Python and what kvmnegd needs, made by mmdebstrap
    project.DIGEST/          what `make install` puts there, for all suites
    layer-SUITE.DIGEST/      what lies over a suite's tree: the project, its users, its compiled modules

Nothing is ever changed in a finished one: containers write elsewhere. Each appears by one rename.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..hosts.cache import digest, used
from ..packages.archive import NO_CONNECTION, find_archive
from ..packages.errors import NoTool, PackageError, Unreachable
from ..packages.store import cache_directory

TOP = Path(__file__).parents[2]
SUITES = {
    "bookworm": 252,
    "trixie": 257,
    "sid": 262,
}  # the oldest systemd that is served, the newest, and between
PACKAGES = (
    "systemd", "systemd-sysv", "libpam-systemd", "dbus", "dbus-broker", "polkitd", "python3", "python3-cffi-backend",
    "python3-systemd", "procps",
)  # fmt: skip
_KEPT = 4  # of a kind, and those that containers stand on
_SOURCES = (
    "Makefile", "pyproject.toml", "meson.build", "meson.options", "kvmneg", "csrc", "client", "units", "man",
    "completion", "tools",
)  # fmt: skip
_SECONDS = 900


def directory() -> Path:
    found = cache_directory().parent / "containers"
    found.mkdir(parents=True, exist_ok=True)
    return found


def tree(suite: str) -> Path:
    """A suite's tree. Raises Unreachable, NoTool, PackageError."""
    return made(suite, digest(*PACKAGES), lambda path: bootstrap(suite, path, PACKAGES))


def layer(suite: str) -> Path:
    """What lies over the suite's tree. Raises as `tree` does."""
    below, key = tree(suite), sources(*_SOURCES)
    project = made("project", key, _install)
    return made(f"layer-{suite}", digest(below.name, key, _LAY), lambda path: _lay(below, project, path))


def bootstrap(suite: str, path: Path, packages: Sequence[str], *options: str) -> None:
    """Make a tree of a suite, with more of mmdebstrap's options. Raises as `tree` does."""
    archive = find_archive()
    words = [
        "mmdebstrap", "--quiet", "--variant=minbase", "--mode=root", "--format=directory",
        f"--keyring={archive.keyring}", "--aptopt=APT::Install-Recommends \"false\"", f"--include={','.join(packages)}",
        *options,
    ]  # fmt: skip
    if suite == "sid":  # a mirror a few days behind outlives its Valid-Until; signatures still bind
        words.append('--aptopt=Acquire::Check-Valid-Until "false"')
    run([*words, suite, str(path), archive.mirror], f"making a tree of {suite}")


def sources(*names: str) -> str:
    """A digest of these files and folders of the project, as git has or would have them."""
    files = [(name, TOP / name) for name in sorted(tracked(*names))]
    return digest(*(part for name, path in files if path.is_file() for part in (name, path.read_bytes())))


def tracked(*names: str) -> list[str]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *names]
    return subprocess.run(listed, cwd=TOP, check=True, capture_output=True, text=True).stdout.splitlines()


def _install(path: Path) -> None:
    """`make install` as a user calls it, but with the tools of the Python that runs this."""
    venv = Path(sys.executable).parents[1]
    # made by whoever runs this: neither packages nor the venv are changed here
    ready = [f"--old-file={venv}/{step}" for step in (".run", ".install")]
    with tempfile.TemporaryDirectory() as folder:
        where = [f"VENV={venv}", f"BUILD={folder}/build", f"DESTDIR={path}", "PREFIX=/usr"]
        run(["make", "--old-file=setup-install", *ready, "install", *where], "make install")


_LAY = """
set -eu
mount -t tmpfs -o size=1m tmpfs "$4"
mkdir "$4/root"
mount -t overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" overlay "$4/root"
mount -t proc proc "$4/root/proc"
# its package has put itself in the place of dbus-daemon, which is what most have; a test boots with it
rm -f "$4/root/etc/systemd/system/dbus.service" "$4/root/etc/systemd/user/dbus.service"
chroot "$4/root" systemd-sysusers
chroot "$4/root" journalctl --update-catalog
chroot "$4/root" systemctl --quiet mask console-getty.service systemd-modules-load.service
chroot "$4/root" python3 -m compileall -q /usr/lib/python3/dist-packages/kvmneg
"""


def _lay(below: Path, project: Path, path: Path) -> None:
    shutil.copytree(project, path, symlinks=True, dirs_exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work, tempfile.TemporaryDirectory() as merged:
        words = ["unshare", "--mount", "--propagation=private", "sh", "-c", _LAY, "sh"]
        run([*words, str(below), str(path), work, merged], "laying the project over it")


def run(words: list[str], step: str) -> str:
    """What a program printed. Raises NoTool, Unreachable, PackageError."""
    try:
        done = subprocess.run(
            words, cwd=TOP, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS,
            check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise NoTool(f"{words[0]} is not installed") from None
    if done.returncode:
        said = done.stdout + done.stderr
        text = f"{step}: {'; '.join(said.splitlines()[-12:])}"
        raise (Unreachable if NO_CONNECTION.search(said) else PackageError)(text)
    return done.stdout


def made(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder KIND.KEY, made by `make(path)` in a new folder where it is missing."""
    target = directory() / f"{kind}.{key}"
    with _locked(kind):
        if not target.exists():
            new = directory() / f".new-{kind}"
            shutil.rmtree(new, ignore_errors=True)  # of a process that was killed: the lock is ours
            new.mkdir(mode=0o755)
            try:
                make(new)
                new.rename(target)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            found = sorted(
                directory().glob(f"{kind}.*/"), key=lambda path: path.stat().st_mtime, reverse=True
            )
            for path in [path for path in found if path != target][_KEPT - 1 :]:
                if not _stood_on(path):
                    shutil.rmtree(path, ignore_errors=True)
        return used(target)


def _stood_on(path: Path) -> bool:
    """Whether some container's root is an overlay over it, of another checkout perhaps."""
    for mounts in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            if str(path) in mounts.read_text("utf-8", "replace"):
                return True
        except OSError:
            pass  # it has ended
    return False


@contextmanager
def _locked(kind: str) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of one that dies."""
    with open(directory() / f".{kind}.lock", "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
