# SPDX-License-Identifier: LGPL-2.1-or-later
"""A caller that floods: flood.py INTERFACE METHOD, calls without waiting for replies until it is ended."""

from __future__ import annotations

import sys

from sdbus import sd_bus_internals as sd_bus

bus = sd_bus.sd_bus_open_system()


def wait() -> None:
    """Until the bus has passed on all that was sent."""
    bus.call(
        bus.new_method_call_message(
            "org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "GetId"
        )
    )


wait()
sys.stdout.write("flooding\n")
sys.stdout.flush()
while True:
    for _ in range(1000):
        call = bus.new_method_call_message("org.kvmneg1", "/org/kvmneg1", sys.argv[1], sys.argv[2])
        call.expect_reply = False
        call.send()
    wait()
