# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line without a daemon: what it prints, in which shape, with which exit status."""

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvmneg
from kvmneg import cli
from kvmneg.errors import KvmFault, NoKvm, NotPermitted, StoreError
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence

Capture = pytest.CaptureFixture[str]

INTEL = {"cpuid:0x0.0.ebx": 0x756E6547, "cpuid:0x0.0.edx": 0x49656E69, "cpuid:0x0.0.ecx": 0x6C65746E}
AMD = {"cpuid:0x0.0.ebx": 0x68747541, "cpuid:0x0.0.edx": 0x69746E65, "cpuid:0x0.0.ecx": 0x444D4163}
# the psABI's v1 and what a guest boots with: fpu … sse2 in leaf 1, syscall nx lm, 46 and 48 address bits
PLAIN = {
    **INTEL,
    "cpuid:0x0.0.eax": 13,
    "cpuid:0x1.0.eax": 0x000506E3,
    "cpuid:0x1.0.ebx": 8 << 8,
    "cpuid:0x1.0.ecx": 0x81000000,
    "cpuid:0x1.0.edx": 0x0F8BFBFF,
    # measured, and empty: a word that is missing would be at its bottom, with MD_CLEAR set
    **{f"cpuid:0x7.0.{register}": 0 for register in ("eax", "ebx", "ecx", "edx")},
    "cpuid:0x80000000.0.eax": 0x80000008,
    "cpuid:0x80000001.0.edx": 1 << 29 | 1 << 20 | 1 << 11,
    "cpuid:0x80000008.0.eax": 0x302E,
}
V2_ECX = 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23
RDRAND = 1 << 30


def report(path: Path, offer: dict[str, int], **other: Any) -> str:
    measured = {"at": "2026-11-21T06:00:00Z", "by": "kvmneg", "host": path.stem, "source": "recorded"}
    vendor = "AuthenticAMD" if offer.get("cpuid:0x0.0.ebx") == AMD["cpuid:0x0.0.ebx"] else "GenuineIntel"
    made = Report(
        "x86_64",
        measured=measured,
        combo=other.pop("combo", {}),
        identity={"vendor": vendor},
        offer=offer,
        **other,
    )
    path.write_text(json.dumps(made.to_json()), "utf-8")
    return str(path)


@pytest.fixture
def plain(tmp_path: Path) -> str:
    return report(tmp_path / "plain.json", PLAIN, silicon={**PLAIN, "cpuid:0x1.0.ecx": 0x81000000 | V2_ECX})


@pytest.fixture
def rich(tmp_path: Path) -> str:
    ecx = PLAIN["cpuid:0x1.0.ecx"] | V2_ECX | RDRAND
    values = {**PLAIN, "cpuid:0x1.0.ecx": ecx, "cpuid:0x80000001.0.ecx": 1, "cpuid:0x80000008.0.eax": 0x3034}
    return report(
        tmp_path / "rich.json", values, combo={"kernel": "6.12", "modules": {"kvm.ignore_msrs": "N"}}
    )


