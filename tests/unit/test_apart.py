# SPDX-License-Identifier: LGPL-2.1-or-later
"""Asking who may look where the daemon may not: answers, silence and nonsense, and what is made of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.host import apart, guests, network
from kvmneg.host.apart import Apart
from kvmneg.service.leases.unknown import UnknownGuests
from kvmneg.service.varlink.loop import Loop
from kvmneg.store.sqlite import SqliteStore
from kvmneg.store.waivers import Waivers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Reply = Callable[[str], bytes | None]  # None: no end of file, until the test is over


class Answering:
    """A socket unit with Accept=yes: one question a connection. `reply` is what the program behind it writes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.asked: list[str] = []
        self.reply: Reply = lambda question: json.dumps({"question": question}).encode()
        self._held: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            question = connection.recv(64).decode()
            if not question:  # close()
                connection.close()
                return
            self.asked.append(question)
            answer = self.reply(question.removesuffix("\n"))
            self._held.append(connection)
            if answer is not None:
                try:
                    connection.sendall(answer)
                except OSError:
                    pass  # who asked had enough
                self._held.pop().close()

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(self.path)
        self._thread.join()
        for one in (*self._held, self._listener):
            one.close()


@pytest.fixture
def unit(tmp_path: Path) -> Iterator[Answering]:
    one = Answering(str(tmp_path / "measure"))
    yield one
    one.close()


def test_an_answer(unit: Answering) -> None:
    assert Apart(unit.path).ask("guests").wait() == {"question": "guests"}
    assert unit.asked == ["guests\n"]


@pytest.mark.parametrize("answer", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"found": 7}{}'])
def test_what_is_no_answer(unit: Answering, answer: bytes) -> None:
    unit.reply = lambda question: answer
    assert Apart(unit.path).ask("guests").wait() is None
    assert Apart(unit.path).network() == {}


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Apart(str(tmp_path / "measure")).ask("guests")
    assert Apart(str(tmp_path / "measure")).network() == {}
    Apart(str(tmp_path / "measure")).hurry()


