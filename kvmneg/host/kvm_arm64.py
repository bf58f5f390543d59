# SPDX-License-Identifier: LGPL-2.1-or-later
"""What one arm64 KVM offers, tried on scratch VMs: the part of kvm.py that is for this architecture only."""

from __future__ import annotations

from struct import Struct

from kvmneg._libkvmneg import ffi, lib
from kvmneg.host.tables import Capabilities
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.host.kvm import Kvm, Scratch

_TRIAL = Struct("=6Q")  # struct kvmneg_trial
_SMCCC_FILTER = 1  # bit of `vm_attributes`


class Init(NamedTuple):
    """struct kvm_vcpu_init of the preferred target (api.rst 4.83)."""

    target: int
    features: tuple[int, ...]  # seven words of 32 bits; bit n of word n // 32 is KVM_ARM_VCPU_* number n


class Trial(NamedTuple):
    """One register that decides what a guest sees, tried before a first run (struct kvmneg_trial); 64-bit masks."""

    id: int
    reset: int  # the first KVM_GET_ONE_REG
    value: int  # what can be given: every bit that a hypercall bitmap takes, the highest PSCI_VERSION, else `reset`
    settable: int  # bits that user space really changes
    dropped: int  # bits whose change KVM takes without an error and without an effect
    writable: int  # what KVM_ARM_GET_REG_WRITABLE_MASKS claims; 0 without it


class Probe(NamedTuple):
    """All that one arm64 KVM offers, from one call."""

    capabilities: Capabilities
    init: Init
    trials: list[Trial]
    register_list: tuple[int, ...]  # KVM_GET_REG_LIST
    vcpu_features: int  # bit n: KVM_ARM_VCPU_INIT takes feature n
    vgic_models: int  # bit 0 GICv2, bit 1 GICv3, bit 2 ITS
    vgic_iidr: int  # GICD_IIDR as it is at first, 0 where no vGIC could be asked
    vgic_revisions: int  # bit n: revision n is taken and read back
    vgic_revisions_dropped: int  # bit n: revision n is taken, another one read back
    pmu_attributes: int  # bit n: attribute n of KVM_ARM_VCPU_PMU_V3_CTRL
    smccc_filter: bool
    protected_vms: bool
    psci_versions: tuple[int, ...]  # major << 16 | minor, rising

    @property
    def registers(self) -> list[tuple[int, int]]:
        """(register id, value) of what can be given."""
        return [(trial.id, trial.value) for trial in self.trials]

    @property
    def masks(self) -> dict[int, int]:
        """Register id → settable bits, where there are any."""
        return {trial.id: trial.settable for trial in self.trials if trial.settable}

    @property
    def dropped(self) -> dict[int, int]:
        """Register id → bits accepted and dropped, where there are any."""
        return {trial.id: trial.dropped for trial in self.trials if trial.dropped}


def probe(kvm: Kvm, scratch: Scratch | None = None) -> Probe:
    """The whole offer of an arm64 KVM in one call; `scratch` is tried out and of no use afterwards.

    Raises KvmFault, which names the ioctl and the errno, where KVM fails in a way it must not.
    """
    if scratch is None:
        with kvm.scratch() as own:
            return probe(kvm, own)
    found = ffi.new("struct kvmneg_probe **")
    kvm._call(lib.kvmneg_probe, kvm.fd, scratch.vm, scratch.vcpu, found)
    try:
        return _decode(found[0])
    finally:
        lib.kvmneg_probe_free(found[0])


def _decode(found: Any) -> Probe:
    """struct kvmneg_probe of arm64."""
    rows = ffi.buffer(found.trials.entries, found.trials.count * _TRIAL.size)
    return Probe(
        capabilities=Capabilities(found.capabilities),
        init=Init(found.init.target, tuple(found.init.features)),
        trials=list(map(Trial._make, _TRIAL.iter_unpack(rows))),
        register_list=tuple(ffi.unpack(found.registers.ids, found.registers.count)),
        vcpu_features=found.vcpu_features,
        vgic_models=found.vgic_models,
        vgic_iidr=found.vgic_iidr,
        vgic_revisions=found.vgic_revisions,
        vgic_revisions_dropped=found.vgic_revisions_dropped,
        pmu_attributes=found.pmu_attributes,
        smccc_filter=bool(found.vm_attributes & _SMCCC_FILTER),
        protected_vms=bool(found.protected_vms),
        psci_versions=tuple(found.psci_versions[0 : found.psci_count]),
    )


def get_register(kvm: Kvm, vcpu: int, register: int) -> int:
    """KVM_GET_ONE_REG (api.rst 4.69) of 32 or 64 bits, or the first 64 of SVE_VLS. Raises KvmFault."""
    value = ffi.new("uint64_t *")
    kvm._call(lib.kvmneg_get_register, vcpu, register, value)
    return int(value[0])


def set_register(kvm: Kvm, vcpu: int, register: int, value: int) -> None:
    """KVM_SET_ONE_REG (api.rst 4.68), as `get_register`. Raises KvmFault."""
    kvm._call(lib.kvmneg_set_register, vcpu, register, value)
