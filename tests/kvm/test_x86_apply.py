# SPDX-License-Identifier: LGPL-2.1-or-later
"""A contract on a VM of this KVM, whatever kind it is, by libkvmneg alone.

A KVM that keeps to what it is given takes the whole contract of its own report. One that replaces words takes all
others, and the failure names a replaced word.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.errors import NotApplied
from kvmneg.features import words
from kvmneg.features.featureset import FeatureSet
from kvmneg.host import measure, software
from kvmneg.host.apply import REASONS, STAGES, Applied
from kvmneg.policy import contract as contracts
from kvmneg.policy import negotiation
from kvmneg.policy.contract import Contract
from kvmneg.policy.request import Request

if measure.ARCHITECTURE == "x86_64":
    from kvmneg.host import guest_x86 as guest
    from kvmneg.host import hidden_x86

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.features.report import Report
    from kvmneg.host.kvm import Kvm
    from kvmneg.host.tables import CpuidEntry

pytestmark = pytest.mark.kvm

# include/uapi/linux/kvm.h
KVM_CREATE_VCPU, KVM_RUN, KVM_SET_USER_MEMORY_REGION = 0xAE41, 0xAE80, 0x4020AE46
PAGE = 4096
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report() -> Report:
    """What this KVM offers, and what it keeps to; asked once there is a KVM."""
    return measure.measure()


def limited(report: Report, *without: str, **changes: Any) -> Applied:
    """A contract over the report, without the words that this KVM replaces or refuses, and without some others."""
    whole = dict(contracts._decode_words(Contract(report.offer).binary()))
    for word, grade in report.enforcement.items():
        if grade != "untested":
            whole.pop(word, None)
    for word in without:
        whole.pop(word, None)
    whole |= {word.replace("_", "-"): pair for word, pair in changes.pop("words", {}).items()}
    return Applied.of(contracts._encode(words.X86_64, whole, (0, ""), "unverified", ()))


def fault(function: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
    """The fields of the NotApplied that it raises."""
    with pytest.raises(NotApplied) as caught:
        function(*arguments, **named)
    return caught.value.fields


def replaced(report: Report) -> set[str]:
    return {
        word
        for word, grade in report.enforcement.items()
        if grade == "replaced" and word.startswith("cpuid:")
    }


def test_a_whole_contract(kvm: Kvm, report: Report) -> None:
    """Applied and verified where KVM keeps to it, twice and without a table; else the failure names a replaced word."""
    held, table = Applied.of(Contract(report.offer).binary()), kvm.supported_cpuid()
    with kvm.scratch() as scratch:
        held.vm(scratch.vm)
        held.vcpu_init(scratch.vm, scratch.vcpu)
        if not replaced(report):
            for own in (table, table, None):
                held.vcpu(scratch.vcpu, own)
                held.verify(scratch.vcpu)
            return
        told = fault(held.vcpu, scratch.vcpu, table)
        assert (told["why"], told["stage"], told["errno"]) == ("dropped", "cpuid", errno.EBADE)
        assert told["word"] in replaced(report)
        assert (told["asked"] ^ told["got"]) & told["mask"]
        again = fault(held.verify, scratch.vcpu)
        assert (again["word"], again["why"], again["stage"]) == (told["word"], "differs", "verify")


def test_the_words_that_this_kvm_keeps(kvm: Kvm, report: Report) -> None:
    """They are there afterwards, by KVM's own answer."""
    held, table = limited(report), kvm.supported_cpuid()
    with kvm.scratch() as scratch:
        held.vm(scratch.vm)
        held.vcpu_init(scratch.vm, scratch.vcpu)
        held.vcpu(scratch.vcpu, table)
        held.verify(scratch.vcpu)
        shown = kvm.try_msrs(scratch, {})
        assert shown == {}
    assert len(list(held.words())) > 100


def test_a_lowered_contract_hides(kvm: Kvm, report: Report) -> None:
    """Every bit of leaf 0x80000001 that may be taken away is gone in what KVM shows."""
    word = "cpuid:0x80000001.0.ecx"
    value, mask = contracts._decode_words(Contract(report.offer).binary())[word]
    held, table = limited(report, words={word: (0, mask)}), kvm.supported_cpuid()
    assert value & mask
    with kvm.scratch() as scratch:
        held.vcpu(scratch.vcpu, table)
        held.verify(scratch.vcpu)
        shown = kvm.try_cpuid(scratch, [_entry(row) for row in held.clamp(table)])
    assert shown is not None
    assert next(row.ecx for row in shown if row.function == 0x80000001) & mask == 0


