# SPDX-License-Identifier: LGPL-2.1-or-later
"""arm64's proof without a KVM: what recorded guests answered, grades, and the table of instructions, assembled.

The recordings are of `-cpu max` under QEMU 7.2 (tests/kvm/arm64_answers.py).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.features import catalog
from kvmneg.host import views_arm64 as views
from kvmneg.host.instructions_arm64 import BASES, CODE, INSTRUCTIONS, KERNELS, LEAST
from kvmneg.host.views_arm64 import ANSWERED, FAULTED, Answer, as_kept, grade_of, questions, view

if TYPE_CHECKING:
    from collections.abc import Sequence

DATA = Path(__file__).with_name("data")
KERNELS_RECORDED = ("6.1", "6.12", "newest")
NONE = (1 << 64) - 1

PSCI = "arm64:0x6030000000140000"
WORKAROUND_1, WORKAROUND_2 = "arm64:0x6030000000140001", "arm64:0x6030000000140002"
STD, STD_HYP, VENDOR, VENDOR_2 = (f"arm64:0x603000000016000{n}" for n in range(4))
ISAR0, PFR0, MMFR0 = (f"arm64:0x603000000013c0{low}" for low in ("30", "20", "38"))
SPECSEI = "arm64:0x603000000013c039"
CTR, DCZID, PMCR = (f"arm64:0x603000000013d{low}" for low in ("801", "807", "ce0"))
VLS = "arm64:0x606000000015ffff"
CACHE_DATA, CACHE_CODE = "arm64:0x6020000000110000", "arm64:0x6020000000110001"


@cache
def recorded(kernel: str) -> dict[str, Any]:
    """{"offer" and "emptied": {word: row}}"""
    tables: dict[str, Any] = json.loads((DATA / f"arm64-answers-{kernel}.json").read_bytes())["tables"]
    return tables


def answers(row: dict[str, Any], mode: str) -> list[Answer]:
    return [
        Answer(outcome, int(detail, 16), tuple(int(x, 16) for x in xs)) for outcome, detail, *xs in row[mode]
    ]


def answered(*xs: int) -> Answer:
    return Answer(ANSWERED, 0, (*xs, 0, 0, 0, 0)[:4])


def told(word: str, row: dict[str, Any]) -> tuple[int, int, int | None, list[int | None]]:
    """bound, value, shown and what was seen by mode."""
    shown = int(row["shown"], 16) if row["shown"] else None
    seen = [as_kept(word, shown, view(word, answers(row, mode))) for mode in views.MODE_NAMES]
    return int(row["bound"], 16), int(row["value"], 16), shown, seen


@pytest.mark.parametrize("table", ["offer", "emptied"])
@pytest.mark.parametrize("kernel", KERNELS_RECORDED)
def test_recorded_guests(kernel: str, table: str) -> None:
    """Each saw what its registers say, but for CTR_EL0.IDC on 6.1, which shows guests the CPU's own."""
    rows = recorded(kernel)[table]
    assert len(rows) > 60
    for word, row in rows.items():
        bound, value, shown, (el1, el0) = told(word, row)
        assert grade_of(word, bound, value, shown, (el1, el0)) == (
            "replaced" if word == CTR and kernel == "6.1" else "honoured"
        ), word
        if word != CTR and el1 is not None:
            assert (el1 ^ value) & bound == 0, word
        assert (el0 is not None) == (word in (CTR, DCZID, PMCR)), word
    assert (rows[CTR]["el1"][0][2] != rows[CTR]["value"]) == (kernel == "6.1")


@pytest.mark.parametrize("kernel", KERNELS_RECORDED)
@pytest.mark.parametrize(("word", "lie"), [(ISAR0, 1 << 5), (PFR0, 1 << 60), (STD, 1), (PSCI, 1)])
def test_recorded_guests_of_a_kvm_that_lies(kernel: str, word: str, lie: int) -> None:
    """The guests, as they answered, of a KVM that was told to hide one thing more, and says that it does."""
    bound, value, _shown, seen = told(word, recorded(kernel)["offer"][word])
    assert value & lie
    less = value & ~lie
    assert grade_of(word, bound, less, less, seen) == "leaks"
    assert grade_of(word, bound, less, value, seen) == "replaced"  # it says so