def run(capsys: Capture, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(words)
    told = capsys.readouterr()
    return status, told.out, told.err


def run_json(capsys: Capture, *words: str) -> tuple[int, Any]:
    status, out, _err = run(capsys, *words)
    return status, json.loads(out)


# -- host, features


def test_host_shows_the_report_it_was_given(capsys: Capture, plain: str) -> None:
    status, document = run_json(capsys, "host", "--json", "--report", plain)
    assert status == 0
    added = {"flagged": [], "unnamed": {}}
    assert document == json.loads(Path(plain).read_text("utf-8")) | added


def test_host_names_levels_and_what_they_lack(capsys: Capture, plain: str) -> None:
    status, out, _ = run(capsys, "host", "--report", plain)
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  x86-64-v")}
    assert status == 0
    assert rows["x86-64-v1"] == ["yes"]
    assert {"pni", "popcnt", "sse4.2"} <= set(rows["x86-64-v2"])
    assert "popcnt" not in rows["x86-64-v3"]


def test_a_recorded_report_is_labelled(capsys: Capture, plain: str) -> None:
    _, out, _ = run(capsys, "host", "--report", plain)
    assert out.startswith("RECORDED REPORT (plain, 2026-11-21T06:00:00Z), not this host\n")


def test_host_tells_what_the_cpu_has_and_kvm_does_not_offer(capsys: Capture, plain: str) -> None:
    _, out, _ = run(capsys, "host", "--report", plain)
    held = out.partition("the CPU has, and KVM does not offer")[2]
    assert {"pni", "popcnt"} <= set(held.split())


def test_host_without_a_usable_kvm_is_3(capsys: Capture) -> None:
    status, document = run_json(capsys, "host", "--json", "--kvm", "/nonexistent/kvm")
    assert status == 3
    assert document["error"]["name"] == "org.kvmneg.NoKvm"
    assert document["blockers"] == []


def test_features_tells_one_in_full(capsys: Capture, plain: str) -> None:
    status, document = run_json(capsys, "features", "--json", "--report", plain, "avx512f")
    (row,) = document["features"]
    assert status == 0
    assert (row["feature"], row["word"], row["bit"]) == ("avx512f", "cpuid:0x7.0.ebx", 16)
    assert row["offered"] is False


@pytest.mark.parametrize(("pattern", "found"), [("sse4.*", {"sse4.1", "sse4.2"}), ("ss[s]e3", {"ssse3"})])
def test_features_takes_globs(capsys: Capture, plain: str, pattern: str, found: set[str]) -> None:
    _, document = run_json(capsys, "features", "--json", "--report", plain, pattern)
    assert {row["feature"] for row in document["features"]} == found


def test_features_without_kvm_shows_the_names(capsys: Capture) -> None:
    status, out, err = run(capsys, "features", "--kvm", "/nonexistent/kvm", "sse4")
    assert status == 0
    assert "sse4.2" in out
    assert "names only" in err


def test_a_pattern_that_matches_nothing_is_a_mistake(capsys: Capture, plain: str) -> None:
    assert run(capsys, "features", "--report", plain, "no-such-thing")[0] == 2


# -- negotiate, check, contract


def test_negotiate_gives_a_contract_with_its_scope(capsys: Capture, plain: str) -> None:
    status, document = run_json(capsys, "negotiate", "--json", "--report", plain)
    assert status == 0
    assert document["digest"] == document["contract"]["digest"]
    assert document["contract"]["words"]["cpuid:0x80000001.0.edx"] == "0x20100800"
    assert [text.partition(":")[0] for text in document["scope"]] == ["judged", "not judged"]


def test_every_human_yes_has_its_scope(capsys: Capture, plain: str) -> None:
    for words in (["negotiate"], ["check"], ["negotiate", "--max"]):
        status, out, _ = run(capsys, *words, "--report", plain)
        assert status == 0
        assert "yes" in out.splitlines()[1]
        assert "\n  judged" in out
        assert "\n  not judged" in out


def test_a_no_names_every_blocker(capsys: Capture, plain: str) -> None:
    status, document = run_json(capsys, "negotiate", "--json", "--report", plain, "--level", "x86-64-v2")
    missing = {blocker["feature"] for blocker in document["blockers"]}
    assert status == 1
    assert missing == {"pni", "ssse3", "cx16", "sse4.1", "sse4.2", "popcnt", "lahf-lm"}
    assert document["error"]["name"] == "org.kvmneg.Blocked"
    assert set(document["blockers"][0]) == {
        "feature",
        "word",
        "bit",
        "wanted_by",
        "missing_on",
        "cause",
        "because",
    }


def test_a_human_no_goes_to_standard_error(capsys: Capture, plain: str) -> None:
    status, out, err = run(capsys, "negotiate", "--report", plain, "--require", "rdrand")
    assert (status, out) == (1, "")
    assert "rdrand" in err


def test_lists_are_split_at_commas_and_may_be_repeated(capsys: Capture, rich: str) -> None:
    words = ["--require", "rdrand,pni", "--require", "sse4.1,ssse3", "--optional", "avx2"]
    status, document = run_json(capsys, "negotiate", "--json", "--report", rich, *words)
    granted = int(document["contract"]["words"]["cpuid:0x1.0.ecx"], 16)
    assert status == 0
    assert granted & (RDRAND | 1 | 1 << 19 | 1 << 9) == RDRAND | 1 | 1 << 19 | 1 << 9
    assert [row["feature"] for row in document["not_granted"] if row["feature"] == "avx2"] == ["avx2"]


def test_a_fence_file_bounds_an_offline_contract(
    capsys: Capture, tmp_path: Path, plain: str, rich: str
) -> None:
    fence = tmp_path / "fence"
    fence.write_text(Fence(FeatureSet.of("x86_64", PLAIN)).text(), "utf-8")
    status, document = run_json(
        capsys, "negotiate", "--json", "--report", rich, "--fence", str(fence), "--require", "rdrand"
    )
    assert status == 1
    assert [(row["feature"], row["cause"]) for row in document["blockers"]] == [("rdrand", "fence")]


@pytest.mark.parametrize(
    "words",
    [
        ["--max", "--level", "x86-64-v2"],
        ["--exact", "fpu", "--require", "tsc"],
        ["--max", "--optional", "avx2"],
        ["--require", "no-such-feature"],
        ["--level", "x86-64-v9"],
        ["--begin"],
        ["--vm", "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"],
        ["--begin", "--vm", "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"],
        ["--no-such-option"],
        ["--emit", "vmware"],
    ],
)
def test_a_request_that_makes_no_sense_is_2(capsys: Capture, plain: str, words: list[str]) -> None:
    status, document = run_json(capsys, "negotiate", "--json", "--report", plain, *words)
    assert status == 2
    assert document["error"]["message"]


def test_a_fence_without_a_report_is_a_mistake(capsys: Capture, plain: str) -> None:
    assert run(capsys, "negotiate", "--fence", plain)[0] == 2


def test_emit_qemu_without_asking_one(capsys: Capture, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    words = ["negotiate", "--json", "--report", plain, "--emit", "qemu"]
    assert run_json(capsys, *words)[0] == 2  # no QEMU to ask for its newest machine type
    status, document = run_json(capsys, *words, "--machine", "pc-q35-7.2")
    assert status == 0
    assert document["qemu"]["arguments"][:2] == ["-machine", "pc-q35-7.2"]
    assert document["qemu"]["cpu"].startswith("base,vendor=GenuineIntel,")


def test_check_by_contract_both_forms(capsys: Capture, tmp_path: Path, plain: str, rich: str) -> None:
    contract = Contract(
        FeatureSet.of("x86_64", {**PLAIN, "cpuid:0x1.0.ecx": PLAIN["cpuid:0x1.0.ecx"] | RDRAND})
    )
    binary, view = tmp_path / "contract", tmp_path / "contract.json"
    binary.write_bytes(contract.binary())
    view.write_text(json.dumps(contract.to_json()), "utf-8")
    for file in (binary, view):
        status, document = run_json(capsys, "check", "--json", "--report", plain, "--contract", str(file))
        assert status == 1
        assert [row["feature"] for row in document["blockers"]] == ["rdrand"]
        assert document["error"]["fits"] is False
        status, document = run_json(capsys, "check", "--json", "--report", rich, "--contract", str(file))
        assert (status, document["fits"]) == (0, True)


def test_check_judges_the_accept_set(capsys: Capture, tmp_path: Path) -> None:
    accept = {"cpuid:0x1.0.ecx": PLAIN["cpuid:0x1.0.ecx"] | RDRAND}
    file = report(tmp_path / "wide.json", PLAIN, accept=accept)
    assert run(capsys, "negotiate", "--report", file, "--require", "rdrand")[0] == 1
    assert run(capsys, "check", "--report", file, "--require", "rdrand")[0] == 0


def test_check_takes_either_a_contract_or_a_request(capsys: Capture, plain: str) -> None:
    assert run(capsys, "check", "--report", plain, "--contract", plain, "--max")[0] == 2


def test_what_negotiate_printed_is_a_contract_file(capsys: Capture, tmp_path: Path, plain: str) -> None:
    _, out, _ = run(capsys, "negotiate", "--json", "--report", plain)
    file = tmp_path / "answer.json"
    file.write_text(out, "utf-8")
    status, document = run_json(capsys, "contract", "--json", str(file))
    assert status == 0
    assert document["contract"] == json.loads(out)["contract"]


def test_an_edited_contract_is_refused(capsys: Capture, tmp_path: Path, plain: str) -> None:
    _, document = run_json(capsys, "negotiate", "--json", "--report", plain)
    document["contract"]["words"]["cpuid:0x1.0.ecx"] = "0xffffffff"
    file = tmp_path / "edited.json"
    file.write_text(json.dumps(document["contract"]), "utf-8")
    status, failure = run_json(capsys, "contract", "--json", str(file))
    assert status == 5
    assert failure["error"]["file"] == str(file)


def test_what_is_neither_digest_nor_file_is_a_mistake(capsys: Capture) -> None:
    assert run(capsys, "contract", "sha256:12")[0] == 2


# -- baseline, compare


def test_baseline_says_what_all_offer_and_who_holds_back(capsys: Capture, plain: str, rich: str) -> None:
    status, document = run_json(capsys, "baseline", "--json", plain, rich)
    held = {row["feature"]: row["held_back_by"] for row in document["held_back"]}
    assert status == 0
    assert document["words"]["cpuid:0x1.0.ecx"] == "0x81000000"
    assert held["rdrand"] == ["plain"]
    assert [row["host"] for row in document["hosts"]] == ["plain", "rich"]


def test_a_baseline_can_be_pinned(capsys: Capture, tmp_path: Path, plain: str, rich: str) -> None:
    _, out, _ = run(capsys, "baseline", "--fence", plain, rich)
    _, document = run_json(capsys, "baseline", "--json", plain, rich)
    assert Fence.parse(out).digest == document["digest"]


def test_two_vendors_have_no_baseline(capsys: Capture, tmp_path: Path, plain: str) -> None:
    other = report(tmp_path / "amd.json", {**PLAIN, **AMD})
    status, document = run_json(capsys, "baseline", "--json", plain, other)
    assert status == 1
    assert document["error"]["name"] == "org.kvmneg.Incompatible"
    assert document["blockers"][0]["because"] == "AuthenticAMD on amd, GenuineIntel on plain"


def test_compare_of_the_same_is_0(capsys: Capture, plain: str) -> None:
    status, document = run_json(capsys, "compare", "--json", plain, plain)
    assert (status, document["same"], document["differences"]) == (0, True, [])
    assert "error" not in document


def test_compare_names_what_differs_and_who_fits(capsys: Capture, plain: str, rich: str) -> None:
    status, document = run_json(capsys, "compare", "--json", plain, rich)
    rows = {row["feature"]: (row["a"], row["b"]) for row in document["differences"]}
    assert status == 1
    assert rows["rdrand"] == ("0x0", "0x1")
    assert rows["phys-bits"] == ("0x2e", "0x34")
    assert document["a_fits_b"] is True
    assert document["b_fits_a"] is False
    assert {"rdrand", "phys-bits"} <= {row["feature"] for row in document["blockers_back"]}
    assert {row["dimension"]: row["b"] for row in document["combo"]} == {
        "kernel": "6.12",
        "modules.kvm.ignore_msrs": "N",
    }


def test_compare_for_people_groups_by_word(capsys: Capture, plain: str, rich: str) -> None:
    status, out, _ = run(capsys, "compare", plain, rich)
    lines = [line for line in out.splitlines() if line.startswith("cpuid:0x1.0.ecx")]
    assert status == 1
    assert len(lines) == 1
    assert "only B" in lines[0]
    assert "rdrand" in lines[0]
    assert "phys-bits  46 on A, 52 on B" in out


def test_compare_takes_contracts_and_fences_too(capsys: Capture, tmp_path: Path, plain: str) -> None:
    granted = Report.loads(Path(plain).read_bytes()).offer
    fence, contract = tmp_path / "fence", tmp_path / "contract"
    fence.write_text(Fence(granted).text(), "utf-8")
    contract.write_bytes(Contract(granted).binary())
    for other in (fence, contract):
        assert run(capsys, "compare", plain, str(other))[0] == 0


def test_two_kernels_with_the_same_features_are_the_same(capsys: Capture, tmp_path: Path) -> None:
    a = report(tmp_path / "a.json", PLAIN, combo={"kernel": "6.1"})
    b = report(tmp_path / "b.json", PLAIN, combo={"kernel": "6.12"})
    status, document = run_json(capsys, "compare", "--json", a, b)
    assert status == 0
    assert document["combo"] == [{"dimension": "kernel", "a": "6.1", "b": "6.12"}]


# -- bad input files


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"format": "kvmneg.report/1", "architecture": "x86_64", "offer": {', "cut short"),
        (b'{"format": "kvmneg.report/2", "architecture": "x86_64", "offer": {}}', "newer"),
        (b'{"format": "kvmneg.report/1", "architecture": "riscv", "offer": {}}', "architecture"),
        (
            b'{"format": "kvmneg.report/1", "architecture": "x86_64", "offer": {"nonsense": "0x1"}}',
            "no word's address",
        ),
        (b"\x00\xff" * 5 * 1024 * 1024, "larger than"),
        (b"[]", "not a report"),
    ],
)
def test_a_bad_report_is_5_and_named(capsys: Capture, tmp_path: Path, content: bytes, what: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    for words in (["host", "--report"], ["negotiate", "--report"], ["check", "--report"], ["baseline"]):
        status, document = run_json(capsys, *words, str(file), "--json")
        assert status == 5
        assert document["error"]["file"] == str(file)
        assert what in document["error"]["message"]


def test_a_missing_file_is_5_and_named(capsys: Capture) -> None:
    for words in (["host", "--report"], ["compare", "/nonexistent/b"], ["import", "cpuid-raw"], ["baseline"]):
        status, document = run_json(capsys, *words, "/nonexistent/a", "--json")
        assert status == 5
        assert "/nonexistent/" in document["error"]["message"]


def test_a_wrong_fence_is_named_by_line(capsys: Capture, tmp_path: Path, plain: str) -> None:
    file = tmp_path / "fence"
    file.write_text("architecture x86_64\ncpuid:0x7.0.ebx 0b12\n", "utf-8")
    status, document = run_json(capsys, "compare", "--json", plain, str(file))
    assert status == 5
    assert document["error"]["line"] == 2


# -- import


def test_import_prints_a_report(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "raw"
    file.write_text(
        "CPU 0:\n   0x00000000 0x00: eax=0x00000001 ebx=0x756e6547 ecx=0x6c65746e edx=0x49656e69\n", "utf-8"
    )
    status, out, err = run(capsys, "import", "cpuid-raw", str(file), "--host", "box")
    assert status == 0
    assert Report.loads(out.encode()).host == "box"
    assert "do not pin" in err


# -- the frame


def test_no_command_and_unknown_ones_are_2(capsys: Capture) -> None:
    for words in ([], ["nonsense"], ["--nonsense", "host"], ["--socket"]):
        assert run(capsys, *words)[0] == 2


def test_help_lists_every_command(capsys: Capture) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"\n  {command} " in out for command in cli.COMMANDS)


def test_watch_is_one_object_a_line_to_the_end(capsys: Capture) -> None:
    status, out, _ = run(capsys, "watch", "--json", "--socket", "/nonexistent/socket")
    assert status == 4
    (line,) = out.splitlines()
    assert json.loads(line)["error"]["name"] == "org.kvmneg.Unreachable"


def test_the_version(capsys: Capture) -> None:
    assert run(capsys, "--version")[1] == f"kvmneg {kvmneg.__version__}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(capsys: Capture, command: str) -> None:
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"usage: kvmneg {command}" in out


def test_the_help_of_fence_tells_its_verbs(capsys: Capture) -> None:
    out = run(capsys, "fence", "--help")[1]
    assert {"show", "pin", "unpin", "history"} <= {
        line.split()[0] for line in out.splitlines() if line.strip()
    }


def test_an_option_name_is_not_guessed(capsys: Capture, plain: str) -> None:
    assert run(capsys, "host", "--rep", plain)[0] == 2


@pytest.mark.parametrize(
    "words",
    [["negotiate"], ["check"], ["fence", "show"], ["fence", "history"], ["contract", "0" * 64], ["watch"]],
)
def test_without_a_daemon_it_is_4(capsys: Capture, words: list[str]) -> None:
    for frame in (
        ["--socket", "/nonexistent/socket", "--json", *words],
        [*words, "--json", "--socket", "/nonexistent/socket"],
    ):
        status, document = run_json(capsys, *frame)
        assert status == 4
        assert document["error"]["name"] == "org.kvmneg.Unreachable"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoKvm("no"), 3),
        (NotPermitted("no"), 6),
        (StoreError("no"), 7),
        (KvmFault("KVM_CREATE_VM", errno.EIO), 7),
        (ZeroDivisionError("oops"), 70),
        (OSError(errno.ENOENT, "gone", "/some/file"), 70),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_failure_has_its_exit_status(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("kvmneg.cli.sources.report_or_host", fail)
    assert run(capsys, "host")[0] == status


def test_an_internal_error_leaves_json_and_the_traceback(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("kvmneg.cli.sources.report_or_host", fail)
    status, out, err = run(capsys, "host", "--json")
    assert status == 70
    assert json.loads(out)["error"]["name"] == "org.kvmneg.Internal"
    assert "Traceback" in err


def _command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "kvmneg.cli", *words]


def test_a_closed_pipe_is_quiet(plain: str) -> None:
    import os

    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        _command("features", "--report", plain), stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_under_the_output_is_told(plain: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            _command("host", "--report", plain), stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 7
    assert b"No space left" in done.stderr


def test_output_to_a_file_has_no_colours(plain: str) -> None:
    done = subprocess.run(_command("host", "--report", plain), capture_output=True, check=True)
    assert b"\x1b" not in done.stdout


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_are_for_terminals_and_respect_no_color(plain: str, no_color: str, coloured: bool) -> None:
    import os
    import pty

    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": no_color}
    with subprocess.Popen(_command("host", "--report", plain), stdout=child, env=environment) as process:
        os.close(child)
        shown = b""
        try:
            while data := os.read(parent, 65536):
                shown += data
        except OSError:
            pass  # a terminal's end of file
    os.close(parent)
    assert process.returncode == 0
    assert (b"\x1b[" in shown) is coloured


def test_what_the_encoding_lacks_does_not_stop_the_output(plain: str) -> None:
    import os

    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        _command("compare", plain, plain), capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0


def test_host_json_imports_nothing_heavy(plain: str) -> None:
    """Start-up is a feature: what costs milliseconds may not creep into it."""
    code = (
        "import sys; from kvmneg.cli import main; main(['host', '--json', '--report', sys.argv[1]]); "
        "print(sorted(set(sys.modules) & {'dataclasses', 'inspect', 'asyncio', 'logging', 'pathlib', 'hashlib', "
        "'tomllib', 'subprocess', 'shutil', 'textwrap', 'kvmneg.features.catalog._x86_64_names'}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, plain], capture_output=True, text=True, check=True
    )
    assert done.stderr == "[]\n"


def test_files_over_the_report_limit_are_not_read_whole(capsys: Capture) -> None:
    status, document = run_json(capsys, "host", "--json", "--report", "/dev/zero")
    assert status == 5
    assert "larger than" in document["error"]["message"]


# -- arguments that were meant otherwise


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["negotiate", "--vm", ""], "--begin and --vm"),
        (["negotiate", "--require", ""], "names no feature"),
        (["negotiate", "--exact", " , "], "names no feature"),
        (["negotiate", "--machine", "pc-q35-7.2"], "--emit"),
        (["negotiate", "--accel", "tcg"], "--emit"),
        (["host", "--kvm", "/dev/kvm"], "--kvm"),
        (["features", "--kvm", "/dev/kvm"], "--kvm"),
        (["check", "--socket", ""], "empty"),
    ],
)
def test_an_option_that_would_be_ignored_is_a_mistake(
    capsys: Capture, plain: str, words: list[str], told: str
) -> None:
    status, document = run_json(capsys, *words, "--report", plain, "--json")
    assert status == 2
    assert told in document["error"]["message"]


