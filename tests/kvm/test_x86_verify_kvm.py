# SPDX-License-Identifier: LGPL-2.1-or-later
"""`kvmneg verify` on this machine's own KVM, whatever kind it is, and under contracts that it cannot keep."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg import cli
from kvmneg.errors import NotApplied
from kvmneg.features import catalog, words
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.host import measure
from kvmneg.host.apply import Applied
from kvmneg.host.kvm import Kvm, Scratch
from kvmneg.host.tables import CpuidEntry
from kvmneg.policy import negotiation
from kvmneg.policy.contract import Contract
from kvmneg.policy.request import Request

if measure.ARCHITECTURE == "x86_64":
    from kvmneg.host import enforcement, hidden_x86, hyperv_x86, sight, verify_x86
    from kvmneg.host import guest_x86 as guest

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.kvm

OURS = "cpuid:0x40000001.0.eax"
# Up to Linux 5.15 KVM looks for its own features in leaf 0x40000001 alone. Beside Hyper-V that is "Hv#1", and the MSRs
# of features that these bits happen to be are not refused, though the guest is not shown them.
BESIDE = [OURS] if tuple(map(int, platform.release().split(".")[:2])) < (5, 16) else []
PVM = Path("/sys/module/kvm_pvm").exists()
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def report(kvm: Kvm) -> Report:
    return measure.measure(kvm.path)


def contract_of(report: Report, *features: str) -> Contract:
    """Everything this host offers but for these features."""
    granted = negotiation.negotiate(Request(maximum=True), report, None).contract.granted
    values = granted.explicit()
    names = catalog.names(report.architecture)
    for feature in features:
        row = names.feature(feature)
        values[row.word] = values.get(row.word, 0) & ~row.mask
    return Contract(FeatureSet.of(report.architecture, values))


def verified(capsys: Capture, tmp_path: Path, contract: Contract | None) -> tuple[int, dict[str, object]]:
    options = []
    if contract is not None:
        path = tmp_path / "contract"
        path.write_bytes(contract.binary())
        options = ["--contract", str(path)]
    status = cli.main(["verify", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def test_the_host(capsys: Capture, kvm: Kvm, tmp_path: Path) -> None:
    """Exit 1 where it does not keep to something; on a KVM that does, everything is honoured."""
    status, found = verified(capsys, tmp_path, None)
    assert status == (1 if found["broken"] else 0)
    tables = found["tables"]
    enlightened = {"hyperv", "hyperv-emptied"} if kvm.probe().hyperv is not None else set()
    assert isinstance(tables, dict) and set(tables) == {"offer", "emptied", *enlightened}
    leaves = {words.parse_cpuid(word)[0] for word in found["broken"]}  # type: ignore[attr-defined]
    assert leaves == ({0x1, 0x7, 0xD} if PVM else set())
    for table in tables.values():
        for word, row in table.items():
            if row["grade"] == "honoured" and word.startswith("cpuid:"):
                mask = int(row["mask"], 16)
                seen = [row[name] for name in ("set", "read_back", "real", "cpl0", "cpl3") if row[name]]
                assert {int(value, 16) & mask for value in seen} == {int(row["promised"], 16)}, word
    if PVM:
        assert found["grades"]["cpuid:0xd.0.eax"] == "leaks"  # type: ignore[index]


def test_under_a_contract(capsys: Capture, report: Report, tmp_path: Path) -> None:
    """What it binds, nothing else; where KVM keeps its word, all of it is kept."""
    contract = contract_of(report)
    status, found = verified(capsys, tmp_path, contract)
    assert found["contract"] == contract.digest
    assert status == (1 if PVM else 0), found["broken"]
    tables = found["tables"]
    assert isinstance(tables, dict)
    assert set(tables["contract"]) <= set(contract.words())
    shown = {word for word in contract.words() if word.startswith("cpuid:")}
    assert shown <= set(tables["contract"])


def test_a_contract_that_this_host_cannot_keep(kvm: Kvm, report: Report) -> None:
    """An MSR that no CPU has is refused, or dropped where kvm.ignore_msrs is set; the rest is judged all the same."""
    bound = contract_of(report).bound()
    found = verify_x86.prove(kvm, {**bound, "msr:0x12345678": (1, 1)})
    before = verify_x86.prove(kvm, bound)
    assert found.grades().pop("msr:0x12345678") in ("refused", "replaced")
    assert found.grades().items() >= before.grades().items()


# -- Hyper-V -----------------------------------------------------------------------------------------------------


@pytest.fixture
def enlightened(kvm: Kvm) -> list[str]:
    """The Hyper-V features that this KVM has; skips where it has no Hyper-V."""
    if kvm.probe().hyperv is None:
        pytest.skip("another kind of KVM: it has no Hyper-V")
    return ["hv-vpindex", "hv-time-ref-count", "hv-hypercall", "hv-relaxed"]


def hyperv_contract(report: Report, features: list[str], *, maximum: bool = False) -> Contract:
    request = Request(require=tuple(features), maximum=maximum)
    return negotiation.negotiate(request, report, None).contract


def test_a_contract_with_hyper_v(
    capsys: Capture, report: Report, tmp_path: Path, enlightened: list[str]
) -> None:
    """Every word of it is set, read back and seen in each mode; KVM's own leaf is seen where it moved to."""
    contract = hyperv_contract(report, enlightened)
    status, found = verified(capsys, tmp_path, contract)
    assert found["broken"] == BESIDE
    assert status == (1 if BESIDE else 0)
    rows = found["tables"]["contract"]  # type: ignore[index]
    granted = {word: value for word, value in contract.words().items() if word.startswith("hyperv:")}
    assert granted["hyperv:0x40000003.0.eax"] == 1 << 6 | 1 << 5 | 1 << 1
    for word, value in {**granted, OURS: contract.words()[OURS]}.items():
        row = rows[word]
        seen = [int(row[name], 16) & int(row["mask"], 16) for name in ("read_back", "real", "cpl0", "cpl3")]
        assert (row["grade"], seen) == ("honoured", [value] * 4), word
    assert not [word for word in found["untried"] if word.startswith("hyperv:")]  # type: ignore[attr-defined]


