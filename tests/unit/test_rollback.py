# SPDX-License-Identifier: LGPL-2.1-or-later
"""Going back to an older kernel: known answers, measured on Linux 6.1 and 6.18 and written down by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from arm64_reports import CLIDR, DFR0, MMFR2, PFR0, PSCI, VENDOR_2, ccsidr, new, old, report
from strategies import INTEL

from kvmneg import cli
from kvmneg.errors import UsageError
from kvmneg.features.featureset import meet
from kvmneg.features.report import Report
from kvmneg.policy import rollback
from kvmneg.policy.fence_text import Fence


def test_n1_can_go_back_from_6_18_to_6_1_under_a_fence() -> None:
    answer = rollback.judge(new(), old())
    assert answer.fence is not None and answer.blockers == ()
    assert {blocker.feature for blocker in answer.unfenced} == {
        "psci-version", "aa64dfr0-debugver", "clidr-ctype3", "clidr-loc", "clidr-icb", "ccsidr-0", "ccsidr-1",
        "ccsidr-2", VENDOR_2, *(ccsidr(n) for n in range(3, 14)),
    }  # fmt: skip
    assert {one.word() for one in answer.dropped} == {VENDOR_2, *(ccsidr(n) for n in range(3, 14))}
    assert set(answer.fence.registers) == set(old().registers)
    assert answer.fence.granted.value(CLIDR) == 0x8200_0023
    assert any(line.startswith("not judged") for line in answer.scope)


def test_v1_cannot_go_back_from_6_18_to_6_1() -> None:
    """6.1 shows MPAM and nested virtualization, 6.18 forces both to 0: exactly these two are named."""
    pfr0 = 0x1100_0000_1111_1112
    answer = rollback.judge(new(), old(PFR0=pfr0 | 1 << 40, MMFR2=0x0100_0000_0200_0011))
    assert answer.fence is None
    assert [(blocker.feature, blocker.word) for blocker in answer.blockers] == [
        ("aa64pfr0-mpam", PFR0),
        ("aa64mmfr2-nv", MMFR2),
    ]
    assert all("cannot-be-levelled" in blocker.because for blocker in answer.blockers)


def test_qemu_cannot_leave_a_register_out() -> None:
    answer = rollback.judge(new(), old(), "qemu")
    assert answer.fence is None
    unknown = {VENDOR_2, *(ccsidr(n) for n in range(3, 14))}
    untold = {CLIDR, DFR0, PSCI, *(ccsidr(n) for n in range(3))}
    assert {blocker.word for blocker in answer.blockers} == unknown | untold
    assert {blocker.cause for blocker in answer.blockers} == {"vmm"}


def test_a_register_without_a_rule_stops_the_move() -> None:
    unknown = 0x6030_0000_0013_C102  # TCR2_EL1 would be 0x6030_0000_0013_C103
    newer = report("new", old().offer_words, registers=(*old().registers, unknown))
    answer = rollback.judge(newer, old())
    assert answer.fence is None
    assert [blocker.word for blocker in answer.blockers] == [f"arm64:{unknown:#x}"]


OSLSR, STD, STD_HYP, VENDOR = (
    0x6030_0000_0013_808C,
    *(0x6030_0000_0016_0000 + number for number in range(3)),
)


def back_to(kernel: str, *listed: int) -> rollback.Answer:
    """From a kernel that lists some registers more to one that does not."""
    lacking = {f"arm64:{register:#x}" for register in listed}
    offer = {word: value for word, value in old().offer_words.items() if word not in lacking}
    registers = tuple(sorted({*old().registers, *listed}))
    older = report(
        "old", offer, kernel=kernel, settable={}, registers=tuple(sorted(set(registers) - set(listed)))
    )
    return rollback.judge(report("new", old().offer_words, registers=registers), older)


def test_the_os_lock_is_left_out_while_it_is_open() -> None:
    """Linux before 5.18 shows every guest OSLSR_EL1 8, and does not list it (trap_oslsr_el1)."""
    answer = back_to("5.10.223", OSLSR)
    assert answer.fence is not None
    assert [(one.register, one.text()) for one in answer.dropped] == [(OSLSR, "drop-if 0x8")]


def test_calls_that_an_older_kernel_does_not_have_are_left_out_while_none_is_offered() -> None:
    """Of the calls 5.10 has stolen time only, and offers it to every guest, 5.15 all."""
    answer = back_to("5.10.223", STD, VENDOR)
    assert answer.fence is not None
    assert {one.register: one.text() for one in answer.dropped} == dict.fromkeys((STD, VENDOR), "drop-if 0x0")
    assert back_to("5.15.1", STD).fence is None
    answer = back_to("5.10.223", STD_HYP)
    assert answer.fence is None
    (blocker,) = answer.blockers
    assert blocker.word == f"arm64:{STD_HYP:#x}" and "every guest" in blocker.because


def test_the_way_forward_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rollback.forward(old(), new()) and not rollback.forward(new(), old())
    paths = []
    for one in (new(), old()):
        path = tmp_path / f"{one.host}.json"
        path.write_text(json.dumps(one.to_json()), "utf-8")
        paths.append(str(path))
    assert cli.main(["rollback", "check", "--from", paths[1], "--to", paths[0]]) == 0
    assert "the way forward" in capsys.readouterr().out


def test_a_timer_is_left_out_while_it_is_off() -> None:
    timers = (0x6030_0000_0013_DF01, 0x6030_0000_0013_DF11, 0x6030_0000_0013_DF12)
    newer = report("new", old().offer_words, registers=tuple(sorted((*old().registers, *timers))))
    answer = rollback.judge(newer, old())
    assert answer.fence is not None
    assert {one.register: one.text() for one in answer.dropped} == dict.fromkeys(timers, "drop-if-timer-off")


def test_what_was_not_measured_is_said() -> None:
    newer = report("new", new().offer_words, settable={}, kernel="6.18.15")
    older = report("old", old().offer_words, settable={}, kernel="6.1.176", registers=())
    answer = rollback.judge(newer, older)
    assert answer.fence is not None and answer.fence.registers == ()
    lines = [line for line in answer.scope if line.startswith("not measured")]
    assert lines == [
        "not measured: which fields can be set on old; it is taken from upstream Linux 6.1",
        "not measured: which fields can be set on new; it is taken from upstream Linux 6.18",
    ]
    assert not any(line.startswith("not measured") for line in rollback.judge(new(), old()).scope)
    assert any("which registers a guest carries" in line for line in answer.scope)


def test_x86_goes_back_under_what_both_offer(intel: Report) -> None:
    vendor = dict(zip(("cpuid:0x0.0.ebx", "cpuid:0x0.0.ecx", "cpuid:0x0.0.edx"), INTEL, strict=True))
    less = {
        **intel.offer_words,
        **vendor,
        "cpuid:0x7.0.edx": intel.offer_words["cpuid:0x7.0.edx"] & ~(1 << 28),
    }
    older = Report("x86_64", measured={"host": "old"}, combo={}, identity={}, offer=less)
    answer = rollback.judge(intel, older)
    assert answer.fence is not None
    assert answer.fence.granted == meet(intel.offer, older.offer)
    assert [blocker.feature for blocker in answer.unfenced] == ["flush-l1d"] * bool(
        intel.offer.field("flush-l1d")
    )
    assert rollback.judge(older, older).unfenced == ()


def test_two_vendors_have_no_fence(intel: Report, amd: Report) -> None:
    answer = rollback.judge(intel, amd)
    assert answer.fence is None and [blocker.feature for blocker in answer.blockers] == ["vendor"]
    with pytest.raises(UsageError, match="x86_64"):
        rollback.judge(intel, new())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for one in (new(), old(), old("worse", MMFR2=2 << 24)):
        path = tmp_path / f"{one.host}.json"
        path.write_text(json.dumps(one.to_json()), "utf-8")
        paths.append(str(path))
    command = ["rollback", "check", "--from", paths[0], "--to"]
    assert cli.main([*command, paths[1], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["possible"] and document["dropped"][VENDOR_2] == "drop-if 0x0"
    assert Fence.parse(document["fence"]).digest == document["digest"]
    assert cli.main([*command, paths[1], "--fence"]) == 0
    assert capsys.readouterr().out == document["fence"]
    assert cli.main([*command, paths[1]]) == 0
    assert "psci-version" in capsys.readouterr().out
    assert cli.main([*command, paths[2], "--json"]) == 1
    no = json.loads(capsys.readouterr().out)
    assert "aa64mmfr2-nv" in {blocker["feature"] for blocker in no["blockers"]}
    assert no["error"]["possible"] is False
