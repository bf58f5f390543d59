# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the host's network devices offer to virtio-net: feature masks of TAP and vhost-net.

They need no namespace and leave nothing behind: a descriptor of /dev/net/tun that no interface was made with,
and one of /dev/vhost-net without an owner. Opening either may load its module, as the first VM would.

The ioctl numbers are written out: computing them by ioctl-opt (kvmneg.host.ioctls) imports ctypes, which
costs more than all of this module. A test compares both.
"""

from __future__ import annotations

import fcntl
import os
from struct import Struct

TUNGETFEATURES = 0x800454CF  # linux/if_tun.h: unsigned int, flags of TUNSETIFF
VHOST_GET_FEATURES = 0x8008AF00  # linux/vhost.h: __u64, virtio features and VHOST_F_*

_PROBES = (
    ("tap:features", "net/tun", TUNGETFEATURES, Struct("=I")),
    ("vhost-net:features", "vhost-net", VHOST_GET_FEATURES, Struct("=Q")),
)


def masks(dev: str = "/dev") -> dict[str, int]:
    """tap:features and vhost-net:features, each 64 bits.

    A device that is missing, forbidden, or another one is not measured: its word is left out.
    """
    found = {}
    for word, name, request, layout in _PROBES:
        try:
            found[word] = _mask(f"{dev}/{name}", request, layout)
        except OSError:
            continue
    return found


def _mask(path: str, request: int, layout: Struct) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        (mask,) = layout.unpack(fcntl.ioctl(fd, request, bytes(layout.size)))
    finally:
        os.close(fd)
    return int(mask)
