# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a power cut may leave of recorded operations.

The model promises as little as a file system may. Written and not synced, of a file: each 512-byte sector of each write
arrives or not, in any order, and so does the new size, with zeros where the data did not arrive. Created, renamed
or removed and the directory not synced: each change arrives or not, alone. A file's own sync says nothing of its
name. What was synced stays. (No bit rots here, and a sync does what it says: else nothing could be promised.)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from tests.disk.recording import Operation

SECTOR = 512

Tree = dict[str, bytes | None]
"""What is on the disk: path → content, None for a directory."""


class _Write(NamedTuple):
    """A change of a file's content: data at an offset, or a new size where data is None."""

    offset: int
    data: bytes | None


class _File:
    """One inode: what is surely on the disk, and what is on its way there."""

    def __init__(self) -> None:
        self.durable = bytearray()
        self.pending: list[_Write] = []

    def sync(self) -> None:
        for write in self.pending:
            _apply(self.durable, write)
        self.pending.clear()


class _Rename(NamedTuple):
    """A change of names: `path` goes, `to` becomes `file`; either may be empty. None as file is a directory."""

    path: str
    to: str
    file: _File | None


class Disk:
    """A file system as operations come in."""

    def __init__(self) -> None:
        self._inodes: dict[int, _File] = {}
        self._names: dict[str, _File | None] = {}  # as processes see them
        self._durable: dict[str, _File | None] = {}
        self._pending: list[_Rename] = []

    def do(self, operation: Operation) -> None:
        """Take one operation in."""
        kind = operation.kind
        if kind == "write":
            self._inodes[operation.file].pending.append(_Write(operation.offset, operation.data))
        elif kind == "truncate":
            self._inodes[operation.file].pending.append(_Write(operation.offset, None))
        elif kind == "sync":
            self._sync(operation)
        elif kind == "create":
            self._inodes[operation.file] = file = _File()  # a number may be given again
            self._rename(_Rename("", operation.path, file))
        elif kind == "mkdir":
            self._rename(_Rename("", operation.path, None))
        elif kind == "rename":
            self._rename(_Rename(operation.path, operation.to, self._names[operation.path]))
        elif kind == "link":
            self._rename(_Rename("", operation.to, self._names[operation.path]))
        elif kind == "unlink":
            self._rename(_Rename(operation.path, "", None))
        else:
            raise ValueError(kind)

    def _rename(self, change: _Rename) -> None:
        if change.path and change.to and os.path.dirname(change.path) != os.path.dirname(change.to):
            raise ValueError("this model has no rename from one directory to another")
        _rename(self._names, change)
        self._pending.append(change)

    def _sync(self, operation: Operation) -> None:
        file = self._inodes.get(operation.file)
        if file is not None and self._names.get(operation.path, file) is file:
            file.sync()
            return
        rest = []
        for change in self._pending:  # a directory
            if os.path.dirname(change.path or change.to) == operation.path:
                _rename(self._durable, change)
            else:
                rest.append(change)
        self._pending = rest

    def after_power_cut(self, chance: random.Random) -> Tree:
        """One of the trees that the next start may find."""
        arrive = chance.choice((0.1, 0.5, 0.9))
        return self._tree(
            _Whim(chance, arrive if chance.random() < 0.7 else 1, arrive if chance.random() < 0.7 else 1)
        )

    def extremes(self) -> Iterator[Tree]:
        """The trees with all or nothing of what was on its way, names and contents; and with one name of several."""
        for names in (0, 1):
            for contents in (0, 1):
                yield self._tree(_Whim(None, names, contents))
        if len(self._pending) > 1:
            for change in self._pending:
                yield self._tree(_Whim(None, 0, 1), change)

    def _tree(self, whim: _Whim, only: _Rename | None = None) -> Tree:
        names = dict(self._durable)
        for change in self._pending:
            if change is only or whim.name():
                _rename(names, change)
        tree: Tree = {}
        for path, file in sorted(names.items()):
            parent = os.path.dirname(path)
            if tree.get(parent, b"") is not None and self._made(parent):
                continue  # its directory did not arrive
            tree[path] = None if file is None else whim.content(file)
        return tree

    def _made(self, path: str) -> bool:
        """Whether a directory was made in the recording (its root was there before)."""
        return path in self._names or path in self._durable


class _Whim:
    """What arrives: with these probabilities, all independent; without chance, 0 or 1."""

    def __init__(self, chance: random.Random | None, names: float, contents: float) -> None:
        self._chance, self._names, self._contents = chance, names, contents

    def _arrives(self, probability: float) -> bool:
        return bool(probability) if self._chance is None else self._chance.random() < probability

    def name(self) -> bool:
        return self._arrives(self._names)

    def content(self, file: _File) -> bytes:
        content = bytearray(file.durable)
        for write in file.pending:
            if write.data is None or self._contents in (0, 1):
                if self._arrives(self._contents):
                    _apply(content, write)
            else:
                self._tear(content, write.offset, write.data)
        return bytes(content)

    def _tear(self, content: bytearray, offset: int, data: bytes) -> None:
        """Some sectors of a write, and perhaps the size it gave the file."""
        at = offset
        while at < offset + len(data):
            end = min(offset + len(data), (at // SECTOR + 1) * SECTOR)
            if self._arrives(self._contents):
                _apply(content, _Write(at, data[at - offset : end - offset]))
            at = end
        if len(content) < offset + len(data) and self._arrives(self._contents):
            content.extend(bytes(offset + len(data) - len(content)))


def _apply(content: bytearray, write: _Write) -> None:
    if write.data is None:
        del content[write.offset :]
        content.extend(bytes(write.offset - len(content)))
        return
    if len(content) < write.offset:
        content.extend(bytes(write.offset - len(content)))
    content[write.offset : write.offset + len(write.data)] = write.data


def _rename(names: dict[str, _File | None], change: _Rename) -> None:
    if change.path:
        names.pop(change.path, None)
    if change.to:
        names[change.to] = change.file
