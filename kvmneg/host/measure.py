# SPDX-License-Identifier: LGPL-2.1-or-later
"""One host, measured: KVM, the CPU itself, TAP and vhost, and the combo, as a report.

Nothing is kept open between two measurements: a scratch VM counts as a guest to whoever watches KVM, and an
open /dev/kvm pins KVM's modules. What stays is what KVM cannot change: raw CPUID, one of each kind of CPU.
"""

from __future__ import annotations

import os
from functools import partial

from kvmneg import __version__
from kvmneg.clock import now
from kvmneg.errors import KvmnegError
from kvmneg.features.report import Report
from kvmneg.features.words import ARM64, X86_64
from kvmneg.host import network, software, visit
from kvmneg.host.kvm import Kvm, raw_cpuid
from kvmneg.host.software import Roots
from kvmneg.host.volatile import Volatile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Self

    from kvmneg.host.proof import Kept
    from kvmneg.host.software import CpuClass
    from kvmneg.host.tables import CpuidEntry, Probe
    from kvmneg.host.visit import Plan

ARCHITECTURE = ARM64 if os.uname().machine == "aarch64" else X86_64


class Measurer:
    """Measures this host again and again. A context manager; one thread at a time."""

    __slots__ = ("_path", "_roots", "_silicon", "_volatile", "networked", "proven", "vmms")

    def __init__(self, path: str = "/dev/kvm", *, roots: Roots = Roots()) -> None:  # noqa: B008 (immutable)
        self._path = path
        self._roots = roots
        self._volatile = Volatile(path, roots, _feature_msrs)
        # raw CPUID of each CPU looked at, under what /proc/cpuinfo says of all of them
        self._silicon: tuple[Plan, list[list[CpuidEntry]]] | None = None
        # VMM builds, as kvmneg.host.vmm.known() gives them; set it when they are known
        self.vmms: Sequence[Mapping[str, str]] = ()
        # what network devices offer, where somebody else has to look (kvmneg.host.apart)
        self.networked: Callable[[], dict[str, int]] | None = None
        # combo → what guests on it saw, None where none ran; kvmneg.host.proof keeps it, running them takes too long
        self.proven: Callable[[Mapping[str, Any]], Kept | None] | None = None

    @classmethod
    def open(cls, path: str = "/dev/kvm", *, roots: Roots = Roots()) -> Self:  # noqa: B008
        """A measurer of a KVM that can be used. Raises NoKvm with the cause and what to do."""
        Kvm.open(path).close()
        return cls(path, roots=roots)

    def close(self) -> None:
        """Forget everything; there is nothing to give back."""
        self._silicon = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def changed(self, *, fresh: bool = False) -> bool:
        """Whether an input that changes without an event did since `measure` (kvmneg.host.volatile)."""
        return self._volatile.changed(fresh=fresh)

    def measure(self) -> Report:
        """Measure now. Raises NoKvm, KvmFault."""
        self.mark()
        return self.take()

    def mark(self) -> None:
        """Take the inputs as they are now: those of the measurement that follows, here or in a child."""
        self._volatile.mark()

    def doubt(self) -> None:
        """The measurement that was marked came to nothing: `changed` is true until the next mark."""
        self._volatile.forget()

    def take(self) -> Report:
        """Measure what was marked. Raises NoKvm, KvmFault."""
        try:
            return self._report()
        except KvmnegError:
            self.doubt()
            raise

    def _report(self) -> Report:
        classes = software.cpu_classes(self._roots)
        plan = visit.plan(classes)
        combo = software.combo(self.vmms, roots=self._roots, classes=classes)
        if plan.unvisited:
            combo["unvisited"] = plan.to_combo()
        measured = {
            "at": now(),
            "by": f"kvmneg {__version__}",
            "host": software.host_name(self._roots),
            "source": "kvm",
        }
        offline = software.offline(self._roots)
        if offline:
            measured["offline"] = offline  # no guest runs there; when they come online, it is measured again
        parts = self._x86(plan, combo) if ARCHITECTURE == X86_64 else self._arm64(plan)
        masks = self.networked() if self.networked else network.masks(self._roots.dev)
        parts["offer"].update(masks)
        kept = self.proven(combo) if self.proven else None
        if kept is not None and parts.get("enforcement"):  # a KVM that cannot be tried is not proven either
            kept.add_to(parts, measured)
        return Report(ARCHITECTURE, measured=measured, combo=combo, **parts)

    def _x86(self, plan: Plan, combo: Mapping[str, Any]) -> dict[str, Any]:
        """Each kind of CPU is asked and tried on a CPU of its own: parts of KVM's answer are that CPU's CPUID."""
        from kvmneg.host import enforcement, x86  # their twins are for the other architecture

        decoder = x86.decoder()
        one_kind = len(plan.cpus) < 2
        with Kvm.open(self._path) as kvm, kvm.scratch() as scratch:
            if one_kind:
                probes = [kvm.probe(scratch)]
            else:
                probes = [visit.on(cpu, lambda: kvm.probe(scratch)) for cpu in plan.cpus]
            tolerance = x86.tolerance_ppm(combo)
            offer = x86.met([decoder.offer(probe, tolerance) for probe in probes])

            def graded(probe: Probe) -> dict[str, str]:
                return enforcement.grades(kvm, scratch, probe, offer)

            if one_kind:
                grades = graded(probes[0])
            else:
                each = zip(plan.cpus, probes, strict=True)
                grades = enforcement.worst([visit.on(cpu, partial(graded, probe)) for cpu, probe in each])
        if self._silicon is None or self._silicon[0] != plan:
            self._silicon = plan, [visit.on(cpu, partial(raw_cpuid, cpu)) for cpu in plan.cpus]
        kinds = [x86.identity(probe.supported) for probe in probes]
        return {
            "identity": {**kinds[0], **_kinds(plan, kinds), **_flags(plan.kinds)},
            "offer": offer,
            "silicon": x86.silicon_of(self._silicon[1]),
            "enforcement": grades,
        }

    def _arm64(self, plan: Plan) -> dict[str, Any]:
        """Each kind of core is asked on a core of its own, on VMs of its own: a probe uses its VM up."""
        from kvmneg.host import arm64, kvm_arm64

        decoder = arm64.decoder()
        with Kvm.open(self._path) as kvm:
            if len(plan.cpus) < 2:
                probes = [kvm_arm64.probe(kvm)]
            else:
                probes = [visit.on(cpu, lambda: kvm_arm64.probe(kvm)) for cpu in plan.cpus]
        offer = arm64.met([decoder.offer(probe) for probe in probes])
        if "kvm-arm.mode=protected" in (software.read(f"{self._roots.proc}/cmdline") or "").split():
            offer["arm:pkvm"] = 1  # kernels up to 7.1 make no protected VMs and protect the host all the same
        return {
            "identity": {**arm64.identity(plan.kinds), **_kinds(plan, [one.identity for one in plan.kinds])},
            "offer": offer,
            "enforcement": decoder.untested(offer),
            "settable": arm64.settable_on_all([decoder.settable(probe) for probe in probes]),
            "dropped": arm64.dropped_on_any([decoder.dropped(probe) for probe in probes]),
            "registers": arm64.on_all(probe.register_list for probe in probes),
        }


def measure(
    path: str = "/dev/kvm",
    *,
    roots: Roots = Roots(),  # noqa: B008
    vmms: Sequence[Mapping[str, str]] = (),
) -> Report:
    """Measure this host once. Raises NoKvm, KvmFault."""
    measurer = Measurer(path, roots=roots)
    measurer.vmms = vmms
    return measurer.measure()


def _feature_msrs(path: str) -> object:
    """KVM's feature MSRs, for comparison. Raises NoKvm, KvmFault."""
    with Kvm.open(path) as kvm:
        return kvm.feature_msrs() if ARCHITECTURE == X86_64 else None


def _flags(classes: Sequence[CpuClass]) -> dict[str, str]:
    """What Linux itself uses of the CPU: it explains what microcode or the command line took away."""
    flags = software.common_flags(one.flags for one in classes) if classes else ""
    return {"flags": flags} if flags else {}


def _kinds(plan: Plan, identities: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Of a host with several kinds of CPU: which CPUs are of which, as KVM shows them to guests there."""
    if len(plan.kinds) < 2:
        return {}
    rows = zip(plan.kinds, identities, strict=True)
    return {"kinds": [{"cpus": visit.cpulist(one.cpus), **identity} for one, identity in rows]}
