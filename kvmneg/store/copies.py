# SPDX-License-Identifier: LGPL-2.1-or-later
"""A copy of the level beside the database, for the day on which the database cannot be read.

One small file, replaced as a whole and synced, with a digest over all of it: it is there as it was written, or it
is not taken. It may be behind the database, never ahead: it is made from what is committed.
"""

from __future__ import annotations

import os

from kvmneg import limits
from kvmneg.errors import StoreError
from kvmneg.records import NamedTuple
from kvmneg.sha import sha256
from kvmneg.store import statedir
from kvmneg.store.faults import translated
from kvmneg.store.interface import ProposalRow, ReportRow

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.store.rolls import ComboRow, RollRow

NAME = statedir.COPY
_FORMAT = "kvmneg.fence-copy/1"
_DIGEST_LINE = 65
_GENERATION = b' "generation": '  # as json.dumps writes it with indent=1: read at each start, without json


class Copy(NamedTuple):
    """What the database said at `made_at` (ISO 8601, UTC).

    `digest` and `text` are those of the fence pinned; without one `text` is None and `digest` that of the fence taken
    down, "" where there never was one; `report` and `level` are then the level that floats (interface.LevelRow).
    `proposal` is the one that is open, without the guests that it listed: they are not known any more where the leases
    are lost. While lowering, `base` is digest and text of the fence that stands above. `rolls` is the roll-back set,
    with its `combos` and their newest `reports`, and that of the level that floats: oldest first.
    """

    made_at: str
    generation: int
    digest: str
    text: str | None
    pinned_at: str
    uid: int
    pid: int
    reason: str
    report: str | None = None
    level: str | None = None
    proposal: ProposalRow | None = None
    base: tuple[str, str] | None = None
    rolls: tuple[RollRow, ...] = ()
    combos: tuple[ComboRow, ...] = ()
    reports: tuple[ReportRow, ...] = ()


def write(directory: str, copy: Copy) -> None:
    """Replace the copy of a state directory; durable when this returns. Raises StoreError."""
    import json  # only where a level changed
    from base64 import b64encode

    reports = [row._replace(body=b64encode(row.body).decode()) for row in copy.reports]  # type: ignore[arg-type]
    document = {"format": _FORMAT, **copy._asdict(), "reports": reports}
    body = json.dumps(document, indent=1).encode() + b"\n"
    path, new = f"{directory}/{NAME}", f"{directory}/{NAME}.new"
    if len(body) > limits.COPY_BYTES - _DIGEST_LINE:
        raise StoreError(
            f"{path} would be larger than {limits.COPY_BYTES} bytes", hint="it could not be read back"
        )
    with translated(directory, f"write {path}"):
        if os.path.lexists(new):
            os.unlink(new)  # of a daemon that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(new, flags, 0o600), "wb") as file:
            file.write(sha256(body).hexdigest().encode() + b"\n" + body)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, path)
        statedir.sync_directory(directory)


def read(directory: str) -> Copy:
    """The copy of a state directory. Raises StoreError where there is none, or it is damaged."""
    import json  # only where a database is damaged

    document = json.loads(_body(directory))
    try:
        if document.pop("format") != _FORMAT or document.keys() != set(Copy._fields):
            raise ValueError
        return _parsed(document)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise StoreError(f"{directory}/{NAME} was written by another kvmneg", hint="run that one") from None


def _parsed(document: dict[str, Any]) -> Copy:
    from base64 import b64decode

    from kvmneg.store.rolls import ComboRow, RollRow

    def rows(name: str, kind: type[Any]) -> tuple[Any, ...]:
        return tuple(kind(*row) for row in document[name])

    proposal = document["proposal"]
    digest, text = document["base"] or ("", "")
    return Copy(**document)._replace(
        proposal=ProposalRow(*proposal) if proposal else None,
        base=(digest, text) if digest else None,
        rolls=rows("rolls", RollRow),
        combos=rows("combos", ComboRow),
        reports=tuple(row._replace(body=b64decode(row.body)) for row in rows("reports", ReportRow)),
    )


def generation(directory: str) -> int:
    """The generation that the copy of a state directory names; 0 where there is none that can be read."""
    try:
        line = next(line for line in _body(directory).splitlines() if line.startswith(_GENERATION))
    except (StoreError, StopIteration):
        return 0
    return int(line.removeprefix(_GENERATION).rstrip(b","))


def _body(directory: str) -> bytes:
    path = f"{directory}/{NAME}"
    with translated(directory, f"read {path}"), open(path, "rb") as file:
        data = file.read(limits.COPY_BYTES + 1)
    digest, _, body = data.partition(b"\n")
    if len(data) > limits.COPY_BYTES or sha256(body).hexdigest().encode() != digest:
        raise StoreError(f"{path} is damaged too: it does not have the digest that it names")
    return body
