# SPDX-License-Identifier: LGPL-2.1-or-later
"""N and N+1: a kernel and a VMM, each old and new, on both ends of a move, before the fence and after it.

    Before the fence you cannot roll back with either component; once on the other side of the fence, the user may
    freely migrate between kernel and VMM combinations.

Over recorded reports and what is known of VMMs. What kernels and VMMs gained is written down by hand: of the kernels
from their documentation (the words of arm64 as tests/hosts/test_rollback_experiment.py was told them by KVM), of VMMs
from their sources. A table of all combinations is printed where an answer is another.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest

from kvmneg.errors import Blocked
from kvmneg.features.report import Report
from kvmneg.policy import leases, negotiation, roll, rollback
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request
from tests.hosts.test_rollback_experiment import N1, TRANSLATION

FOLDER = Path(__file__).parents[1] / "data/hosts"
BEFORE, UNDER = "started before the fence", "started under the fence"
NOTHING: frozenset[str] = frozenset()
# After 6.1: 4096 vCPUs by configuration instead of 1024, and their ids with them, KVM_CAP_VM_TYPES, KVM_CAP_XEN_HVM in
# this build, KVM_CAP_X86_APIC_BUS_CYCLES_NS, quirks that can be disabled (api.rst), SVM FlushByASID for nested guests.
# After 6.12: one quirk more, one flag more of KVM_CAP_X2APIC_API.
X86_6_12 = {
    *(
        "kvm:max-vcpus",
        "kvm:max-vcpu-id",
        "kvm:vm-types",
        "kvm:x86-apic-bus-cycles-ns",
        "kvm:disable-quirks2",
    ),
    "kvm:xen-hvm",
}
AMD_6_12 = {*X86_6_12, "cpuid:0x8000000a.0.edx"}
AMD_NEWEST = {"kvm:disable-quirks2", "kvm:x2apic-api"}
# newer kernels list MSR_PLATFORM_INFO, which QEMU has no property for, and its state goes with it
LISTED = {"msr:0xce", "state:msrs"}
# QEMU 10.0 tells of machine checks that 7.2 does not know: OVERFLOW_RECOV, SUCCOR
QEMU_10 = {"cpuid:0x80000007.0.ebx"}
# capabilities, and the calls that a VMM may filter (KVM_ARM_VM_SMCCC_FILTER, 6.4)
ARM64_6_12 = {"kvm:counter-offset", "kvm:arm-supported-reg-mask-ranges", "arm:smccc-filter"}
ARM64_NEWEST = {"kvm:arm-sea-to-user", "kvm:arm-writable-imp-id-regs"}


class Component(NamedTuple):
    """A kernel of a recorded host, or a VMM, old and new, and the words by which the new is more, and less."""

    old: str
    new: str
    more: frozenset[str] = NOTHING
    less: frozenset[str] = NOTHING

    def lost(self, source: str, target: str) -> frozenset[str]:
        """What a guest of the source has that the target lacks."""
        if (source, target) == (self.new, self.old):
            return self.more
        return self.less if (source, target) == (self.old, self.new) else NOTHING


class Combo(NamedTuple):
    kernel: str
    vmm: str


Cell = tuple[str, Combo, Combo]
Answers = dict[Cell, frozenset[str]]


class Matrix:
    """The answers for a pair of kernels and a pair of VMMs.

    `answers` are words that stand in the way of a move; where the guest does not even start (`unstarted`), those that
    stand in the way of that.
    """

    def __init__(self, kernels: Component, vmms: Component) -> None:
        self.kernels, self.vmms = kernels, vmms
        self.combos = [Combo(*one) for one in product(_both(kernels), _both(vmms))]
        self.way_back = rollback.judge(report(kernels.new), report(kernels.old))
        assert self.way_back.fence is not None, self.way_back.blockers
        self.fence = Fence(self.way_back.fence.granted, 1, registers=self.way_back.fence.registers)
        self.contracts: dict[tuple[str, Combo], Contract] = {}
        self.unstarted: dict[Combo, frozenset[str]] = {}
        self.answers: Answers = {}
        for when, source in product((BEFORE, UNDER), self.combos):
            self._ask(when, source)

    def _ask(self, when: str, source: Combo) -> None:
        fence = self.fence if when == UNDER else None
        request = Request(maximum=True, vmm=source.vmm)
        try:
            contract = negotiation.negotiate(request, report(source.kernel), fence).contract
        except Blocked as no:
            assert when == UNDER, no.blockers
            self.unstarted[source] = frozenset(blocker.word for blocker in no.blockers)
            return
        self.contracts[when, source] = contract
        for target in self.combos:
            found = negotiation.check(contract, report(target.kernel), target.vmm)
            self.answers[when, source, target] = frozenset(blocker.word for blocker in found)

    def unfenced(self) -> Answers:
        """What must be in the way of a guest that was started without a fence, pinned or not since."""
        return {
            (BEFORE, source, target): self.kernels.lost(source.kernel, target.kernel)
            | self.vmms.lost(source.vmm, target.vmm)
            for source, target in product(self.combos, repeat=2)
        }

    def free(self) -> Answers:
        """Nothing, whichever way, for the guests that start under the fence."""
        started = [source for source in self.combos if source not in self.unstarted]
        return {(UNDER, source, target): NOTHING for source, target in product(started, self.combos)}

    def table(self, expected: Answers) -> str:
        """All answers; each that is not the expected one with both."""
        lines = [f"{self.kernels.old} and {self.kernels.new}, {self.vmms.old} and {self.vmms.new}"]
        for cell, found in self.answers.items():
            when, source, target = cell
            wanted = expected.get(cell, NOTHING)
            line = f"  {when:<26} {' '.join(source):<42} to {' '.join(target):<42} {_told(found)}"
            lines.append(line if found == wanted else f"{line}   <-- {_told(wanted)} expected")
        lines += [f"  not started: {' '.join(one)}: {_told(why)}" for one, why in self.unstarted.items()]
        return "\n".join(lines)


def _both(one: Component) -> list[str]:
    return list(dict.fromkeys((one.old, one.new)))


def _told(found: frozenset[str]) -> str:
    return f"no: {' '.join(sorted(found))}" if found else "yes"


@cache
def report(name: str) -> Report:
    return Report.loads((FOLDER / f"{name}.json").read_bytes(), file=name)


def words(*registers: str) -> frozenset[str]:
    return frozenset(f"arm64:{register}" for register in registers)


def amd(older: str, newer: str, more: set[str]) -> Component:
    return Component(f"amd-{older}.max", f"amd-{newer}.max", frozenset(more))


AMD = (
    amd("6.1", "6.12", AMD_6_12),
    amd("6.12", "newest", AMD_NEWEST),
    amd("6.1", "newest", AMD_6_12 | AMD_NEWEST),
)
QEMU = (
    Component("qemu-7.2", "qemu-10.0", frozenset(QEMU_10)),
    Component("qemu-7.2", "qemu-10.1", frozenset(QEMU_10)),
    Component("qemu-10.0", "qemu-10.1"),
)
# Bochs' Sandy Bridge; the machine checks that QEMU 10.0 tells of are AMD's
INTEL = Component(
    *(f"intel-{line}.corei7_sandy_bridge_2600k" for line in ("6.1", "6.12")), frozenset(X86_6_12)
)
# of these no difference between versions is known
OTHERS = (Component("firecracker-1.7", "firecracker-1.13"), Component("generic", "generic"))


def n1(number: int, more: set[str], less: set[str]) -> Component:
    journey = N1[number]
    old, new = (f"arm64-{line}.neoverse-n1" for line in (journey.older, journey.newer))
    return Component(old, new, words(*journey.refused, *journey.unknown) | more, words(*less))


ARM64 = (
    n1(0, ARM64_NEWEST, TRANSLATION),
    n1(1, ARM64_NEWEST | ARM64_6_12, set()),
    n1(2, ARM64_6_12, set()),
)


def ids(kernels: tuple[Component, ...]) -> list[str]:
    return [f"{one.old}-{one.new}" for one in kernels]


@pytest.mark.parametrize("vmms", QEMU, ids=ids(QEMU))
@pytest.mark.parametrize("kernels", AMD, ids=ids(AMD))
def test_x86_with_qemu(kernels: Component, vmms: Component) -> None:
    """Before the fence no way back, by either component; behind it each of the sixteen ways is free."""
    matrix = Matrix(kernels, vmms)
    expected = {**matrix.unfenced(), **matrix.free()}
    assert matrix.answers == expected, matrix.table(expected)
    assert len(expected) == 2 * 16 and matrix.unstarted == {}
    back = matrix.answers[BEFORE, Combo(kernels.new, vmms.old), Combo(kernels.old, vmms.old)]
    assert back == kernels.more != NOTHING


@pytest.mark.parametrize("vmms", (*QEMU, *OTHERS), ids=ids((*QEMU, *OTHERS)))
def test_x86_on_intel(vmms: Component) -> None:
    """No version of a VMM has more than another there; the kernel alone is in the way."""
    matrix = Matrix(INTEL, vmms._replace(more=NOTHING))
    expected = {**matrix.unfenced(), **matrix.free()}
    assert matrix.answers == expected, matrix.table(expected)
    assert matrix.unstarted == {}


@pytest.mark.parametrize("vmms", OTHERS, ids=ids(OTHERS))
@pytest.mark.parametrize("kernels", AMD, ids=ids(AMD))
def test_x86_with_vmms_that_hand_on_what_kvm_lists(kernels: Component, vmms: Component) -> None:
    """MSR_PLATFORM_INFO comes along, which the newest lists and the others do not."""
    if kernels.new.startswith("amd-newest"):
        kernels = kernels._replace(more=kernels.more | LISTED)
    matrix = Matrix(kernels, vmms)
    expected = {**matrix.unfenced(), **matrix.free()}
    assert matrix.answers == expected, matrix.table(expected)
    assert matrix.unstarted == {}


@pytest.mark.parametrize("kernels", ARM64, ids=ids(ARM64))
def test_arm64_with_a_vmm_that_follows_contracts(kernels: Component) -> None:
    """Before the fence 6.12 has no way forward either: it lists registers that 7.x does not. Behind it all is free."""
    matrix = Matrix(kernels, OTHERS[1])
    expected = {**matrix.unfenced(), **matrix.free()}
    assert matrix.answers == expected, matrix.table(expected)
    assert matrix.unstarted == {}


STUCK = {one.name: words(*one.unknown) for one in N1}  # registers that only the newer of both kernels lists


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("vmm", ["qemu-10.0", "firecracker"])
def test_arm64_with_vmms_that_leave_no_register_out(number: int, vmm: str) -> None:
    """No guest starts under the fence on a kernel that lists more than the other; those that do, move freely."""
    kernels = ARM64[number]
    matrix = Matrix(kernels, Component(vmm, vmm))
    expected = {**matrix.unfenced(), **matrix.free()}
    assert matrix.answers == expected, matrix.table(expected)
    stuck = {kernels.new: STUCK[N1[number].name], kernels.old: kernels.less}
    told = {source.kernel: why for source, why in matrix.unstarted.items()}
    assert told.keys() == {kernel for kernel, registers in stuck.items() if registers}
    for kernel, why in told.items():
        unset = words(*N1[number].refused) if kernel == kernels.new and vmm != "firecracker" else NOTHING
        assert why == stuck[kernel] | unset  # QEMU cannot lower a register of a new guest either
    # and the admin who asks for the way back is told the same
    answer = rollback.judge(report(kernels.new), report(kernels.old), vmm)
    assert answer.fence is None
    assert frozenset(blocker.word for blocker in answer.blockers) == told[kernels.new]


def test_arm64_with_a_newer_qemu_that_leaves_some_out() -> None:
    """QEMU 11.1 sets PSCI's version and leaves out TCR2_EL1 and the like: what starts with it may not go to 10.0.

    A fence is over kernels. That the older VMM lacks a way is told when a move is asked for.
    """
    kernels = ARM64[0]
    matrix = Matrix(kernels, Component("qemu-10.0", "qemu-11.1"))
    old_kernel, new_kernel = (Combo(kernel, "qemu-11.1") for kernel in (kernels.old, kernels.new))
    assert matrix.unstarted[new_kernel] == words("0x603000000013c4f6")  # PMMIR_EL1, which 6.12 does not list
    assert old_kernel not in matrix.unstarted
    for target in matrix.combos:
        lost = kernels.less if target == Combo(kernels.new, "qemu-10.0") else NOTHING
        assert matrix.answers[UNDER, old_kernel, target] == lost, matrix.table({})


def recorded(pattern: str) -> list[tuple[str, str]]:
    """Pairs of one emulated CPU under two kernels."""
    lines = ("5.10", "6.1", "6.12", "6.16", "6.18", "newest")
    names = [pattern.format(line) for line in lines if (FOLDER / f"{pattern.format(line)}.json").exists()]
    assert len(names) > 1
    return list(combinations(names, 2))


AMD_PAIRS = recorded("amd-{}.max")
ARM64_PAIRS = [
    pair
    for name in ("neoverse-n1", "max", "max.qemu-10.0")
    for pair in recorded(f"arm64-{{}}.{name}")
    if rollback.judge(report(pair[1]), report(pair[0])).fence
]


@pytest.mark.parametrize("pair", [*AMD_PAIRS, *ARM64_PAIRS], ids="-".join)
def test_every_pair_of_kernels(pair: tuple[str, str]) -> None:
    """The fence holds on both, all that starts under it moves freely, and what stands in a guest's way is above it."""
    matrix = Matrix(Component(*pair), QEMU[1] if pair[0].startswith("amd") else OTHERS[1])
    fence = matrix.fence
    assert all(negotiation.below(report(name), fence) == () for name in pair)
    free = {cell: found for cell, found in matrix.answers.items() if cell[0] == UNDER}
    assert free == matrix.free() and matrix.unstarted == {}, matrix.table({})
    for (when, source, target), found in matrix.answers.items():
        assert source != target or not found
        blockers = leases.exceeding(matrix.contracts[when, source].granted, fence.granted, "the fence")
        above = {blocker.word for blocker in blockers}
        assert when == BEFORE or not above
        valued = {word for word in found if not _unlisted(word, target)}
        assert valued - CACHES <= above and bool(valued) <= bool(above), matrix.table({})


