# SPDX-License-Identifier: LGPL-2.1-or-later
"""Proof without a KVM: grades from what guests saw, and the table of instructions, assembled."""

from __future__ import annotations

import platform
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from kvmneg.features import catalog

if platform.machine() == "x86_64":
    from kvmneg.host import guest_x86, hidden_x86, proof_x86, sight
    from kvmneg.host.instructions_x86 import BASES, CODE, INSTRUCTIONS
    from kvmneg.host.tables import CpuidEntry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="these words are x86's")

BITS = "cpuid:0x7.0.ebx"  # every feature in it is a bit
NUMBER = "cpuid:0x80000008.0.eax"  # address widths


@pytest.mark.parametrize(
    ("shown", "seen", "grade"),
    [
        (0b0110, (0b0110, 0b0110, 0b0110), "honoured"),
        (0b0110, (None, 0b0110, None), "honoured"),
        (0b1110, (0b0110, 0b0110, 0b0110), "replaced"),  # KVM itself says so
        (0b1110, (0b1110, 0b1110, 0b1111), "leaks"),  # and does not say all
        (0b0110, (0b0110, 0b0110, 0b1110), "leaks"),
        (0b0110, (0b1110, 0b0010, 0b0110), "leaks"),
        (0b0110, (0b0110, 0b0010, 0b0110), "replaced"),
        (0b0110, (None, None, None), "untested"),
    ],
)
def test_grade(shown: int, seen: Sequence[int | None], grade: str) -> None:
    assert proof_x86.grade_of(BITS, 0b1111, 0b0110, shown, seen) == grade
    beside = [None if one is None else one | 0x100 for one in seen]
    assert proof_x86.grade_of(BITS, 0b1111, 0b0110, shown | 0x100, beside) == grade  # not compared


def test_grade_of_numbers_and_msrs() -> None:
    assert proof_x86.grade_of(NUMBER, 0xFFFF, 0x3028, 0x3028, (0x302F,)) == "replaced"
    assert proof_x86.grade_of(NUMBER, 0, 0x3028, 0, (0x302F,)) == "honoured"
    assert proof_x86.grade_of("msr:0x10a", 0xFF, 1, 1, (None, None, None)) == "honoured"  # hidden altogether
    assert proof_x86.grade_of("msr:0x10a", 0xFF, 1, None, (None, None, None)) == "untested"
    assert proof_x86.grade_of("msr:0x10a", 0xFF, 1, 1, (None, 3, None)) == "leaks"


def test_xcr0() -> None:
    def entry(eax: int, edx: int = 0) -> list[CpuidEntry]:
        return [CpuidEntry(0xD, 0, 1, eax, 0, 0, edx)]

    assert proof_x86.xcr0_of([]) == 0
    assert proof_x86.xcr0_of(entry(0)) == 0
    assert proof_x86.xcr0_of(entry(0xE7)) == 0xE7
    assert proof_x86.xcr0_of(entry(0x600E7)) == 0xE7  # AMX needs permission first
    assert proof_x86.xcr0_of(entry(7, 0x40000000)) == 0x40000000_00000007


@pytest.mark.parametrize(
    ("outcome", "value", "ignoring", "found"),
    [
        ("FAULTED", 0, False, (True, False)),
        ("FAULTED", 0, True, (True, False)),
        ("ANSWERED", 0, False, (False, False)),
        ("ANSWERED", 0, True, (True, True)),  # what KVM answers where it would refuse
        ("ANSWERED", 1 << 32, True, (False, False)),  # and this it never does
        ("ENDED", 0, True, None),
        ("OPEN", 0, True, None),
    ],
)
def test_what_came_of_an_msr(
    outcome: str, value: int, ignoring: bool, found: tuple[bool, bool] | None
) -> None:
    answer = guest_x86.Answer(getattr(guest_x86, outcome), 13, value & 0xFFFF_FFFF, 0, 0, value >> 32)
    assert hidden_x86.judged(answer, ignoring=ignoring) == found


def test_hyper_v_msrs_by_feature() -> None:
    """A few by hand (Hyper-V TLFS, chapter 12); each is of one feature, which is in CPUID."""
    msrs = hidden_x86.hyperv_msrs()
    assert msrs["hv-hypercall"] == (0x40000000, 0x40000001)
    assert msrs["hv-vpindex"] == (0x40000002,)
    assert msrs["hv-frequency-msrs"] == (0x40000022, 0x40000023)
    assert msrs["hv-crash"] == tuple(range(0x40000100, 0x40000106))
    assert sum(map(len, msrs.values())) == len({msr for each in msrs.values() for msr in each}) == 28
    names = catalog.names("x86_64")
    assert {names.feature(name).word for name in msrs} == {
        "hyperv:0x40000003.0.eax",
        "hyperv:0x40000003.0.edx",
    }


def test_features_of_instructions() -> None:
    names = catalog.names("x86_64")
    assert len(CODE) == len(INSTRUCTIONS)
    for feature, code in CODE.items():
        assert names.feature(feature).name == feature
        assert names.feature(feature).width == 1
        assert len(code) <= guest_x86.CODE_BYTES
    assert set(BASES) <= set(CODE)
    for feature in hidden_x86.PARAVIRTUAL_MSRS:
        assert names.feature(feature).word == sight.PARAVIRTUAL


def test_instructions_assemble_to_their_bytes(tmp_path: Path) -> None:
    """By GNU as, which has read the manuals too."""
    if not shutil.which("as") or not shutil.which("objcopy"):
        pytest.skip("binutils is not installed")
    source, built, flat = (tmp_path / name for name in ("code.s", "code.o", "code.bin"))
    lines = [".intel_syntax noprefix"]
    for _, text, _ in INSTRUCTIONS:
        lines += [*text.split("; "), "ret"]
    source.write_text("\n".join(lines) + "\n")
    subprocess.run(["as", "--64", source, "-o", built], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", built, flat], check=True)
    assert flat.read_bytes() == b"".join(CODE.values())