@pytest.mark.parametrize("value", ["0", "-1", "1001", "x", "1e2", "9" * 30, "٣"])
def test_a_number_out_of_its_bounds_is_named_with_them(capsys: Capture, value: str) -> None:
    status, document = run_json(capsys, "fence", "history", "--json", "--limit", value)
    assert status == 2
    assert "from 1 to 1000" in document["error"]["message"]


def test_spaces_around_names_are_no_part_of_them(capsys: Capture, rich: str) -> None:
    status, document = run_json(capsys, "negotiate", "--json", "--report", rich, "--require", " rdrand, pni ")
    assert status == 0
    assert int(document["contract"]["words"]["cpuid:0x1.0.ecx"], 16) & (RDRAND | 1) == RDRAND | 1


def test_an_empty_name_of_a_file_is_a_mistake(capsys: Capture) -> None:
    assert run(capsys, "host", "--report", "")[0] == 2
    assert run(capsys, "fence", "pin", "--from", "", "--reason", "x")[0] == 2


def test_a_file_that_is_no_report_says_who_writes_one(capsys: Capture, tmp_path: Path) -> None:
    fence, contract = tmp_path / "fence", tmp_path / "contract"
    granted = FeatureSet.of("x86_64", PLAIN)
    fence.write_text(Fence(granted).text(), "utf-8")
    contract.write_bytes(Contract(granted).binary())
    for file in (fence, contract):
        status, document = run_json(capsys, "baseline", str(file), "--json")
        assert status == 5
        assert "kvmneg host --json" in document["error"]["hint"]


