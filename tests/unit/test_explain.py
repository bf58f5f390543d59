# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg explain: what a feature is, and how it stands here and in a pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from strategies import NAMES

from kvmneg import cli
from kvmneg.cli import explain
from kvmneg.errors import UsageError
from kvmneg.features.report import Report
from kvmneg.policy.fence_text import Fence

Capture = pytest.CaptureFixture[str]
DATA = Path(__file__).parent / "data"
INTEL, AMD, SOFTWARE = (
    str(DATA / f"{name}.json") for name in ("intel-ice-lake", "amd-milan", "software-kvm")
)


def run(capsys: Capture, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["explain", *words])
    told = capsys.readouterr()
    return status, told.out, told.err


def document(capsys: Capture, *words: str) -> dict[str, Any]:
    status, out, err = run(capsys, "--json", *words)
    assert status == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_feature_in_json(capsys: Capture) -> None:
    found = document(capsys, "avx2", "--report", INTEL)
    assert (found["feature"], found["word"], found["bit"], found["rule"]) == (
        "avx2", "cpuid:0x7.0.ebx", 5, "and",
    )  # fmt: skip
    assert found["names"] == {"qemu": "avx2", "libvirt": "avx2", "linux": "avx2"}
    assert found["requires"] == ["avx"] and "avx512f" in found["needed_by"]
    assert found["here"] == {
        "host": "node-intel", "state": "offered", "value": True, "held_back_by": None, "cause": None,
        "because": None, "enforcement": None, "instruction": None, "vmm": None,
    }  # fmt: skip
    assert found["pool"] == []


@pytest.mark.parametrize("name", ["cpuid:0x1.0.ecx:19", "sse4_1", "sse4.1"])
def test_one_feature_has_many_names(name: str, capsys: Capture) -> None:
    assert document(capsys, name, "--report", INTEL)["feature"] == "sse4.1"


def test_a_bit_of_a_number_is_the_number(capsys: Capture) -> None:
    found = document(capsys, "cpuid:0x80000008.0.eax:3", "--report", INTEL)
    assert found["feature"] == "phys-bits" and found["bits"] == "7:0"
    assert found["here"]["value"] == 0x3934 & 0xFF


def test_a_name_that_two_features_share(capsys: Capture) -> None:
    found = document(capsys, "kvmclock", "--report", INTEL)
    assert found["bit"] == 3 and found["shared_names"] == {"qemu": ["kvmclock-old"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpuid:0x7.0.ebx:32", "32 bits"),
        ("cpuid:0x7.0.ebx:99999999999999999999", "32 bits"),
        ("cpuid:0x123.0.eax:0", "nobody has classified"),
        ("cpuid:0x4.0.eax:3", "topology"),
        ("nonsense:5", "nonsense"),
        ("avx3", "no feature is called"),
        ("cpuid:0x7.0.ebx", "no feature is called"),
    ],
)
def test_what_is_no_feature(text: str, message: str, capsys: Capture) -> None:
    with pytest.raises(UsageError):
        explain.find(NAMES, text)
    status, out, err = run(capsys, text, "--report", INTEL)
    assert status == 2 and not out and message in err


def test_every_feature_can_be_explained(intel: Report) -> None:
    for feature in NAMES.by_name.values():
        assert explain.find(NAMES, f"{feature.word}:{feature.shift}").word == feature.word
        place = explain.Place(feature, intel, None, "qemu")
        assert place.standing.state != "held-back" or (place.standing.cause and place.standing.because)


@pytest.mark.parametrize(
    ("mark", "text"), [("trapped", "raise #UD"), ("hidden only", "does not look at CPUID"), ("", "")]
)
def test_what_comes_of_hiding_it(
    mark: str, text: str, intel: Report, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**intel.to_json(), "instructions": {"avx2": mark} if mark else {}}))
    _, out, _ = run(capsys, "avx2", "--report", str(path))
    assert ("hiding it" in out) == bool(mark)
    assert not mark or f"{mark}: " in out
    assert text in " ".join(out.split())
    assert document(capsys, "avx2", "--report", str(path))["here"]["instruction"] == (mark or None)
    assert document(capsys, "avx", "--report", str(path))["here"]["instruction"] is None


