# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which builds of VMMs this host has: part of the combo, as a VMM decides too what its guests get.

Asking a binary for its version starts it, and digesting it reads it whole, so neither is ever waited for:
`known` answers at once from a cache in the state directory, by path, device, inode, size and time of
change; `refresh` does the work, in a child or a thread of the daemon's. `stamps` costs some 20 µs and tells
whether it is worth asking again.
"""

from __future__ import annotations

import json
import os
import stat

from kvmneg import limits
from kvmneg.errors import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

FORMAT = "kvmneg.vmm-builds/1"
FOLDERS = ("/usr/local/bin", "/usr/bin", "/usr/sbin", "/usr/local/sbin", "/usr/libexec", "/usr/lib/qemu")

_EMULATOR = {"x86_64": "qemu-system-x86_64", "aarch64": "qemu-system-aarch64"}
# binary → (name in the combo, arguments that print its version)
_KNOWN = {
    _EMULATOR.get(os.uname().machine, "qemu-system"): ("qemu", ("--version",)),
    "qemu-kvm": ("qemu", ("--version",)),  # RHEL's, in /usr/libexec
    "firecracker": ("firecracker", ("--version",)),
    "cloud-hypervisor": ("cloud-hypervisor", ("--version",)),
    "crosvm": ("crosvm", ("version",)),
    "libvirtd": ("libvirt", ("--version",)),
    "virtqemud": ("libvirt", ("--version",)),
}
NAMES = frozenset(_KNOWN)
_VERSION_SECONDS = 5.0
_VERSION_BYTES = 64 * 1024
_CACHE_BYTES = 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
_STAMP = ("device", "inode", "size", "mtime_ns")


def known(cache: str, folders: Sequence[str] = FOLDERS) -> list[dict[str, str]]:
    """The builds whose version is known, as the combo has them: {"name", "path", "version", "build"}.

    Never starts a binary. One that was replaced since is left out until `refresh` has looked at it.
    """
    remembered = _load(cache)
    found = []
    for path in _binaries(folders):
        entry = remembered.get(path)
        if entry is not None and _same(entry, path):
            found.append({key: entry[key] for key in ("name", "path", "version", "build")})
    return found


def refresh(cache: str, folders: Sequence[str] = FOLDERS) -> list[dict[str, str]]:
    """Look up the builds that are new or were replaced, write the cache, return `known`.

    Takes up to limits.VMM_BUILDS times 5 seconds in the worst case. Raises StoreError where the cache
    cannot be written.
    """
    remembered = _load(cache)
    entries = {}
    for path in _binaries(folders):
        entry = remembered.get(path)
        if entry is None or not _same(entry, path):
            entry = _look_up(path)
        if entry is not None:
            entries[path] = entry
    if entries != remembered:
        _save(cache, entries)
    return known(cache, folders)


def settled(cache: str, folders: Sequence[str] = FOLDERS) -> bool:
    """Whether `refresh` has looked at every build as it is now."""
    remembered = _load(cache)
    return all(path in remembered and _same(remembered[path], path) for path in _binaries(folders))


def stamps(cache: str, builds: Sequence[Mapping[str, str]] = (), folders: Sequence[str] = FOLDERS) -> object:
    """Something that compares unequal after a build was installed, replaced, removed, or looked up.

    A package manager renames a new file into its folder, which shows in the folder; `builds`, as `known` gave
    them, are looked at themselves too, for what is written in place or lies behind a link.
    """
    return (
        _stamp_or_none(cache),
        [_stamp_or_none(folder) for folder in searched(folders)],
        [_stamp_or_none(build["path"]) for build in builds],
    )


def searched(folders: Sequence[str] = FOLDERS) -> Iterable[str]:
    """The folders of PATH and `folders`, each once."""
    # a relative folder in PATH would be the caller's, whoever that is
    on_path = [folder for folder in os.environ.get("PATH", "").split(":") if folder.startswith("/")]
    return dict.fromkeys((*on_path, *folders))


def _binaries(folders: Sequence[str]) -> Iterator[str]:
    """Real paths of the VMMs in PATH and `folders`, each once, at most limits.VMM_BUILDS."""
    seen: set[str] = set()
    for folder in searched(folders):
        for name in _KNOWN:
            path = os.path.realpath(f"{folder}/{name}")
            if path not in seen and os.path.basename(path) in _KNOWN and _may_start(path):
                seen.add(path)
                yield path
                if len(seen) >= limits.VMM_BUILDS:
                    return


def _may_start(path: str) -> bool:
    """An executable file of root's or our own that nobody else may write, as we are going to start it."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid in (0, os.geteuid())
        and not found.st_mode & 0o022
        and os.access(path, os.X_OK)
    )


