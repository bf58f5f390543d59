# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line against a daemon that serves a recorded report, and the demonstration as a whole."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvmneg
from kvmneg import cli
from kvmneg.client import Client
from kvmneg.errors import Unreachable
from kvmneg.policy.fence_text import Fence

Capture = pytest.CaptureFixture[str]
RECORDED = str(Path(kvmneg.__file__).parent / "data" / "recorded-host.json")
VM = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"


def answers(path: str) -> bool:
    """Whether a daemon answers there: the socket's file is there before anybody listens."""
    try:
        with Client(path) as client:
            return bool(client.get_info())
    except Unreachable:
        return False


@pytest.fixture
def socket(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "socket")
    command = [
        sys.executable,
        "-P",
        "-m",
        "kvmneg.service.daemon",
        "--socket",
        path,
        "--state",
        str(tmp_path / "state"),
    ]
    with subprocess.Popen([*command, "--report", RECORDED]) as daemon:
        deadline = time.monotonic() + 20
        while not answers(path):
            assert daemon.poll() is None and time.monotonic() < deadline, "kvmnegd did not start"
            time.sleep(0.01)
        yield path
        daemon.terminate()
        assert daemon.wait(10) == 0


def run(capsys: Capture, socket: str, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["--socket", socket, *words])
    told = capsys.readouterr()
    return status, told.out, told.err


def run_json(capsys: Capture, socket: str, *words: str) -> tuple[int, Any]:
    status, out, _ = run(capsys, socket, *words, "--json")
    return status, json.loads(out)


def test_a_fence_is_pinned_shown_and_taken_down(capsys: Capture, socket: str) -> None:
    assert run_json(capsys, socket, "fence", "show")[1]["pinned"] is False
    status, pinned = run_json(capsys, socket, "fence", "pin", "--from", "host", "--reason", "first")
    assert (status, pinned["generation"]) == (0, 1)
    _, shown = run_json(capsys, socket, "fence", "show")
    assert (shown["generation"], shown["digest"], shown["pinned"]) == (1, pinned["digest"], True)
    assert run_json(capsys, socket, "fence", "unpin", "--reason", "done") == (0, {"generation": 2})
    _, history = run_json(capsys, socket, "fence", "history")
    assert [(row["generation"], row["reason"]) for row in history["entries"]] == [(2, "done"), (1, "first")]
    assert {row["uid"] for row in history["entries"]} == {os.getuid()}


def test_the_shown_fence_can_be_edited_and_pinned_again(capsys: Capture, socket: str, tmp_path: Path) -> None:
    run(capsys, socket, "fence", "pin", "--from", "host", "--reason", "first")
    _, text, about = run(capsys, socket, "fence", "show")
    assert about.startswith("generation 1, pinned, sha256:")
    rows = [row for row in text.splitlines() if not row.startswith("cpuid:0x7.0.ebx")]
    file = tmp_path / "fence"
    file.write_text("\n".join(rows), "utf-8")
    status, pinned = run_json(capsys, socket, "fence", "pin", "--from", str(file), "--reason", "no leaf 7")
    assert (status, pinned["generation"]) == (0, 2)
    assert Fence.parse(pinned["text"]).granted.field("bmi1") == 0
    status, no = run_json(capsys, socket, "negotiate", "--require", "bmi1")
    assert status == 1
    assert [(row["feature"], row["cause"]) for row in no["blockers"]] == [("bmi1", "fence")]


def test_a_level_and_a_report_can_be_pinned(capsys: Capture, socket: str) -> None:
    assert run(capsys, socket, "fence", "pin", "--from", "level:x86-64-v2", "--reason", "level")[0] == 0
    assert run(capsys, socket, "negotiate", "--level", "x86-64-v3")[0] == 1
    assert run(capsys, socket, "fence", "pin", "--from", RECORDED, "--reason", "report")[0] == 0
    assert run(capsys, socket, "negotiate", "--level", "x86-64-v3")[0] == 0


