# SPDX-License-Identifier: LGPL-2.1-or-later
"""A stand-in for polkit on a private bus: the real one needs the system's. It answers as a file says, and keeps a log.

fake_polkit.py RULES LOG: RULES is JSON, action → "yes", "no", "password" (one is needed), "never" (no answer at
all); read for each question.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from pathlib import Path

from sdbus import sd_bus_internals as sd_bus

NAME, PATH = "org.freedesktop.PolicyKit1", "/org/freedesktop/PolicyKit1/Authority"
INTERFACE = "org.freedesktop.PolicyKit1.Authority"


def asked(rules: Path, log: Path, call: sd_bus.SdBusMessage) -> None:
    """CheckAuthorization."""
    (kind, details), action, _, flags, cancellation = call.parse_to_tuple()
    subject = {name: value for name, (_, value) in details.items()}
    with log.open("a") as file:
        row = {"kind": kind, "subject": subject, "action": action, "flags": flags, "id": cancellation}
        file.write(json.dumps(row) + "\n")
    answer = json.loads(rules.read_text()).get(action, "no")
    if answer != "never":
        reply = call.create_reply()
        reply.append_data("(bba{ss})", (answer == "yes", answer == "password", {}))
        reply.send()


def cancelled(log: Path, call: sd_bus.SdBusMessage) -> None:
    """CancelCheckAuthorization."""
    with log.open("a") as file:
        file.write(json.dumps({"kind": "cancelled", "id": call.parse_to_tuple()[0]}) + "\n")
    if call.expect_reply:
        call.create_reply().send()


async def main(rules: Path, log: Path) -> None:
    bus = sd_bus.sd_bus_open_system()
    authority = sd_bus.SdBusInterface()
    flag = sd_bus.DbusUnprivilegedFlag
    authority.add_method(
        "CheckAuthorization", "(sa{sv})sa{ss}us",
        ["subject", "action_id", "details", "flags", "cancellation_id"],
        "(bba{ss})", ["result"], flag, partial(asked, rules, log),
    )  # fmt: skip
    authority.add_method(
        "CancelCheckAuthorization", "s", ["cancellation_id"], "", [], flag, partial(cancelled, log)
    )
    bus.add_interface(authority, PATH, INTERFACE)
    await bus.request_name_async(NAME, 0)
    await asyncio.Event().wait()


asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
