# SPDX-License-Identifier: LGPL-2.1-or-later
"""A job for a host, packed, and what comes back of it. agent.py has the other end of it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SECONDS = 120.0
_MESSAGE = re.compile(rb"=kvmneg= ([a-z]+) ([A-Za-z0-9+/=]+)$")


class Job(NamedTuple):
    """`argv` is run in /job, where `files` (path → content) are; what it leaves in /job/out comes back."""

    argv: Sequence[str]
    files: Mapping[str, bytes] = {}
    environment: Mapping[str, str] = {}
    seconds: float = SECONDS

    def packed(self, boot_id: str = "") -> bytes:
        """The tar that the agent reads. `boot_id` replaces the kernel's: a restored host is another one."""
        listed = {
            "argv": list(self.argv),
            "environment": dict(self.environment),
            "seconds": self.seconds,
            "time": time.time(),
            "entropy": os.urandom(64).hex(),
            "boot_id": boot_id,
        }
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w:gz", compresslevel=1) as archive:
            for name, content in {**self.files, "job.json": json.dumps(listed).encode()}.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode, member.mtime = len(content), 0o755, int(time.time())
                archive.addfile(member, io.BytesIO(content))
        return target.getvalue()


class Result(NamedTuple):
    """The exit status (124: its time was up), what was printed, the files of /job/out; `about` is the host, `console`
    all that its kernel printed.
    """

    status: int
    stdout: bytes
    stderr: bytes
    files: dict[str, bytes]
    about: dict[str, str]
    console: str = ""

    @property
    def text(self) -> str:
        return self.stdout.decode("utf-8", "replace")

    def why(self) -> str:
        """What tells why it failed: what it printed as errors, and the console."""
        return f"status {self.status}\n{self.stderr.decode('utf-8', 'replace')}{self.console}"


Listener = Callable[[str, bytes], None]


def parse(line: bytes) -> tuple[str, bytes] | None:
    """A message of the agent's, None for what else a line may have (a kernel's words on the same console)."""
    match = _MESSAGE.search(line.rstrip(b"\r\n"))
    if match is None:
        return None
    return match[1].decode(), zlib.decompress(base64.b64decode(match[2]))


class Collector:
    """Puts the messages of one job together; `listener` hears each piece of output as it comes."""

    def __init__(self, about: dict[str, str], listener: Listener | None = None) -> None:
        self._about = about
        self._listener = listener
        self._printed = {"out": bytearray(), "err": bytearray()}
        self._files: dict[str, bytes] = {}
        self.result: Result | None = None

    def take(self, kind: str, content: bytes) -> None:
        if kind in self._printed:
            self._printed[kind] += content
            if self._listener:
                self._listener(kind, content)
        elif kind == "file":
            self._files = dict(_unpacked(content))
        elif kind == "end":
            status = int(json.loads(content)["status"])
            out, err = bytes(self._printed["out"]), bytes(self._printed["err"])
            self.result = Result(status, out, err, self._files, self._about)


def _unpacked(content: bytes) -> Iterable[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield os.path.normpath(member.name), file.read()


def folder(root: Path, below: str, names: Iterable[Path]) -> dict[str, bytes]:
    """Files of a folder, to be put at `below` in a job."""
    return {
        f"{below}{name.relative_to(root).as_posix()}": name.read_bytes() for name in names if name.is_file()
    }
