# SPDX-License-Identifier: LGPL-2.1-or-later
"""A copy of the fence beside the database, for the day on which the database cannot be read.

One small file, replaced as a whole and synced, with a digest over all of it: it is there as it was written, or it
is not taken. It may be behind the database, never ahead: it is made from what is committed.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from kvmneg import limits
from kvmneg.errors import StoreError
from kvmneg.sha import sha256
from kvmneg.store import statedir
from kvmneg.store.faults import translated

NAME = statedir.COPY
_FORMAT = "kvmneg.fence-copy/1"
_GENERATION = b' "generation": '  # as json.dumps writes it with indent=1: read at each start, without json


class Copy(NamedTuple):
    """What the database said at `made_at` (ISO 8601, UTC).

    `digest` and `text` are those of the fence pinned; without one `text` is None and `digest` that of the fence taken
    down, "" where there never was one. `rolls` is the roll-back set, as JSON.
    """

    made_at: str
    generation: int
    digest: str
    text: str | None
    pinned_at: str
    uid: int
    pid: int
    reason: str
    rolls: list[Any]


def write(directory: str, copy: Copy) -> None:
    """Replace the copy of a state directory; durable when this returns. Raises StoreError."""
    import json  # only where a fence changed

    body = json.dumps({"format": _FORMAT, **copy._asdict()}, indent=1).encode() + b"\n"
    path, new = f"{directory}/{NAME}", f"{directory}/{NAME}.new"
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
    if document.pop("format", None) != _FORMAT or document.keys() != set(Copy._fields):
        raise StoreError(f"{directory}/{NAME} was written by another kvmneg", hint="run that one")
    return Copy(**document)


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