@pytest.mark.parametrize(
    ("value", "shown", "seen", "grade"),
    [
        (0x20, 0x20, (0x20, None), "honoured"),
        (0x20, 0x20, (0x20, 0x20), "honoured"),
        (0x20, 0x10, (0x20, None), "replaced"),
        (0x20, 0x20, (0x10, None), "replaced"),
        (0x10, 0x10, (0x20, None), "leaks"),
        (0x10, 0x10, (0x10, 0x20), "leaks"),
        (0x10, 0x20, (0x20, None), "replaced"),
        (0x20, 0x20, (None, None), "untested"),
        (0, 0, (None, None), "honoured"),
        (0, None, (None, None), "honoured"),
        (0, 0, (0x10, None), "leaks"),
        (0x20, 0x20, (0x220, None), "honoured"),  # beside the bits that are compared
    ],
)
def test_grade(value: int, shown: int | None, seen: Sequence[int | None], grade: str) -> None:
    """ISAR0.AES: 1 AES, 2 PMULL besides."""
    assert grade_of(ISAR0, 0xF0, value, shown, seen) == grade


def test_more_is_what_the_rule_says() -> None:
    """0xf is less than 0 of a signed field; of SpecSEI the lower value promises more."""
    assert grade_of(MMFR0, 0xF << 28, 0xF << 28, 0xF << 28, (0, None)) == "leaks"  # TGran4
    assert grade_of(MMFR0, 0xF << 28, 0, 0, (0xF << 28, None)) == "replaced"
    assert grade_of(SPECSEI, 0xF << 24, 1 << 24, 1 << 24, (0, None)) == "leaks"
    assert grade_of(SPECSEI, 0xF << 24, 0, 0, (1 << 24, None)) == "replaced"
    assert grade_of("arm64:0x603000000013c0ff", NONE, 1, 1, (3, None)) == "leaks"  # nobody catalogued it


@pytest.mark.parametrize(
    ("word", "given", "expected"),
    [
        (PSCI, [answered(0x10001)], 0x10001),
        (WORKAROUND_1, [answered(NONE)], 0),
        (WORKAROUND_1, [answered(0)], 1),
        (WORKAROUND_1, [answered(1)], 2),
        (WORKAROUND_1, [answered(7)], None),
        (WORKAROUND_2, [answered(NONE - 1)], 3),
        (WORKAROUND_2, [answered(1)], 3),
        (WORKAROUND_2, [answered(NONE)], 0),
        (STD, [answered(0x10000)], 1),
        (STD, [answered(NONE)], 0),
        (STD, [answered(0xFFFF_FFFF)], 0),
        (STD_HYP, [answered(0)], 1),
        (VENDOR, [answered(0xB66FB428), answered(3), answered(0)], 3),
        (VENDOR, [answered(0xB66FB428), answered(1), answered(NONE)], 1),
        (VENDOR, [answered(NONE), answered(NONE), answered(NONE)], 0),
        (VENDOR, [answered(NONE), answered(NONE), answered(5)], 2),
        (VENDOR_2, [answered(3, 0, 1)], 1),
        (VENDOR_2, [answered(NONE)], None),
        (CACHE_CODE, [answered(0xF_2010_E01A)], 0x2010_E01A),
        (VLS, [answered(16 * n) for n in (1, 2, 2, 4)], 0b1011),
        (views.REVISION, [answered(0x4B00_343B)], 3),
        (ISAR0, [answered(0x21)], 0x21),
        (ISAR0, [Answer(FAULTED, 0, (0,) * 4)], None),
        (VENDOR, [answered(1), Answer(FAULTED, 0, (0,) * 4), answered(1)], None),
        (ISAR0, [], None),
    ],
)
def test_view(word: str, given: list[Answer], expected: int | None) -> None:
    """Linux Documentation/virt/kvm/arm/hypercalls.rst, Arm DEN 0028 (SMCCC) 7."""
    assert view(word, given) == expected


