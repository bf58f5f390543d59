# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of kvmnegd."""

from __future__ import annotations

import pytest

from kvmneg import __version__
from kvmneg.errors import UsageError
from kvmneg.service.options import Options, parse


def test_defaults_are_the_systems() -> None:
    assert parse([]) == Options("/run/kvmneg/org.kvmneg", "/var/lib/kvmneg", "/dev/kvm", None)


def test_both_spellings() -> None:
    assert parse(["--socket", "a", "--state=b", "--report=c"]) == Options("a", "b", "/dev/kvm", "c")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "1"], "--port"),
        (["--socket"], "--socket"),
        (["--socket="], "--socket needs a value"),
        (["here"], "'here' is no option"),
        (["--kvm", "a", "--report", "b"], "exclude each other"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("-", r"\-")) as caught:
        parse(words)
    assert "kvmnegd --help" in caught.value.hint or "recorded" in caught.value.hint


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for word, said in (("--version", __version__), ("--help", "--state DIR")):
        with pytest.raises(SystemExit) as caught:
            parse([word])
        assert caught.value.code == 0
        assert said in capsys.readouterr().out
