# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking an installed QEMU what it knows, and proving that it starts with given arguments.

Both start the binary without a guest (`-S`: paused before the first instruction) and talk QMP over its
standard streams. Every wait is bounded; the process is ended on every way out.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time

from kvmneg import limits
from kvmneg.errors import VmmFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Any

BINARY = "qemu-system-x86_64"
BINARIES = {"x86_64": BINARY, "arm64": "qemu-system-aarch64"}
# architecture → types of CPU whose properties are those a guest can be given, the best first; prefix of machine types
_TYPES = {"x86_64": ("base-x86_64-cpu",), "arm64": ("host-arm-cpu", "max-arm-cpu")}
_MACHINES = {"x86_64": "pc-q35", "arm64": "virt"}
_QUIET = ("-S", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "none", "-qmp", "stdio")
_STATUS_PAUSED = ("prelaunch", "paused")


class Build:
    """One QEMU binary: `version` ("7.2.22"), `machines` (versioned q35 or virt types, newest first), `properties`."""

    __slots__ = ("machines", "path", "properties", "version")

    def __init__(
        self, path: str, version: str, machines: tuple[str, ...], properties: frozenset[str]
    ) -> None:
        self.path = path
        self.version = version
        self.machines = machines
        self.properties = properties

    @property
    def machine(self) -> str:
        """The newest versioned machine type. Raises VmmFault where the build has none."""
        if not self.machines:
            raise VmmFault(f"{self.path} has no versioned machine type", hint="name one with --machine")
        return self.machines[0]


def find(binary: str = BINARY) -> str | None:
    """The path of an installed QEMU, None where there is none."""
    if os.sep in binary:
        return binary if os.access(binary, os.X_OK) else None
    for directory in os.environ.get("PATH", os.defpath).split(os.pathsep):
        path = os.path.join(directory, binary)
        if os.access(path, os.X_OK) and os.path.isfile(path):
            return path
    return None


def probe(path: str, architecture: str = "x86_64", *, timeout: float = limits.QEMU_SECONDS) -> Build:
    """What a QEMU binary knows, asked with neither guest nor accelerator. Raises VmmFault.

    On arm64 those of its own `max` where it was built without KVM, which has no properties of KVM's then.
    """
    family = _MACHINES[architecture]
    with Monitor([path, "-M", "none", "-accel", "tcg", *_QUIET], timeout) as monitor:
        version = monitor.greeting["QMP"]["version"]["qemu"]
        properties = _properties(monitor, _TYPES[architecture])
        machines = [row["name"] for row in monitor.ask("query-machines") if not row.get("deprecated")]
    found = {name: _version(name, family) for name in machines}
    versioned = sorted((name for name in found if found[name]), key=lambda name: found[name], reverse=True)
    text = f"{version['major']}.{version['minor']}.{version['micro']}"
    return Build(path, text, tuple(versioned), properties)


def _properties(monitor: Monitor, types: tuple[str, ...]) -> frozenset[str]:
    """The properties of the first type that this build has. Raises VmmFault where it has none of them."""
    *others, last = types
    for name in others:
        with contextlib.suppress(VmmFault):
            return frozenset(row["name"] for row in monitor.ask("device-list-properties", typename=name))
    return frozenset(row["name"] for row in monitor.ask("device-list-properties", typename=last))


def _version(machine: str, family: str) -> tuple[int, ...]:
    prefix, _, numbers = machine.rpartition("-")
    parts = numbers.split(".")
    return tuple(map(int, parts)) if prefix == family and all(part.isdecimal() for part in parts) else ()


def start_paused(path: str, arguments: Sequence[str], *, timeout: float = limits.QEMU_SECONDS) -> str:
    """Start QEMU paused with these arguments and end it; the run state it answered ("prelaunch").

    Raises VmmFault with what QEMU said where it does not start or is not paused.
    """
    with Monitor([path, *arguments, *_QUIET], timeout) as monitor:
        status: str = monitor.ask("query-status")["status"]
    if status not in _STATUS_PAUSED:
        raise VmmFault(f"{path} started, but is {status}")
    return status


class Monitor:
    """A QEMU process with its QMP on standard streams, ended when the block is left."""

    def __init__(self, command: Sequence[str], timeout: float) -> None:
        self._command = list(command)
        self._deadline = time.monotonic() + timeout
        self._buffer = b""
        self.greeting: dict[str, Any] = {}

    def __enter__(self) -> Monitor:
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise VmmFault(f"cannot start {self._command[0]}: {error.strerror}") from None
        try:
            self.greeting = self._read()
            self.ask("qmp_capabilities")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, command: str, **arguments: Any) -> Any:
        """One QMP command's answer. Raises VmmFault where QEMU refuses it, ends, or takes too long."""
        assert self._process.stdin
        try:
            self._process.stdin.write(
                json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"
            )
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        while True:
            message = self._read()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise VmmFault(f"QEMU refuses {command}: {message['error'].get('desc')}")

    def _read(self) -> dict[str, Any]:
        """The next message, events included."""
        assert self._process.stdout
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            left = self._deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise VmmFault(f"{self._command[0]} did not answer in time")
            chunk = os.read(descriptor, 65536)
            if not chunk:
                raise self._ended()
            self._buffer += chunk
            if len(self._buffer) > limits.REPLY_BYTES:
                raise VmmFault(f"{self._command[0]} does not speak QMP")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise VmmFault(f"{self._command[0]} does not speak QMP: {line[:80]!r}")
        return message

    def _ended(self) -> VmmFault:
        """QEMU is gone: what it said is the reason."""
        assert self._process.stderr
        self._process.kill()  # it may have closed its streams only
        said = self._process.stderr.read(limits.READ_CHUNK_BYTES).decode("utf-8", "replace").strip()
        return VmmFault(f"{self._command[0]} does not start: {said or 'it said nothing'}")

    def _end(self) -> None:
        self._process.kill()  # paused and without a guest: nothing is lost
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                with contextlib.suppress(OSError):  # of what was not written yet
                    stream.close()
        self._process.wait()
