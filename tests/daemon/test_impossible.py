# SPDX-License-Identifier: LGPL-2.1-or-later
"""A report with a word that no CPU can have: kept as measured, flagged everywhere, and in no offer. End to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import cli
from kvmneg.errors import Blocked

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Daemon

Capture = pytest.CaptureFixture[str]
HERE = Path(__file__).parent
SOUND = HERE.parent / "unit/data/intel-ice-lake.json"

# What is wrong, the word as it is measured, the word that is flagged, what the finding says, what is never given.
CASES = {
    # bit 31 of IA32_VMX_BASIC is reserved, bits 44:32 are 4096 bytes of VMCS (SDM vol. 3D, A.1)
    "reserved bits": ("msr:0x480", 0x00D8_1000_91E5_7ED0, "msr:0x480", "reserved bits 0x80000000", "vmx"),
    # pin-based control 7 must be 1, and may not be (A.3.1)
    "VMX halves": ("msr:0x48d", 0x7F_0000_0080, "msr:0x48d", "must be 1 and may not be", "vmx"),
    # PKRU at 0x220 lies in the header; an area of 0xA80 ends where PKRU begins (vol. 1, 13.4)
    "XSAVE offset": ("cpuid:0xd.9.ebx", 0x220, "cpuid:0xd.9.eax", "8 bytes at 544", "pku"),
    "XSAVE size": ("cpuid:0xd.0.ecx", 0xA80, "cpuid:0xd.9.eax", "beyond the 2688 bytes of the area", "pku"),
}


def run(capsys: Capture, *words: str) -> tuple[int, Any]:
    capsys.readouterr()
    status = cli.main([*words, "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("case", CASES)
def test_it_is_kept_flagged_and_never_offered(
    case: str, make_daemon: Callable[..., Daemon], tmp_path: Path, capsys: Capture
) -> None:
    word, value, flagged, says, gone = CASES[case]
    document = json.loads(SOUND.read_text("utf-8"))
    digits = len(document["offer"][word]) - 2
    document["offer"][word] = f"{value:#0{digits + 2}x}"
    document["measured"]["host"] = "lying"
    lying, sound = tmp_path / "lying.json", str(SOUND)
    lying.write_text(json.dumps(document), "utf-8")
    file = str(lying)
    daemon = make_daemon("--report", file).start()

    def told(document: Any) -> None:
        rows = document["flagged"]
        assert {row["host"] for row in rows} == {"lying"}
        assert any(row["word"] == flagged and says in row["finding"] for row in rows), rows

    status, shown = run(capsys, "host", "--report", file)
    assert status == 0 and shown["offer"] == document["offer"], "as measured"
    told(shown)
    _, compared = run(capsys, "compare", file, sound)
    told(compared)
    assert gone in {row["feature"] for row in compared["differences"]}
    status, met = run(capsys, "baseline", file, sound)
    assert status == 0
    told(met)
    assert [row["held_back_by"] for row in met["held_back"] if row["feature"] == gone] == [["lying"]]
    with daemon.client() as client:
        assert client.get_host()["host"]["offer"] == document["offer"], "kept as measured"
    _given_by_the_daemon(daemon, gone)
    for where in (("--report", file), ("--socket", daemon.socket)):
        status, yes = run(capsys, "check", "--level", "x86-64-v2", *where)
        assert status == 0 and yes["fits"]
        told(yes)
        status, no = run(capsys, "check", "--max", "--require", gone, *where)
        assert status == 1 and no["error"]["fits"] is False
        assert gone in {row["feature"] for row in no["blockers"]}
        told(no["error"])


def _given_by_the_daemon(daemon: Daemon, gone: str) -> None:
    """Neither a contract nor a fence has it."""
    with daemon.client() as client:
        words = client.negotiate({"max": True})["contract"]["words"]
        assert not int(words.get("cpuid:0x1.0.ecx", "0x0"), 16) >> 5 & 1 or gone != "vmx"
        assert not int(words.get("cpuid:0x7.0.ecx", "0x0"), 16) >> 3 & 1 or gone != "pku"
        with pytest.raises(Blocked) as refused:
            client.negotiate({"max": True, "require": [gone]})
        assert gone in {blocker.feature for blocker in refused.value.blockers}
        client.fence_pin("test", source="host")
        assert client.fence_get()["state"] == "pinned"
