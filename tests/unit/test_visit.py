# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kinds of CPU: which CPU stands for each, how it is visited, and what becomes of those that cannot be."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmneg.errors import KvmFault
from kvmneg.features.featureset import FeatureSet, fits
from kvmneg.features.report import Report
from kvmneg.host import enforcement, visit, x86
from kvmneg.host.software import CpuClass, cpu_numbers
from kvmneg.host.tables import CpuidEntry, Probe

BIG, LITTLE, THIRD = CpuClass({"model": "1"}, (0, 1)), CpuClass({"model": "2"}, (2, 3, 4)), CpuClass({}, (7,))


class TestPlan:
    def test_the_first_cpu_of_each_kind_that_may_be_used(self) -> None:
        plan = visit.plan([BIG, LITTLE], {1, 3, 4})
        assert (plan.kinds, plan.cpus, plan.unvisited) == ((BIG, LITTLE), (1, 3), ())
        assert plan.to_combo() == []

    def test_kinds_that_may_not_be_used(self) -> None:
        plan = visit.plan([BIG, LITTLE, THIRD], {0, 1})
        assert (plan.kinds, plan.cpus) == ((BIG,), (0,))
        assert [one for one, _ in plan.unvisited] == [LITTLE, THIRD]
        assert [(row["cpus"], row["kind"]) for row in plan.to_combo()] == [("2-4", {"model": "2"}), ("7", {})]

    def test_cpus_that_are_not_listed(self) -> None:
        """A container's /proc/cpuinfo may number others than the kernel does: then nothing is known of any."""
        plan = visit.plan([BIG], {5, 9})
        assert (plan.kinds, plan.cpus) == ((), (5,))
        assert [(one, "lists none" in why) for one, why in plan.unvisited] == [(BIG, True)]

    def test_no_list_at_all(self) -> None:
        assert visit.plan([], {5, 9}) == visit.Plan((), (5,), ())

    def test_by_itself_it_looks_at_this_thread(self) -> None:
        assert visit.plan([]).cpus == (min(os.sched_getaffinity(0)),)


class TestOn:
    def test_it_runs_there(self) -> None:
        before = os.sched_getaffinity(0)
        for cpu in sorted(before)[:4]:
            assert visit.on(cpu, lambda: os.sched_getaffinity(0)) == {cpu}
        assert os.sched_getaffinity(0) == before

    def test_what_it_raises_is_raised(self) -> None:
        def fail() -> None:
            raise KeyError("here")

        with pytest.raises(KeyError, match="here"):
            visit.on(min(os.sched_getaffinity(0)), fail)

    def test_a_cpu_that_is_not_there(self) -> None:
        called: list[int] = []
        with pytest.raises(KvmFault) as caught:
            visit.on(8191, lambda: called.append(1))
        assert caught.value.fields["ioctl"] == "sched_setaffinity" and not called

    def test_no_thread_to_be_had(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("_thread.start_new_thread", none)
        with pytest.raises(KvmFault):
            visit.on(0, lambda: None)


@pytest.mark.parametrize(
    ("cpus", "text"), [((), ""), ((5,), "5"), ((3, 1, 2), "1-3"), ((0, 1, 4, 6, 7), "0-1,4,6-7")]
)
def test_cpu_lists(cpus: tuple[int, ...], text: str) -> None:
    assert visit.cpulist(cpus) == text
    assert cpu_numbers(text) == set(cpus)


@pytest.mark.parametrize("text", ["a", "1-", "-1", "0-65536", "0,,1", "1-0x3", "0-99999999999"])
def test_what_is_no_cpu_list(text: str) -> None:
    assert cpu_numbers(text) == set()


class TestWorst:
    def test_each_word_by_its_worst_kind(self) -> None:
        a = {"msr:0x10a": "replaced", "kvm:max-vcpus": "untested", "cpuid:0x1.0.edx": "untested"}
        b = {"msr:0x10a": "refused", "kvm:max-vcpus": "untested", "cpuid:0x1.0.edx": "replaced"}
        expected = {"cpuid:0x1.0.edx": "replaced", "msr:0x10a": "refused", "kvm:max-vcpus": "untested"}
        assert enforcement.worst([a, b]) == expected == enforcement.worst([b, a])
        assert enforcement.worst([a, {"kvm:max-vcpus": "untested"}]) == a

    def test_a_kind_that_could_not_be_tried_leaves_no_grades(self) -> None:
        assert enforcement.worst([{"msr:0x10a": "refused"}, {}]) == {}


def _decoded(report: Report, taken: dict[str, int]) -> dict[str, int]:
    """A recorded CPU as KVM would list it without some bits, through the decoder."""
    leaves: dict[tuple[int, int], list[int]] = {}
    for word, value in report.offer_words.items():
        kind, _, address = word.partition(":")
        if kind == "cpuid":
            leaf, subleaf, register = address.split(".")
            row = leaves.setdefault((int(leaf, 16), int(subleaf, 16)), [0, 0, 0, 0])
            row[("eax", "ebx", "ecx", "edx").index(register)] = value & ~taken.get(word, 0)
    msrs = {
        int(word[4:], 16): value & ~taken.get(word, 0)
        for word, value in report.offer_words.items()
        if word.startswith("msr:")
    }
    table = [CpuidEntry(leaf, subleaf, 0, *row) for (leaf, subleaf), row in leaves.items()]
    return x86.decoder().offer(Probe({}, table, None, None, msrs, (), None, {}))


# What Intel's hybrid CPUs differ in by design where firmware does not level it (leaf 0x1a tells cores apart), and
# what an E core reports smaller: AVX-512, the signature's model, the counters (leaf 0xA).
_E_CORE = {
    "cpuid:0x7.0.ebx": 1 << 16 | 1 << 17 | 1 << 21 | 1 << 28 | 1 << 30 | 1 << 31,
    "cpuid:0xd.0.eax": 0xE0,
    "cpuid:0x1.0.eax": 0xF0,
    "cpuid:0xa.0.eax": 0xF00,
}


def test_a_hybrid_host(intel: Report) -> None:
    performance, efficiency = _decoded(intel, {}), _decoded(intel, _E_CORE)
    assert performance != efficiency
    host = FeatureSet.of("x86_64", x86.met([performance, efficiency]))
    assert not host.field("avx512f") and FeatureSet.of("x86_64", performance).field("avx512f")
    assert host.field("avx2")
    for kind in (performance, efficiency):
        assert not fits(host, FeatureSet.of("x86_64", kind))


_BITS = st.dictionaries(
    st.sampled_from(["cpuid:0x1.0.ecx", "cpuid:0x1.0.edx", "cpuid:0x7.0.ebx", "cpuid:0x7.0.edx", "cpuid:0xd.0.eax",
                     "cpuid:0xa.0.eax", "cpuid:0x80000001.0.ecx", "cpuid:0x80000008.0.eax", "msr:0x10a", "msr:0x485"]),
    st.integers(0, (1 << 32) - 1),
)  # fmt: skip


@given(st.lists(_BITS, min_size=2, max_size=3))
def test_the_met_host_fits_each_kind(intel: Report, taken: list[dict[str, int]]) -> None:
    kinds = [_decoded(intel, bits) for bits in taken]
    host = FeatureSet.of("x86_64", x86.met(kinds))
    for kind in kinds:
        assert not fits(host, FeatureSet.of("x86_64", kind))
