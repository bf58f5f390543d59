# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a host of the catalogue to a running one: build what is missing, boot it or restore its snapshot."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from . import bochs, cache, cpio, kernel, userspace
from .catalogue import Host
from .errors import HostError
from .job import Job, Listener, Result
from .machine import Machine, arguments, emulator_name

POLL_SECONDS = 0.01
MOVE_SECONDS = 120.0
ATTEMPTS = 8


class Built:
    """A host's files: what boots it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.kernel = kernel.get(host)
        self._userspace = userspace.initramfs(host.architecture)
        self._modules = self.kernel.modules(host.emulator)
        self.key = cache.digest(
            self.kernel.release,
            self.kernel.version,
            self._userspace.name,
            self._modules,
            emulator_name(host),
            *arguments(host),
        )

    @contextmanager
    def files(self) -> Iterator[list[str]]:
        """QEMU's arguments with the kernel's image and the initramfs, for as long as a machine loads them."""
        with TemporaryDirectory(prefix="kvmneg-boot-") as name:
            image, initrd = Path(name) / "image", Path(name) / "initrd"
            image.write_bytes(kernel.bootable(self.kernel.image))
            with open(initrd, "wb") as target:
                cpio.join(target, [self._userspace.read_bytes(), self._modules])
            yield ["-kernel", str(image), "-initrd", str(initrd)]


def run(host: Host, job: Job, listener: Listener | None = None) -> Result:
    """A job in a host of its own, whatever emulates it. Raises HostError, PackageError."""
    if host.emulator == "bochs":
        return bochs.run(host, job, listener)
    with restored(Built(host)) as machine:
        return machine.run(job, listener)


@contextmanager
def booted(built: Built) -> Iterator[Machine]:
    """A host that was booted."""
    with built.files() as files, Machine(built.host, files) as machine:
        machine.wait_ready()
        yield machine


@contextmanager
def restored(built: Built) -> Iterator[Machine]:
    """A host as it was when it had just booted, from its snapshot; booted for one where there is none.

    Clock, entropy and boot id are new with the first job; all else is the same in each: addresses, process
    numbers, what the kernel measured at boot.
    """
    with _from(built, snapshot(built)) as machine:
        yield machine


def snapshot(built: Built) -> Path:
    """The file with it, which a boot makes where it is missing: half a minute, more on a busy machine."""
    kind = f"snapshot-{'-'.join(built.host.parts())}"
    return cache.made(kind, built.key, lambda path: _save(built, path), 1)


@contextmanager
def _from(built: Built, saved: Path) -> Iterator[Machine]:
    incoming = ["-kernel", str(built.kernel.image), "-incoming", f"exec:cat {shlex.quote(str(saved))}"]
    with Machine(built.host, incoming) as machine:
        _wait(machine, "query-status", "paused", ("inmigrate",), "restore")
        machine.qmp("cont")
        machine.about = {
            "release": built.kernel.release,
            "machine": userspace.MACHINES[built.host.architecture],
        }
        machine.boot_id = str(uuid4())
        yield machine


def _save(built: Built, path: Path) -> None:
    """Boot a host and save it, until what is restored lives on, its timers too (see agent.wake_timers())."""
    with booted(built) as machine:
        machine.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 34})
        for attempt in range(ATTEMPTS):
            time.sleep(0.05 + 0.23 * attempt)  # at another moment each time
            machine.qmp("stop")
            machine.qmp("migrate", uri=f"exec:cat >{shlex.quote(str(path))}")
            _wait(machine, "query-migrate", "completed", ("setup", "active", "device"), "snapshot")
            if _lives(built, path):
                return
            machine.qmp("cont")
    raise HostError(
        "snapshot", f"{built.host.describe()} was saved {ATTEMPTS} times, and its timers never went on"
    )


def _lives(built: Built, path: Path) -> bool:
    """Whether a host that is restored from the file sleeps and wakes up again."""
    try:
        with _from(built, path) as machine:
            return machine.run(Job(["sh", "-c", "sleep 0.1; sleep 0.3"], seconds=3), grace=2).status == 0
    except HostError:
        return False


def _wait(machine: Machine, query: str, done: str, meanwhile: tuple[str, ...], step: str) -> None:
    ends = time.monotonic() + MOVE_SECONDS
    while True:
        answer = machine.qmp(query)
        status = str(answer.get("status", "setup")) if isinstance(answer, dict) else ""
        if status == done:
            return
        if status not in meanwhile or time.monotonic() > ends:
            raise HostError(step, f"{query} says {answer}", machine.console())
        time.sleep(POLL_SECONDS)
