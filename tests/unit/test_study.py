# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts of two vendors, for study: what XSAVE layout leaves of them, why, and that nothing can be pinned by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from strategies import AMD, CATALOG, INTEL

from kvmneg import cli
from kvmneg.features.report import Report
from kvmneg.policy import pool

if TYPE_CHECKING:
    from kvmneg.policy.pool import Holder

Capture = pytest.CaptureFixture[str]

# Both hosts can all of it: AVX, AVX2, AVX-512 F DQ IFMA CD BW VL, VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ, PKU.
COMMON = {
    "cpuid:0x0.0.eax": 0x14,
    "cpuid:0x1.0.ecx": 1 | 1 << 9 | 1 << 12 | 1 << 19 | 1 << 20 | 1 << 23 | 1 << 26 | 1 << 28,
    "cpuid:0x1.0.edx": 0x0F8BFBFF,
    "cpuid:0x7.0.ebx": 1 << 5 | 1 << 16 | 1 << 17 | 1 << 21 | 1 << 28 | 1 << 30 | 1 << 31,
    "cpuid:0x7.0.ecx": 1 << 1 | 1 << 3 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14,
    "cpuid:0x7.0.edx": 0,
    "cpuid:0xd.0.eax": 0x2E7,
    "cpuid:0xd.0.ecx": 0xA88,
    "cpuid:0xd.2.eax": 0x100,
    "cpuid:0xd.2.ebx": 0x240,
    "cpuid:0xd.5.eax": 0x40,
    "cpuid:0xd.6.eax": 0x200,
    "cpuid:0xd.7.eax": 0x400,
    "cpuid:0xd.9.eax": 0x8,
}
# Offsets of the components: Intel SDM vol. 1 chapter 13 and AMD APM vol. 3 appendix E, as CPUs of each answer.
PLACES = {
    "intel": {5: 0x440, 6: 0x480, 7: 0x680, 9: 0xA80},
    "amd": {5: 0x340, 6: 0x380, 7: 0x580, 9: 0x980},
}
VENDOR = {"intel": ("GenuineIntel", INTEL), "amd": ("AuthenticAMD", AMD)}
AVX512 = {
    "avx512f", "avx512dq", "avx512ifma", "avx512cd", "avx512bw", "avx512vl", "avx512vbmi", "avx512vbmi2",
    "avx512vnni", "avx512bitalg", "avx512-vpopcntdq", "xcr0-opmask", "xcr0-zmm-hi256", "xcr0-hi16-zmm",
}  # fmt: skip
PKU = {"pku", "xcr0-pkru"}
REASONS = {
    "opmask": "opmask offset 0x440 on intel, 0x340 on amd",
    "zmm-hi256": "zmm-hi256 offset 0x480 on intel, 0x380 on amd",
    "hi16-zmm": "hi16-zmm offset 0x680 on intel, 0x580 on amd",
    "pkru": "pkru offset 0xa80 on intel, 0x980 on amd",
}


def host(name: str, kind: str = "", **changes: int) -> Report:
    vendor, letters = VENDOR[kind or name]
    places = {f"cpuid:0xd.{number}.ebx": at for number, at in PLACES[kind or name].items()}
    offer = COMMON | places | dict(zip(CATALOG.equal_words, letters, strict=True))
    offer |= {f"cpuid:{word.replace('_', '.')}": value for word, value in changes.items()}
    measured = {"host": name, "source": "recorded"}
    return Report("x86_64", measured=measured, combo={}, identity={"vendor": vendor}, offer=offer)


def held(reports: list[Report]) -> dict[str, Holder]:
    return {holder.feature: holder for holder in pool.holders(reports, pool.study(reports))}


def test_both_hosts_have_it_all() -> None:
    for name in VENDOR:
        offer = host(name).offer
        assert all(offer.field(feature) for feature in AVX512 | PKU | {"avx", "avx2"}), name


def test_xsave_layout_takes_avx512_and_pku_and_what_depends_on_them() -> None:
    met = pool.study([host("intel"), host("amd")])
    assert {conflict.word for conflict in met.conflicts} == set(CATALOG.equal_words)
    assert {feature: met.field(feature) for feature in AVX512 | PKU} == dict.fromkeys(AVX512 | PKU, 0)
    assert met.field("avx") == met.field("avx2") == met.field("xsave") == met.field("fma") == 1
    assert met.value("cpuid:0xd.0.eax") == 0x7
    assert not any(
        word.startswith(("cpuid:0xd.5", "cpuid:0xd.6", "cpuid:0xd.7", "cpuid:0xd.9")) for word in met.words
    )


def test_each_loss_says_which_layout_differs() -> None:
    found = held([host("intel"), host("amd")])
    assert {"xsave-pkru-offset", "xsave-opmask-offset", *AVX512, *PKU} <= set(found)
    for feature in AVX512:
        because = found[feature].because
        assert because.startswith("XSAVE layout differs: ") and because.count("XSAVE layout") == 1
        assert all(REASONS[name] in because for name in ("opmask", "zmm-hi256", "hi16-zmm")), feature
        assert REASONS["pkru"] not in because
    for feature in PKU:
        assert found[feature].because == f"XSAVE layout differs: {REASONS['pkru']}"


def test_one_vendor_and_one_layout_have_no_such_reason() -> None:
    reports = [
        host("a", "intel"),
        host("b", "intel", **{"0x7_0_ebx": COMMON["cpuid:0x7.0.ebx"] & ~(1 << 31)}),
    ]
    found = held(reports)
    assert "avx512vl" in found and {holder.because for holder in found.values()} == {""}
    assert pool.study(reports) == pool.baseline(reports) and not pool.study(reports).conflicts


