# SPDX-License-Identifier: LGPL-2.1-or-later
"""The flag by which a caller of D-Bus lets a person be asked: ALLOW_INTERACTIVE_AUTHORIZATION of a message's header.

sd-bus has a function for it, sdbus does not pass that on. What sdbus has is sd-bus's dump of a message, on standard
output, which must not be buffered; its first line tells the header, and nothing of a caller's stands before it.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sdbus import sd_bus_internals as sd_bus

_ALLOW_INTERACTIVE_AUTHORIZATION = 0x4  # D-Bus Specification, "Message Format"
_HEADER_BYTES = 1024


def allows_interaction(message: sd_bus.SdBusMessage) -> bool:
    """Whether the flag is set; what cannot be read is a no. Not for several threads: it borrows standard output."""
    try:
        line = _dumped(message).partition(b"\n")[0]
    except OSError:
        return False
    for word in line.split():
        name, _, number = word.partition(b"=")
        if name == b"Flags" and number.isdigit():
            return bool(int(number) & _ALLOW_INTERACTIVE_AUTHORIZATION)
    return False


def _dumped(message: sd_bus.SdBusMessage) -> bytes:
    """The first bytes of its dump. Raises OSError."""
    kept = os.dup(1)
    try:
        memory = os.memfd_create("a message")
        try:
            os.dup2(memory, 1)
            try:
                message.dump()
            finally:
                os.dup2(kept, 1)
            return os.pread(memory, _HEADER_BYTES, 0)
        finally:
            os.close(memory)
    finally:
        os.close(kept)
