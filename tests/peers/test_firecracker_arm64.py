# SPDX-License-Identifier: LGPL-2.1-or-later
"""Published Firecracker fingerprints of a Neoverse N1 under 5.10, 6.1 and 6.18: imported, compared, taken back.

What blocks is written down by hand, from the fingerprints' own bitmaps.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kvmneg.emit import firecracker_fingerprint
from kvmneg.emit.imported import Measured
from kvmneg.features.report import Report
from kvmneg.policy import levelling, rollback

REGISTERS = {"5.10": 312, "6.1": 242, "6.18": 254}
ISAR0, ISAR1 = "arm64:0x603000000013c030", "arm64:0x603000000013c031"


def _folder() -> Path:
    folder = os.environ.get("KVMNEG_PEER_DATA")
    if not folder:
        pytest.skip("KVMNEG_PEER_DATA is not set")
    return Path(folder) / "firecracker"


def n1(kernel: str) -> Report:
    path = _folder() / f"fingerprint_ARM_NEOVERSE_N1_{kernel}host.json.gz"
    return firecracker_fingerprint.read(path.read_bytes(), Measured(str(path), kernel))


@pytest.mark.parametrize("kernel", REGISTERS)
def test_a_fingerprint_is_a_report(kernel: str) -> None:
    report = Report.from_json(n1(kernel).to_json())
    assert report.architecture == "arm64" and report.combo["kernel"].startswith(f"{kernel}.")
    assert len(report.registers) == REGISTERS[kernel]
    assert report.identity == {"vendor": "ARM", "midr": "0x413fd0c1"}
    assert report.unclassified() == {}
    assert levelling.by_table(report)


def test_the_published_template_levels_to_what_n1_has() -> None:
    """V1N1 sets on a V1 what an N1 has not: the bits it sets are N1's own."""
    template = json.loads((_folder() / "V1N1.json").read_text("utf-8"))
    report = n1("6.1")
    assert (hex(report.offer.value(ISAR0)), hex(report.offer.value(ISAR1))) == ("0x100010211120", "0x100001")
    fixed = 0
    for row in template["reg_modifiers"]:
        if int(row["addr"], 16) in (0x603000000013C030, 0x603000000013C031):
            bits = row["bitmap"].removeprefix("0b")
            own = f"{report.offer.value('arm64:' + row['addr']):064b}"
            assert all(bit in ("x", is_) for bit, is_ in zip(bits, own, strict=True))
            fixed += 64 - bits.count("x")
    assert fixed > 40


def test_n1_can_go_back_from_6_18_to_6_1_under_a_fence() -> None:
    answer = rollback.judge(n1("6.18"), n1("6.1"))
    assert answer.fence is not None
    unknown = {f"arm64:{0x6020000000110000 + n:#x}" for n in range(3, 14)} | {"arm64:0x6030000000160003"}
    assert {blocker.feature for blocker in answer.unfenced} == unknown | {
        "psci-version", "aa64dfr0-debugver", "clidr-ctype3", "clidr-loc", "clidr-icb", "ccsidr-0", "ccsidr-1",
        "ccsidr-2",
    }  # fmt: skip
    assert {one.word() for one in answer.dropped} == unknown
    assert any("not measured" in line for line in answer.scope)


def test_n1_cannot_go_back_from_6_1_to_5_10() -> None:
    """5.10 shows profiling, a newer debug version and a PMU, and takes nothing else.

    It knows no bitmaps: TRNG and the vendor's calls came after it, so 0 there is what 5.10 is, but stolen time it has
    offered to every guest since 5.10 itself, so a guest that was not told must not go. OSLSR is 8 until a debugger.
    """
    answer = rollback.judge(n1("6.1"), n1("5.10"))
    assert answer.fence is None
    assert {blocker.feature for blocker in answer.blockers} == {
        "aa64dfr0-debugver", "aa64dfr0-pmuver", "aa64dfr0-pmsver", "dfr0-perfmon", "arm64:0x6030000000160001",
    }  # fmt: skip


def test_an_upgrade_removes_registers_too() -> None:
    """5.10 to 6.1 drops 74 and adds four."""
    older, newer = set(n1("5.10").registers), set(n1("6.1").registers)
    assert (len(older - newer), len(newer - older)) == (74, 4)
    assert rollback.judge(n1("6.1"), n1("6.18")).fence is not None
