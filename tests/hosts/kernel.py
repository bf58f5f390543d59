# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Debian kernel: its image, and the modules a host needs in the order in which they load."""

from __future__ import annotations

import lzma
import re
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from ..packages.errors import Missing
from ..packages.store import Store, Wanted
from ..packages.tree import Tree
from ..packages.versions import numbers, satisfies
from .catalogue import Host
from .cpio import DATA, Member, archive
from .errors import HostError

# What a host uses, on either architecture; what a kernel has built in, or not at all, is left out.
MODULES = (
    *("virtio_pci", "virtio_console"),  # the way in and out
    *("kvm-amd", "kvm-intel"),
    *("tun", "tap", "vhost_net", "vhost_vsock"),
)
_NOT_UNDER = {"qemu": "kvm-intel", "bochs": "kvm-amd"}  # the other vendor's: half a second to be refused
# Cloud kernels are a third of the size. Up to 6.18 everything is in linux-image-*; from 6.19 on that one is empty.
_NAME = re.compile(r"linux-(image|binary)-([0-9][^-]*(?:-[0-9]+)?)-cloud-(?:amd64|arm64)")
_NAME_PREFIX = re.compile(r"^linux-(?:image|binary)-")
SPLIT_FROM = (6, 19)
_SUFFIX = re.compile(r"\.ko(\.xz)?$")


class Kernel(NamedTuple):
    """`image` is what an emulator boots, `trees` the unpacked packages, `version` Debian's of the package."""

    image: Path
    trees: list[Tree]
    version: str
    release: str

    def modules(self, emulator: str) -> bytes:
        """An initramfs with the modules, numbered as they have to be loaded."""
        files = _files(self.trees)
        ordered: dict[str, bytes] = {}
        for name in (name for name in MODULES if name != _NOT_UNDER[emulator]):
            _add(name.replace("-", "_"), files, ordered)
        return archive(
            Member(f"modules/{place:02}-{name}.ko", DATA, data)
            for place, (name, data) in enumerate(ordered.items())
        )


def get(host: Host, store: Store | None = None) -> Kernel:
    """The host's kernel, from the cache or the mirror. Raises PackageError."""
    store = store or Store()
    names = _cached(host, store) or store.names(host.suite, host.architecture, "linux-")
    found = [name for name in names if (match := _NAME.fullmatch(name)) and _fits(match, host)]
    if not found:
        raise Missing(f"{host.suite} has no kernel {host.line} for {host.architecture}")
    package = max(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    wanted = [package]
    if package.startswith("linux-binary-"):
        wanted.append(package.replace("linux-binary-", "linux-modules-"))
    trees = [store.get(Wanted(name, "", host.suite, host.architecture, alone=True)) for name in wanted]
    image = _image(trees[0])
    release = _NAME_PREFIX.sub("", package)
    return Kernel(image, trees, trees[0].version, release)


def _image(tree: Tree) -> Path:
    for pattern in ("boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz", "usr/lib/linux-binary-*/*vmlinuz*"):
        for found in tree.root.glob(pattern):
            return found
    raise HostError("packages", f"{tree.package} {tree.version} has no kernel image")


def _fits(match: re.Match[str], host: Host) -> bool:
    """The right line; below 6.19 the one package, from there on the one that has the kernel."""
    version = numbers(match[2])
    return satisfies(match[2], host.kernel) and (match[1] == "binary") == (version[:2] >= SPLIT_FROM)


def _cached(host: Host, store: Store) -> list[str]:
    """Names of unpacked kernels: with one of them the mirror need not be asked."""
    same = (host.suite, host.architecture)
    return [
        tree.package
        for tree in store.trees()
        if (tree.suite, tree.architecture) == same
        and (match := _NAME.fullmatch(tree.package))
        and _fits(match, host)
    ]


def _files(trees: list[Tree]) -> dict[str, Path]:
    """Module names, as the kernel writes them, to files."""
    return {
        _SUFFIX.sub("", path.name).replace("-", "_"): path
        for tree in trees
        for path in (tree.root / "usr/lib/modules").rglob("*.ko*")
        if _SUFFIX.search(path.name)
    }


def _add(name: str, files: dict[str, Path], ordered: dict[str, bytes]) -> None:
    """Add a module after those it depends on (.modinfo's `depends=`); depmod is not needed."""
    if name in ordered or name not in files:
        return
    data = files[name].read_bytes()
    if files[name].suffix == ".xz":
        data = lzma.decompress(data)
    match = re.search(rb"\0depends=([^\0]*)\0", data)
    for needed in match[1].decode().split(",") if match else ():
        _add(needed.replace("-", "_"), files, ordered)
    ordered[name] = data


def bootable(image: Path) -> bytes:
    """An arm64 image that any QEMU boots: EFI's self-extracting "zimg" form is unpacked (gzip only)."""
    data = image.read_bytes()
    if data[4:8] != b"zimg":
        return data
    start, size = struct.unpack_from("<II", data, 8)
    if not data[24:28].startswith(b"gzip"):
        raise HostError("build", f"{image.name} is compressed as {data[24:32]!r}, which is not read here")
    return zlib.decompress(data[start : start + size], wbits=31)
