# SPDX-License-Identifier: LGPL-2.1-or-later
"""`kvmneg verify` on this machine's own KVM, and under contracts that it cannot keep."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import cli
from kvmneg.features import catalog, words
from kvmneg.features.featureset import FeatureSet
from kvmneg.host import guest_arm64, measure, proof, verify_arm64
from kvmneg.policy import grade, negotiation
from kvmneg.policy.contract import Contract
from kvmneg.policy.request import Request

from .arm64_facts import ISAR0, Facts, facts
from .arm64_guest import PSCI_0_2, PSCI_VERSION, PTRAUTH, STD, SVE, SVE_VLS, VENDOR_HYP, Vm, reads, sysreg

if TYPE_CHECKING:
    from pathlib import Path

    from kvmneg.features.report import Report
    from kvmneg.host.kvm import Kvm

pytestmark = pytest.mark.kvm
Capture = pytest.CaptureFixture[str]
CTR = sysreg(3, 3, 0, 0, 1)
FULL = (1 << 64) - 1


@pytest.fixture
def found(kvm: Kvm) -> Facts:
    """What this KVM is."""
    return facts(kvm)


@pytest.fixture
def report(kvm: Kvm) -> Report:
    return measure.measure(kvm.path)


def word(register: int) -> str:
    return f"arm64:{register:#x}"


@pytest.fixture
def broken(kvm: Kvm, found: Facts) -> set[str]:
    """The words that this kernel does not keep, as other guests see them.

    Before Linux 6.7 guests read the CPU's own CTR_EL0: where Linux found that caches need no cleaning (CLIDR_EL1), its
    register says so, and they see that they do.
    """
    with Vm(kvm.fd) as vm:
        vcpu = vm.vcpu(PSCI_0_2)
        vm.load(reads(CTR))
        return {word(CTR)} if vcpu.run() != [found.trials[CTR].value] else set()


def test_only_an_old_kernel_breaks_anything(found: Facts, broken: set[str]) -> None:
    assert not (broken and found.trials[CTR].settable)


def contract_of(report: Report, **changed: int) -> Contract:
    """Everything this host offers, with other values of some features."""
    granted = negotiation.negotiate(Request(maximum=True), report, None).contract.granted
    values = granted.explicit()
    names = catalog.names(report.architecture)
    for name, value in changed.items():
        row = names.feature(name.replace("_", "-"))
        values[row.word] = values.get(row.word, 0) & ~row.mask | value << row.shift
    return Contract(FeatureSet.of(report.architecture, values), present=report.offer_words)


def verified(capsys: Capture, tmp_path: Path, contract: Contract | None) -> tuple[int, dict[str, Any]]:
    options = []
    if contract is not None:
        path = tmp_path / "contract"
        path.write_bytes(contract.binary())
        options = ["--contract", str(path)]
    status = cli.main(["verify", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def test_the_host(capsys: Capture, tmp_path: Path, broken: set[str]) -> None:
    """Exit 1 where it does not keep to something; everything else is honoured, and seen wherever it can be."""
    status, told = verified(capsys, tmp_path, None)
    assert set(told["broken"]) == broken
    assert status == (1 if broken else 0)
    assert set(told["tables"]) == {"offer", "emptied"}
    assert not set(told["grades"].values()) - {"replaced"}
    for table in told["tables"].values():
        seen = [name for name, row in table.items() if row["el1"] is not None]
        assert len(seen) > 60
        assert {name for name, row in table.items() if row["el0"] is not None} >= {word(CTR)}
        for name, row in table.items():
            if row["grade"] == "honoured" and not name.startswith("arm:"):
                mask = int(row["mask"], 16)
                values = {int(row[key], 16) & mask for key in ("set", "read_back") if row[key]}
                assert values <= {int(row["promised"], 16)}, name


def test_emptied_is_as_low_as_it_goes(capsys: Capture, tmp_path: Path, found: Facts) -> None:
    """Where ID registers can be written: none of ISAR0's instructions is left; each hypercall is hidden."""
    _, told = verified(capsys, tmp_path, None)
    emptied = told["tables"]["emptied"]
    for bitmap in found.bitmaps:
        assert int(emptied[word(bitmap)]["el1"] or "0", 16) == 0
    assert int(emptied[word(PSCI_VERSION)]["el1"], 16) == min(found.probe.psci_versions)
    left = found.trials[ISAR0].value & ~found.trials[ISAR0].settable
    assert int(emptied[word(ISAR0)]["el1"], 16) == left
    assert word(SVE_VLS) not in emptied