def _entry(row: tuple[int, ...]) -> CpuidEntry:
    from kvmneg.host.tables import CpuidEntry

    return CpuidEntry(*row)


def test_what_a_level_hides_is_refused(kvm: Kvm, report: Report) -> None:
    """MSRs of KVM's own features that a guest is not shown, whether or not its contract grants the capability."""
    contract = negotiation.negotiate(Request(level="x86-64-v1"), report).contract
    bound = dict(contracts._decode_words(contract.binary()))
    kept = {
        word: row for word, row in bound.items() if report.enforcement.get(word, "untested") == "untested"
    }
    assert kept["cpuid:0x40000001.0.eax"][0] == 0
    held = Applied.of(contracts._encode(words.X86_64, kept, (0, ""), "unverified", ()))
    ignoring = software.modules().get("kvm.ignore_msrs") == "Y"
    with kvm.scratch() as scratch:
        held.vm(scratch.vm)
        held.vcpu_init(scratch.vm, scratch.vcpu)
        held.vcpu(scratch.vcpu, kvm.supported_cpuid())
        indices = [index for each in hidden_x86.PARAVIRTUAL_MSRS.values() for index in each]
        asked = [guest.Question(guest.ASK_MSR, index) for index in indices]
        answers = guest.ask(kvm, scratch, guest.CPL0, asked)
    came = [hidden_x86.judged(answer, ignoring=ignoring) for answer in answers]
    assert len(came) > 5 and all(one and one.refused for one in came)


def test_verify_writes_nothing(kvm: Kvm, report: Report) -> None:
    """A fresh vCPU has no CPUID at all: the first word that is not zero differs, and stays so."""
    held = limited(report)
    with kvm.scratch() as scratch:
        first, second = fault(held.verify, scratch.vcpu), fault(held.verify, scratch.vcpu)
    assert first == second
    assert (first["why"], first["got"], first["stage"]) == ("differs", 0, "verify")
    assert first["word"].startswith("cpuid:") and first["asked"]


def test_what_else_a_bound_register_shows_is_a_failure(kvm: Kvm, report: Report) -> None:
    """A VMM that gives a guest more than the contract, past kvmneg_vcpu_apply, is found."""
    word = "cpuid:0x80000001.0.ecx"
    held, table = limited(report), kvm.supported_cpuid()
    with kvm.scratch() as scratch:
        rows = [_entry(row) for row in held.clamp(table)]
        more = [row._replace(ecx=row.ecx | 1 << 31) if row.function == 0x80000001 else row for row in rows]
        assert kvm.try_cpuid(scratch, more) is not None
        told = fault(held.verify, scratch.vcpu)
    assert (told["word"], told["asked"] >> 31, told["got"] >> 31) == (word, 0, 1)


def test_msrs(kvm: Kvm, report: Report) -> None:
    """One that no KVM has; one whose value KVM does not take; one that is bound to 0 and not there."""
    with kvm.scratch() as scratch:
        none = {"msr:0x12345678": (0, 0xFF)}
        limited(report, words=none).vcpu(scratch.vcpu, kvm.supported_cpuid())
        tried = kvm.try_msrs(scratch, {0x12345678: 1})[0x12345678]
        if tried.unset:  # kvm.ignore_msrs takes everything
            told = fault(limited(report, words={"msr:0x12345678": (1, 0xFF)}).vcpu, scratch.vcpu)
            assert (told["word"], told["why"], told["errno"]) == ("msr:0x12345678", "missing", errno.ENOENT)
            assert (told["stage"], told["register"]) == ("msr", 0x12345678)


