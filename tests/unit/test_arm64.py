# SPDX-License-Identifier: LGPL-2.1-or-later
"""arm64's answers as words, and its part of a report, on stand-ins for KVM. Real ones: tests/kvm/test_arm64_*."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.features import words
from kvmneg.host import arm64, kvm_arm64, measure
from kvmneg.host.kvm_arm64 import Init, Probe, Trial
from kvmneg.host.software import CpuClass, Roots

if TYPE_CHECKING:
    from kvmneg.host.tables import Capabilities

PSCI = 0x6030000000140000
VENDOR_2 = 0x6030000000160003
MIDR = 0x603000000013C000
DFR0 = 0x603000000013C028
MMFR2 = 0x603000000013C03A
PMCR = 0x603000000013DCE0


class Answers:
    """Stands for KVM_CHECK_EXTENSION's answers."""

    def __init__(self, **known: tuple[int, int]) -> None:
        self._known = {name.replace("_", "-"): pair for name, pair in known.items()}

    def known(self) -> dict[str, tuple[int, int]]:
        return self._known


def probe(midr: int = 0x410FD0C0, **changes: Any) -> Probe:
    """A KVM with a handful of registers."""
    answers: Capabilities = Answers(arm_sve=(1, 0), arm_vm_ipa_size=(48, 40), msi_devid=(-22, 1))  # type: ignore[assignment]
    found = Probe(
        capabilities=answers,
        init=Init(5, (0,) * 7),
        trials=[
            Trial(PSCI, 0x10001, 0x10003, 0x10003, 0, 0),
            Trial(VENDOR_2, 0, 3, 3, 0, 0),
            Trial(MIDR, midr, midr, 0, 0, 0),
            Trial(DFR0, 0x10305609, 0x10305609, 0xF0F, 0, 0xF0F),
            Trial(MMFR2, 0, 0, 0, 0xF000000, 0),
            Trial(PMCR, 6 << 11, 6 << 11, 0xF800, 0, 0),
        ],
        register_list=(PMCR, PSCI, MIDR),
        vcpu_features=0b10_0111_1111,
        vgic_models=6,
        vgic_iidr=0x4B00343B,
        vgic_revisions=0b1100,
        vgic_revisions_dropped=0,
        pmu_attributes=31,
        smccc_filter=True,
        protected_vms=False,
        psci_versions=(2, 0x10000, 0x10001, 0x10003),
    )
    return found._replace(**changes)


def word(register: int) -> str:
    return f"arm64:{register:#x}"


def test_offer() -> None:
    """What can be given, not what a vCPU has at first; registers that read zero are there."""
    offer = arm64.decoder().offer(probe())
    assert offer[word(PSCI)] == 0x10003
    assert offer[word(VENDOR_2)] == 3
    assert offer[word(MMFR2)] == 0
    assert offer["arm:vcpu-features"] == 0x27F
    assert offer["arm:vgic-models"] == 6
    assert offer["arm:vgic-revision"] == 3
    assert offer["arm:smccc-filter"] == 1
    assert offer["arm:pkvm"] == 0
    assert all(words.check(name) for name in offer)


def test_capabilities_of_the_vm_bind() -> None:
    """/dev/kvm's answer counts only where the VM refuses; a capability that is 0 is none."""
    answers = {"arm-sve": (1, 0), "arm-vm-ipa-size": (48, 40), "msi-devid": (1, -22), "one-reg": (-22, -22)}
    assert arm64.decoder().capabilities(answers) == {"kvm:arm-vm-ipa-size": 40, "kvm:msi-devid": 1}


def test_a_revision_that_cannot_be_set_is_the_one_there_is() -> None:
    """Linux 6.16 to 6.19 take every revision and change none."""
    assert arm64.decoder().offer(probe(vgic_revisions=0))["arm:vgic-revision"] == 3
    assert arm64.decoder().offer(probe(vgic_revisions=0b100))["arm:vgic-revision"] == 2


def test_settable_and_dropped() -> None:
    decoder = arm64.decoder()
    assert decoder.settable(probe()) == {
        word(PSCI): 0x10003, word(VENDOR_2): 3, word(DFR0): 0xF0F, word(PMCR): 0xF800,
    }  # fmt: skip
    assert decoder.dropped(probe()) == {word(MMFR2): 0xF000000}