def test_under_a_contract(capsys: Capture, report: Report, tmp_path: Path, broken: set[str]) -> None:
    """What it binds, nothing else; all of it is kept."""
    contract = contract_of(report)
    status, told = verified(capsys, tmp_path, contract)
    assert told["contract"] == contract.digest
    assert set(told["broken"]) == broken & set(contract.words())
    assert status == (1 if told["broken"] else 0)
    table = told["tables"]["contract"]
    assert set(table) <= set(contract.words())
    assert {name for name in contract.words() if name.startswith("arm64:")} <= set(table) | set(
        told["untried"]
    )


def test_a_lower_contract_is_kept(
    capsys: Capture, report: Report, found: Facts, tmp_path: Path, broken: set[str]
) -> None:
    """PSCI 0.2, no TRNG and, where it can be told so, no AES: all of it seen by the guest."""
    changed = {"psci_version": 2}
    if STD in found.bitmaps:
        changed["hypercall_trng"] = 0
    aes = found.trials[ISAR0].settable & 0xF0
    if aes:
        changed["aa64isar0_aes"] = 0
    _, told = verified(capsys, tmp_path, contract_of(report, **changed))
    assert set(told["broken"]) <= broken
    table = told["tables"]["contract"]
    assert int(table[word(PSCI_VERSION)]["el1"], 16) == 2
    if STD in found.bitmaps:
        assert int(table[word(STD)]["el1"], 16) == 0
    has = found.trials[ISAR0].value & 0xF0
    assert int(table[word(ISAR0)]["el1"], 16) & 0xF0 == (0 if aes else has)
    assert told["instructions"].get("aa64isar0-aes") == ("hidden only" if aes and has else None)


def test_a_contract_of_another_host(
    capsys: Capture, report: Report, found: Facts, tmp_path: Path, broken: set[str]
) -> None:
    """More than this KVM has: each such word is refused, everything else is judged, exit 1."""
    contract = contract_of(report, psci_version=0x10009, aa64isar0_tme=1)
    status, told = verified(capsys, tmp_path, contract)
    assert status == 1
    refused = {name for name, one in told["grades"].items() if one == "refused"}
    assert refused == {word(PSCI_VERSION), word(ISAR0)}
    assert set(told["broken"]) == refused | broken
    table = told["tables"]["contract"]
    assert table[word(PSCI_VERSION)]["el1"] == words.text_value(
        word(PSCI_VERSION), found.probe.psci_versions[-1]
    )


def test_vector_lengths_of_another_host(kvm: Kvm, report: Report, found: Facts) -> None:
    bound = contract_of(report).bound()
    bound[word(SVE_VLS)] = 1 << 40, FULL
    told = verify_arm64.prove(kvm, bound).grades()
    if found.sve:
        assert told[word(SVE_VLS)] == "refused"
    else:
        assert told[word(SVE_VLS)] in ("refused", "untested", "replaced")


def test_a_feature_that_kvm_does_not_take(kvm: Kvm, report: Report, found: Facts) -> None:
    """A contract with SVE or pointer authentication, on a host without: told, and the rest is judged."""
    lacking = (SVE | PTRAUTH) & ~found.probe.vcpu_features
    if not lacking:
        return
    bound = contract_of(report).bound()
    bound["arm:vcpu-features"] = bound["arm:vcpu-features"][0] | lacking, FULL
    told = verify_arm64.prove(kvm, bound)
    assert told.grades()["arm:vcpu-features"] == "refused"
    assert told.tables["contract"][word(ISAR0)].grade == "honoured"


