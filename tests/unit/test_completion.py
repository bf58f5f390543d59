# SPDX-License-Identifier: LGPL-2.1-or-later
"""Completion as people have it: bash and zsh at a terminal, keys pressed, and the line looked at."""

from __future__ import annotations

import argparse
import importlib.util
import os
import pty
import re
import runpy
import select
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from kvmneg.cli import COMMANDS, arguments
from kvmneg.features import catalog
from kvmneg.policy import definitions
from kvmneg.service import options

if TYPE_CHECKING:
    from collections.abc import Iterator
from pathlib import Path

TOP = Path(__file__).parents[2]
GENERATE = TOP / "completion/generate.py"
PROGRAMS = ("kvmneg", "kvmnegd")
SHELLS = ("bash", "zsh")
# How long a shell may take to answer a key. This is no measurement: a shell that has no answer never gives one.
PATIENCE = 30
ALL = "\x18a"  # ^Xa: put in all that is possible
SHOW = "\x18s"  # ^Xs: show the line

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("shtab"), reason="shtab is not installed")

# What a shell does on these keys, and where it finds completions; that is how they are installed, below SHARE.
START = {
    "bash": """
        source /usr/share/bash-completion/bash_completion
        bind '"\\C-xa": insert-completions'
        show() { printf '\\n<%s>\\n' "$READLINE_LINE"; READLINE_LINE=; READLINE_POINT=0; }
        bind -x '"\\C-xs": show'
        """,
    "zsh": """
        fpath=($SHARE/zsh/site-functions $fpath)
        autoload -Uz compinit && compinit -D -u
        zle -C all complete-word _generic
        bindkey '^Xa' all
        zstyle ':completion:all::::' completer _all_matches _complete
        zstyle ':completion:all:*' insert true
        show() { print; print -r -- "<$BUFFER>"; BUFFER=; zle reset-prompt }
        zle -N show
        bindkey '^Xs' show
        """,
}
COMMAND = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}


def names_of_catalogues() -> list[str]:
    return [str(Path(catalog.__file__).with_name(f"_{one}_names.py")) for one in catalog.available()]


def generated(shell: str, program: str) -> str:
    command = [sys.executable, "-P", GENERATE, shell, program, *names_of_catalogues()]
    return subprocess.run(command, capture_output=True, check=True, text=True, encoding="utf-8").stdout


class Shell:
    """An interactive shell of its own terminal, in a folder of its own."""

    def __init__(self, name: str, share: Path, folder: Path) -> None:
        environment = {"PATH": os.environ["PATH"], "TERM": "dumb", "HOME": str(folder), "LC_ALL": "C.UTF-8"}
        environment |= {"SHARE": str(share), "XDG_DATA_DIRS": str(share), "XDG_DATA_HOME": str(folder)}
        self.terminal, inside = pty.openpty()
        self.process = subprocess.Popen(
            COMMAND[name],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            cwd=folder,
            env=environment,
            process_group=0,
        )
        os.close(inside)
        start = folder.parent / f"start-{name}"
        start.write_text(START[name])
        self.type(f"source {start}; PS1=; echo 'rea''dy'\n")
        self.until(r"\nready\r")

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def until(self, pattern: str) -> re.Match[str]:
        text, end = "", time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if select.select([self.terminal], [], [], 1)[0]:
                text += os.read(self.terminal, 65536).decode("utf-8", "replace")
            if found := re.search(pattern, text):
                return found
        raise AssertionError(f"{pattern} does not come: {text!r}")

    def line(self, typed: str, key: str) -> str:
        """What the line has become with this key."""
        self.type(typed + key + SHOW)
        return self.until(r"\n<(.*)>\r")[1]

    def all(self, typed: str) -> list[str]:
        """All that may follow in the place of the last word, as the shell puts it in."""
        before = typed.rpartition(" ")[0]
        line = self.line(typed, ALL)
        assert line.startswith(before)
        return [word.replace("\\:", ":").rstrip(",=") for word in line.removeprefix(before).split()]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where completions are installed, with these and no other."""
    folder = tmp_path_factory.mktemp("share")
    (folder / "bash-completion/completions").mkdir(parents=True)
    (folder / "zsh/site-functions").mkdir(parents=True)
    for program in PROGRAMS:
        (folder / "bash-completion/completions" / program).write_text(generated("bash", program), "utf-8")
        (folder / "zsh/site-functions" / f"_{program}").write_text(generated("zsh", program), "utf-8")
    return folder


@pytest.fixture(scope="module", params=SHELLS)
def shell(
    request: pytest.FixtureRequest, share: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shell]:
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    folder = tmp_path_factory.mktemp("home") / "here"
    folder.mkdir()
    (folder / "node1.json").touch()
    (folder / "node2.json").touch()
    (folder / "states").mkdir()
    one = Shell(request.param, share, folder)
    yield one
    one.close()


def below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    return sorted(text for action in parser._actions for text in action.option_strings)


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command and verb, as it is typed, with the parser that the program itself has for it."""
    for command in COMMANDS:
        parser = arguments.parser_of(command)
        yield f"kvmneg {command}", parser
        yield from ((f"kvmneg {command} {verb}", one) for verb, one in below(parser).items())