def test_the_pool_names_who_holds_it_back(capsys: Capture) -> None:
    found = document(capsys, "avx512f", INTEL, AMD, SOFTWARE, "--report", INTEL)
    stand = {row["host"]: (row["state"], row["cause"]) for row in found["pool"]}
    hosts = [Report.loads(Path(path).read_bytes()).host for path in (INTEL, AMD, SOFTWARE)]
    assert list(stand) == hosts
    assert stand[hosts[0]] == ("offered", None)
    assert stand[hosts[1]] == ("held-back", "unknown")
    _status, out, _err = run(capsys, "avx512f", INTEL, AMD, SOFTWARE, "--report", INTEL)
    assert "in the pool of 3" in out and all(host in out for host in hosts)


def test_alike_hosts_stand_together(tmp_path: Path, capsys: Capture) -> None:
    paths = []
    for number in range(12):
        report = json.loads(Path(AMD).read_text("utf-8"))
        report["measured"]["host"] = f"m{number}"
        paths.append(str(tmp_path / f"{number}.json"))
        Path(paths[-1]).write_text(json.dumps(report), "utf-8")
    _status, out, _err = run(capsys, "avx512f", *paths, "--report", INTEL)
    assert "m0 m1" in out and "and 4 more" in out and out.count("[unknown]") == 1


def test_a_fence_and_a_vmm(tmp_path: Path, intel: Report, capsys: Capture) -> None:
    fence = tmp_path / "pool.fence"
    fence.write_text(Fence(intel.offer).text(), "utf-8")
    given = document(capsys, "kvm-msi-ext-dest-id", "--report", INTEL, "--vmm", "qemu")["here"]
    assert given["state"] == "offered" and given["vmm"]["what"] == "given"
    assert given["vmm"]["needs"] == "kernel-irqchip=split" and given["vmm"]["source"]
    bounded = document(
        capsys, "kvm-msi-ext-dest-id", "--report", INTEL, "--vmm", "qemu", "--fence", str(fence)
    )["here"]
    assert (bounded["state"], bounded["cause"]) == ("held-back", "fence")
    _status, out, _err = run(capsys, "cpuid-fault", "--report", INTEL, "--vmm", "qemu")
    assert "held back by QEMU on node-intel [vmm]" in out and "feature_word_info" in out


def test_host_lists_what_a_vmm_changes(capsys: Capture) -> None:
    capsys.readouterr()
    assert cli.main(["host", "--report", INTEL, "--vmm", "qemu"]) == 0
    out = capsys.readouterr().out
    assert "through QEMU" in out and "kvm-msi-ext-dest-id" in out and "kernel-irqchip=split" in out
    assert cli.main(["host", "--report", INTEL, "--vmm", "qemu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vmm"]["name"] == "qemu" and found["vmm"]["version"] is None
    assert {row["what"] for row in found["vmm"]["differences"]} == {"given", "taken", "allowed"}
    # the report is the measured one all the same
    assert Report.from_json(found).offer_words == Report.loads(Path(INTEL).read_bytes()).offer_words


def test_without_kvm_and_daemon_names_are_told(tmp_path: Path, capsys: Capture) -> None:
    nothing = ("--kvm", str(tmp_path / "kvm"), "--socket", str(tmp_path / "socket"))
    status, out, err = run(capsys, "avx2", *nothing)
    assert status == 0 and "AVX2" in out and "names only" in err
    assert document(capsys, "avx2", *nothing)["here"] is None


def test_a_check_for_a_vmm(capsys: Capture) -> None:
    words = ("check", "--report", INTEL, "--require", "kvm-msi-ext-dest-id")
    assert cli.main(words) == 1
    assert cli.main([*words, "--vmm", "qemu"]) == 0
    assert cli.main([*words, "--vmm", "bhyve"]) == 2
    capsys.readouterr()