def test_machine_checks(kvm: Kvm, report: Report) -> None:
    """The number of banks is set; one above KVM's is refused, and the failure names the ioctl."""
    with kvm.scratch() as scratch:
        banks = {"msr:0x179": (10, 0xFF)}
        limited(report, words=banks).vcpu(scratch.vcpu, kvm.supported_cpuid())
        limited(report, words=banks).verify(scratch.vcpu)
        told = fault(limited(report, words={"msr:0x179": (33, 0xFF)}).vcpu, scratch.vcpu)
        assert (told["word"], told["why"], told["ioctl"]) == ("msr:0x179", "refused", "KVM_X86_SETUP_MCE")
        assert (told["asked"], told["got"] & 0xFF) == (33, 10)


def test_capabilities(kvm: Kvm, report: Report) -> None:
    """What KVM lacks is missing; what this version cannot judge is unknown; what is not KVM's is left alone."""
    cases = (
        ({"kvm:max-vcpus": (1 << 31, (1 << 32) - 1)}, "missing", "check", errno.EBADE),
        ({"kvm:x2apic-api": (1 << 30, (1 << 32) - 1)}, "missing", "check", errno.EBADE),
        ({"kvm:of-the-future": (1, 1)}, "unknown", "check", errno.EOPNOTSUPP),
    )
    with kvm.scratch() as scratch:
        for changes, why, stage, error in cases:
            told = fault(limited(report, words=changes).vm, scratch.vm)
            (word,) = changes
            assert (told["word"], told["why"], told["stage"], told["errno"]) == (word, why, stage, error)
        limited(report, words={"state:msrs": (1 << 63, 1 << 63), "tap:features": (1 << 40, 1 << 40)}).vm(
            scratch.vm
        )


def test_choices_lie_within_the_contract(kvm: Kvm, report: Report) -> None:
    granted = report.offer.value("kvm:x2apic-api")
    with kvm.scratch() as scratch:
        held = limited(report, words={"kvm:disable-quirks2": (0, (1 << 32) - 1)})
        held.vm(scratch.vm, x2apic_api=granted)
        told = fault(held.vm, scratch.vm, disable_quirks=1)
        assert (told["word"], told["why"], told["got"]) == ("kvm:disable-quirks2", "outside", 0)
        assert told["errno"] == errno.EINVAL


def test_the_tsc(kvm: Kvm, report: Report) -> None:
    """The host's own rate is given everywhere; one that this KVM cannot reach is refused, not caught up with."""
    if "tsc:khz" not in report.offer_words:
        pytest.skip("another kind of KVM: its TSC has no rate")
    with kvm.scratch() as scratch:
        found = kvm.probe(scratch).tsc
        assert found is not None
        khz = found[0]
        held = limited(report, words={"tsc:khz": (khz << 32 | khz, (1 << 64) - 1)})
        held.vm(scratch.vm)
        held.vcpu_init(scratch.vm, scratch.vcpu)
        held.vcpu(scratch.vcpu, kvm.supported_cpuid())
        held.verify(scratch.vcpu)
        assert held.info()["tsc_khz"] == khz
        other = khz * 2
        faster = limited(report, words={"tsc:khz": (other << 32 | other, (1 << 64) - 1)})
        if report.offer.value("kvm:tsc-control"):
            faster.vcpu_init(scratch.vm, scratch.vcpu)
            told = fault(held.verify, scratch.vcpu)
        else:
            told = fault(faster.vcpu_init, scratch.vm, scratch.vcpu)
            assert (told["why"], told["errno"], told["asked"], told["got"]) == (
                "refused",
                errno.ERANGE,
                other,
                khz,
            )
        assert told["word"] == "tsc:khz"


def test_the_other_architecture(kvm: Kvm) -> None:
    held = Applied.of(Contract(FeatureSet.of("arm64", {})).binary())
    with kvm.scratch() as scratch:
        for function, arguments in (
            (held.vm, (scratch.vm,)),
            (held.vcpu_init, (scratch.vm, scratch.vcpu)),
            (held.vcpu, (scratch.vcpu,)),
            (held.verify, (scratch.vcpu,)),
        ):
            assert fault(function, *arguments)["errno"] == errno.ENOEXEC