def test_a_fence_of_a_file_is_not_called_pinned(
    capsys: Capture, tmp_path: Path, plain: str, rich: str
) -> None:
    fence = tmp_path / "mine.fence"
    fence.write_text(Fence(FeatureSet.of("x86_64", PLAIN)).text(), "utf-8")
    words = ["negotiate", "--report", rich, "--fence", str(fence)]
    _, document = run_json(capsys, *words, "--optional", "rdrand", "--json")
    (row,) = (row for row in document["not_granted"] if row["feature"] == "rdrand")
    assert row["missing_on"] == f"fence {fence}"
    assert "pinned" not in row["because"]
    _, out, _ = run(capsys, *words)
    assert f"fence       {fence}\n" in out


def test_check_names_the_host_it_judged(capsys: Capture, tmp_path: Path, plain: str, rich: str) -> None:
    contract = tmp_path / "contract"
    contract.write_bytes(Contract(Report.loads(Path(rich).read_bytes()).offer).binary())
    assert "may come to rich\n" in run(capsys, "check", "--report", rich, "--contract", str(contract))[1]
    assert (
        "may not come to plain\n" in run(capsys, "check", "--report", plain, "--contract", str(contract))[2]
    )


def test_compare_tells_once_what_only_one_side_says(capsys: Capture, tmp_path: Path) -> None:
    a = report(tmp_path / "a.json", PLAIN, combo={"kernel": "6.1", "smt": "on", "bios": "2.19"})
    b = report(tmp_path / "b.json", PLAIN, combo={"kernel": "6.12"})
    out = run(capsys, "compare", a, b)[1]
    assert [line.split() for line in out.splitlines() if "kernel" in line] == [["kernel", "6.1", "6.12"]]
    assert "  only A says  smt bios\n" in out