def test_hyper_v_msrs_that_a_contract_hides(kvm: Kvm, report: Report, enlightened: list[str]) -> None:
    """Refused by KVM_CAP_HYPERV_ENFORCE_CPUID (Linux 5.14 and later); those that it shows are there."""
    standings = verify_x86.prove(kvm, hyperv_contract(report, enlightened).bound()).paravirtual
    found = {name: one for name, one in standings.items() if name.startswith("hv-")}
    can = bool(report.offer.value("kvm:hyperv-enforce-cpuid"))
    assert found["hv-vpindex"] == (True, False, False if can else None, False)
    assert found["hv-runtime"] == (False, False, True if can else None, False)
    hidden = {name: one for name, one in found.items() if not one.shown}
    assert {one.refused_enforced for one in hidden.values()} == {True if can else None}
    assert len(hidden) > 5


def test_hyper_v_is_not_shown_unasked(kvm: Kvm, report: Report, enlightened: list[str]) -> None:
    found = verify_x86.prove(kvm, contract_of(report).bound())
    assert not any(word.startswith("hyperv:") for word in found.tables["contract"])
    assert not any(one.shown for name, one in found.paravirtual.items() if name.startswith("hv-"))


def test_a_hyper_v_leaf_that_is_not_kept(kvm: Kvm, report: Report, enlightened: list[str]) -> None:
    """Of a KVM that shows its guests a feature of Hyper-V's which was not set."""

    class Liar(Kvm):
        def try_cpuid(self, scratch: Scratch, entries: Sequence[CpuidEntry]) -> list[CpuidEntry] | None:
            more = [one._replace(eax=one.eax | 1 << 7) if one[0] == 0x40000003 else one for one in entries]
            assert super().try_cpuid(scratch, more) is not None
            return list(entries)

    with Liar(os.dup(kvm.fd)) as liar:
        found = verify_x86.prove(liar, hyperv_contract(report, enlightened).bound())
    assert found.grades() == {**dict.fromkeys(BESIDE, "leaks"), "hyperv:0x40000003.0.eax": "leaks"}


