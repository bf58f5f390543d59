# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examples of org.kvmneg(7) as they stand there, against a daemon: those for varlinkctl by what they would send."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmneg.client import Client
from kvmneg.errors import Blocked
from tests.served import daemon_in

TOP = Path(__file__).parents[2]
PAGE = (TOP / "man/org.kvmneg.7.scd.in").read_text("utf-8")
# As they are shown: scdoc takes a backslash away, in examples too.
EXAMPLES = [
    re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)
    for text in re.findall(r"^```\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
]
RECORDED = TOP / "kvmneg/data/recorded-host.json"
SOCKET = "/run/kvmneg/org.kvmneg"


def example(of: str) -> str:
    (found,) = (text for text in EXAMPLES if of in text)
    return str(found)


def test_the_program_in_python_takes_a_contract(tmp_path: Path) -> None:
    program = example("import json")
    assert SOCKET in program
    with daemon_in(tmp_path, "--report", str(RECORDED)) as socket:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program.replace(SOCKET, socket)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        words, path = re.fullmatch(r"(\d+) words, in binary in (\S+)\n", done.stdout).groups()  # type: ignore[union-attr]
        assert int(words) > 20
        assert Path(path).parent.parent == Path(socket).parent


def test_the_program_says_why_it_ends(tmp_path: Path) -> None:
    program = example("import json").replace("x86-64-v1", "x86-64-v9")
    with daemon_in(tmp_path, "--report", str(RECORDED)) as socket:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program.replace(SOCKET, socket)],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("org.kvmneg.InvalidRequest: ")


def test_the_calls_by_varlinkctl_are_answered(tmp_path: Path) -> None:
    """Its arguments are the socket, the method and the parameters."""
    scripts = [text.replace("\\\n", " ") for text in EXAMPLES if "varlinkctl" in text]
    commands = [
        shlex.split(one)
        for text in scripts
        for one in re.split(r"^(?=varlinkctl)", text, flags=re.MULTILINE)
        if one
    ]
    calls = [words for words in commands if words[1] == "call"]
    assert len(calls) > 3
    assert {words[1] for words in commands} == {"call", "info", "introspect"}
    with daemon_in(tmp_path, "--report", str(RECORDED)) as socket, Client(socket) as client:
        for words in calls:
            place, method, parameters = (word for word in words[2:] if word != "--more")
            assert place == SOCKET
            if "svm" in parameters:
                with pytest.raises(Blocked):
                    client.call(method, json.loads(parameters))
            elif "--more" in words:
                assert next(client.call_more(method, json.loads(parameters)))["state"] == "floating"
            else:
                assert client.call(method, json.loads(parameters))


def test_a_report_is_served_without_a_kvm(tmp_path: Path) -> None:
    """The second line of that example; the first one needs a KVM, and makes a file like the recorded one."""
    first, _, second = example("kvmnegd --socket").partition("\n")
    assert first == "kvmneg host --json > report.json"
    (tmp_path / "report.json").write_bytes(RECORDED.read_bytes())
    script = second.replace("kvmnegd ", f"exec timeout 20 {sys.executable} -P -m kvmneg.service.daemon ", 1)
    process = subprocess.Popen(["sh", "-c", script], cwd=tmp_path)
    try:
        with Client(str(tmp_path / "run/org.kvmneg"), timeout=20) as client:
            for _ in range(400):
                if (tmp_path / "run/org.kvmneg").exists():
                    break
                time.sleep(0.05)
            assert client.get_host()["state"] == "floating"
    finally:
        process.terminate()
        process.wait(20)
