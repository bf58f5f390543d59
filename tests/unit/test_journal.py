# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon tells: the module, the journal's catalogue, the page and the places that call it agree."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.service import journal
from kvmneg.service.journal import EVENTS
from tests.namespaces import unshare

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[2]
CATALOG = TOP / "units/kvmneg.catalog"
PAGE = TOP / "man/kvmnegd.8.scd"
HOSTILE = "x\nkvmnegd: everything is well\x1b[2J\u2028\udcff"


def entries() -> dict[str, tuple[str, str]]:
    """MESSAGE_ID → its subject and text."""
    found = {}
    for part in re.split(r"^-- ", CATALOG.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        head, _, text = part.partition("\n\n")
        number, *lines = head.split("\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert set(headers) == {"Subject", "Defined-By", "Documentation"}
        assert number not in found
        found[number] = headers["Subject"], re.sub(r"^# .*", "", text, flags=re.MULTILINE).strip()
    return found


@pytest.fixture(autouse=True)
def told_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No journal, whatever this machine has, and no message counted."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr(journal, "_told", {})
    yield


# -- the catalogue


def test_each_event_has_an_id_of_its_own() -> None:
    numbers = [number for number, *_ in EVENTS.values()]
    assert len(set(numbers)) == len(numbers)
    assert all(re.fullmatch(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", number) for number in numbers)


def test_the_catalogue_has_a_text_for_each_event_and_no_other() -> None:
    found = entries()
    assert set(found) == {number for number, *_ in EVENTS.values()}
    for subject, text in found.values():
        assert 10 < len(subject) < 70
        assert len(text.split()) > 10, subject


@pytest.mark.parametrize("name", EVENTS)
def test_a_text_names_only_fields_that_its_message_has(name: str) -> None:
    number, _, fields, _ = EVENTS[name]
    named = set(re.findall(r"@([A-Z_]+)@", "".join(entries()[number])))
    assert named <= {f"KVMNEG_{field}" for field in fields}


@pytest.mark.parametrize("name", EVENTS)
def test_the_page_has_each_event_with_its_id_and_fields(name: str) -> None:
    number, _, fields, _ = EVENTS[name]
    found = re.search(rf"^\*{name}\* \({number}\)\n\t(.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert found, f"kvmnegd(8) has no {name} with its id"
    told = re.findall(r"_KVMNEG\\_([A-Z\\_]+?)_(?=[,.])", found[1])
    assert tuple(field.replace("\\", "") for field in told) == fields


def test_the_page_has_no_other_event() -> None:
    assert set(re.findall(r"^\*([a-z-]+)\* \([0-9a-f]{32}\)$", PAGE.read_text("utf-8"), re.MULTILINE)) == set(
        EVENTS
    )


def test_the_page_tells_the_limits() -> None:
    wanted = f"told {limits.EVENT_BURST_PER_UID} times in {limits.EVENT_SECONDS:.0f} seconds"
    assert wanted in " ".join(PAGE.read_text("utf-8").split())


def test_what_calls_names_events_and_fields_that_there_are() -> None:
    told = set()
    for file in (TOP / "kvmneg").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "journal.event"):
                continue
            names = {one.value for one in ast.walk(node.args[0]) if isinstance(one, ast.Constant)}
            for name in names & set(EVENTS):
                fields = {word.arg.upper() for word in node.keywords if word.arg}
                told.add(name)
                assert fields <= set(EVENTS[name][2]), f"{file}:{node.lineno}"
            assert names & set(EVENTS) or ast.unparse(node.args[0]) == "name", f"{file}:{node.lineno}"
    moved = {
        "fence-pinned",
        "fence-unpinned",
        "fence-proposed",
        "fence-raised",
        "fence-lowered",
        "fence-settled",
    }
    by_name = {*moved, "fence-aborted"}  # told by one function for all: kvmneg.service.telling.moved
    assert told == set(EVENTS) - by_name


def test_journalctl_takes_the_catalogue(tmp_path: Path) -> None:
    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    shutil.copy(CATALOG, folder)
    run = ["journalctl", f"--root={tmp_path}"]
    made = subprocess.run([*run, "--update-catalog"], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    listed = subprocess.run([*run, "--list-catalog"], capture_output=True, text=True, check=True).stdout
    assert dict(line.split(" kvmneg: ") for line in listed.splitlines()) == {
        number: subject for number, (subject, _) in entries().items()
    }


# -- stderr


def test_without_a_journal_it_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    journal.event("breached", "host a lacks avx2", "  lower the fence", host="a")
    assert capsys.readouterr().err == "kvmnegd: host a lacks avx2\n  lower the fence\n"


def test_nobodys_words_begin_a_line_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    journal.event("unknown-guest", f"process 1 ({HOSTILE})")
    assert capsys.readouterr().err == (
        "kvmnegd: process 1 (x\\x0akvmnegd: everything is well\\x1b[2J\\x2028\\udcff)\n"
    )


def test_a_line_has_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    journal.event("trouble", "x" * (limits.EVENT_LINE_CHARACTERS + 1))
    assert capsys.readouterr().err == f"kvmnegd: {'x' * limits.EVENT_LINE_CHARACTERS}\n"


def test_what_clients_bring_about_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(journal, "_clock", lambda: now)
    for _ in range(limits.EVENT_BURST_PER_UID + 7):
        journal.event("peer-refused", "no", uid=1000)
    assert capsys.readouterr().err == "kvmnegd: no\n" * limits.EVENT_BURST_PER_UID
    journal.event("unknown-guest", "another kind", process_uid=1000)
    assert capsys.readouterr().err == "kvmnegd: another kind\n"
    now += limits.EVENT_SECONDS
    journal.event("peer-refused", "no", uid=1000)
    assert capsys.readouterr().err == "kvmnegd: no\nkvmnegd: 7 more of this kind were not told\n"
    journal.event("peer-refused", "no", uid=1000)
    assert capsys.readouterr().err == "kvmnegd: no\n"


@pytest.mark.parametrize(("kind", "field"), [("peer-refused", "uid"), ("unknown-guest", "process_uid")])
def test_one_user_cannot_hide_what_another_does(
    capsys: pytest.CaptureFixture[str], kind: str, field: str
) -> None:
    """Nor do many fill the journal."""
    for _ in range(limits.EVENT_BURST_PER_UID * 2):
        journal.event(kind, "a cloud of them", **{field: 1000})
    capsys.readouterr()
    journal.event(kind, "an attack", **{field: 1001})
    assert "an attack" in capsys.readouterr().err
    for uid in range(2000, 2000 + limits.EVENT_BURST * 2):
        journal.event(kind, "one of many", **{field: uid})
    assert capsys.readouterr().err.count("one of many") == limits.EVENT_BURST - limits.EVENT_BURST_PER_UID - 1


def test_what_an_administrator_does_is_always_told(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(limits.EVENT_BURST * 2):
        journal.event("fence-pinned", "pinned")
    assert capsys.readouterr().err.count("\n") == limits.EVENT_BURST * 2


class Broken:
    """A stderr whose other end is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_stderr_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    broken = Broken()
    monkeypatch.setattr(sys, "stderr", broken)
    monkeypatch.setattr(journal, "_prefixed", lambda line: tried.append(line) or line)
    journal.event("trouble", "nobody reads this")
    assert tried == ["nobody reads this"]


# -- the journal


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The messages of a daemon whose stderr is the journal's stream."""
    found: list[dict[str, str]] = []
    monkeypatch.setattr(journal, "SOCKET", str(tmp_path))
    monkeypatch.setattr(journal, "stderr_is_journal", lambda: True)
    monkeypatch.setattr(journal, "_send", lambda fields: found.append(fields) or True)
    return found


def test_a_message_has_its_id_and_the_chosen_fields(
    sent: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    journal.event("breached", "a lacks avx2", host="a", features=["avx2", "bmi1"], count=2, generation=None)
    assert sent == [
        {
            "MESSAGE": "a lacks avx2",
            "MESSAGE_ID": EVENTS["breached"][0],
            "PRIORITY": "3",
            "SYSLOG_IDENTIFIER": "kvmnegd",
            "KVMNEG_EVENT": "breached",
            "KVMNEG_HOST": "a",
            "KVMNEG_FEATURES": "avx2 bmi1",
            "KVMNEG_COUNT": "2",
        }
    ]
    assert capsys.readouterr().err == ""


def test_what_is_not_chosen_is_not_sent(sent: list[dict[str, str]]) -> None:
    journal.event("store-recovered", "well", reason="x", uid=0)
    assert not [field for field in sent[0] if field in ("KVMNEG_REASON", "KVMNEG_UID")]


def test_a_field_has_its_limit(sent: list[dict[str, str]]) -> None:
    journal.event("breached", "x", features=["x" * 10] * limits.EVENT_FIELD_CHARACTERS)
    assert len(sent[0]["KVMNEG_FEATURES"]) == limits.EVENT_FIELD_CHARACTERS


def test_a_journal_that_refuses_leaves_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*lines: str) -> None:
        raise PermissionError(1, "refused")

    monkeypatch.setattr(journal, "_has_journal", lambda: True)
    monkeypatch.setattr("systemd.journal.sendv", refuse)
    journal.event("healed", "well again")
    assert capsys.readouterr().err == "kvmnegd: well again\n"


_IN_NAMESPACE = """
import os, socket, sys
from kvmneg.service import journal
os.makedirs("/run/systemd/journal")
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind(journal.SOCKET)
assert "systemd.journal" not in sys.modules
found = os.fstat(2)
stream = f"{found.st_dev}:{found.st_ino}"
for environment, told in (({"JOURNAL_STREAM": stream}, "stream"), ({"NOTIFY_SOCKET": "/none"}, "both"), ({}, "hand")):
    for name in ("JOURNAL_STREAM", "NOTIFY_SOCKET"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    journal.event("healed", told, host="h\\udcff")
receiver.setblocking(False)
for _ in range(2):
    sys.stdout.buffer.write(receiver.recv(65536))
try:
    receiver.recv(65536)
except BlockingIOError:
    print("none by hand")
"""


def test_libsystemd_sends_it(tmp_path: Path) -> None:
    """Over a socket in the journal's place, in a mount namespace: whatever runs here, it is not told."""
    if os.geteuid():
        pytest.skip("needs root: a mount namespace")
    program = [sys.executable, "-P", "-c", _IN_NAMESPACE]
    command = [*unshare("--mount"), "sh", "-ec", 'mount -t tmpfs none /run; exec "$@"', "sh", *program]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stderr == b"kvmnegd: both\nkvmnegd: hand\n"
    *fields, last = done.stdout.split(b"\n")[:-1]
    assert last == b"none by hand"
    common = {b"MESSAGE_ID=" + EVENTS["healed"][0].encode(), b"PRIORITY=5", b"SYSLOG_IDENTIFIER=kvmnegd"}
    own = {b"KVMNEG_EVENT=healed", b"KVMNEG_HOST=h\\udcff"}
    assert set(fields) == common | own | {b"MESSAGE=stream", b"MESSAGE=both"}
    assert len(fields) == 12