def test_apart_seconds(unit: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not answer keeps the daemon for so long at most."""
    monkeypatch.setattr(limits, "APART_SECONDS", 0.05)
    unit.reply = lambda question: None
    assert Apart(unit.path).network() == {}


def test_apart_bytes(unit: Answering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "APART_BYTES", 1000)
    for size, taken in ((900, True), (1100, False)):
        unit.reply = lambda question, size=size: json.dumps({"tap:features": "0x1" + " " * size}).encode()
        assert (Apart(unit.path).ask("network").wait() is not None) == taken


def test_network_words(unit: Answering) -> None:
    """Asked ahead once, the answer is used once."""
    unit.reply = lambda question: b'{"tap:features": "0x7173"}'
    one = Apart(unit.path)
    one.hurry()
    assert [one.network(), one.network()] == [{"tap:features": 0x7173}] * 2
    assert unit.asked == ["network\n"] * 2
    for answer in (b'{"tap:features": 7}', b'{"tap:features": "seven"}', b'{"tap:features": null}'):
        unit.reply = lambda question, answer=answer: answer
        assert one.network() == {}


def process(root: Path, pid: int, link: str = "anon_inode:kvm-vm") -> None:
    """One in a recorded /proc (proc_pid_stat(5)) with one descriptor."""
    folder = root / str(pid)
    (folder / "fd").mkdir(parents=True)
    (folder / "stat").write_text(f"{pid} (qemu) S 1 {'0 ' * 17}1000 0 0\n")
    (folder / "cmdline").write_bytes(b"")
    (folder / "fd/0").symlink_to(link)


def test_the_units_side(tmp_path: Path) -> None:
    process(tmp_path, 11)
    process(tmp_path, 12, "/dev/null")
    answer = json.loads(json.dumps(apart.answer("guests", proc=str(tmp_path))))
    assert apart.holders(answer) == ([(guests.Process(11, 1000, 1, os.getuid(), "qemu"), 1)], 0)
    assert apart.answer("network", dev=str(tmp_path)) == {}
    assert apart.answer("network") == {word: hex(mask) for word, mask in network.masks().items()}
    assert apart.answer("passwords") is None


@pytest.mark.parametrize(
    "answer",
    [
        None,
        {},
        {"found": []},
        {"found": 3, "unreadable": 0},
        {"found": [[1, 2, 3]], "unreadable": 0},
        {"found": [[1, 2, 3, "x", "y", 1]], "unreadable": 0},
        {"found": [[1, 2, 3, 4, "y"]], "unreadable": 0},
        {"found": [], "unreadable": None},
    ],
)
def test_what_names_no_holders(answer: dict[str, object] | None) -> None:
    assert apart.holders(answer) is None


@pytest.mark.parametrize(("question", "status", "said"), [("network\n", 0, "{"), ("x\n", 2, "")])
def test_the_program(question: str, status: int, said: str) -> None:
    """As the unit runs it: a question on standard input, the answer on standard output."""
    command = [sys.executable, "-P", "-c", "import sys; from kvmneg.host.apart import main; sys.exit(main())"]
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:1]) == (status, said)
    assert ("is no question" in done.stderr) == bool(status)


class Quiet:
    """The kernel's events, of which none comes."""

    def __init__(self) -> None:
        self.pair = socket.socketpair()
        self.coming: list[guests.Event] = []

    def fileno(self) -> int:
        return self.pair[0].fileno()

    def read(self) -> tuple[list[guests.Event], bool]:
        coming, self.coming = self.coming, []
        return coming, False

    def waits(self) -> bool:
        return bool(self.coming)

    def close(self) -> None:
        for one in self.pair:
            one.close()


class Hidden:
    """A /proc in which the daemon may look into no process, and the unit that may."""

    def __init__(self, unit: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = tmp_path / "proc"
        self.root.mkdir()
        self.events = Quiet()
        unit.reply = lambda question: json.dumps(self.seen()).encode()

        def forbidden(pid: int, proc: str = "/proc") -> bool:
            raise PermissionError

        monkeypatch.setattr(guests, "has_vm", forbidden)

    def seen(self) -> dict[str, object]:
        return apart.answer("guests", proc=str(self.root)) or {}

    def end(self, pid: int) -> None:
        """Its VM, not the process."""
        (self.root / str(pid) / "fd/0").unlink()


@pytest.fixture
def hidden(unit: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hidden]:
    monkeypatch.setattr(limits, "VOLATILE_SECONDS", 0.0)
    one = Hidden(unit, tmp_path, monkeypatch)
    yield one
    one.events.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    one = Loop()
    yield one
    one.epoll.close()


@pytest.fixture
def unknown(hidden: Hidden, unit: Answering, loop: Loop, tmp_path: Path) -> Iterator[UnknownGuests]:
    with SqliteStore(str(tmp_path / "state")) as store:
        found = UnknownGuests(
            Waivers(store._database, "boot-1"),
            proc=str(hidden.root),
            events=lambda: hidden.events,  # type: ignore[arg-type, return-value]
            apart=Apart(unit.path),
        )
        yield found
        found.stop()


def pids(found: UnknownGuests) -> list[int]:
    return [one.process.pid for one in found.all()]


def test_a_guest_that_only_the_unit_sees_comes_and_goes(
    hidden: Hidden, unknown: UnknownGuests, loop: Loop
) -> None:
    unknown.start(loop)
    process(hidden.root, 11)
    assert pids(unknown) == [11] and unknown.missed() == ""
    hidden.end(11)
    assert pids(unknown) == []


def test_one_whose_event_came_after_the_answer_is_not_forgotten(
    hidden: Hidden, unknown: UnknownGuests, unit: Answering, loop: Loop
) -> None:
    """It was asked before that VM was made: what does not name it says nothing of it."""
    unknown.start(loop)
    old = hidden.seen()
    process(hidden.root, 11)
    unit.reply = lambda question: json.dumps(old).encode()
    unknown._ask()
    hidden.events.coming.append(guests.Event("create", 11, 1))
    assert pids(unknown) == [11]


def test_in_the_loop_nobody_waits_for_the_answer(hidden: Hidden, unknown: UnknownGuests, loop: Loop) -> None:
    process(hidden.root, 11)
    told: list[int] = []
    unknown.on_found = lambda process: told.append(process.pid)
    unknown.start(loop)
    for _ in range(1000):
        loop._run_timers()
        loop._call_back([fd for fd, _ in loop.epoll.poll(0.02)])
        if told:
            break
    assert told == [11]


def test_asked_once_a_second_while_events_tell_the_rest(
    hidden: Hidden, unknown: UnknownGuests, unit: Answering, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks again and again costs the daemon a tenth of its time at most."""
    monkeypatch.setattr(limits, "VOLATILE_SECONDS", 3600.0)
    unknown.start(loop)
    process(hidden.root, 11)
    for _ in range(20):
        assert pids(unknown) == [11]
    assert len(unit.asked) == 1


def test_where_no_answer_comes_the_daemon_looks_itself(
    hidden: Hidden, unknown: UnknownGuests, unit: Answering, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it may not read is told."""
    unit.reply = lambda question: b"{}"
    process(hidden.root, 11)
    process(hidden.root, 12)
    scandir = os.scandir

    def partly(path: str) -> object:
        if path == f"{hidden.root}/12/fd":
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(os, "scandir", partly)
    unknown.start(loop)
    unknown.all()
    assert unknown._found.keys() == {11}
    assert "among 1 processes" in unknown.missed()