def test_the_table_of_both_hypervisors(kvm: Kvm) -> None:
    """KVM's leaves behind Hyper-V's, its highest leaf told there, and each register by its address in contracts."""
    hyperv = [
        CpuidEntry(0x40000000, 0, 0, 0x40000082, 1, 2, 3),
        CpuidEntry(0x40000001, 0, 0, hyperv_x86.INTERFACE, 0, 0, 0),
        CpuidEntry(0x40000003, 0, 0, 0xFFFF, 0, 0, 0),
    ]
    ours = [
        CpuidEntry(0x40000000, 0, 0, 0x40000001, *(0x4B4D564B, 0x564B4D56, 0x4D)),
        CpuidEntry(0x40000001, 0, 0, 8, 0, 0, 1),
        CpuidEntry(0x80000008, 0, 0, 0x3028, 0, 0, 0),
    ]
    both = hyperv_x86.beside(ours, hyperv)
    assert [(entry[0], entry.eax) for entry in both] == [
        (0x40000000, 0x40000082), (0x40000001, hyperv_x86.INTERFACE), (0x40000003, 0xFFFF),
        (0x40000100, 0x40000101), (0x40000101, 8), (0x80000008, 0x3028),
    ]  # fmt: skip
    named = hyperv_x86.named(both)
    assert [named[leaf, 0][0][0] for leaf in (0x40000003, 0x40000101, 1)] == [
        "hyperv:0x40000003.0.eax", OURS, "cpuid:0x1.0.eax",
    ]  # fmt: skip
    bound = {
        "hyperv:0x40000003.0.eax": (0x42, 0xFFFF_FFFF),
        OURS: (8, 0xFFFF_FFFF),
        "hyperv:0x4000000a.0.eax": (2, 2),
    }
    made = {entry[0]: entry.eax for entry in verify_x86.contract_entries(both, bound)}
    assert (made[0x40000003], made[0x40000101], made[0x4000000A]) == (0x42, 8, 2)
    assert hyperv_x86.wanted(bound) and not hyperv_x86.wanted(
        {OURS: (8, 8), "hyperv:0x40000003.0.eax": (0, 1)}
    )
    assert hyperv_x86.named(ours) is enforcement.registers


def test_hidden_features_are_tried(kvm: Kvm, report: Report) -> None:
    """A contract without POPCNT: no guest sees it, and every guest can execute it where the CPU has it."""
    has = report.silicon_words["cpuid:0x1.0.ecx"] & catalog.names("x86_64").feature("popcnt").mask
    found = verify_x86.prove(kvm, contract_of(report, "popcnt").bound())
    assert found.instructions.get("popcnt") == ("hidden only" if has else None)