def test_as_kept() -> None:
    """Nothing else than those two ways of KVM's is forgiven."""
    assert as_kept(CACHE_DATA, 0x701F_E01A, 0x7000_0002) == 0x701F_E01A
    assert as_kept(CACHE_DATA, 0x701F_E01A, 0x7000_0003) == 0x7000_0003
    assert as_kept(CACHE_CODE, 0x201F_E01A, 0x2000_0002) == 0x2000_0002
    assert as_kept(WORKAROUND_2, 1, 2) == 1
    assert as_kept(WORKAROUND_2, 3, 2) == 2
    assert as_kept(WORKAROUND_1, 1, 2) == 2
    assert as_kept(ISAR0, None, 5) == 5
    assert as_kept(views.REVISION, 2, 3) == 3


def test_questions() -> None:
    """Every word of the catalogue that is a register has one at EL1; only what EL0 may read has one there."""
    asked = {word for word in catalog.load("arm64").words if word.startswith("arm64:")}
    unasked = {word for word in asked if not questions(word)}
    assert not {word for word in unasked if not word.startswith("arm64:0x60300000001")}
    for word in asked - unasked:
        for question in questions(word):
            assert question.code[-1] == views.RET and len(question.code) <= views.CODE_WORDS
    assert questions("kvm:max-vcpus") == [] == questions("arm:vcpu-features")
    assert questions(PSCI, views.EL0) == [] == questions(VLS, views.EL0)
    assert questions(CTR, views.EL0)[0].code[0] == 0xD53B0020  # MRS X0, CTR_EL0


def test_features_of_instructions() -> None:
    names = catalog.names("arm64")
    assert len(CODE) == len(INSTRUCTIONS)
    for feature, code in CODE.items():
        row = names.feature(feature)
        assert row.name == feature and 0 < LEAST[feature] < 1 << row.width
        assert len(code) <= views.CODE_WORDS
    assert set(BASES) | set(KERNELS) <= set(CODE)


def assembled(lines: list[str], folder: Path) -> bytes:
    """By GNU as, which has read the manual too."""
    name = "aarch64-linux-gnu-as"
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    source, built, flat = (folder / name for name in ("code.s", "code.o", "code.bin"))
    source.write_text("\n".join(lines) + "\n")
    subprocess.run([name, source, "-o", built], check=True)
    subprocess.run(["aarch64-linux-gnu-objcopy", "-O", "binary", "-j", ".text", built, flat], check=True)
    return flat.read_bytes()


EXTENSIONS = (
    "sme sve2-aes sve2-sha3 sve2-sm4 sve2-bitperm sha3 sm4 aes sha2 fp16 fp16fml rng memtag f32mm f64mm"
)


def test_instructions_assemble_to_their_words(tmp_path: Path) -> None:
    lines = [f".arch armv8.8-a+{EXTENSIONS.replace(' ', '+')}"]
    for _, _, _, text, _ in INSTRUCTIONS:
        lines += [*text.split("; "), "ret"]
    words = b"".join(word.to_bytes(4, "little") for code in CODE.values() for word in code)
    assert assembled(lines, tmp_path) == words


def test_questions_assemble_to_their_words(tmp_path: Path) -> None:
    text = (
        "ret; hvc #0; isb; msr csselr_el1, x0; mrs x0, ccsidr_el1; msr zcr_el1, x0; rdvl x0, #1; ldr w0, [x0]"
    )
    text += (
        "; mrs x0, ctr_el0; mrs x0, id_aa64isar0_el1; mrs x0, midr_el1; mrs x0, pmcr_el0; mrs x0, dczid_el0"
    )
    words = [
        views.RET, views.HVC, views.ISB, views.MSR_CSSELR, views.MRS_CCSIDR, views.MSR_ZCR, views.RDVL, views.LDR_W,
        *(views.mrs(views.register_of(word)) for word in (CTR, ISAR0, "arm64:0x603000000013c000", PMCR, DCZID)),
    ]  # fmt: skip
    built = assembled([".arch armv8.2-a+sve", *text.split("; ")], tmp_path)
    assert built == b"".join(word.to_bytes(4, "little") for word in words)
