# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg.toml(5): what an administrator settles for kvmnegd, every limit of kvmneg.limits among it.

Imported only where the file is there. A file is taken whole or not at all; a mistake is told with its line and key.
"""

from __future__ import annotations

import os
import stat
import tomllib

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.service import authorization

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

FILE_BYTES = 1024 * 1024
KEYS = {"socket": "/…", "state": "/…", "admin-group": "the name of a group"}

_DAY = 86400
_MIB = 1024 * 1024

# name → least and most: below the least the daemon is of no use, above the most it could be brought down with it
BOUNDS: dict[str, tuple[float, float]] = {
    "CALL_BYTES": (4096, 16 * _MIB),
    "REPLY_QUEUE_BYTES": (4096, 16 * _MIB),
    "READ_CHUNK_BYTES": (4096, _MIB),
    "NESTING_DEPTH": (8, 200),
    "TURN_SECONDS": (0.001, 1),
    "CALLS_PER_TURN": (1, 4096),
    "CONNECTIONS": (8, 65536),
    "CONNECTIONS_PER_UID": (1, 65536),
    "CONNECTIONS_RESERVED": (0, 65536),
    "SYSTEM_UIDS": (1, 65534),
    "FIRST_CALL_SECONDS": (0.1, 3600),
    "WATCHERS": (0, 65536),
    "WATCHERS_PER_UID": (0, 65536),
    "WATCHER_STALL_SECONDS": (0.1, 3600),
    "ACCEPT_PER_TURN": (1, 4096),
    "ACCEPT_PAUSE_SECONDS": (0.001, 10),
    "TROUBLE_SECONDS": (0, _DAY),
    "STOP_SECONDS": (0, 8),
    "CACHED_REPLIES": (0, 65536),
    "CACHED_CALL_BYTES": (0, 16 * _MIB),
    "CACHED_REPLY_BYTES": (0, 16 * _MIB),
    "CACHED_OFFERS": (1, 1_000_000),
    "COPY_SECONDS": (0.01, 60),
    "COPY_AGAIN_SECONDS": (1, 3600),
    "COPY_BYTES": (_MIB, 1024 * _MIB),
    "BUS_CALLS": (1, 65536),
    "BUS_CALLS_PER_CALLER": (1, 65536),
    "BUS_CALLS_PER_UID": (1, 65536),
    "BUS_CALLERS": (1, 65536),
    "BUS_RETRY_SECONDS": (1, 3600),
    "POLKIT_QUESTIONS": (0, 4096),
    "POLKIT_QUESTIONS_PER_UID": (0, 4096),
    "POLKIT_SECONDS": (0.1, 3600),
    "REQUEST_FEATURES": (1, 65536),
    "REASON_CHARACTERS": (16, 65536),
    "LEASES": (1, 1_000_000),
    "LEASES_PER_UID": (1, 1_000_000),
    "LEASES_RESERVED": (0, 1_000_000),
    "CONTRACTS": (1, 1_000_000),
    "CONTRACTS_PER_UID": (1, 1_000_000),
    "LEASES_FINISHED": (0, 1_000_000),
    "LEASE_UNSTARTED_SECONDS": (1, 30 * _DAY),
    "HOLDERS_PER_LEASE": (1, 16),
    "GUESTS_NAMED": (1, 100_000),
    "FEATURES_NAMED": (1, 4096),
    "CONSENTS": (1, 65536),
    "OVERRIDES": (1, 65536),
    "PROPOSAL_SECONDS": (60, 3650 * _DAY),
    "REPORT_BYTES": (64 * 1024, 256 * _MIB),
    "FENCE_BYTES": (64 * 1024, 64 * _MIB),
    "WORDS": (256, 65536),
    "REGISTERS": (512, 65536),
    "REPORTS_PER_BASELINE": (2, 10_000_000),
    "FEATURE_MSRS": (64, 65536),
    "VOLATILE_SECONDS": (0, 60),
    "WATCH_POLL_SECONDS": (1, _DAY),
    "WATCH_SETTLE_SECONDS": (0, 10),
    "WATCHED_FOLDERS": (0, 4096),
    "INOTIFY_BYTES": (4096, _MIB),
    "MEASURE_SECONDS": (1, 3600),
    "MEASURE_RETRY_SECONDS": (1, 3600),
    "MEASURE_RETRY_MOST_SECONDS": (1, _DAY),
    "GUEST_SECONDS": (0.1, 600),
    "PROOF_SECONDS": (1, _DAY),
    "PROOFS": (1, 4096),
    "APART_SECONDS": (0.1, 60),
    "APART_BYTES": (4096, 64 * _MIB),
    "VMM_BUILDS": (0, 4096),
    "HISTORY_ROWS": (1, 100_000),
    "COMBO_ROWS": (1, 100_000),
    "COMBOS_SEARCHED": (1, 10_000_000),
    "ROLLBACK_COMBOS": (1, 4096),
    "ROLLBACK_DIMENSIONS": (1, 4096),
    "ROLLBACK_SETS": (1, 65536),
    "ROLLBACK_REASON_BYTES": (4096, 4 * _MIB),
    "SETS_KEPT": (1, 65536),
    "UEVENTS_PER_TURN": (1, 65536),
    "UEVENT_TURNS": (1, 65536),
    "STRANGER_SECONDS": (0, 3600),
    "LOOK_SLICE_SECONDS": (0.001, 1),
    "UNKNOWN_GUESTS": (1, 1_000_000),
    "WAIVERS": (1, 1_000_000),
    "GUEST_NAME_CHARACTERS": (1, 4096),
    "EVENT_BURST": (1, 65536),
    "EVENT_BURST_PER_UID": (1, 65536),
    "EVENT_SECONDS": (1, _DAY),
    "EVENT_LINE_CHARACTERS": (256, 65536),
    "EVENT_FIELD_CHARACTERS": (256, 65536),
}

# Not the daemon's to settle, each with whose it is.
FIXED = {
    "REPLY_BYTES": "clients keep it, and they read no settings",
    "CONTRACT_BYTES": "libkvmneg has the same, and reads what is granted",
    "CONTRACT_ENTRIES": "libkvmneg has the same, and reads what is granted",
    "GENERATIONS": "JSON's numbers end there",
    "QEMU_SECONDS": "`kvmneg` keeps it, and reads no settings",
    "IMAGE_PARTS": "`kvmneg image` keeps it, and reads no settings",
    "IMAGE_PART_BYTES": "`kvmneg image` keeps it, and reads no settings",
    "CPUID_ENTRIES": "KVM takes no more",
    "TSC_KHZ": "KVM scales to no higher rate",
    "UEVENT_BYTES": "the kernel's messages are no longer",
}

# Looked at once: a reload says that they wait for the next start.
AT_START = ("WATCHED_FOLDERS",)

_DEFAULTS: dict[str, float] = {name: getattr(limits, name) for name in BOUNDS}
_ADMIN_GROUP = authorization.admin_group


class Settings:
    """A file's settings: `socket` and `state` are "" where it has none, `changed` the limits that it names."""

    __slots__ = ("admin_group", "changed", "file", "socket", "state")

    def __init__(self, file: str, table: dict[str, Any], changed: dict[str, float]) -> None:
        self.file = file
        self.socket: str = table.get("socket", "")
        self.state: str = table.get("state", "")
        self.admin_group: str = table.get("admin-group", _ADMIN_GROUP)
        self.changed = changed

    def apply(self) -> None:
        """Make its limits those of this process; what it does not name is as it was delivered."""
        apply(self)

    def waits(self, other: Settings | None) -> list[str]:
        """What differs from the settings that the daemon started with, and only a restart brings about."""
        old: dict[str, object] = other.changed if other else {}  # type: ignore[assignment]
        return [
            *(
                key
                for key in ("socket", "state")
                if getattr(self, key) != (getattr(other, key) if other else "")
            ),
            *(name for name in AT_START if self.changed.get(name) != old.get(name)),
        ]


