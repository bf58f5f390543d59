# SPDX-License-Identifier: LGPL-2.1-or-later
"""From a host of the catalogue to a running one: build what is missing, boot it or restore its snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from . import cache, cpio, kernel, userspace
from .catalogue import Host
from .machine import Machine, arguments, emulator_name

POLL_SECONDS = 0.01


class Built:
    """A host's files: what boots it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.kernel = kernel.get(host)
        self._userspace = userspace.initramfs(host.architecture)
        self._modules = self.kernel.modules()
        self.key = cache.digest(
            self.kernel.release,
            self.kernel.version,
            self._userspace.name,
            self._modules,
            emulator_name(host),
            *arguments(host),
        )

    @contextmanager
    def files(self) -> Iterator[tuple[Path, Path]]:
        """The kernel's image and the whole initramfs, for as long as a machine loads them."""
        with TemporaryDirectory(prefix="kvmneg-boot-") as name:
            image, initrd = Path(name) / "image", Path(name) / "initrd"
            image.write_bytes(kernel.bootable(self.kernel.image))
            with open(initrd, "wb") as target:
                cpio.join(target, [self._userspace.read_bytes(), self._modules])
            yield image, initrd


@contextmanager
def booted(built: Built) -> Iterator[Machine]:
    """A host that was booted."""
    with built.files() as (image, initrd), Machine(built.host, image, initrd) as machine:
        machine.wait_ready()
        yield machine