# -- terminals, streams, encodings


def test_what_a_file_says_does_not_reach_the_terminal_raw(capsys: Capture, tmp_path: Path) -> None:
    evil = tmp_path / "a\x1b]0;owned\x07\u202e.json"
    file = report(tmp_path / "evil.json", PLAIN, combo={"kernel": "6.1\x1b[2J\x9b31m"})
    text = Path(file).read_text("utf-8").replace('"host": "evil"', '"host": "\\u001b[31mred"')
    evil.write_text(text, "utf-8")
    for words in (
        ["host", "--report", str(evil)],
        ["compare", str(evil), file],
        ["host", "--report", f"{evil}?"],
    ):
        _, out, err = run(capsys, *words)
        assert [c for c in out + err if not c.isprintable() and c != "\n"] == []


@pytest.mark.parametrize("columns", ["40", "64"])
def test_a_narrow_terminal_gets_narrow_lines(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, plain: str, rich: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    # what cannot be broken: digests, paths, long names
    for words in (
        ["host", "--report", rich],
        ["negotiate", "--report", rich],
        ["negotiate", "--help"],
        ["--help"],
    ):
        _, out, _ = run(capsys, *words)
        long = [line for line in out.splitlines() if len(line) > int(columns)]
        assert [line for line in long if " " in line.strip() and "sha256:" not in line] == [], words
    monkeypatch.setenv("COLUMNS", "nonsense")
    assert max(map(len, run(capsys, "host", "--report", rich)[1].splitlines())) > 64


def _environment(**other: str) -> dict[str, str]:
    import os

    # the locale of a bare chroot, without the ways in which Python makes it UTF-8 after all
    bare = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": "/".join(kvmneg.__file__.split("/")[:-2]),
    }
    return {**os.environ, **bare, **other}


