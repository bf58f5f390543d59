# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg.toml: limits.py, settings and man page together; mistakes with line and key; what a reload changes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.errors import BadInput, LimitExceeded, UsageError
from kvmneg.service import authorization, settings
from kvmneg.service.options import parse as parse_options
from kvmneg.service.settings import AT_START, BOUNDS, FIXED, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.daemon.conftest import Daemon

PAGE = Path(__file__).parents[2] / "man/kvmneg.toml.5.scd"
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


@pytest.mark.usefixtures("as_delivered")
def test_a_setting_that_goes_is_as_delivered_again() -> None:
    delivered = limits.LEASES
    parse(b"admin-group = 'staff'\n[limits]\nLEASES = 3\n", "x").apply()
    assert (limits.LEASES, authorization.admin_group) == (3, "staff")
    parse(b"[limits]\nWAIVERS = 3\n", "x").apply()
    assert (limits.LEASES, limits.WAIVERS, authorization.admin_group) == (delivered, 3, "kvmneg-admin")


def test_what_waits_for_a_restart() -> None:
    old = parse(b"state = '/a'\n[limits]\nLEASES = 3\n", "x")
    new = parse(b"socket = '/b'\nstate = '/a'\n[limits]\nREAD_CHUNK_BYTES = 8192\n", "x")
    assert new.waits(old) == ["socket", "READ_CHUNK_BYTES"]
    assert new.waits(new) == []


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
