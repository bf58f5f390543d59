# SPDX-License-Identifier: LGPL-2.1-or-later
"""A libvirtd that runs apart (libvirt_init.py), asked by its own virsh; Debian's versions, unpacked side by side.

    with Session([tree.root, …], folder, kvm=False) as libvirt:
        path = libvirt.give("cpus.xml", text)
        replies = libvirt.ask([f"cpu-baseline --features {path}", …])

Root is needed, for the namespaces. The session ends with its `with`, with this process, or after SECONDS.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple
from xml.etree import ElementTree as ET

INIT = Path(__file__).with_name("libvirt_init.py")
SECONDS = 60.0
END = "-- end of call --"  # libvirt_init.END
_NEXT = "==next-command=="  # virsh puts no end of line after what it echoes
_BYTES = 100_000  # of one argument, of which Linux takes 128 KiB (MAX_ARG_STRLEN)
_NAMESPACES = ("--mount", "--pid", "--net", "--ipc", "--uts", "--propagation", "private")
EMULATOR = "/usr/bin/qemu-system-x86_64"


# How the complaints of unshare(1) and of the init's mount(8) begin.
_NO_NAMESPACES = ("unshare: ", "mount ")


class Apart(Exception):
    """There can be no namespaces or mounts for the daemon here; the text says why."""


class Ended(Exception):
    """The daemon, or who starts it, ended or took too long; the text says what it left."""


class Reply(NamedTuple):
    """What one command printed, or the error that it ended with ("" where it succeeded)."""

    text: str
    error: str

    def xml(self) -> ET.Element:
        assert not self.error, self.error
        return ET.fromstring(self.text)


class Session:
    """One running libvirtd and who asks it."""

    def __init__(self, roots: Sequence[Path], folder: Path, *, kvm: bool) -> None:
        self._given = folder / "in"
        self._given.mkdir()
        (folder / "base").mkdir()
        self._faults = folder / "faults"
        unshare = ["unshare", *_NAMESPACES, "--fork", "--kill-child"]
        with self._faults.open("wb") as faults:
            self._process: subprocess.Popen[str] = subprocess.Popen(
                [
                    *unshare,
                    sys.executable,
                    "-I",
                    str(INIT),
                    str(folder),
                    "kvm" if kvm else "-",
                    *map(str, roots),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=faults,
                text=True,
            )
        self._timer = threading.Timer(SECONDS, self._process.kill)
        self._timer.start()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self._input.close()
        except BrokenPipeError:
            pass  # it has ended, and _call has told
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()  # and by --kill-child all that it started
            self._process.wait()
        self._timer.cancel()
        self._timer.join()
        self._output.close()

    @property
    def pid(self) -> int:
        """The process whose end is the session's."""
        return self._process.pid

    @property
    def _input(self) -> IO[str]:
        assert self._process.stdin is not None
        return self._process.stdin

    @property
    def _output(self) -> IO[str]:
        assert self._process.stdout is not None
        return self._process.stdout

    def give(self, name: str, text: str) -> str:
        """Make a file for libvirt to read; its path there."""
        (self._given / name).write_text(text, "utf-8")
        return f"/in/{name}"

    def ask(self, commands: Iterable[str]) -> list[Reply]:
        """The replies of virsh commands, in order; many commands are one process and one connection."""
        return [reply for batch in _batches(commands) for reply in self._call(batch)]

    def _call(self, batch: list[str]) -> list[Reply]:
        line = "; ".join(f"echo {_NEXT}; {command}" for command in batch)
        lines: list[str] = []
        try:
            self._input.write(f"{line}\n")
            self._input.flush()
        except BrokenPipeError:
            raise self._fault() from None
        for said in self._output:
            if said.rstrip("\n") == END:
                break
            lines.append(said)
        else:
            raise self._fault()
        before, *parts = "".join(lines).split(_NEXT)
        assert not before.strip() and len(parts) == len(batch), before
        return [_reply(part) for part in parts]

    def _fault(self) -> Exception:
        said = self._faults.read_text("utf-8", "replace").strip()
        kind = Apart if said.startswith(_NO_NAMESPACES) else Ended
        return kind(said or f"no answer within the session's {SECONDS:g} s")


def _batches(commands: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for command in commands:
        more = len(command) + len(_NEXT) + 9
        if batch and size + more > _BYTES:
            yield batch
            batch, size = [], 0
        batch.append(command)
        size += more
    if batch:
        yield batch


def _reply(text: str) -> Reply:
    errors = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error: ")]
    return Reply("", "; ".join(errors)) if errors else Reply(text, "")


def named(cpu: ET.Element, policy: str = "require") -> frozenset[str]:
    """The features that an expanded <cpu> has under one policy (a host's features have none)."""
    return frozenset(
        one.attrib["name"] for one in cpu.findall("feature") if one.get("policy", "require") == policy
    )
