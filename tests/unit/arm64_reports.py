# SPDX-License-Identifier: LGPL-2.1-or-later
"""Synthetic arm64 reports: a Neoverse N1 as Linux shows it, and what KVM of some kernels makes of it."""

from __future__ import annotations

from typing import Any

from kvmneg.features.report import Report

PSCI, WORKAROUND_1 = "arm64:0x6030000000140000", "arm64:0x6030000000140001"
STD, VENDOR, VENDOR_2 = (f"arm64:0x603000000016000{n}" for n in (0, 2, 3))
MIDR, PFR0, PFR1, DFR0 = (f"arm64:0x603000000013c0{n}" for n in ("00", "20", "21", "28"))
ISAR0, ISAR1, MMFR1, MMFR2 = (f"arm64:0x603000000013c0{n}" for n in ("30", "31", "39", "3a"))
CLIDR, CTR, ZFR0 = "arm64:0x603000000013c801", "arm64:0x603000000013d801", "arm64:0x603000000013c024"
VLS, INIT = "arm64:0x606000000015ffff", "arm:vcpu-features"
EVERY = (1 << 64) - 1


def ccsidr(number: int) -> str:
    return f"arm64:{0x6020_0000_0011_0000 + number:#x}"


# What every kernel shows of it.
N1 = {
    MIDR: 0x413FD0C1, PFR0: 0x1100_0000_1111_1112, PFR1: 0x20, ISAR0: 0x1000_1021_1120, ISAR1: 0x10_0001,
    MMFR1: 0x1021_2122, MMFR2: 0x0100_0000_0000_0011, CTR: 0xB444_C004, WORKAROUND_1: 2, INIT: 0b100,
    STD: 1, VENDOR: 3,
}  # fmt: skip
OLD = {**N1, DFR0: 0x1030_5006, PSCI: 0x1_0001, CLIDR: 0x8200_0023}
OLD |= {ccsidr(n): value for n, value in enumerate((0x701F_E01A, 0x201F_E01A, 0x70FF_E03A))}
NEW = {**N1, DFR0: 0x1030_5008, PSCI: 0x1_0003, CLIDR: 0x300_0123, VENDOR_2: 3}
NEW |= {ccsidr(n): 2 for n in range(14)}

# What a probe finds to be settable: what a kernel with writable ID registers takes, and one of 6.1.
WRITABLE = {
    PSCI: EVERY, STD: EVERY, VENDOR: EVERY, VENDOR_2: EVERY, CLIDR: EVERY, VLS: EVERY,
    PFR0: 0xFFFF_00F0_0F00_FFFF, PFR1: 0xFF, DFR0: 0xF0_00F0_0F0F, ISAR0: EVERY, ISAR1: 0xFFFF_FFFF_00FF_F00F,
    MMFR1: 0xFFFF_F0F0_0FFF_F00F, MMFR2: 0xF0FF_000F_F00F_FFFF, ZFR0: EVERY, CTR: 0x300F_000F,
    **{ccsidr(n): 0xFFFF_FFFF for n in range(14)},
}  # fmt: skip
WRITABLE_6_1 = {PSCI: EVERY, STD: EVERY, VENDOR: EVERY, PFR0: 0xFF << 56}


def report(
    host: str,
    offer: dict[str, int],
    *,
    kernel: str = "6.18.15",
    settable: dict[str, int] | None = None,
    registers: tuple[int, ...] | None = None,
    **rest: Any,
) -> Report:
    """A report of these words; its registers are those of the words unless they are given."""
    listed = tuple(sorted(int(word[6:], 16) for word in offer if word.startswith("arm64:")))
    return Report(
        "arm64",
        measured={"host": host},
        combo={"kernel": kernel},
        identity={"vendor": "ARM"},
        offer=dict(offer),
        settable=WRITABLE if settable is None else settable,
        registers=listed if registers is None else registers,
        **rest,
    )


def new(host: str = "new", **changes: int) -> Report:
    return report(host, {**NEW, **_words(changes)})


def old(host: str = "old", **changes: int) -> Report:
    return report(host, {**OLD, **_words(changes)}, kernel="6.1.176", settable=WRITABLE_6_1)


def _words(changes: dict[str, int]) -> dict[str, int]:
    return {globals()[name]: value for name, value in changes.items()}