def test_explain_tries_it(capsys: Capture, kvm: Kvm, report: Report) -> None:
    """On this host, at once; of what no instruction shows there is nothing to tell."""
    has = report.silicon_words["cpuid:0x1.0.ecx"] & catalog.names("x86_64").feature("sse4.2").mask
    assert cli.main(["explain", "sse4.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["here"]["instruction"] == ("hidden only" if has else None)
    assert verify_x86.mark_of(kvm, "lzcnt") is None
    assert verify_x86.mark_of(kvm, "tbm") in (None, "hidden only", "trapped", "untested")


def test_an_empty_contract(kvm: Kvm) -> None:
    """Binds nothing that guests see: nothing is broken."""
    found = verify_x86.prove(kvm, {})
    assert found.grades().keys() <= {sight.PARAVIRTUAL}
    assert found.tables["contract"] == {}


def test_bits_that_nobody_promised_are_clear(kvm: Kvm, report: Report) -> None:
    probe = kvm.probe()
    bound = {"cpuid:0x1.0.ecx": (1 << 23, 0xFFFF_FFFF), "cpuid:0x7.1.eax": (1 << 4, 0xFFFF_FFFF)}
    entries = {entry[:2]: entry for entry in verify_x86.contract_entries(probe.supported, bound)}
    assert entries[1, 0].ecx == 1 << 23
    assert entries[7, 1].eax == 1 << 4 and entries[7, 1].flags == 1
    assert entries[7, 0].ebx == 0
    topology = [entry for entry in probe.supported if entry[0] == 0xB]
    assert [entries[entry[:2]] for entry in topology] == topology
    _, compared, _ = enforcement.registers[1, 0][2]
    assert compared


def test_for_people(capsys: Capture, kvm: Kvm) -> None:
    status = cli.main(["verify"])
    out = capsys.readouterr().out
    assert ("broken: " if status else "kept: ") in out
    assert "\neverything that this host offers: " in out
    assert "\nnone of the features that this host offers, but for what no guest can be without: " in out
    assert "  word " in out and " CPL 3\n" in out
    cli.main(["verify", "--all"])
    assert len(capsys.readouterr().out.splitlines()) > len(out.splitlines())


def test_no_kvm(capsys: Capture, tmp_path: Path) -> None:
    assert cli.main(["verify", "--kvm", str(tmp_path / "kvm")]) == 3
    assert cli.main(["verify", "--contract", str(tmp_path / "contract")]) == 5
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("maximum", [False, True])
def test_what_is_shown_beside_hyper_v_is_not_refused(
    kvm: Kvm, report: Report, enlightened: list[str], maximum: bool
) -> None:
    """Applied by the library, with all it enforces: a guest has the MSRs of KVM's own features that it is shown."""
    book = catalog.names(words.X86_64)
    rows = [book.feature(name) for name in hidden_x86.PARAVIRTUAL_MSRS]
    shown = [row.name for row in rows if report.offer.value(row.word) & row.mask]
    contract = hyperv_contract(report, [*enlightened, *shown], maximum=maximum)
    held = Applied.of(contract.binary())
    table = hyperv_x86.beside(kvm.supported_cpuid(), kvm.probe().hyperv or [])
    indices = [index for name in shown for index in hidden_x86.PARAVIRTUAL_MSRS[name]]
    with kvm.scratch() as scratch:
        held.vm(scratch.vm)
        held.vcpu_init(scratch.vm, scratch.vcpu)
        if BESIDE and contract.words().get("kvm:enforce-pv-feature-cpuid"):
            with pytest.raises(NotApplied) as caught:
                held.vcpu(scratch.vcpu, table)
            told = caught.value.fields
            assert (told["word"], told["why"]) == ("kvm:enforce-pv-feature-cpuid", "dropped")
        else:
            held.vcpu(scratch.vcpu, table)
        questions = [guest.Question(guest.ASK_MSR, index) for index in indices]
        answers = guest.ask(kvm, scratch, guest.CPL0, questions)
    refused = [
        hex(index) for index, one in zip(indices, answers, strict=True) if one.outcome != guest.ANSWERED
    ]
    assert len(indices) > 5 and not refused


@pytest.mark.parametrize("asked", ["level", "maximum", "hyperv"])
def test_the_table_is_the_librarys(kvm: Kvm, report: Report, asked: str) -> None:
    """What guests are proven under is what libkvmneg makes of KVM's own table, but for sizes, which KVM computes."""
    probe = kvm.probe()
    _offer, offered, _silicon = verify_x86._offered(probe)
    if asked == "hyperv":
        if probe.hyperv is None:
            pytest.skip("another kind of KVM: it has no Hyper-V")
        offered = hyperv_x86.beside(offered, probe.hyperv)
        contract = hyperv_contract(report, ["hv-vpindex", "hv-relaxed"])
    else:
        contract = hyperv_contract(report, [], maximum=asked == "maximum")
    proven = {row[:2]: row[3:] for row in verify_x86.contract_entries(offered, contract.bound())}
    applied = {tuple(row[:2]): tuple(row[3:]) for row in Applied.of(contract.binary()).clamp(offered)}
    sizes = {(0xD, 0): (1, 2), (0xD, 1): (1,)}
    for key in sorted({*proven, *applied}):
        ours, theirs = proven.get(key, (0,) * 4), applied.get(key, (0,) * 4)
        differs = [place for place in range(4) if ours[place] != theirs[place]]
        assert set(differs) <= set(sizes.get(key, ())), (key, ours, theirs)
