# SPDX-License-Identifier: LGPL-2.1-or-later
"""An arm64 contract as QEMU arguments: `-machine virt-…,gic-version=3 -cpu host,pmu=on,pauth=off,…`. Pure.

KVM has no CPU models on arm64: `-cpu host` shows what KVM shows, and QEMU has properties for vCPU features, vector
lengths and (11.1) the PSCI version only. What a contract wants otherwise than this host shows it by itself cannot be
said to QEMU, so it is an error with the names, never left out. Source: QEMU target/arm/arm-qmp-cmds.c and cpu64.c.
"""

from __future__ import annotations

from kvmneg.errors import Blocked, UsageError
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.difference import Blocker
from kvmneg.policy import definitions, vmm_arm64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.policy.contract import Contract

# QEMU's properties of `-cpu host` and the KVM_ARM_VCPU_* features behind them
PROPERTIES = (("pmu", "vcpu-pmu-v3"), ("pauth", "vcpu-ptrauth-address"), ("sve", "vcpu-sve"))
_LENGTHS, _LONGEST = "sve-lengths", 16  # QEMU knows sve128 to sve2048 (ARM_MAX_VQ)
_PSCI, _PSCI_PROPERTY = "psci-version", "kvm-psci-version"
_EVERY = "1000"  # later than each version of a definition
_LACKS = "QEMU has no way to set it: its guests see {shown:#x} on this host, {wanted:#x} is needed"


def cpu(contract: Contract, known: frozenset[str] | None, host: FeatureSet | None) -> str:
    """The value of -cpu. `known` are the properties of the build (None: not asked), `host` is what this host offers.

    Raises UsageError without `host` (what is not a property cannot be judged then), Blocked naming each field that
    QEMU would show otherwise than the contract has it, or each property that this build does not know.
    """
    if host is None:
        raise UsageError(
            "QEMU arguments for arm64 are made for a host: `-cpu host` shows what that host shows",
            hint="kvmneg negotiate --emit qemu, with --report FILE or the daemon",
        )
    granted = contract.granted
    names = catalogs.names(words.ARM64)
    psci: list[str] = []
    blockers = []
    # every property of every version: which of them a build has is asked of it
    able = vmm_arm64.settable(definitions.vmm("qemu")["arm64"], _EVERY)
    for feature, wanted, shown in vmm_arm64.differing(granted, host):
        if feature.name == _PSCI and (known is None or _PSCI_PROPERTY in known):
            psci.append(f"{_PSCI_PROPERTY}={wanted >> 16}.{wanted & 0xFFFF}")
        elif feature.name not in able or feature.name == _PSCI:
            because = _LACKS.format(wanted=wanted, shown=shown)
            blockers.append(
                Blocker(feature.name, feature.word, None, "the contract", "QEMU on this host", "vmm", because)
            )
    init = granted.value(vmm_arm64.INIT)
    on = {name: bool(init & names.feature(feature).mask) for name, feature in PROPERTIES}
    blockers += [_unknown(feature) for name, feature in PROPERTIES if on[name] and not _there(name, known)]
    if blockers:
        named = f"{len(blockers)} of the contract's fields" if len(blockers) > 1 else blockers[0].feature
        raise Blocked(f"QEMU cannot show a guest {named} as the contract has it", blockers)
    # what is off is named too: left out, it would be on wherever KVM has it
    parts = [f"{name}={'on' if on[name] else 'off'}" for name, _feature in PROPERTIES if _there(name, known)]
    lengths = _lengths(granted) if on["sve"] else []
    return ",".join(["host", *parts, *lengths, *psci])


def _there(name: str, known: frozenset[str] | None) -> bool:
    return known is None or name in known


def _unknown(name: str) -> Blocker:
    because = "this QEMU has no property for it"
    return Blocker(name, vmm_arm64.INIT, None, "the contract", "QEMU on this host", "vmm", because)


def _lengths(granted: FeatureSet) -> list[str]:
    """The vector lengths: with one of them named, QEMU turns the longer ones off."""
    lengths = granted.field(_LENGTHS)
    return [f"sve{128 * (n + 1)}=on" for n in range(_LONGEST) if lengths >> n & 1]