def test_the_commands(shell: Shell) -> None:
    assert sorted(shell.all("kvmneg ")) == sorted(COMMANDS)


def test_the_verbs_of_the_fence(shell: Shell) -> None:
    assert sorted(shell.all("kvmneg fence ")) == sorted(below(arguments.parser_of("fence")))


def test_options_before_a_command(shell: Shell) -> None:
    assert sorted(shell.all("kvmneg --s")) == ["--socket"]
    assert sorted(shell.all("kvmneg --json --socket /run/x fence r")) == ["raise", "restore"]


def test_every_option_of_every_command_and_no_other(shell: Shell) -> None:
    for typed, parser in parsers():
        assert sorted(shell.all(f"{typed} --")) == [
            text for text in options_of(parser) if text.startswith("--")
        ], typed


def test_every_option_of_the_daemon(shell: Shell) -> None:
    known = [f"--{name.rstrip('=')}" for name in (*options._TAKE_VALUES, "check", "help", "version")]
    assert sorted(shell.all("kvmnegd --")) == sorted(known)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("kvmneg neg", "kvmneg negotiate "),
        ("kvmneg negotiate --le", "kvmneg negotiate --level "),
        ("kvmneg negotiate --level armv9.4", "kvmneg negotiate --level armv9.4-a "),
        ("kvmneg negotiate --level=armv9.4", "kvmneg negotiate --level=armv9.4-a "),
        ("kvmneg check --vmm fire", "kvmneg check --vmm firecracker "),
        ("kvmneg fence pin --from ho", "kvmneg fence pin --from host "),
        ("kvmneg fence pin --from level:armv9.4", "kvmneg fence pin --from level:armv9.4-a "),
        ("kvmneg fence pin --from level:x86-64-v1 --rea", "kvmneg fence pin --from level:x86-64-v1 --reason "),
        ("kvmneg negotiate --require avx2,movdiri", "kvmneg negotiate --require avx2,movdiri "),
        ("kvmneg negotiate --require avx2,hle,movdir64", "kvmneg negotiate --require avx2,hle,movdir64b "),
        ("kvmneg compare node1", "kvmneg compare node1.json "),
        ("kvmneg compare node1.json ho", "kvmneg compare node1.json host "),
        ("kvmneg baseline node1.json node2", "kvmneg baseline node1.json node2.json "),
        ("kvmneg explain avx2 node1.json node2", "kvmneg explain avx2 node1.json node2.json "),
        ("kvmneg check --report node1", "kvmneg check --report node1.json "),
        ("kvmneg import instlatx64 node2", "kvmneg import instlatx64 node2.json "),
        ("kvmnegd --state sta", "kvmnegd --state states/"),
        ("kvmnegd --bus sys", "kvmnegd --bus system "),
        ("kvmnegd --bus=", "kvmnegd --bus=system "),
        ("kvmnegd --report node2", "kvmnegd --report node2.json "),
    ],
)  # fmt: skip
def test_a_word_is_completed(shell: Shell, typed: str, line: str) -> None:
    found = shell.line(typed, "\t").replace("\\:", ":")
    assert found.rstrip(" ,=") == line.rstrip()  # zsh takes its comma or = back with the next space


def test_the_levels_are_those_there_are(shell: Shell) -> None:
    assert sorted(shell.all("kvmneg negotiate --level ")) == sorted(definitions.available("levels"))


def test_the_features_are_those_of_every_architecture(shell: Shell) -> None:
    known = {
        name for one in catalog.available() for name in catalog.names(one).by_name if name.startswith("avx")
    }
    assert set(shell.all("kvmneg negotiate --require avx")) == known
    assert len(known) > 20


def test_the_features_are_all_of_them() -> None:
    names = runpy.run_path(str(GENERATE), run_name="generate")["features"](names_of_catalogues())
    known = {name for one in catalog.available() for name in catalog.names(one).by_name}
    assert known <= set(names)
    assert {"vmx-ept"} <= set(names)
    for name in set(names) - known:
        assert any(name in catalog.names(one).controls for one in catalog.available()), name


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_shell_finds_fault_with_the_file(share: Path, program: str) -> None:
    subprocess.run(["bash", "-n", share / "bash-completion/completions" / program], check=True)
    subprocess.run(["zsh", "-n", share / "zsh/site-functions" / f"_{program}"], check=True)
