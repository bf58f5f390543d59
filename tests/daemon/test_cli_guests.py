# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg vm, guests and image as an operator's script calls them, against a real daemon."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import cli

from .conftest import RECORDED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .conftest import Daemon

VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"


class Shell:
    """`kvmneg` with one daemon's socket: exit status, output, errors."""

    def __init__(self, daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
        self._daemon = daemon
        self._capsys = capsys

    def __call__(self, *words: str | int) -> tuple[int, str, str]:
        self._capsys.readouterr()
        status = cli.main(["--socket", self._daemon.socket, *map(str, words)])
        told = self._capsys.readouterr()
        return status, told.out, told.err

    def json(self, *words: str | int) -> Any:
        status, out, errors = self(*words, "--json")
        assert status == 0, errors
        return json.loads(out)


@pytest.fixture
def kvmneg(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(daemon, capsys)


@pytest.fixture
def vmm() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands in for a VMM."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_a_vm_from_its_start_to_its_image_and_back(
    kvmneg: Shell, vmm: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert kvmneg("guests")[1] == "0 guests with a contract\n"
    offer = kvmneg.json("negotiate", "--level", "x86-64-v2")
    status, told, _ = kvmneg("vm", "begin", offer["digest"], VM, "--pid", vmm.pid)
    assert status == 0 and f"while process {vmm.pid} lives" in told
    assert "does not expire" in kvmneg("vm", "started", VM)[1]
    told = kvmneg("guests", "list")[1]
    assert VM in told and "started" in told and f"process {vmm.pid}" in told
    contract = tmp_path / "contract.json"
    contract.write_text(json.dumps(offer["contract"]))
    assert (
        f"has {kvmneg.json('vm', 'report', VM, contract)['digest']}"
        in kvmneg("vm", "report", VM, contract)[1]
    )
    image = tmp_path / "web-1.save"
    image.write_bytes(b"memory of a guest")
    assert kvmneg("vm", "saved", VM)[0] == 0
    assert kvmneg("image", "tag", image, "--vm", VM)[0] == 0
    assert (tmp_path / "web-1.save.kvmneg").exists()
    status, told, _ = kvmneg("image", "check", image)
    assert status == 0 and told.startswith("yes: ") and "not judged" in told
    assert kvmneg.json("guests")["guests"][0]["state"] == "saved"
    assert f"process {vmm.pid} too" in kvmneg("vm", "handover", VM, "--pid", vmm.pid)[1]
    assert kvmneg.json("guests")["guests"][0]["state"] == "started"
    assert kvmneg("vm", "end", VM)[0] == 0
    assert kvmneg.json("guests")["guests"] == []
    received = kvmneg.json("vm", "receive", contract, VM)  # it comes back from elsewhere
    told = {"vm", "digest", "generation", "path", "expires_in_seconds", "incarnation"}
    assert received.keys() == {*told, "above"}
    assert kvmneg.json("guests")["guests"][0]["digest"] == offer["digest"]


def test_an_image_that_nobody_tagged_is_unknown(kvmneg: Shell, tmp_path: Path) -> None:
    image = tmp_path / "old.save"
    assert kvmneg("image", "check", image)[0] == 5  # there is no such image
    image.write_bytes(b"memory")
    status, _, errors = kvmneg("image", "check", image)
    assert status == 1 and "unknown" in errors


def tagged(kvmneg: Shell, tmp_path: Path) -> Path:
    offer = kvmneg.json("negotiate", "--level", "x86-64-v2")
    kvmneg("vm", "begin", offer["digest"], VM)
    image = tmp_path / "a.save"
    image.write_bytes(b"memory of a guest")
    assert kvmneg("image", "tag", image, "--vm", VM)[0] == 0
    return image


def test_an_image_that_was_written_again_is_not_what_was_tagged(kvmneg: Shell, tmp_path: Path) -> None:
    image = tagged(kvmneg, tmp_path)
    for other in (b"memory of a guest, later", b"memory of another"):  # the second of the same size
        image.write_bytes(other)
        status, _, errors = kvmneg("image", "check", image)
        assert status == 1 and "written again" in errors
    image.write_bytes(b"memory of a guest")  # a copy of it, brought back
    assert kvmneg("image", "check", image)[0] == 0


def test_a_large_image_is_told_from_another_by_parts_of_it(kvmneg: Shell, tmp_path: Path) -> None:
    image = tagged(kvmneg, tmp_path)
    with image.open("wb") as file:
        file.truncate(1 << 30)
    assert kvmneg("image", "tag", image, "--vm", VM)[0] == 0
    assert kvmneg("image", "check", image)[0] == 0
    for place in (0, (1 << 30) - 1):
        with image.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert kvmneg("image", "check", image)[0] == 1
        with image.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")


def test_an_image_is_judged_by_what_its_vmm_reported(kvmneg: Shell, tmp_path: Path) -> None:
    """A guest with a feature that another host lacks stays away from it, contract or not."""
    offer = kvmneg.json("negotiate", "--level", "x86-64-v2")
    kvmneg("vm", "begin", offer["digest"], VM)
    more = kvmneg.json("negotiate", "--level", "x86-64-v2", "--require", "clflushopt")["contract"]
    contract = tmp_path / "more.json"
    contract.write_text(json.dumps(more))
    assert "clflushopt" in kvmneg("vm", "report", VM, contract)[1]
    image = tmp_path / "a.save"
    image.write_bytes(b"memory")
    assert kvmneg("image", "tag", image, "--vm", VM)[0] == 0
    assert kvmneg("image", "check", image)[0] == 0  # this host has it
    report = json.loads(RECORDED.read_text())
    report["offer"]["cpuid:0x7.0.ebx"] = f"{int(report['offer']['cpuid:0x7.0.ebx'], 16) & ~(1 << 23):#x}"
    report.get("accept", {}).pop("cpuid:0x7.0.ebx", None)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(report))
    status, _, errors = kvmneg("image", "check", image, "--report", other)
    assert status == 1 and "clflushopt" in errors


@pytest.mark.parametrize(
    "document",
    [
        "", "{", "[]", "{}", '{"format": "kvmneg.image/2"}', '{"format": "kvmneg.image/1", "vm": 1, "bytes": 2}',
        '{"format": "kvmneg.image/1", "vm": "x", "bytes": -1, "contract": {}}',
    ],
)  # fmt: skip
def test_a_document_beside_an_image_that_is_none_is_bad_input(
    kvmneg: Shell, tmp_path: Path, document: str
) -> None:
    image = tmp_path / "a.save"
    image.write_bytes(b"memory")
    (tmp_path / "a.save.kvmneg").write_text(document)
    status, _, errors = kvmneg("image", "check", image)
    assert status == 5 and "a.save.kvmneg" in errors


def test_a_tag_that_cannot_be_written_leaves_nothing(kvmneg: Shell, tmp_path: Path) -> None:
    if os.geteuid() == 0 and not Path("/dev/full").exists():
        pytest.skip("needs a place that cannot be written to")
    image = tagged(kvmneg, tmp_path)
    before = (tmp_path / "a.save.kvmneg").read_bytes()
    (tmp_path / "a.save.kvmneg.new").mkdir()  # in the way
    status, _, errors = kvmneg("image", "tag", image, "--vm", VM)
    assert status == 7 and "cannot write" in errors
    assert (tmp_path / "a.save.kvmneg").read_bytes() == before


def test_wrong_calls_say_what_is_wrong(kvmneg: Shell, tmp_path: Path) -> None:
    assert kvmneg("vm", "handover", VM)[0] == 2  # --pid is needed
    assert kvmneg("vm", "started", VM)[0] == 2
    assert kvmneg("guests", "waive", 0, "--reason", "x")[0] == 2
    assert kvmneg("guests", "waive", os.getpid(), "--reason", "x")[0] == 2
    text = tmp_path / "no-contract"
    text.write_text("hello\n")
    assert kvmneg("vm", "receive", text, VM)[0] == 5
    assert kvmneg("vm", "report", VM, RECORDED)[0] == 5  # a report is no contract