@pytest.mark.parametrize(
    ("kernels", "vmms"),
    [(AMD[2], QEMU[1]), (INTEL, OTHERS[1]), (ARM64[1], OTHERS[1])],
    ids=("amd", "intel", "arm64"),
)
def test_the_rollback_check_answers_the_same(kernels: Component, vmms: Component) -> None:
    """With the fence pinned and one guest: back, and forth, iff that guest may move there, by the same words."""
    matrix = Matrix(kernels, vmms)
    for (when, source, target), words_in_the_way in matrix.answers.items():
        contract = matrix.contracts[when, source]
        holding = leases.Holding("guest", contract.digest, contract.granted, leases.RUNNING, 0)
        guests = roll.Guests([holding], registers={contract.digest: contract.portable})
        answer = roll.judge(report(target.kernel), matrix.fence, guests, vmm=target.vmm)
        told = {blocker.word for held in answer.guests for blocker in held.blockers}
        assert (answer.blockers, told) == ((), words_in_the_way)
        assert answer.allowed == (not words_in_the_way)


# CLIDR_EL1 and the CCSIDR_EL1 that both kernels list: they must be the fence's, and neither is more than the other
CACHES = words("0x603000000013c801", *(f"0x602000000011000{n}" for n in range(3)))


def _unlisted(word: str, target: Combo) -> bool:
    """Whether it is a register of arm64 that the target does not list, which no fence's values speak about."""
    return word.startswith("arm64:") and int(word[6:], 16) not in report(target.kernel).registers