def _stamp(path: str) -> dict[str, int]:
    found = os.stat(path)
    return dict(zip(_STAMP, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns), strict=True))


def _stamp_or_none(path: str) -> dict[str, int] | None:
    try:
        return _stamp(path)
    except OSError:
        return None


def _same(entry: dict[str, Any], path: str) -> bool:
    try:
        return _stamp(path) == {key: entry[key] for key in _STAMP}
    except OSError:
        return False


def _look_up(path: str) -> dict[str, Any] | None:
    """Version and digest of a binary. None where it was replaced meanwhile: the next time then."""
    name, arguments = _KNOWN[os.path.basename(path)]
    try:
        before = _stamp(path)
        build = _digest(path)
        version = _version_in(_output([path, *arguments]))
        if _stamp(path) != before:
            return None
    except OSError:
        return None
    return {"name": name, "path": path, "version": version, "build": build, **before}


def _digest(path: str) -> str:
    from hashlib import sha256  # 4 ms at import, and the fastest for files

    digest = sha256()
    with open(path, "rb") as file:
        while data := file.read(_CHUNK_BYTES):
            digest.update(data)
    return "sha256:" + digest.hexdigest()


def _output(command: list[str]) -> str:
    """What a command prints on its standard output, cut at _VERSION_BYTES; "" when it does not end in time.

    It gets no input, an environment of its own, and a process group, which is ended as a whole.
    """
    import selectors
    import signal
    import subprocess  # 8 ms at import, and only the background needs it
    import time

    deadline = time.monotonic() + _VERSION_SECONDS
    data = b""
    with (
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
            cwd="/",
            start_new_session=True,
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None  # stdout=PIPE
        selector.register(process.stdout, selectors.EVENT_READ)
        try:
            while len(data) < _VERSION_BYTES and selector.select(max(0.0, deadline - time.monotonic())):
                chunk = os.read(process.stdout.fileno(), _VERSION_BYTES)
                if not chunk:
                    return data[:_VERSION_BYTES].decode("utf-8", "replace")
                data += chunk
        finally:
            # also what it may have left behind; the group lives as long as the leader is not reaped
            os.killpg(process.pid, signal.SIGKILL)
    return data[:_VERSION_BYTES].decode("utf-8", "replace") if len(data) >= _VERSION_BYTES else ""


def _version_in(text: str) -> str:
    """The first number with a dot in a text like "QEMU emulator version 7.2.22 (Debian …)", else ""."""
    for token in text.split():
        number = token.lstrip("v")
        if number[:1].isdigit() and "." in number:
            return number.rstrip(",;()")
    return ""


def _load(cache: str) -> dict[str, dict[str, Any]]:
    """The cache's entries by path; none where it is missing or not ours: it can always be made again."""
    try:
        with open(cache, "rb") as file:
            document = json.loads(file.read(_CACHE_BYTES))
        entries = document["builds"] if document["format"] == FORMAT else {}
        return {path: entry for path, entry in entries.items() if _well_formed(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _well_formed(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), str) for key in ("name", "path", "version", "build"))
        and all(isinstance(entry.get(key), int) for key in _STAMP)
    )


def _save(cache: str, entries: dict[str, dict[str, Any]]) -> None:
    """Replace the cache as a whole: a reader sees the old or the new one."""
    data = json.dumps({"format": FORMAT, "builds": entries}, sort_keys=True, indent=1).encode() + b"\n"
    temporary = f"{cache}.{os.getpid()}.new"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(temporary, cache)
    except OSError as error:
        raise StoreError(f"{cache} cannot be written: {error.strerror}") from None