def test_identity() -> None:
    assert arm64.identity([]) == {}
    assert arm64.identity([CpuClass({"part": "0xd0c"}, (0,))]) == {"part": "0xd0c"}


class TestMixedCores:
    """What a guest gets that is not bound to one kind of core."""

    def test_one_kind(self) -> None:
        offer = arm64.decoder().offer(probe())
        assert arm64.met([offer]) is offer

    def test_neither_identity_nor_pmu(self) -> None:
        offers = [arm64.decoder().offer(probe(midr)) for midr in (0x410FD034, 0x410FD092)]
        common = arm64.met(offers)
        assert offers[0].keys() - common.keys() == {word(MIDR), word(PMCR)}
        assert common["arm:vcpu-features"] == 0x27F & ~(1 << 3 | 1 << 9)
        assert common[word(DFR0)] == 0x10305609 & ~0xF00
        assert common[word(PSCI)] == 0x10003

    def test_masks_and_lists(self) -> None:
        assert arm64.settable_on_all([{"a": 3, "b": 1}, {"a": 6, "c": 1}]) == {"a": 2}
        assert arm64.settable_on_all([{"a": 3}]) == {"a": 3}
        assert arm64.dropped_on_any([{"a": 1}, {"a": 2, "b": 4}]) == {"a": 3, "b": 4}
        assert arm64.on_all([(3, 1, 2), (2, 3)]) == (2, 3)


class FakeKvm:
    """An open KVM that is asked nothing itself."""

    def __enter__(self) -> FakeKvm:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @classmethod
    def open(cls, path: str = "/dev/kvm") -> FakeKvm:
        return cls()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    """A machine with one kind of core, whose KVM answers `probe()`, and says where it was asked."""
    monkeypatch.setattr(measure, "ARCHITECTURE", words.ARM64)
    monkeypatch.setattr(measure, "Kvm", FakeKvm)
    monkeypatch.setattr(kvm_arm64, "probe", lambda kvm: probe(0x100 + min(os.sched_getaffinity(0))))
    for folder in ("proc/sys/kernel", "sys", "dev"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo("0xd03"))
    (tmp_path / "proc/cmdline").write_text("root=/dev/vda quiet\n")
    return Roots(str(tmp_path / "sys"), str(tmp_path / "proc"), str(tmp_path / "dev"))


def cpuinfo(*parts: str) -> str:
    return "\n".join(
        f"processor\t: {number}\nCPU implementer\t: 0x41\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 4\n"
        for number, part in enumerate(parts)
    )


def test_report(machine: Roots) -> None:
    document = json.loads(json.dumps(measure.measure(roots=machine).to_json()))
    assert document["architecture"] == "arm64"
    assert document["identity"]["part"] == "0xd03"
    assert document["offer"]["arm64:0x6030000000160003"] == "0x0000000000000003"
    assert document["settable"]["arm64:0x603000000013c028"] == "0x0000000000000f0f"
    assert document["dropped"] == {"arm64:0x603000000013c03a": "0x000000000f000000"}
    assert document["registers"] == ["0x603000000013c000", "0x603000000013dce0", "0x6030000000140000"]


def test_protected_mode_is_told(machine: Roots) -> None:
    (Path(machine.proc) / "cmdline").write_text("quiet kvm-arm.mode=protected\n")
    assert measure.measure(roots=machine).offer_words["arm:pkvm"] == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one CPU to run on")
def test_each_kind_of_core_is_asked_on_itself(machine: Roots) -> None:
    before = os.sched_getaffinity(0)
    first, second = sorted(before)[:2]
    parts = ["0xd03" if cpu == first else "0xd09" for cpu in range(second + 1)]
    (Path(machine.proc) / "cpuinfo").write_text(cpuinfo(*parts))
    report = measure.measure(roots=machine)
    assert word(MIDR) not in report.offer_words
    assert report.offer_words[word(PSCI)] == 0x10003
    assert os.sched_getaffinity(0) == before