def apply(settings: Settings | None) -> None:
    """Make these settings' limits those of this process; None is a file that is gone."""
    changed = settings.changed if settings else {}
    for name, default in _DEFAULTS.items():
        setattr(limits, name, changed.get(name, default))
    authorization.admin_group = settings.admin_group if settings else _ADMIN_GROUP


def load(file: str, *, groups: bool = False) -> Settings | None:
    """The settings of a file, None where there is none. Raises BadInput with line and key, and changes nothing.

    With `groups` the group of admins must be there. A start does not ask: who knows it may come up later than this.
    """
    try:
        # not waited for: a FIFO that nobody writes to would hang the daemon
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", file=file) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadInput("is no regular file", file=file)
        with open(descriptor, "rb", closefd=False) as opened:
            data = opened.read(FILE_BYTES + 1)
    except OSError as error:
        raise BadInput(f"cannot be read: {error.strerror}", file=file) from None
    finally:
        os.close(descriptor)
    return parse(data, file, groups=groups)


def parse(data: bytes, file: str, *, groups: bool = False) -> Settings:
    """The settings in a file's bytes. Raises BadInput."""
    if len(data) > FILE_BYTES:
        raise BadInput(f"larger than {FILE_BYTES} bytes", file=file)
    try:
        text = data.decode()
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise BadInput("not UTF-8", file=file, line=data[: error.start].count(b"\n") + 1) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise _no_toml(str(error), text, file) from None
    reader = _Reader(text, file)
    reader.known("", table, (*KEYS, "limits"))
    for key in KEYS:
        reader.text(key, table)
    if groups and "admin-group" in table:
        reader.group("admin-group", table)
    return Settings(file, table, reader.limits(table.get("limits", {})))


