# SPDX-License-Identifier: LGPL-2.1-or-later
"""An initramfs in the "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst), by hand.

Archives can be joined end to end: the kernel unpacks one after the other.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

FOLDER, PROGRAM, DATA, LINK = 0o040755, 0o100755, 0o100644, 0o120777


class Member(NamedTuple):
    """One file: its path below /, its mode with the type, its content (a link's target)."""

    path: str
    mode: int
    content: bytes = b""


def archive(members: Iterable[Member]) -> bytes:
    """The whole archive; the folders on the way to each member come first."""
    parts: list[bytes] = []
    known: set[str] = {"", "."}
    for inode, member in enumerate(_with_folders(members, known), 1):
        parts += _entry(inode, member)
    parts += _entry(0, Member("TRAILER!!!", 0))
    return b"".join(parts)


def _with_folders(members: Iterable[Member], known: set[str]) -> Iterable[Member]:
    for member in members:
        above = [str(path) for path in reversed(Path(member.path).parents)]
        for path in (path for path in above if path not in known):
            known.add(path)
            yield Member(path, FOLDER)
        if not stat.S_ISDIR(member.mode) or member.path not in known:
            known.add(member.path)
            yield member


def _entry(inode: int, member: Member) -> list[bytes]:
    name = member.path.encode() + b"\0"
    fields = (inode, member.mode, 0, 0, 1, 0, len(member.content), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
    return [head, bytes(-len(head) % 4), member.content, bytes(-len(member.content) % 4)]


def tree(root: Path, *, below: str = "") -> list[Member]:
    """Every file of a folder, links as they are, owner root."""
    members = []
    for path in sorted(root.rglob("*")):
        name = f"{below}{path.relative_to(root)}"
        if path.is_symlink():
            members.append(Member(name, LINK, str(path.readlink()).encode()))
        elif path.is_dir():
            members.append(Member(name, FOLDER))
        elif path.is_file():
            members.append(Member(name, PROGRAM if path.stat().st_mode & 0o100 else DATA, path.read_bytes()))
    return members


def join(target: BinaryIO, archives: Iterable[bytes]) -> None:
    """Write archives one after the other, each starting at a multiple of four bytes."""
    for data in archives:
        target.write(data)
        target.write(bytes(-len(data) % 4))