def test_a_fence_comes_from_standard_input(socket: str) -> None:
    command = [sys.executable, "-P", "-m", "kvmneg.cli", "--socket", socket, "fence"]
    pin = [*command, "pin", "--json", "--reason", "piped", "--from"]
    first = json.loads(subprocess.run([*pin, "host"], stdout=subprocess.PIPE, check=True).stdout)
    shown = subprocess.run([*command, "show"], capture_output=True, check=True).stdout
    second = json.loads(subprocess.run([*pin, "-"], input=shown, stdout=subprocess.PIPE, check=True).stdout)
    assert (second["generation"], second["digest"]) == (2, first["digest"])


def test_a_wrong_fence_file_is_named_by_line_and_changes_nothing(
    capsys: Capture, socket: str, tmp_path: Path
) -> None:
    file = tmp_path / "fence"
    file.write_text("architecture x86_64\n\ncpuid:0x7.0.ebx 0b2\n", "utf-8")
    status, no = run_json(capsys, socket, "fence", "pin", "--from", str(file), "--reason", "wrong")
    assert (status, no["error"]["line"]) == (5, 3)
    assert run_json(capsys, socket, "fence", "show")[1]["generation"] == 0


def test_an_unexpected_generation_changes_nothing(capsys: Capture, socket: str) -> None:
    words = ["fence", "pin", "--from", "host", "--reason", "first", "--expected-generation", "5"]
    status, no = run_json(capsys, socket, *words)
    assert (status, no["error"]["name"]) == (1, "org.kvmneg.Fence.GenerationMismatch")
    assert run_json(capsys, socket, "fence", "show")[1]["generation"] == 0


def test_unpinning_nothing_is_a_no(capsys: Capture, socket: str) -> None:
    status, no = run_json(capsys, socket, "fence", "unpin", "--reason", "none")
    assert (status, no["error"]["name"]) == (1, "org.kvmneg.Fence.NotPinned")


def test_a_contract_is_offered_granted_and_read_back(capsys: Capture, socket: str) -> None:
    status, offer = run_json(
        capsys, socket, "negotiate", "--level", "x86-64-v2", "--optional", "avx2,amx-tile"
    )
    assert status == 0
    assert [row["feature"] for row in offer["not_granted"] if row["feature"] == "amx-tile"] == ["amx-tile"]
    words = ["negotiate", "--level", "x86-64-v2", "--optional", "avx2,amx-tile", "--begin", "--vm", VM]
    status, granted = run_json(capsys, socket, *words)
    assert (status, granted["digest"]) == (0, offer["digest"])
    assert granted["begun"]["vm"] == VM
    binary = granted["begun"]["path"]
    _, by_digest = run_json(capsys, socket, "contract", offer["digest"])
    _, by_file = run_json(capsys, socket, "contract", binary)
    assert by_digest["contract"] == by_file["contract"] == offer["contract"]
    assert (by_digest["state"], by_digest["path"]) == ("granted", binary)
    for contract in (offer["digest"], binary):
        assert run_json(capsys, socket, "check", "--contract", contract)[1]["fits"] is True


def test_a_vm_is_begun_started_and_ended(capsys: Capture, socket: str) -> None:
    _, offer = run_json(capsys, socket, "negotiate", "--level", "x86-64-v2")
    digest = offer["digest"].removeprefix("sha256:")
    status, begun = run_json(capsys, socket, "vm", "begin", digest, VM)
    assert (status, begun["vm"], begun["digest"]) == (0, VM, offer["digest"])
    assert begun["generation"] == offer["generation"] and begun["expires_in_seconds"] > 0
    assert Path(begun["path"]).stat().st_size
    status, out, _ = run(capsys, socket, "vm", "begin", digest, VM)  # the same again
    assert status == 0 and begun["path"] in out and "expires" in out
    assert run_json(capsys, socket, "vm", "started", VM) == (0, {"vm": VM, "state": "started"})
    status, out, _ = run(capsys, socket, "vm", "end", VM)
    assert status == 0 and VM in out
    assert not Path(begun["path"]).exists()
    status, no = run_json(capsys, socket, "vm", "end", VM)
    assert (status, no["error"]["name"]) == (2, "org.kvmneg.InvalidRequest")


@pytest.mark.parametrize(
    "words",
    [["begin", "nothing", VM], ["begin", "0" * 64], ["started"], ["end", "no-uuid"], ["stop", VM], []],
)
def test_what_a_vm_cannot_be_told(capsys: Capture, socket: str, words: list[str]) -> None:
    assert run_json(capsys, socket, "vm", *words)[0] == 2