def test_a_register_that_changes_behind_the_contract(
    monkeypatch: pytest.MonkeyPatch, kvm: Kvm, report: Report, found: Facts
) -> None:
    """A KVM that says one thing and shows another, played by changing the register when it was set and read back."""
    if VENDOR_HYP not in found.bitmaps:
        return
    real, lied = guest_arm64.Machine.get, []

    def get(self: guest_arm64.Machine, name: str) -> int | None:
        value = real(self, name)
        if name == word(VENDOR_HYP) and value == 0:
            lied.append(self.set(name, 1))  # too late after the first run
        return value

    bound = contract_of(report, hypercall_features=0, hypercall_ptp=0).bound()
    assert verify_arm64.prove(kvm, bound).grades().get(word(VENDOR_HYP)) is None
    monkeypatch.setattr(guest_arm64.Machine, "get", get)
    told = verify_arm64.prove(kvm, bound)
    assert lied[0]
    assert told.grades()[word(VENDOR_HYP)] in ("replaced", "leaks")
    assert told.tables["contract"][word(VENDOR_HYP)].seen[0] == 1


def test_instructions_of_what_kvm_hides(kvm: Kvm, found: Facts) -> None:
    """Vectors and pointer authentication are trapped where they are taken away; AES is executed all the same."""
    marks = verify_arm64.prove(kvm).instructions
    if found.sve:
        assert marks["aa64pfr0-sve"] == "trapped"
    if found.probe.vcpu_features & PTRAUTH:
        assert {"trapped"} == {
            mark for name, mark in marks.items() if name.split("-")[1] in ("apa", "api", "apa3")
        }
    if found.trials[ISAR0].settable & 0xF0:
        assert marks["aa64isar0-aes"] == "hidden only"
        assert verify_arm64.mark_of(kvm, "aa64isar0-aes") == "hidden only"
    assert verify_arm64.mark_of(kvm, "aa64mmfr0-ecv") is None


def test_explain_tries_it(capsys: Capture, found: Facts) -> None:
    settable = found.trials[ISAR0].settable & 0xF0
    assert cli.main(["explain", "aa64isar0-aes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["here"]["instruction"] == ("hidden only" if settable else None)


def test_an_empty_contract(kvm: Kvm) -> None:
    """Binds nothing that guests see: nothing is broken."""
    told = verify_arm64.prove(kvm, {})
    assert told.grades() == {}
    assert told.tables["contract"] == {}


def test_what_the_daemon_keeps(kvm: Kvm, report: Report, tmp_path: Path, broken: set[str]) -> None:
    """The proof of a combo, and what it makes of a report and of its contracts."""
    assert grade.of(contract_of(report).granted, report) == "enforced"
    kept = proof.refresh(str(tmp_path / "proofs.json"), kvm.path, "sha256:combo")
    assert proof.known(str(tmp_path / "proofs.json")).keys() == {"sha256:combo"}
    assert set(kept.grades) == broken
    measurer = measure.Measurer(kvm.path)
    measurer.proven = lambda _combo: kept
    again = measurer.measure()
    assert again.instructions == kept.instructions and again.measured["guests"] == kept.at
    assert grade.of(contract_of(again).granted, again) == ("partial" if broken else "enforced")


def test_for_people(capsys: Capture) -> None:
    status = cli.main(["verify"])
    out = capsys.readouterr().out
    assert ("broken: " if status else "kept: ") in out
    assert "\neverything that this host offers: " in out
    assert "  word " in out and " EL0\n" in out
    cli.main(["verify", "--all"])
    assert len(capsys.readouterr().out.splitlines()) > len(out.splitlines())


def test_no_kvm(capsys: Capture, tmp_path: Path) -> None:
    assert cli.main(["verify", "--kvm", str(tmp_path / "kvm")]) == 3
    assert cli.main(["verify", "--contract", str(tmp_path / "contract")]) == 5
    assert "cannot be read" in capsys.readouterr().err