def test_layouts_of_one_vendor_are_told_as_well() -> None:
    """Nothing of it is about vendors: a CPU whose component lies elsewhere has it nowhere in the pool."""
    reports = [host("a", "intel"), host("b", "intel", **{"0xd_9_ebx": 0xAC0, "0xd_0_ecx": 0xB00})]
    found = held(reports)
    assert found["pku"].because == "XSAVE layout differs: pkru offset 0xa80 on a, 0xac0 on b"
    assert pool.baseline(reports).field("avx512f") == 1


def test_processor_trace_that_differs_says_where() -> None:
    trace = {"0x7_0_ebx": COMMON["cpuid:0x7.0.ebx"] | 1 << 25, "0x14_0_ebx": 0xF, "0x14_0_ecx": 7}
    reports = [host("a", "intel", **trace), host("b", "intel", **trace, **{"0x14_0_eax": 1})]
    assert held(reports)["intel-pt"].because == "leaf 0x14 differs: cpuid:0x14.0.eax 0x0 on a, 0x1 on b"


# -- the commands ------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = []
    for name in VENDOR:
        paths.append(str(tmp_path / f"{name}.json"))
        Path(paths[-1]).write_text(json.dumps(host(name).to_json()), "utf-8")
    return paths


def run(capsys: Capture, *words: str) -> tuple[int, str, str]:
    status = cli.main(words)
    told = capsys.readouterr()
    return status, told.out, told.err


def run_json(capsys: Capture, *words: str) -> tuple[int, Any]:
    status, out, _err = run(capsys, *words, "--json")
    return status, json.loads(out)


def test_two_vendors_are_an_error_that_names_both_and_their_hosts(capsys: Capture, files: list[str]) -> None:
    status, out, err = run(capsys, "baseline", *files)
    assert (status, out) == (1, "")
    assert "these hosts have no common baseline: AuthenticAMD on amd, GenuineIntel on intel" in err
    assert "--ignore-vendor" in err
    status, out, err = run(capsys, "baseline", "--fence", *files)
    assert (status, out) == (1, "") and "no common baseline" in err


def test_a_study_is_marked_in_every_form(capsys: Capture, files: list[str]) -> None:
    status, document = run_json(capsys, "baseline", "--ignore-vendor", *files)
    assert status == 0
    assert document["format"] == "kvmneg.study/1"
    assert document["study"] == {"vendors": {"AuthenticAMD": ["amd"], "GenuineIntel": ["intel"]}}
    assert document["fence"] is None
    assert not any(
        word.startswith("cpuid:0x0.0.e") and word != "cpuid:0x0.0.eax" for word in document["words"]
    )
    assert any("neither pinned nor negotiated" in line for line in document["scope"])
    reasons = {row["feature"]: row["because"] for row in document["held_back"]}
    assert reasons["pku"] == f"XSAVE layout differs: {REASONS['pkru']}"
    status, out, _ = run(capsys, "baseline", "--ignore-vendor", *files)
    assert status == 0 and out.startswith("STUDY, no baseline: AuthenticAMD on amd, GenuineIntel on intel.")
    assert REASONS["pkru"] in " ".join(out.split())


def test_nothing_is_pinned_or_negotiated_by_a_study(
    capsys: Capture, files: list[str], tmp_path: Path
) -> None:
    status, out, _ = run(capsys, "baseline", "--ignore-vendor", "--json", *files)
    study = tmp_path / "study.json"
    study.write_text(out, "utf-8")
    for words in (
        ("baseline", "--ignore-vendor", "--fence", *files),
        ("fence", "pin", "--from", str(study), "--reason", "x", "--socket", str(tmp_path / "none")),
        ("negotiate", "--report", files[0], "--fence", str(study)),
        ("check", "--report", files[0], "--contract", str(study)),
        ("negotiate", "--report", str(study)),
        ("baseline", str(study)),
    ):
        status, out, err = run(capsys, *words)
        assert status in (2, 4, 5) and not out, words
        assert "study" in err or "not allowed with" in err, err


def test_of_one_vendor_nothing_is_a_study(capsys: Capture, files: list[str]) -> None:
    _, plain = run_json(capsys, "baseline", files[0], files[0])
    _, ignoring = run_json(capsys, "baseline", "--ignore-vendor", files[0], files[0])
    assert plain == ignoring and plain["study"] is None and "format" not in plain and plain["fence"]


def test_compare_goes_on_without_the_vendor_and_says_no(capsys: Capture, files: list[str]) -> None:
    status, document = run_json(capsys, "compare", "--ignore-vendor", *files)
    assert status == 1 and not document["same"]
    assert document["study"] == {"vendors": "GenuineIntel on A, AuthenticAMD on B"}
    assert (document["a_fits_b"], document["b_fits_a"]) == (False, False)
    offsets = {f"xsave-{name}-offset" for name in REASONS}
    assert {row["feature"] for row in document["differences"]} == offsets
    assert {row["feature"] for row in document["blockers"]} == offsets
    _, whole = run_json(capsys, "compare", *files)
    assert {row["feature"] for row in whole["differences"]} == offsets | {"vendor-1", "vendor-2", "vendor-3"}
    _, out, _ = run(capsys, "compare", "--ignore-vendor", *files)
    assert out.startswith("STUDY, the vendors differ: GenuineIntel on A, AuthenticAMD on B")
    assert "a guest of A fits B: no, by its vendor already; besides:" in out