def test_an_offer_that_nobody_made_is_not_begun(capsys: Capture, socket: str) -> None:
    status, no = run_json(capsys, socket, "vm", "begin", "0" * 64, VM)
    assert (status, no["error"]["name"]) == (1, "org.kvmneg.NoSuchContract")


def test_a_daemons_contract_leads_to_qemu_arguments(
    capsys: Capture, socket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    words = ["negotiate", "--level", "x86-64-v2", "--emit", "qemu", "--machine", "pc-q35-7.2"]
    status, offer = run_json(capsys, socket, *words)
    assert status == 0
    assert "popcnt=on" in offer["qemu"]["cpu"].split(",")


def test_a_no_of_the_daemon_names_every_blocker(capsys: Capture, socket: str) -> None:
    for command in ("negotiate", "check"):
        status, no = run_json(capsys, socket, command, "--level", "x86-64-v4")
        assert status == 1
        missing = {row["feature"] for row in no["blockers"]}
        assert {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= missing
        assert {row["wanted_by"] for row in no["blockers"]} == {"x86-64-v4"}


def test_an_unknown_feature_is_a_mistake(capsys: Capture, socket: str) -> None:
    status, no = run_json(capsys, socket, "negotiate", "--require", "avx22")
    assert status == 2
    assert "avx2" in no["error"]["hint"]


def test_an_unknown_contract_is_a_no(capsys: Capture, socket: str) -> None:
    status, no = run_json(capsys, socket, "contract", "0" * 64)
    assert (status, no["error"]["name"]) == (1, "org.kvmneg.NoSuchContract")


def test_watch_tells_each_change(socket: str) -> None:
    command = [sys.executable, "-P", "-m", "kvmneg.cli", "--socket", socket]
    with subprocess.Popen(
        [*command, "--json", "watch", "--count", "2"], stdout=subprocess.PIPE, text=True
    ) as watch:
        assert watch.stdout
        first = json.loads(watch.stdout.readline())
        pin = [*command, "fence", "pin", "--from", "host", "--reason", "watched"]
        subprocess.run(pin, check=True, stdout=subprocess.DEVNULL)
        second = json.loads(watch.stdout.readline())
        assert watch.wait(20) == 0
    assert (first["generation"], first["state"]) == (0, "floating")
    assert (second["generation"], second["state"]) == (1, "pinned")
    assert second["host_digest"] == first["host_digest"]


def test_the_demonstration_without_kvm_says_why_and_labels_every_screen() -> None:
    command = [sys.executable, "-P", "-m", "kvmneg.cli.demo", "--kvm", "/nonexistent/kvm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KVM cannot be used: /nonexistent/kvm" in done.stdout
    assert "how to fix it: " in done.stdout
    screens = done.stdout.split("\n── ")[1:]
    assert len(screens) > 5
    assert [screen for screen in screens if "RECORDED REPORT" not in screen.split("\n", 2)[1]] == []


@pytest.mark.kvm
def test_the_demonstration_on_this_kvm() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "kvmneg.cli.demo"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RECORDED" not in done.stdout
    assert "kvmnegd ended with status 0" in done.stdout


# -- the fence moves


def test_a_raise_by_hand(capsys: Capture, socket: str) -> None:
    run(capsys, socket, "fence", "pin", "--from", "level:x86-64-v2", "--reason", "low")
    status, out, _ = run(capsys, socket, "fence", "plan", "--from", "host")
    assert status == 0
    assert "new guests get more" in out and "avx2" in out
    status, tried = run_json(
        capsys, socket, "fence", "raise", "--from", "host", "--reason", "up", "--dry-run"
    )
    assert (status, tried["state"], tried["dry_run"], tried["plan"]["kind"]) == (0, "pinned", True, "raise")
    assert run(capsys, socket, "fence", "raise", "--from", "host", "--reason", "up")[0] == 0
    _, _, told = run(capsys, socket, "fence", "show")
    assert "it is proposed to raise it" in told
    status, refused = run_json(capsys, socket, "fence", "lower", "--without", "cx16", "--reason", "down")
    assert (status, refused["error"]["name"]) == (1, "org.kvmneg.Fence.WrongState")
    status, done = run_json(capsys, socket, "fence", "commit", "--reason", "up", "--expected-generation", "1")
    assert (status, done["generation"], done["state"]) == (0, 2, "pinned")


def test_a_lowering_by_hand_names_who_is_above(capsys: Capture, socket: str) -> None:
    run(capsys, socket, "fence", "pin", "--from", "host", "--reason", "all")
    run(capsys, socket, "negotiate", "--max", "--begin", "--vm", VM)
    assert run(capsys, socket, "vm", "started", VM)[0] == 0
    status, out, _ = run(capsys, socket, "fence", "lower", "--without", "avx2,smep", "--reason", "leaves")
    assert status == 0
    assert re.search(rf"1 guest above.*\n  {VM}  running  uid \d+  avx2, smep\n", out)
    status, _, err = run(capsys, socket, "fence", "commit", "--reason", "done?")
    assert status == 1
    assert f"guests hold more than that: {VM}\n  {VM}  running" in err
    _, out, err = run(capsys, socket, "fence", "show")
    assert "architecture x86_64" in out
    hidden = re.search(r"hidden by the fence \[fence\]: 2\n +(.*)\n", err)
    assert hidden is not None and set(hidden[1].split()) == {"avx2", "smep"}
    assert run(capsys, socket, "fence", "abort", "--reason", "no")[0] == 0
    status, plan = run_json(capsys, socket, "fence", "plan", "--without", "avx2")
    (guest,) = plan["plan"]["guests"]
    assert (status, guest["vm"], guest["features"], plan["plan"]["guest_count"]) == (0, VM, ["avx2"], 1)
    words = ["fence", "commit", "--reason", "above", "--override", VM]
    run(capsys, socket, "fence", "lower", "--without", "avx2", "--reason", "again")
    assert run(capsys, socket, *words, "--dry-run")[0] == 0
    assert run(capsys, socket, *words)[0] == 0


def test_an_emergency_by_hand(capsys: Capture, socket: str) -> None:
    run(capsys, socket, "fence", "pin", "--from", "host", "--reason", "all")
    assert run(capsys, socket, "fence", "emergency")[0] == 2  # nothing is being lowered
    assert run(capsys, socket, "fence", "emergency", "--without", "avx2")[0] == 2  # why?
    run(capsys, socket, "negotiate", "--max", "--begin", "--vm", VM)
    status, out, _ = run(capsys, socket, "fence", "emergency", "--without", "avx2", "--reason", "a leak")
    assert status == 0
    assert "`kvmneg fence emergency` shows how far it is" in out
    status, out, _ = run(capsys, socket, "fence", "emergency")
    assert status == 1
    assert "0 of 1 guest done" in out and "not started: ask again" in out
    assert run(capsys, socket, "vm", "end", VM)[0] == 0
    status, progress = run_json(capsys, socket, "fence", "emergency")
    assert (status, progress["guests"][0]["became"], progress["done"]) == (0, "gone", 1)
    assert run(capsys, socket, "fence", "commit", "--reason", "through")[0] == 0


def test_why_each_absent_feature_is_absent(capsys: Capture, socket: str) -> None:
    run(capsys, socket, "fence", "pin", "--from", "level:x86-64-v2", "--reason", "low")
    status, shown = run_json(capsys, socket, "fence", "show", "--absent")
    absent = {row["feature"]: row for row in shown["absent"]}
    assert status == 0
    assert (absent["avx2"]["cause"], absent["avx2"]["missing_on"]) == ("fence", "fence generation 1")
    assert absent["avx512f"]["cause"] == "silicon"  # of the recorded host
    assert all(row["because"] for row in shown["absent"])
    assert "cx16" not in absent
    _, out, err = run(capsys, socket, "fence", "show", "--absent")
    assert "avx512f" in err and "avx512f" not in out
    assert Fence.parse(out).digest == shown["digest"]  # standard output is the fence and nothing else


def test_a_dry_run_pins_nothing(capsys: Capture, socket: str) -> None:
    status, out, _ = run(capsys, socket, "fence", "pin", "--from", "host", "--reason", "try", "--dry-run")
    assert (status, out.partition(":")[0]) == (0, "it would be pinned")
    assert run_json(capsys, socket, "fence", "show")[1]["pinned"] is False
