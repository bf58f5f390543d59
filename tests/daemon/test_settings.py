# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg.toml: limits.py, settings and man page together; mistakes with line and key; what a reload changes."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits, settled
from kvmneg.errors import BadInput, LimitExceeded, UsageError
from kvmneg.service import authorization, lifecycle, settings, systemd, telling
from kvmneg.service.options import parse as parse_options
from kvmneg.service.settings import AT_START, BOUNDS, FIXED, parse
from kvmneg.service.watching import proofs, vmms

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.daemon.conftest import Daemon

TOP = Path(__file__).parents[2]
PAGE = TOP / "man/kvmneg.toml.5.scd"
NAMES = {name for name in vars(limits) if name.isupper()}
TOLD = {
    match[1]: tuple(map(float, match.groups()[1:]))
    for match in re.finditer(
        r"^\*([A-Z_]+)\* \(([\d.]+); ([\d.]+) to ([\d.]+)\)$", PAGE.read_text("utf-8"), re.MULTILINE
    )
}


@pytest.fixture
def as_delivered() -> Iterator[None]:
    yield
    settings.apply(None)


def test_every_limit_can_be_set_or_has_a_reason() -> None:
    assert set(BOUNDS) | set(FIXED) == NAMES
    assert not set(BOUNDS) & set(FIXED)


def test_the_page_has_every_limit_with_default_and_bounds() -> None:
    assert {name: (float(getattr(limits, name)), *BOUNDS[name]) for name in BOUNDS} == TOLD
    page = PAGE.read_text("utf-8")
    for name in (*FIXED, *AT_START):
        assert page.count(name) >= 1
    for key in settings.KEYS:
        assert f"*{key}* = " in page


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_what_is_delivered_is_within_its_bounds(name: str) -> None:
    low, high = BOUNDS[name]
    assert low < high and low <= getattr(limits, name) <= high


@pytest.mark.parametrize("name", sorted(BOUNDS))
@pytest.mark.usefixtures("as_delivered")
def test_each_limit_takes_its_bounds_and_nothing_beyond(name: str) -> None:
    for value in BOUNDS[name]:
        parse(f"[limits]\n{name} = {value}\n".encode(), "x").apply()
        assert getattr(limits, name) == value
    low, high = BOUNDS[name]
    for value in (low - 1, high + 1, "true", '"7"', "[]", "nan", "inf"):
        with pytest.raises(BadInput, match=rf"x:2: limits\.{name}: must be a (whole )?number from"):
            parse(f"[limits]\n{name} = {value}\n".encode(), "x")
    if isinstance(settings._DEFAULTS[name], int):
        with pytest.raises(BadInput, match="whole number"):
            parse(f"[limits]\n{name} = {low + 0.5}\n".encode(), "x")


