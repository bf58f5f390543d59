# SPDX-License-Identifier: LGPL-2.1-or-later
"""An emulated host under QEMU: its command line, its process, its port, its console."""

from __future__ import annotations

import json
import math
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from ..packages.store import Store, Wanted
from .catalogue import Host
from .errors import HostError, NoEmulator
from .job import Collector, Job, Listener, Result, parse

BOOT_SECONDS = 120.0
GRACE_SECONDS = 15.0  # past a job's own limit, which the agent keeps
QMP_SECONDS = 120.0
MEMORY = {"arm64": 1024, "amd64": 1024}
PROGRAMS = {
    "arm64": ("qemu-system-aarch64", "qemu-system-arm"),
    "amd64": ("qemu-system-x86_64", "qemu-system-x86"),
}
_PORT = "/dev/vport0p1"
_CONSOLE = {"arm64": "ttyAMA0", "amd64": "ttyS0"}
# QEMU 7.2 (Debian 12's; 10.0 no more) computes the flags after CMPXCHG16B from a stale state: an interrupt right
# behind it saves bits of a pointer as flags, which ends in a panic (helper_cmpxchg16b_unlocked, target/i386/tcg).
# Linux has it in SLUB's fast path, which no cache with consistency checks goes; they cost little.
_KERNEL = {"arm64": "", "amd64": "slub_debug=F "}


def emulator(host: Host) -> list[str]:
    """The words that start its QEMU: the installed one, or an unpacked one of the wanted version."""
    program, package = PROGRAMS[host.architecture]
    if not host.emulator_version:
        found = shutil.which(program)
        if found is None:
            raise NoEmulator(program)
        return [found]
    suite = "trixie" if host.emulator_version.startswith("10.") else "trixie-backports"
    return Store().get(Wanted(package, host.emulator_version, suite)).qemu(f"usr/bin/{program}")