def test_another_process(kvm: Kvm, report: Report) -> None:
    """KVM answers EIO to anyone but the VMM: nothing says that a word is wrong."""
    held, table = limited(report), kvm.supported_cpuid()
    with kvm.scratch() as scratch:
        child = os.fork()
        if child == 0:
            try:
                held.vcpu(scratch.vcpu, table)
            except NotApplied as error:
                os._exit(error.fields["errno"] if error.fields["why"] == "failed" else 254)
            os._exit(255)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == errno.EIO


def test_after_the_first_run(kvm: Kvm, report: Report) -> None:
    """The same calls again are no change, and a vCPU that is plugged in then gets the same; another contract is late.

    The guest is one HLT where a processor begins.
    """
    held, table = limited(report), kvm.supported_cpuid()
    word = "cpuid:0x80000001.0.ecx"
    mask = {name: mask for name, _, mask in held.words()}[word]
    with kvm.scratch() as scratch, mmap.mmap(-1, PAGE) as memory:
        memory[:] = b"\xf4" * PAGE
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        region = struct.pack("=IIQQQ", 0, 0, 0xFFFF_F000, PAGE, address)
        fcntl.ioctl(scratch.vm, KVM_SET_USER_MEMORY_REGION, region)
        held.vm(scratch.vm)
        held.vcpu_init(scratch.vm, scratch.vcpu)
        held.vcpu(scratch.vcpu, table)
        fcntl.ioctl(scratch.vcpu, KVM_RUN, 0)
        held.verify(scratch.vcpu)
        held.vcpu_init(scratch.vm, scratch.vcpu)
        if replaced(report) and frozen(os.uname().release):
            # this KVM compares what it is given with what it made of it, and finds a change
            assert fault(held.vcpu, scratch.vcpu, table)["ioctl"] == "KVM_SET_CPUID2"
        else:
            held.vcpu(scratch.vcpu, table)
        late = fcntl.ioctl(scratch.vm, KVM_CREATE_VCPU, 1)
        try:
            held.vcpu_init(scratch.vm, late)
            held.vcpu(late, table)
            held.verify(late)
        finally:
            os.close(late)
        if frozen(os.uname().release):
            told = fault(limited(report, words={word: (0, mask)}).vcpu, scratch.vcpu, table)
            assert (told["stage"], told["why"], told["ioctl"]) == ("cpuid", "refused", "KVM_SET_CPUID2")


def frozen(release: str) -> bool:
    """Whether KVM freezes CPUID at the first run: since Linux 5.16."""
    major, minor = release.split(".")[:2]
    return (int(major), int("".join(filter(str.isdigit, minor)))) >= (5, 16)


def test_sanitized(kvm: Kvm, report: Report, compile_c: Callable[..., Path], tmp_path: Path) -> None:
    """Read and applied from C, three times over, under the address and undefined behaviour sanitizers."""
    file = tmp_path / "contract"
    file.write_bytes(limited(report).binary())
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.[cS]")) if not path.name.startswith("arm64")]
    program = compile_c("applying", "-Wl,--wrap=ioctl", ROOT / "bench/c/applying.c", *sources)
    done = subprocess.run([program, file, "3"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) == 3


def test_each_ioctl_fails(kvm: Kvm, report: Report, compile_c: Callable[..., Path], tmp_path: Path) -> None:
    """An error that says nothing of a word is passed on as it is, with its ioctl; errno is left alone."""
    file = tmp_path / "contract"
    file.write_bytes(limited(report).binary())
    sources = [path for path in sorted((ROOT / "csrc").rglob("*.[cS]")) if not path.name.startswith("arm64")]
    program = compile_c("apply_faults", "-Wl,--wrap=ioctl", ROOT / "tests/kvm/apply_faults.c", *sources)
    done = subprocess.run([program, file, str(errno.EIO)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *rows, last = [line.split() for line in done.stdout.splitlines()]
    assert last == ["whole", "0"]
    for result, error, stage, why, ioctl, word in rows:
        assert int(result) == int(error) == -errno.EIO
        assert REASONS[int(why)] == "failed" and STAGES[int(stage)]
        assert ioctl.startswith("KVM_") and (word != "-" or "CPUID2" in ioctl), ioctl
    assert {row[4] for row in rows} >= {
        "KVM_CHECK_EXTENSION",
        "KVM_SET_CPUID2",
        "KVM_GET_CPUID2",
        "KVM_ENABLE_CAP",
    }
