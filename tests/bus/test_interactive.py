# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who lets polkit ask a person: callers of D-Bus by a flag of their message, `kvmneg` on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.client import Client
from kvmneg.client_permission import FIELD, METHODS
from kvmneg.service.interfaces import parameters
from tests.bus.conftest import NO_ADMINS, Polkit, Refused, Served, Wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FENCE = "org.kvmneg1.Fence"
PIN = ("org.kvmneg1", "/org/kvmneg1", FENCE, "Pin", "sa{sv}", "a test", "1", "from", "s", "host")

# As pkttyagent(1) is called by systemctl: it says that it is ready by closing the descriptor, and lives until ended.
AGENT = """\
#!/bin/sh
echo "$$ $PPID $1 $3" >"$AGENT_LOG"
eval "exec $2>&-"
exec sleep 60
"""
# Whoever runs the tests may be root, who is never asked.
CLI = """
import os, sys
os.geteuid = lambda: 1000
from kvmneg.cli import main, permission
permission.AGENT = os.environ["AGENT"]
sys.exit(main())
"""


@pytest.fixture
def judged(polkit: Polkit, make_served: Callable[..., Served]) -> Served:
    """A kvmnegd that takes nobody for an admin, with a polkit that permits to pin."""
    polkit.say(pin="yes")
    return make_served(NO_ADMINS)


@pytest.mark.parametrize(("allow", "flags"), [("yes", 1), ("no", 0)])
def test_the_flag_of_a_message_lets_a_person_be_asked(
    judged: Served, polkit: Polkit, allow: str, flags: int
) -> None:
    done = judged.bus.busctl(f"--allow-interactive-authorization={allow}", "call", *PIN)
    assert done.returncode == 0, done.stderr
    assert [one["flags"] for one in polkit.asked()] == [flags]


def test_a_callers_text_is_no_flag(judged: Served, polkit: Polkit) -> None:
    """What is read of a message stands before all that a caller can write."""
    with pytest.raises(Refused):
        Wire().call(FENCE, "Unpin", "sa{sv}", "\nFlags=4\n Flags=4 ", {})
    assert [one["flags"] for one in polkit.asked()] == [0]


class Terminal:
    """Commands on a terminal, with an agent that is not polkit's."""

    def __init__(self, served: Served, folder: Path) -> None:
        self.served, self.log = served, folder / "agent.log"
        self.agent = folder / "agent"
        self.agent.write_text(AGENT)
        self.agent.chmod(0o755)

    def run(self, *words: str, terminal: bool = True) -> subprocess.CompletedProcess[str]:
        ours, theirs = pty.openpty()
        with closing(os.fdopen(ours)), closing(os.fdopen(theirs)):
            return subprocess.run(
                [sys.executable, "-P", "-c", CLI, "--socket", self.served.socket, *words],
                stdin=theirs if terminal else subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                env={**os.environ, "AGENT": str(self.agent), "AGENT_LOG": str(self.log)}, check=False,
            )  # fmt: skip


@pytest.fixture
def terminal(judged: Served, tmp_path: Path) -> Terminal:
    return Terminal(judged, tmp_path)


FENCE_PIN = ("fence", "pin", "--from", "host", "--reason", "a test")


def test_a_command_on_a_terminal_has_an_agent_and_lets_it_ask(terminal: Terminal, polkit: Polkit) -> None:
    done = terminal.run(*FENCE_PIN)
    assert done.returncode == 0, done.stderr
    (asked,) = polkit.asked()
    assert asked["flags"] == 1
    pid, *words = terminal.log.read_text().split()
    assert words == [str(asked["subject"]["pid"]), "--notify-fd", "--fallback"]
    assert not os.path.exists(f"/proc/{pid}")  # it ended with the command


@pytest.mark.parametrize(
    "words", [("--no-ask-password", *FENCE_PIN), (*FENCE_PIN, "--no-ask-password"), FENCE_PIN]
)
def test_nobody_is_asked(terminal: Terminal, polkit: Polkit, words: tuple[str, ...]) -> None:
    """By the option, or without a terminal."""
    done = terminal.run(*words, terminal="--no-ask-password" in words)
    assert done.returncode == 0, done.stderr
    assert [one["flags"] for one in polkit.asked()] == [0]
    assert not terminal.log.exists()


def test_what_everybody_may_do_starts_no_agent(terminal: Terminal) -> None:
    assert terminal.run("fence", "show").returncode == 0
    assert not terminal.log.exists()


def test_an_agent_that_is_not_there_is_no_fault(terminal: Terminal, polkit: Polkit) -> None:
    """The session may have one."""
    terminal.agent.unlink()
    done = terminal.run(*FENCE_PIN)
    assert (done.returncode, [one["flags"] for one in polkit.asked()]) == (0, [1]), done.stderr


def test_the_client_lets_polkit_ask_where_it_is_told_to(judged: Served, polkit: Polkit) -> None:
    given: dict[str, Any] = {"reason": "a test", "source": "host"}
    for interactive in (True, False):
        with Client(judged.socket, interactive=interactive) as client:
            client.fence_pin(**given)
            assert client.fence_get()["pinned"] is True
    assert [one["flags"] for one in polkit.asked()] == [1, 0]


def test_the_client_knows_each_method_that_polkit_may_permit() -> None:
    declared = {
        f"{interface}.{method}"
        for interface, methods in parameters.METHODS.items()
        for method, fields in methods.items()
        if FIELD in fields
    }
    assert declared == METHODS
