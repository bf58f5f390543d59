# SPDX-License-Identifier: LGPL-2.1-or-later
"""One suite of the Debian archive, asked through an apt that has directories of its own.

Why apt and not a reader of our own: what must be right here is signatures, hashes and the choice of
dependencies, and all three are apt's daily work.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .errors import Missing, NoTool, PackageError, Unreachable

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DEFAULT_MIRROR = "http://deb.debian.org/debian"
UPDATE_SECONDS = 180  # an index of 10 MB over a slow line
DOWNLOAD_SECONDS = 600
SOURCES = Path("/etc/apt")

# Indices of these suites carry a Valid-Until that a mirror a few days behind outlives; signatures still bind.
_MOVING = ("sid", "unstable", "experimental")
# What apt says where the mirror cannot be reached, as opposed to: what it holds is wrong.
NO_CONNECTION = re.compile(
    r"Temporary failure resolving|Could not resolve|Cannot initiate the connection|Could not connect"
    r"|Unable to connect|Connection (?:failed|refused|timed out)|Network is unreachable|No route to host"
    r"|50[234]  "
)
_ABSENT = re.compile(r"404  |Version '.*' for '.*' was not found")


class Archive(NamedTuple):
    """Where packages come from: a mirror's URI and the keyring that its indices are signed with."""

    mirror: str
    keyring: str


def find_archive(sources: Path = SOURCES) -> Archive:
    """The Debian mirror of this system's apt sources, both formats; Debian's own where there is none."""
    files = [sources / "sources.list", *sorted((sources / "sources.list.d").glob("*"))]
    for file in files:
        if file.suffix not in (".list", ".sources") or not file.is_file():
            continue
        for uri in re.findall(r"https?://[^\s\]]+", _without_comments(file.read_text("utf-8", "replace"))):
            if uri.rstrip("/").endswith("/debian"):
                return Archive(uri.rstrip("/"), KEYRING)
    return Archive(DEFAULT_MIRROR, KEYRING)


def _without_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))


class Suite:
    """A suite ("trixie", "trixie-backports", "sid") for one architecture, with its apt below `directory`.

    A backports suite brings its base suite along: what it does not have itself comes from there.
    """

    def __init__(
        self, name: str, directory: Path, archive: Archive | None = None, architecture: str = "amd64"
    ) -> None:
        self.name = name
        self.architecture = architecture
        self.archive = archive or find_archive()
        self._directory = directory
        self._configuration = directory / "apt.conf"

    def update(self) -> None:
        """Fetch the signed indices. Raises Unreachable, PackageError (also for a wrong signature)."""
        self._prepare()
        # without Any, apt keeps an old index and calls it a warning
        self._apt(
            "update", "-o", "APT::Update::Error-Mode=any", step="reading the index", seconds=UPDATE_SECONDS
        )

    def candidates(self, package: str) -> list[str]:
        """The versions of a package that the indices list, in apt's order. Raises PackageError."""
        table = self._run(["apt-cache", "madison", package], step="asking for versions", seconds=60)
        rows = (line.split("|") for line in table.splitlines())
        return [row[1].strip() for row in rows if len(row) == 3 and f"{self.architecture} Packages" in row[2]]

    def names(self, prefix: str) -> list[str]:
        """The packages whose names begin so: for those with a version in their name. Raises PackageError."""
        command = ["apt-cache", "pkgnames", prefix]
        return sorted(self._run(command, step="asking for names", seconds=60).split())

    def download(self, package: str, version: str, target: Path, *, alone: bool = False) -> list[Path]:
        """Fetch a package, and all it depends on unless `alone`, into `target`; the files.

        Dependencies are chosen as for an empty system, recommended packages left out. apt has checked every
        file against the index. Raises Missing where the index promises what the mirror does not hold.
        """
        (target / "partial").mkdir(parents=True, exist_ok=True)
        wanted = f"{package}={version}"
        options = ["-o", f"Dir::Cache::archives={target}"]
        step = f"fetching {wanted} of {self.name}"
        if alone:
            self._apt("download", wanted, step=step, seconds=DOWNLOAD_SECONDS, directory=target)
        else:
            words = ["install", "--yes", "--download-only", "--target-release", self.name, *options, wanted]
            self._apt(*words, step=step, seconds=DOWNLOAD_SECONDS)
        files = sorted(target.glob("*.deb"))
        if not files:
            raise PackageError(f"{step}: apt reports success and left no package")
        return files

    def _prepare(self) -> None:
        if not Path(self.archive.keyring).is_file():
            raise PackageError(f"{self.archive.keyring} is missing: nothing could be verified")
        for name in ("lists/partial", "cache/archives/partial", "empty"):
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        (self._directory / "status").touch()
        base = self.name.removesuffix("-backports")
        lines = [
            f"deb [arch={self.architecture} signed-by={self.archive.keyring}] {self.archive.mirror} {suite} main\n"
            for suite in dict.fromkeys((base, self.name))
        ]
        (self._directory / "sources.list").write_text("".join(lines), "utf-8")
        self._configuration.write_text(self._settings(), "utf-8")

    def _settings(self) -> str:
        """apt.conf: every path apt uses lies below the directory, and no hook of the system's is run."""
        own, nothing = self._directory, self._directory / "empty"
        values = {
            "APT::Architecture": self.architecture,
            "APT::Architectures": self.architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "20",
            "Acquire::https::Timeout": "20",
            "Dir::State": str(own),
            "Dir::State::status": str(own / "status"),
            "Dir::Cache": str(own / "cache"),
            "Dir::Etc::sourcelist": str(own / "sources.list"),
            "Dir::Etc::sourceparts": str(nothing),
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": str(nothing),
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": str(nothing),
        }
        if self.name in _MOVING:
            values["Acquire::Check-Valid-Until"] = "false"
        return "".join(f'{key} "{value}";\n' for key, value in values.items()) + _system_proxy()

    def _apt(self, *words: str, step: str, seconds: float, directory: Path | None = None) -> str:
        return self._run(["apt-get", "--quiet", *words], step=step, seconds=seconds, directory=directory)

    def _run(
        self, command: Sequence[str], *, step: str, seconds: float, directory: Path | None = None
    ) -> str:
        environment = {**os.environ, "APT_CONFIG": str(self._configuration), "LC_ALL": "C.UTF-8"}
        try:
            done = subprocess.run(
                command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except FileNotFoundError:
            raise NoTool(f"{command[0]} is not installed") from None
        except subprocess.TimeoutExpired:
            raise Unreachable(f"{step}: {self.archive.mirror} took more than {seconds} s") from None
        if done.returncode:
            raise self._fault(step, done.stdout + done.stderr)
        return done.stdout

    def _fault(self, step: str, said: str) -> PackageError:
        """apt's complaint as one of our errors: its lines that are errors or warnings."""
        lines = [line for line in said.splitlines() if line[:2] in ("E:", "W:")] or said.splitlines()[-3:]
        text = f"{step}: {'; '.join(lines)}"
        if NO_CONNECTION.search(text):
            return Unreachable(text)
        return Missing(text) if _ABSENT.search(text) else PackageError(text)


def _system_proxy() -> str:
    """The system's proxy settings, as apt.conf lines: the way to the mirror is the machine's, not ours."""
    program = shutil.which("apt-config")
    if program is None:
        return ""
    shown = subprocess.run([program, "dump"], capture_output=True, text=True, check=False).stdout
    return "".join(
        f"{line}\n" for line in shown.splitlines() if re.match(r"Acquire::https?::(?:[^ ]*::)?Proxy ", line)
    )
