# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an operator cares about, as messages of the journal: one MESSAGE_ID for each kind, and chosen fields.

`event` is the one way for anything the daemon tells. Under systemd it becomes a message with KVMNEG_* fields, of which
units/kvmneg.catalog has the text for `journalctl -x`; elsewhere lines on stderr. Those that a client can bring about as
often as it likes are told EVENT_BURST_PER_UID times of each user in EVENT_SECONDS, EVENT_BURST times of all, then
counted.

The only module that imports systemd-python's journal, and not before the first message: it costs 17 ms.
"""

from __future__ import annotations

import os
import sys
import time

from kvmneg import limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SOCKET = "/run/systemd/journal/socket"

# syslog(3)
ERROR, WARNING, NOTICE, INFO = 3, 4, 5, 6

_FENCE = ("GENERATION", "FENCE_DIGEST", "UID", "PID", "REASON")

# name → MESSAGE_ID, PRIORITY, the fields it may have (KVMNEG_ in front), whether clients can bring it about at will.
# An id is never given to something else: people have alerts on them.
EVENTS: dict[str, tuple[str, int, tuple[str, ...], bool]] = {
    "started": (
        "7ce61b318deb4babb7af78bd5e4dcccb",
        INFO,
        ("STATE", "GENERATION", "FENCE_DIGEST", "HOST_DIGEST", "VERSION"),
        False,
    ),
    "reloaded": ("475b124d323e4f42a96fd58b91f0ba3f", INFO, ("FILE", "SETTINGS"), False),
    "reload-refused": ("99ebd8f6733b45ff958a53274e166634", ERROR, ("FILE", "LINE", "KEY", "REASON"), False),
    "fence-pinned": ("c9e5b86ac81a4f72bf93dcb9f877a7af", NOTICE, _FENCE, False),
    "fence-unpinned": ("b9f430ba7b3a4a85b589825684349b50", NOTICE, _FENCE, False),
    "fence-proposed": ("ce6c3a551aac48798365391409d66324", NOTICE, _FENCE, False),
    "fence-raised": ("26a7ccf59726406bbc5e9c30e87f7934", NOTICE, _FENCE, False),
    "fence-lowered": ("eee7af9f56c24e47b6d34e59dd766e5e", NOTICE, (*_FENCE, "URGENT"), False),
    "fence-settled": ("42a5a493dec2410bb6d59be34253ab25", NOTICE, _FENCE, False),
    "fence-aborted": ("e5d9c478c4db4df18f2bb437b5ad3fc8", NOTICE, _FENCE, False),
    "fence-refused": (
        "796381fad29f40a8846deef605430bb4",
        WARNING,
        ("METHOD", "ERROR", "UID", "PID", "GENERATION"),
        True,
    ),
    "host-changed": (
        "5943b5a5e32146dc8cdc5bfb4188c9f3",
        NOTICE,
        ("HOST_DIGEST", "COMBO_DIGEST", "INPUTS", "LOST", "GAINED", "CHANGED"),
        False,
    ),
    "host-unmeasured": ("e62e20b0396b43c0b8e43e58eeb74ff2", ERROR, ("REASON", "CAUSE"), False),
    "host-measured": ("ce0d3134343b49828a5dc7a414e1d2e3", NOTICE, ("HOST_DIGEST", "COMBO_DIGEST"), False),
    "breached": (
        "dbbd033ab67343ee9fd4cc94e45190e7",
        ERROR,
        ("HOST", "GENERATION", "COMBO_DIGEST", "FEATURES", "COUNT"),
        False,
    ),
    "healed": ("f0053cb28bdf4ec59c2ab15766be0280", NOTICE, ("HOST", "GENERATION", "COMBO_DIGEST"), False),
    "unknown-guest": (
        "16788ccefe264f248cbab619f5dde308",
        WARNING,
        ("PROCESS_PID", "PROCESS_UID", "PROCESS", "VM", "VM_NAME"),
        True,
    ),
    "peer-refused": ("9ee40da0ae4549bc96476c0be3e64c89", WARNING, ("METHOD", "UID", "PID", "REASON"), True),
    "limit-hit": (
        "b9d726de99174b35a5a1052f788beb3d",
        WARNING,
        ("LIMIT", "ALLOWED", "METHOD", "UID", "PID"),
        True,
    ),
    "store-failing": ("a22e9221fdc64db6aa268a8c80ac9219", ERROR, ("REASON", "CAUSE"), True),
    "store-recovered": ("dca790956b4740a7976cf65a1d3ecbd2", NOTICE, (), True),
    "trouble": ("1b47a50a92f840c8bf2dab33b302ea6b", WARNING, ("REASON",), True),
}
# Of no use to who reads stderr: it started, as they see.
_JOURNAL_ONLY = frozenset(("started",))

_told: dict[str, tuple[float, dict[object, int], int]] = {}  # name → since when, told by user, how many not
_clock: Callable[[], float] = time.monotonic


def event(name: str, *lines: str, **fields: object) -> None:
    """Tell an event of EVENTS: lines for a person, fields (`generation=4`) for programs.

    Fields that are None are left out, sequences are joined by blanks, and what EVENTS does not list is not sent.
    Never raises: a log that is broken is no reason to fail a call.
    """
    number, priority, allowed, at_will = EVENTS[name]
    left_out = _left_out(name, fields.get("uid", fields.get("process_uid"))) if at_will else 0
    if left_out is None:
        return
    shown = [_printable(line, limits.EVENT_LINE_CHARACTERS) for line in lines]
    if left_out:
        shown.append(f"{left_out} more of this kind were not told")
    # the name, as libsystemd would say "python3"
    sent = {
        "MESSAGE_ID": number,
        "PRIORITY": str(priority),
        "SYSLOG_IDENTIFIER": "kvmnegd",
        "KVMNEG_EVENT": name,
    }
    for field, value in fields.items():
        if field.upper() in allowed and value is not None:
            sent[f"KVMNEG_{field.upper()}"] = _value(value)
    to_journal = _has_journal() and _send({"MESSAGE": "\n".join(shown), **sent})
    if name in _JOURNAL_ONLY or (to_journal and stderr_is_journal()):
        return
    try:
        sys.stderr.write("".join(map(_prefixed, shown)))
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # nobody is there to be told


def _left_out(name: str, uid: object) -> int | None:
    """How many were not told since the last that was, None where this one is not told either."""
    now = _clock()
    since, told, left_out = _told.get(name, (now, {}, 0))
    if now - since >= limits.EVENT_SECONDS:
        since, told = now, {}
    if told.get(uid, 0) >= limits.EVENT_BURST_PER_UID or sum(told.values()) >= limits.EVENT_BURST:
        _told[name] = since, told, left_out + 1
        return None
    _told[name] = since, {**told, uid: told.get(uid, 0) + 1}, 0
    return left_out


def _value(value: object) -> str:
    words = [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]
    return _printable(" ".join(words), limits.EVENT_FIELD_CHARACTERS)


def _printable(text: str, most: int) -> str:
    """A client's words, or a process's name, must not begin a line of their own, nor move a terminal's cursor."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if not text.isprintable():
        text = "".join(one if one.isprintable() else f"\\x{ord(one):02x}" for one in text)
    return text[:most]


def _prefixed(line: str) -> str:
    return f"{line}\n" if line.startswith(" ") else f"kvmnegd: {line}\n"


def _has_journal() -> bool:
    """Whether a journal is there that this process belongs to.

    JOURNAL_STREAM names the stream of a unit (systemd.exec(5)); one whose stderr is a file has NOTIFY_SOCKET. Who
    starts the daemon by hand looks at the terminal.
    """
    of_unit = os.environ.get("JOURNAL_STREAM") or os.environ.get("NOTIFY_SOCKET")
    return (stderr_is_journal() or bool(of_unit)) and os.path.exists(SOCKET)


def stderr_is_journal() -> bool:
    """Whether this process writes its errors there.

    JOURNAL_STREAM is inherited by whatever is started below a unit: only the stream itself counts.
    """
    stream = os.environ.get("JOURNAL_STREAM")
    if not stream:
        return False
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return stream == f"{found.st_dev}:{found.st_ino}"


def _send(fields: dict[str, str]) -> bool:
    """Whether the journal has it."""
    from systemd.journal import sendv

    try:
        sendv(*(f"{name}={value}" for name, value in fields.items()))
    except OSError:
        return False
    return True
