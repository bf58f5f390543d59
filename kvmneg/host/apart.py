# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon may not look at itself, asked of a unit that may (units/kvmneg-measure@.service); and its side.

One question a connection: a word and a line feed; the answer is one JSON object, then the end.

    network    {"tap:features": "0x…", "vhost-net:features": "0x…"}, as kvmneg.host.network.masks()
    guests     {"found": [[pid, started, parent, uid, name, VMs], …], "unreadable": n}, as kvmneg.host.guests.Look

Without systemd there is no such unit, and the daemon looks itself.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time

from kvmneg import limits
from kvmneg.host.guests import Look, Process, vms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_QUESTION_BYTES = 64


class Question:
    """One question that was asked; `answer` is None until it came whole, and where none came."""

    def __init__(self, path: str, question: str) -> None:
        """Raises OSError where nobody can be asked."""
        self.answer: dict[str, Any] | None = None
        self._parts: list[bytes] = []
        self._end = time.monotonic() + limits.APART_SECONDS
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.setblocking(False)
            self._socket.connect(path)
            self._socket.send(f"{question}\n".encode())
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """To be watched until `take` is true."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def take(self) -> bool:
        """Take what has come; true when nothing more will, and `answer` is what it is."""
        try:
            while data := self._socket.recv(limits.READ_CHUNK_BYTES):
                self._parts.append(data)
                if sum(map(len, self._parts)) > limits.APART_BYTES:
                    return True
        except BlockingIOError:
            return False
        except OSError:
            return True
        try:
            found = json.loads(b"".join(self._parts))
        except (ValueError, RecursionError):
            return True
        self.answer = found if isinstance(found, dict) else None
        return True

    def wait(self) -> dict[str, Any] | None:
        """Wait for the answer, up to APART_SECONDS from when it was asked, and close."""
        try:
            while not self.take():
                left = self._end - time.monotonic()
                if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                    break
        finally:
            self.close()
        return self.answer


class Apart:
    """Asks at one socket. Whoever answers is as trusted as the daemon: the socket's folder is root's."""

    __slots__ = ("_early", "_path")

    def __init__(self, path: str) -> None:
        self._path = path
        self._early: Question | None = None

    def ask(self, question: str) -> Question:
        """Raises OSError where nobody can be asked."""
        return Question(self._path, question)

    def hurry(self) -> None:
        """Ask now what `network` is asked next: the answer is made while this process does something else."""
        try:
            self._early = self.ask("network")
        except OSError:
            pass  # network() will say so

    def network(self) -> dict[str, int]:
        """kvmneg.host.network.masks(), there; nothing where no answer comes."""
        asked, self._early = self._early, None
        try:
            answer = (asked or self.ask("network")).wait() or {}
            return {str(word): int(mask, 16) for word, mask in answer.items()}
        except (OSError, TypeError, ValueError):
            return {}


def holders(answer: dict[str, Any] | None) -> tuple[list[tuple[Process, int]], int] | None:
    """The answer to "guests": those with a VM and how many each, and how many could not be looked into; or None."""
    try:
        found = [
            (Process(int(pid), int(started), int(parent), int(uid), str(name)), int(count))
            for pid, started, parent, uid, name, count in (answer or {})["found"]
        ]
        return found, int((answer or {})["unreadable"])
    except (KeyError, TypeError, ValueError):
        return None


def answer(question: str, *, dev: str = "/dev", proc: str = "/proc") -> dict[str, Any] | None:
    """The answer to one question; None where it is none of ours."""
    if question == "network":
        from kvmneg.host import network

        return {word: hex(mask) for word, mask in network.masks(dev).items()}
    if question == "guests":
        look = Look(proc)
        look.step()
        found = look.found[: limits.UNKNOWN_GUESTS]
        return {"found": [(*one, vms(one.pid, proc)) for one in found], "unreadable": look.unreadable}
    return None


def main() -> int:
    """The unit's side: a question on standard input, its answer on standard output."""
    question = os.read(0, _QUESTION_BYTES).decode("ascii", "replace")
    found = answer(question.removesuffix("\n"))
    if found is None:
        sys.stderr.write(f"kvmneg-measure: {question!r} is no question\n")
        return 2
    sys.stdout.write(json.dumps(found))
    return 0