@pytest.mark.parametrize("words", [["--help"], ["negotiate", "--help"], ["fence", "pin", "--help"]])
def test_help_needs_no_utf8(words: list[str]) -> None:
    done = subprocess.run(_command(*words), capture_output=True, env=_environment(), check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"usage: kvmneg")


def test_json_is_json_in_every_locale(tmp_path: Path) -> None:
    file = report(tmp_path / "r.json", PLAIN, combo={"bios": "geprüft"})
    for environment in (
        _environment(),
        _environment(PYTHONIOENCODING="latin-1"),
        _environment(PYTHONUTF8="1"),
    ):
        done = subprocess.run(
            _command("host", "--json", "--report", file), capture_output=True, env=environment, check=True
        )
        assert json.loads(done.stdout.decode("utf-8"))["combo"]["bios"] == "geprüft"


def test_json_holds_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    for environment in (_environment(), _environment(PYTHONUTF8="1")):
        command = [word.encode() for word in _command("host", "--json", "--report")]
        done = subprocess.run([*command, b"/no/\xff"], capture_output=True, env=environment, check=False)
        assert done.returncode == 5
        assert json.loads(done.stdout.decode("utf-8"))["error"]["file"] == "/no/\udcff"


def test_a_reason_is_text_in_every_locale(tmp_path: Path) -> None:
    command = [
        word.encode() for word in _command("fence", "unpin", "--json", "--socket", "/nonexistent", "--reason")
    ]
    for reason, status in (("für".encode(), 4), (b"\xff", 2)):
        done = subprocess.run([*command, reason], capture_output=True, env=_environment(), check=False)
        assert done.returncode == status, done.stdout