def _no_toml(said: str, text: str, file: str) -> BadInput:
    """tomllib says where in words: "… (at line 3, column 5)", "(at end of document)"."""
    what, _, where = said.rpartition(" (at ")
    number = where.partition("line ")[2].partition(",")[0]
    line = int(number) if number.isdecimal() else len(text.splitlines()) or 1
    return BadInput(f"not TOML: {what or said}", file=file, line=line)


class _Reader:
    """Looks at a file's values one by one, and tells of the first that is none."""

    def __init__(self, text: str, file: str) -> None:
        self._text, self._file = text, file

    def known(self, section: str, table: dict[str, Any], names: Iterable[str]) -> None:
        names = list(names)
        for key in table:
            if key not in names:
                from difflib import get_close_matches  # for who mistyped one

                near = get_close_matches(key, names, 1) or get_close_matches(key.upper(), names, 1)
                hint = f"did you mean {near[0]}?" if near else "kvmneg.toml(5) lists them"
                self._refuse(section, key, "there is no such setting", hint)

    def text(self, key: str, table: dict[str, Any]) -> None:
        value = table.get(key, "/")
        good = isinstance(value, str) and value and value.isprintable()
        if not good or (KEYS[key] == "/…" and not value.startswith("/")):
            what = "an absolute path" if KEYS[key] == "/…" else KEYS[key]
            self._refuse("", key, f"must be {what}, in quotation marks")

    def group(self, key: str, table: dict[str, Any]) -> None:
        import grp

        try:
            grp.getgrnam(table[key])
        except KeyError:
            self._refuse("", key, f"there is no group {table[key]}")

    def limits(self, table: object) -> dict[str, float]:
        if not isinstance(table, dict):
            self._refuse("", "limits", "must be a section: [limits]")
        for key in table:
            if key in FIXED:
                self._refuse("limits", key, f"cannot be set: {FIXED[key]}")
        self.known("limits", table, BOUNDS)
        return {key: self._limit(key, value) for key, value in table.items()}

    def _limit(self, key: str, value: object) -> float:
        whole = isinstance(_DEFAULTS[key], int)
        allowed = (int,) if whole else (int, float)
        low, high = BOUNDS[key]
        if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
            kind = "a whole number" if whole else "a number"
            self._refuse("limits", key, f"must be {kind} from {low} to {high}")
        assert isinstance(value, (int, float))
        return value

    def _refuse(self, section: str, key: str, why: str, hint: str = "") -> NoReturn:
        name = f"{section}.{key}" if section else key
        fault = BadInput(f"{name}: {why}", file=self._file, line=self._line(section, key), hint=hint)
        fault.fields["key"] = name
        raise fault

    def _line(self, section: str, key: str) -> int:
        """Where a key stands; 1 where it is written in a way that is not looked for."""
        inside = ""
        for number, line in enumerate(self._text.splitlines(), 1):
            word = line.strip()
            if word.startswith("["):
                inside = word.strip("[] \t")
                if inside == key and not section:
                    return number
                continue
            name = word.partition("=")[0].strip().strip("\"'")
            if (inside, name) == (section, key) or (not inside and name == f"{section}.{key}"):
                return number
        return 1
