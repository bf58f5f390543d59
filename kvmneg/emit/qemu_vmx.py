# SPDX-License-Identifier: LGPL-2.1-or-later
"""What QEMU makes of nested VMX by itself: what of its MSRs comes from properties, from KVM, or is constant. Pure.

Of the five control words QEMU has a property a control, and writes every other as its class has it: 1 in the default1
class, else 0 (Intel SDM vol. 3D A.2). Source: QEMU 10.0 target/i386/kvm/kvm.c, kvm_msr_entry_add_vmx and
make_vmx_msr_value; 7.2 differs in IA32_VMX_VMCS_ENUM only, of controls that it does not name.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.catalog import controls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.catalog import Feature

FOLLOWS, KVM, LOST = "follows", "kvm", "lost"
# Bits that QEMU asks KVM for, whatever its properties say.
_OF_KVM = (
    "vmx-revision", "vmx-vmcs-size", "vmx-vmcs-memory-type", "vmx-preemption-rate", "vmx-msr-list-size",
    "vmx-ept-uc", "vmx-ept-wb",
)  # fmt: skip
_CONSTANTS = {"vmx-cr0-fixed0": 0x8000_0021, "vmx-cr4-fixed0": 0x2000}  # PE, NE, PG; VMXE
# The highest field of a VMCS, by the first control that is granted.
_HIGHEST = (
    ("vmx-entry-load-fred", 0x52),
    ("vmx-exit-secondary-ctls", 0x44),
    ("vmx-tsc-scaling", 0x32),
    ("", 0x2E),
)
_HOST_ADDRESS_SPACE = "vmx-exit-host-addr-space-size"  # it is there in a guest with lm
_WORDS = ("msr:0x48", "msr:0x49")


def treated(feature: Feature, values: dict[str, int], known: frozenset[str] | None) -> tuple[str, str] | None:
    """(FOLLOWS, KVM or LOST, because) of a feature of nested VMX that QEMU has no property for, None of any other.

    `known` are the properties of the build (None: all).
    """
    if not feature.word.startswith(_WORDS) or feature.word == "msr:0x48":  # that one is IA32_SPEC_CTRL
        return None
    if feature.name in _OF_KVM:
        return KVM, "QEMU takes it from KVM"
    if feature.name == _HOST_ADDRESS_SPACE:
        return (FOLLOWS, "") if _granted("lm", values) else None
    written = _written(feature, values, known)
    if written is None:
        return None
    told = feature.of(values.get(feature.word, 0)) == written
    return (FOLLOWS, "") if told else (LOST, f"QEMU writes {written:#x}")


def _written(feature: Feature, values: dict[str, int], known: frozenset[str] | None) -> int | None:
    """What QEMU writes of a number or a control word by itself, None of what it writes nothing of."""
    if feature.name in _CONSTANTS:
        return _CONSTANTS[feature.name]
    if feature.name == "vmx-vmcs-enum":
        said = [name for name, _ in _HIGHEST if name and (known is None or name in known)]
        return dict(_HIGHEST)[next((name for name in said if _granted(name, values)), "")]
    table = catalogs.names(words.X86_64)
    if feature.word not in table.controls or feature.whole:
        return None
    # its controls stand for it, where all of it is what they say
    named = sum(1 << control.number for control in table.controls[feature.word])
    return controls.value_of(controls.offered(values[feature.word]) & named, table.default1[feature.word])


def without_base(feature: Feature, granted: dict[str, Feature]) -> str:
    """The base that a control is granted without: QEMU refuses it then (cpu.c, feature_dependencies). "" for none."""
    return next((name for name, _ in feature.bases if feature.whole and name not in granted), "")


def _granted(name: str, values: dict[str, int]) -> bool:
    feature = catalogs.names(words.X86_64).by_name[name]
    return bool(feature.of(values.get(feature.word, 0)))