@pytest.mark.parametrize(
    ("text", "line", "said", "hint"),
    [
        ("a = 1\nb\n", 2, "not TOML", ""),
        ("socket = 'a", 1, "not TOML", ""),
        ("\n\nsokcet = '/x'\n", 3, "sokcet: there is no such setting", "did you mean socket?"),
        ("state = 3\n", 1, "state: must be an absolute path", ""),
        ("state = 'var'\n", 1, "state: must be an absolute path", ""),
        ("\nadmin-group = ''\n", 2, "admin-group: must be the name of a group", ""),
        ("limits = 3\n", 1, "limits: must be a section", ""),
        ("\n[limit]\n", 2, "limit: there is no such setting", "did you mean limits?"),
        ("[limits]\n# x\nLEASE = 3\n", 3, "limits.LEASE: there is no such setting", "did you mean LEASES?"),
        ("[limits]\nconnections = 30\n", 2, "limits.connections: there is no such setting", "CONNECTIONS?"),
        ("limits.LEASES = 0\n", 1, "limits.LEASES: must be", ""),
        ("[limits]\n'LEASES' = 0\n", 2, "limits.LEASES: must be", ""),
        ("[limits]\nTSC_KHZ = 5\n", 2, "limits.TSC_KHZ: cannot be set: KVM", ""),
        ("zzzz = 1\n", 1, "zzzz: there is no such setting", "kvmneg.toml(5)"),
        ("[limits]\nLEASES = 1\nLEASES = 2\n", 3, "not TOML", ""),
    ],
)
def test_mistakes_have_line_and_key(text: str, line: int, said: str, hint: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse(text.encode(), "kvmneg.toml")
    assert caught.value.fields["line"] == line
    assert caught.value.fields.get("key") == (None if "TOML" in said else said.partition(":")[0])
    assert f"kvmneg.toml:{line}: {said}" in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"# a\n# \xff\n", "x:2: not UTF-8"),
        (b"#" * (settings.FILE_BYTES + 1), "larger"),
        (b"a=" + b"[" * 5000, "TOML"),
    ],
)
def test_what_is_no_text_at_all(data: bytes, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parse(data, "x")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(BadInput, match="is no regular file"):
            settings.load(str(path))


def test_a_group_that_is_not_there_is_refused_but_at_the_start(tmp_path: Path) -> None:
    """A reload that takes a mistyped group would shut all admins out; at the start who knows it may not be up."""
    file = tmp_path / "kvmneg.toml"
    file.write_text("\nadmin-group = 'no such group'\n")
    with pytest.raises(BadInput, match="toml:2: admin-group: there is no group no such group"):
        settings.load(str(file), groups=True)
    found = settings.load(str(file))
    assert found is not None and found.admin_group == "no such group"
    with pytest.raises(BadInput, match="admin-group"):
        parse_options(["--check", "--config", str(file)])


@pytest.mark.usefixtures("as_delivered")
def test_a_setting_that_goes_is_as_delivered_again() -> None:
    delivered = limits.LEASES
    parse(b"admin-group = 'staff'\n[limits]\nLEASES = 3\n", "x").apply()
    assert (limits.LEASES, authorization.admin_group) == (3, "staff")
    parse(b"[limits]\nWAIVERS = 3\n", "x").apply()
    assert (limits.LEASES, limits.WAIVERS, authorization.admin_group) == (delivered, 3, "kvmneg-admin")


def test_what_waits_for_a_restart() -> None:
    old = parse(b"state = '/a'\n[limits]\nLEASES = 3\n", "x")
    new = parse(b"socket = '/b'\nstate = '/a'\n[limits]\nWATCHED_FOLDERS = 7\n", "x")
    assert new.waits(old) == ["socket", "WATCHED_FOLDERS"]
    assert new.waits(new) == []


def test_nothing_that_a_reload_changes_is_kept_at_import() -> None:
    """Defaults of parameters, and names of modules and classes, are made once: a limit in one would stay as it was."""
    kept = set()
    for file in (TOP / "kvmneg").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            once: list[ast.AST] = []
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                once = [one for one in (*node.args.defaults, *node.args.kw_defaults) if one is not None]
            elif isinstance(node, ast.Module | ast.ClassDef):
                once = [one for one in node.body if isinstance(one, ast.Assign | ast.AnnAssign)]
            for one in (inner for outer in once for inner in ast.walk(outer)):
                if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "limits":
                    kept.add((file.relative_to(TOP / "kvmneg").parts[0], one.attr))
    assert {name for room, name in kept if room != "cli" and name in BOUNDS} == set()


def test_a_reload_gives_timers_their_new_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kvmneg.toml"
    file.write_text("[limits]\nWATCH_POLL_SECONDS = 7\n")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(settings, "apply", lambda found: monkeypatch.setattr(limits, "WATCH_POLL_SECONDS", 7))
    timers: list[tuple[float, object]] = []
    callbacks: dict[int, Callable[[], None]] = {}

    def every(seconds: float, callback: object) -> tuple[float, object]:
        timers.append((seconds, callback))
        return timers[-1]

    changed: list[bool] = []
    server: Any = SimpleNamespace(every=every, cancel=timers.remove, watch_fd=callbacks.__setitem__)
    router: Any = SimpleNamespace(bus=None, limits_changed=lambda: changed.append(True))
    node: Any = SimpleNamespace(keep_up=print)
    lifecycle.schedule(server, node, parse_options(["--config", str(file)]), lambda: "", router)
    ((wake, woken),) = callbacks.items()
    assert timers == [(limits.WATCH_POLL_SECONDS, print)] != [(7, print)]
    os.eventfd_write(wake, 1)
    woken()
    os.close(wake)
    assert (timers, changed) == ([(7, print)], [True])


@pytest.mark.usefixtures("as_delivered")
@pytest.mark.parametrize("module", ["proof", "vmm"])
def test_what_the_daemon_starts_has_its_limits(module: str) -> None:
    program = {"proof": proofs._PROGRAM, "vmm": vmms._PROGRAM}[module]
    parse(b"[limits]\nPROOF_SECONDS = 77\nVOLATILE_SECONDS = 0.5\n", "x").apply()
    shown = (
        f"from kvmneg.host import {module} as m; from kvmneg import limits;"
        "m.refresh = lambda *_: print(limits.PROOF_SECONDS, limits.VOLATILE_SECONDS);"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", shown + program, "x"], capture_output=True, text=True, check=True,
        env={**settled.environment(), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "77 0.5\n"


@pytest.mark.parametrize(
    ("room", "given", "told"),
    [
        (None, "", False),  # no manager
        ("", "", False),  # one that does not say: as the unit has it
        ("", "CONNECTIONS = 1025", True),
        ("1153", "CONNECTIONS = 1025", False),
        ("1152", "CONNECTIONS_RESERVED = 129", True),
        ("512", "", True),
        ("512", "LEASES = 512", False),
    ],
)
@pytest.mark.usefixtures("as_delivered")
def test_more_leases_than_the_manager_keeps_are_told(
    monkeypatch: pytest.MonkeyPatch, room: str | None, given: str, told: bool
) -> None:
    if room is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent")
        monkeypatch.setenv("FDSTORE", room)
    parse(f"[limits]\n{given}\n".encode(), "x").apply()
    said: list[str] = []
    monkeypatch.setattr(telling, "trouble", said.append)
    lifecycle.tell_store()
    assert [f"room for {room or 1152} of them" in text for text in said] == [True] * told


def test_the_unit_has_the_room_that_is_assumed() -> None:
    unit = (TOP / "units/kvmneg.service.in").read_text()
    assert f"\nFileDescriptorStoreMax={systemd.STORE_DESCRIPTORS}\n" in unit
    # as delivered there is room for all
    assert systemd.STORE_DESCRIPTORS >= limits.CONNECTIONS + limits.CONNECTIONS_RESERVED


def test_options_come_before_settings(tmp_path: Path) -> None:
    file = tmp_path / "kvmneg.toml"
    file.write_text("socket = '/a/socket'\nstate = '/a/state'\n")
    found = parse_options(["--config", str(file), "--state", "/b"])
    assert (found.socket, found.state) == ("/a/socket", "/b")
    assert found.settings is not None and found.settings.file == str(file)
    with pytest.raises(UsageError, match="there is no file"):
        parse_options(["--config", str(tmp_path / "other")])


def test_without_a_file_nothing_is_imported() -> None:
    program = (
        "import sys; from kvmneg.service import options; options.DEFAULT_CONFIG = '/nonexistent';"
        "options.parse([]); assert 'tomllib' not in sys.modules and 'kvmneg.service.settings' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-P", "-c", program], check=True, env={"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_check(tmp_path: Path) -> None:
    """It says so and serves nothing."""
    file = tmp_path / "kvmneg.toml"
    for text, status, said in (
        ("", 0, ""),
        ("[limits]\nLEASES = 'x'\n", 5, f"{file}:2: limits.LEASES: must be"),
    ):
        file.write_text(text)
        command = [sys.executable, "-P", "-m", "kvmneg.service.daemon", "--check", "--config", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == status
        assert said in done.stderr


def test_reload(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """SIGHUP: a good file is in force, a bad one changes nothing, none is as delivered."""
    file = tmp_path / "kvmneg.toml"
    file.write_text("[limits]\nREASON_CHARACTERS = 16\n")
    recorded = Path(__file__).parents[2] / "kvmneg/data/recorded-host.json"
    daemon = make_daemon("--report", str(recorded), "--config", str(file)).start()

    def reload(text: str | None, said: str) -> None:
        file.unlink() if text is None else file.write_text(text)
        before = len(daemon.errors.read_text())
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        for _ in range(1000):
            if said in daemon.errors.read_text()[before:]:
                return
            with daemon.client() as client:
                client.get_info()
        raise TimeoutError(daemon.errors.read_text())

    def pinned(characters: int) -> bool:
        with daemon.client() as client:
            try:
                client.fence_pin("x" * characters, source="host")
            except LimitExceeded:
                return False
        return True

    assert pinned(16) and not pinned(17)
    reload("[limits]\nREASON_CHARACTERS = 20\n", f"settings of {file} reloaded")
    assert pinned(20) and not pinned(21)
    reload("[limits]\nREASON_CHARACTERS = 0\n", f"{file}:2: limits.REASON_CHARACTERS: must be")
    assert pinned(20) and not pinned(21)
    reload("state = '/elsewhere'\n", "state: changed, and taken at the next start")
    assert pinned(limits.REASON_CHARACTERS)
    reload(None, "settings as delivered")