def _closed(number: int, *words: str) -> subprocess.CompletedProcess[bytes]:
    """Run with one standard stream closed, as `kvmneg … N>&-` does."""
    script = f'exec "$@" {number}<&-' if number == 0 else f'exec "$@" {number}>&-'
    return subprocess.run(["sh", "-c", script, "sh", *_command(*words)], capture_output=True, check=False)


def test_a_closed_stream_is_no_bug(plain: str) -> None:
    assert _closed(1, "host", "--report", plain).returncode == 0
    assert _closed(1, "host", "--json", "--report", "/nonexistent").returncode == 5
    assert _closed(2, "host", "--report", "/nonexistent").returncode == 5
    done = _closed(0, "import", "cpuid-raw", "-")
    assert (done.returncode, b"Traceback" in done.stderr) == (5, False)


def test_a_failure_that_finds_no_room_keeps_its_status() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            _command("host", "--json", "--report", "/nonexistent"),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert done.returncode == 5
        assert b"cannot be read" in done.stderr and b"No space left" in done.stderr
        both = subprocess.run(
            _command("host", "--report", "/nonexistent"), stdout=full, stderr=full, check=False
        )
        assert both.returncode == 5
        help_ = subprocess.run(_command("host", "--help"), stdout=full, stderr=subprocess.PIPE, check=False)
        assert help_.returncode == 7


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize(
    "command",
    [("check", "--level", "x86-64-v1"), ("check", "--level", "x86-64-v3"), ("negotiate", "--max")],
    ids=" ".join,
)
def test_a_report_comes_by_a_pipe(plain: str, command: tuple[str, ...], more: tuple[str, ...]) -> None:
    """As `--report <(kvmneg host --json)`: what is read of it is gone, however often its name is opened."""

    def said(path: str, *fds: int) -> tuple[int, str]:
        words = [sys.executable, "-P", "-m", "kvmneg.cli", *command, *more, "--report", path]
        done = subprocess.run(words, capture_output=True, text=True, check=False, pass_fds=fds)
        return done.returncode, done.stdout + done.stderr

    expected = said(plain)
    assert expected[0] in (0, 1)
    with subprocess.Popen(["cat", plain], stdout=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        assert said(f"/dev/fd/{cat.stdout.fileno()}", cat.stdout.fileno()) == expected
