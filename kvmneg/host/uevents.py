# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's uevents: modules that come and go, CPUs, devices, and KVM's VMs.

One socket and one reader for all of them (kvmneg.host.guests takes KVM's VMs out). pyroute2 has a reader too, which
gives the same messages; it costs 130 to 160 ms at import, in the thread that clients wait for, where this costs none.
"""

from __future__ import annotations

import socket

from kvmneg import limits

_NETLINK_KOBJECT_UEVENT = 15  # which Python's socket does not name
_KERNEL = 1  # the kernel's multicast group; udev's is 2
# ACTION@DEVPATH of what moves a measurement: modules (kvm's own, those of devices, live patches), CPUs, the devices
_PLACES = (b"@/module/", b"@/devices/system/cpu/", b"@/devices/virtual/misc/")
_DEVICES = (b"kvm", b"tun", b"vhost-net")


class Uevents:
    """The kernel's messages. Raises OSError where there are none to be had.

    `fd` is a socket that a service manager bound to them already, and becomes this one's.
    """

    def __init__(self, fd: int = -1) -> None:
        if fd >= 0:
            self._socket = socket.socket(fileno=fd)
            self._socket.setblocking(False)
            return
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            _NETLINK_KOBJECT_UEVENT,
        )
        try:
            self._socket.bind((0, _KERNEL))
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def read(self) -> tuple[list[bytes], bool]:
        """What came, at most UEVENTS_PER_TURN messages; and whether some were lost.

        The kernel drops messages where the queue is full (ENOBUFS): then only a new look tells what there is.
        """
        messages: list[bytes] = []
        for _ in range(limits.UEVENTS_PER_TURN):
            try:
                message, sender = self._socket.recvfrom(limits.UEVENT_BYTES)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS
                return messages, True
            if sender[0] == 0:  # of the kernel: whoever has CAP_NET_ADMIN may send here too
                messages.append(message)
        return messages, False


def concerns(message: bytes) -> bool:
    """Whether what happened may move a measurement; whether it did, a look at the inputs tells."""
    header = message.partition(b"\0")[0]
    if header.startswith(b"change@"):
        return False  # a VM of KVM's, a CPU's thermal state: nothing came or went
    return any(place in header for place in _PLACES[:2]) or (
        _PLACES[2] in header and header.rpartition(b"/")[2] in _DEVICES
    )