def emulator_name(host: Host) -> str:
    """What it calls itself: "QEMU emulator version …"."""
    done = subprocess.run([*emulator(host), "--version"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[0]


def cpu(host: Host) -> str:
    """The -cpu argument. Pointer authentication by QEMU's own cipher instead of the architecture's: 2.5 s to boot
    instead of 10; an AMD model other than `max` needs SVM added.
    """
    if host.architecture == "arm64":
        return f"{host.cpu},pauth-impdef=on" if host.cpu == "max" else host.cpu
    return host.cpu if host.cpu == "max" else f"{host.cpu},+svm,+npt"


def arguments(host: Host, append: str = "") -> list[str]:
    """QEMU's arguments without files and descriptors: also what a snapshot is tied to."""
    machine = {
        "arm64": ["-M", "virt,virtualization=on,gic-version=3", "-accel", "tcg,thread=multi"],
        "amd64": ["-M", "q35", "-accel", "tcg"],
    }[host.architecture]
    line = f"console={_CONSOLE[host.architecture]} panic=-1 quiet loglevel=4 kvmneg.port={_PORT} "
    line += _KERNEL[host.architecture] + append
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", *machine),
        *("-cpu", cpu(host), "-smp", "1", "-m", str(MEMORY[host.architecture]), "-append", line.strip()),
        *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port,name=kvmneg"),
    ]


class Machine:
    """One running host; a context manager, which ends it. Raises HostError from every method."""

    # No boot and no job goes on past this time.monotonic(): set by who is ended then, and would take the log along.
    ends: ClassVar[float] = math.inf

    def __init__(self, host: Host, files: Sequence[str]) -> None:
        """Start QEMU; `files` are its arguments that name files: kernel and initramfs, or a saved machine."""
        self.host = host
        self.about: dict[str, str] = {}
        self.boot_id = ""  # the kernel's own
        self._folder = Path(tempfile.mkdtemp(prefix="kvmneg-host-"))
        self._console = self._folder / "console"
        self._port, port = socket.socketpair()
        self._qmp, qmp = socket.socketpair()
        self._buffer = b""
        command = [*emulator(host), *arguments(host)]
        command += [*files, "-serial", f"file:{self._console}"]
        command += ["-chardev", f"socket,id=port,fd={port.fileno()}"]
        command += ["-chardev", f"socket,id=qmp,fd={qmp.fileno()}", "-mon", "chardev=qmp,mode=control"]
        with port, qmp, open(self._folder / "errors", "wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(port.fileno(), qmp.fileno()),
            )
        self._qmp_file = self._qmp.makefile("rwb", buffering=0)
        self._negotiated = False

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it at once: nothing in it is worth keeping."""
        self._process.kill()
        self._process.wait()
        self._qmp_file.close()
        self._port.close()
        self._qmp.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def console(self) -> str:
        """All that the kernel printed, and what QEMU itself said."""
        texts = [
            path.read_text("utf-8", "replace")
            for path in (self._console, self._folder / "errors")
            if path.exists()
        ]
        return "\n".join(text.replace("\r\n", "\n") for text in texts if text.strip())

    def wait_ready(self, seconds: float = BOOT_SECONDS) -> None:
        """Until the agent has said what it is."""
        ends, seconds = self._limit(seconds)
        while not self.about:
            message = self._message(ends, "boot", seconds)
            if message[0] == "ready":
                self.about = json.loads(message[1])

    def run(self, job: Job, listener: Listener | None = None, grace: float = 0.0) -> Result:
        """A job from its start to its end; one after the other may run in one host. A host that fails is ended."""
        try:
            return self._run(job, listener, job.seconds + (grace or GRACE_SECONDS))
        except HostError:
            self._process.kill()
            raise

    def _run(self, job: Job, listener: Listener | None, limit: float) -> Result:
        ends, limit = self._limit(limit)
        packed = job.packed(self.boot_id)
        self._send(b"job %d\n" % len(packed) + packed, ends, limit)
        collector = Collector(self.about, listener)
        while collector.result is None:
            collector.take(*self._message(ends, "job", limit))
        return collector.result._replace(console=self.console())

    def _limit(self, seconds: float) -> tuple[float, float]:
        """When it is, in time.monotonic(), and how long until then."""
        now = time.monotonic()
        ends = min(now + seconds, self.ends)
        return ends, max(0.0, round(ends - now, 1))

    def _send(self, data: bytes, ends: float, limit: float) -> None:
        view = memoryview(data)
        try:
            self._port.setblocking(False)
            while view:
                if not select.select([], [self._port], [], max(0.0, ends - time.monotonic()))[1]:
                    raise HostError("job", f"was not taken within {limit:g} s", self.console())
                view = view[self._port.send(view) :]
            self._port.setblocking(True)
        except OSError as error:
            raise HostError("job", f"the host is gone: {error}", self.console()) from error

    def _message(self, ends: float, step: str, limit: float) -> tuple[str, bytes]:
        """The next message of the agent's."""
        while True:
            line, found, rest = self._buffer.partition(b"\n")
            if found:
                self._buffer = rest
                message = parse(line)
                if message is not None:
                    return message
                continue
            if not select.select([self._port], [], [], max(0.0, ends - time.monotonic()))[0]:
                raise HostError(step, f"no answer within {limit:g} s", self.console())
            try:
                data = self._port.recv(1 << 20)
            except ConnectionResetError:  # it was killed with something left to read
                data = b""
            if not data:
                self._process.wait(10)
                raise HostError(step, f"the host ended ({self._process.returncode})", self.console())
            self._buffer += data

    def plug(self, name: str, path: Path, *, listens: bool) -> None:
        """One more virtio-serial port, joined to another host's by a UNIX socket; first on the one that listens."""
        backend = {"addr": {"type": "unix", "data": {"path": str(path)}}, "server": listens}
        backend |= {"wait": False} if listens else {}
        self.qmp("chardev-add", id=name, backend={"type": "socket", "data": backend})
        self.qmp("device_add", driver="virtserialport", id=f"port-{name}", chardev=name, name=name)

    def qmp(self, command: str, **words: object) -> object:
        """One QMP command; what it returns."""
        self._qmp.settimeout(QMP_SECONDS)
        try:
            if not self._negotiated:
                self._negotiated = True
                self._qmp_file.readline()  # the greeting
                self.qmp("qmp_capabilities")
            request = {"execute": command, "arguments": words} if words else {"execute": command}
            self._qmp_file.write(json.dumps(request).encode() + b"\n")
            while line := self._qmp_file.readline():
                answer = json.loads(line)
                if "error" in answer:
                    raise HostError("snapshot", f"{command}: {answer['error']['desc']}", self.console())
                if "return" in answer:
                    return answer["return"]
        except OSError as error:
            raise HostError("snapshot", f"{command}: {error}", self.console()) from error
        raise HostError("snapshot", f"{command}: QEMU has ended", self.console())


def interactive(host: Host, files: Sequence[str]) -> int:
    """A shell on the host's console, at this terminal; its exit status (Ctrl-A X ends it)."""
    line = [
        *emulator(host),
        *arguments(host, "kvmneg.shell"),
        "-serial",
        "mon:stdio",
        "-chardev",
        "null,id=port",
    ]
    return subprocess.run([*line, *files], check=False).returncode
