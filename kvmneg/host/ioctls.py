# SPDX-License-Identifier: LGPL-2.1-or-later
"""Numbers of ioctls, computed by ioctl-opt from the layout of their arguments.

Python itself makes the TUN and vhost ones (kvmneg.host.network). KVM's are made in csrc/ only; their numbers
here are an oracle for the tests. Everything is computed when asked for: ioctl-opt imports ctypes, which costs
several milliseconds, and most commands need none of it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable

_KVMIO = 0xAE  # linux/kvm.h
_VHOST_VIRTIO = 0xAF  # linux/vhost_types.h


def network() -> dict[str, int]:
    """ioctls of /dev/net/tun (linux/if_tun.h) and /dev/vhost-* (linux/vhost.h), name → number."""
    from ctypes import c_int, c_uint, c_uint64

    from ioctl_opt import IO, IOR, IOW

    return {
        "TUNSETIFF": IOW(ord("T"), 202, c_int),
        "TUNGETFEATURES": IOR(ord("T"), 207, c_uint),
        "TUNSETOFFLOAD": IOW(ord("T"), 208, c_uint),
        "VHOST_GET_FEATURES": IOR(_VHOST_VIRTIO, 0x00, c_uint64),
        "VHOST_SET_OWNER": IO(_VHOST_VIRTIO, 0x01),
        "VHOST_GET_BACKEND_FEATURES": IOR(_VHOST_VIRTIO, 0x26, c_uint64),
    }


def kvm() -> dict[str, int]:
    """Every KVM ioctl that csrc/ makes on any architecture, name → number."""
    from ctypes import c_int, c_uint64

    from ioctl_opt import IO, IOR, IOW, IOWR

    layouts = _kvm_layouts()
    return {
        "KVM_GET_API_VERSION": IO(_KVMIO, 0x00),
        "KVM_CREATE_VM": IO(_KVMIO, 0x01),
        "KVM_CHECK_EXTENSION": IO(_KVMIO, 0x03),
        "KVM_CREATE_VCPU": IO(_KVMIO, 0x41),
        "KVM_ENABLE_CAP": IOW(_KVMIO, 0xA3, layouts["kvm_enable_cap"]),
        "KVM_CREATE_DEVICE": IOWR(_KVMIO, 0xE0, layouts["kvm_create_device"]),
        "KVM_SET_DEVICE_ATTR": IOW(_KVMIO, 0xE1, layouts["kvm_device_attr"]),
        "KVM_GET_DEVICE_ATTR": IOW(_KVMIO, 0xE2, layouts["kvm_device_attr"]),
        "KVM_HAS_DEVICE_ATTR": IOW(_KVMIO, 0xE3, layouts["kvm_device_attr"]),
        # x86
        "KVM_GET_SUPPORTED_CPUID": IOWR(_KVMIO, 0x05, layouts["kvm_cpuid2"]),
        "KVM_GET_EMULATED_CPUID": IOWR(_KVMIO, 0x09, layouts["kvm_cpuid2"]),
        "KVM_GET_MSR_INDEX_LIST": IOWR(_KVMIO, 0x02, layouts["kvm_msr_list"]),
        "KVM_GET_MSR_FEATURE_INDEX_LIST": IOWR(_KVMIO, 0x0A, layouts["kvm_msr_list"]),
        "KVM_GET_MSRS": IOWR(_KVMIO, 0x88, layouts["kvm_msrs"]),
        "KVM_SET_MSRS": IOW(_KVMIO, 0x89, layouts["kvm_msrs"]),
        "KVM_SET_CPUID2": IOW(_KVMIO, 0x90, layouts["kvm_cpuid2"]),
        "KVM_GET_CPUID2": IOWR(_KVMIO, 0x91, layouts["kvm_cpuid2"]),
        "KVM_X86_SETUP_MCE": IOW(_KVMIO, 0x9C, c_uint64),
        "KVM_X86_GET_MCE_CAP_SUPPORTED": IOR(_KVMIO, 0x9D, c_uint64),
        "KVM_SET_TSC_KHZ": IO(_KVMIO, 0xA2),
        "KVM_GET_TSC_KHZ": IO(_KVMIO, 0xA3),
        "KVM_GET_SUPPORTED_HV_CPUID": IOWR(_KVMIO, 0xC1, layouts["kvm_cpuid2"]),
        # x86's proof guests
        "KVM_GET_VCPU_MMAP_SIZE": IO(_KVMIO, 0x04),
        "KVM_SET_USER_MEMORY_REGION": IOW(_KVMIO, 0x46, layouts["kvm_userspace_memory_region"]),
        "KVM_SET_TSS_ADDR": IO(_KVMIO, 0x47),
        "KVM_RUN": IO(_KVMIO, 0x80),
        "KVM_SET_REGS": IOW(_KVMIO, 0x82, layouts["kvm_regs"]),
        "KVM_GET_SREGS": IOR(_KVMIO, 0x83, layouts["kvm_sregs"]),
        "KVM_SET_SREGS": IOW(_KVMIO, 0x84, layouts["kvm_sregs"]),
        "KVM_SET_SIGNAL_MASK": IOW(_KVMIO, 0x8B, layouts["kvm_signal_mask"]),
        "KVM_SET_VCPU_EVENTS": IOW(_KVMIO, 0xA0, layouts["kvm_vcpu_events"]),
        "KVM_SET_XCRS": IOW(_KVMIO, 0xA7, layouts["kvm_xcrs"]),
        # arm64
        "KVM_GET_ONE_REG": IOW(_KVMIO, 0xAB, layouts["kvm_one_reg"]),
        "KVM_SET_ONE_REG": IOW(_KVMIO, 0xAC, layouts["kvm_one_reg"]),
        "KVM_ARM_VCPU_INIT": IOW(_KVMIO, 0xAE, layouts["kvm_vcpu_init"]),
        "KVM_ARM_PREFERRED_TARGET": IOR(_KVMIO, 0xAF, layouts["kvm_vcpu_init"]),
        "KVM_GET_REG_LIST": IOWR(_KVMIO, 0xB0, layouts["kvm_reg_list"]),
        "KVM_ARM_GET_REG_WRITABLE_MASKS": IOR(_KVMIO, 0xB6, layouts["reg_mask_range"]),
        "KVM_ARM_VCPU_FINALIZE": IOW(_KVMIO, 0xC2, c_int),
    }


def _kvm_layouts() -> dict[str, type[ctypes.Structure]]:
    """The kernel's structures as ctypes; arrays at their end have no length, as in the kernel's headers."""
    from ctypes import Structure
    from ctypes import c_uint8 as u8
    from ctypes import c_uint32 as u32
    from ctypes import c_uint64 as u64

    def structure(name: str, *fields: tuple[str, object]) -> type[ctypes.Structure]:
        return type(name, (Structure,), {"_fields_": fields})

    words = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
    entry = structure("kvm_cpuid_entry2", *((word, u32) for word in words), ("padding", u32 * 3))
    msr = structure("kvm_msr_entry", ("index", u32), ("reserved", u32), ("data", u64))
    return {
        **_guest_layouts(structure),
        "kvm_cpuid2": structure("kvm_cpuid2", ("nent", u32), ("padding", u32), ("entries", entry * 0)),
        "kvm_msr_list": structure("kvm_msr_list", ("nmsrs", u32), ("indices", u32 * 0)),
        "kvm_msrs": structure("kvm_msrs", ("nmsrs", u32), ("pad", u32), ("entries", msr * 0)),
        "kvm_device_attr": structure(
            "kvm_device_attr", ("flags", u32), ("group", u32), ("attr", u64), ("addr", u64)
        ),
        "kvm_enable_cap": structure(
            "kvm_enable_cap", ("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64)
        ),
        "kvm_create_device": structure("kvm_create_device", ("type", u32), ("fd", u32), ("flags", u32)),
        "reg_mask_range": structure("reg_mask_range", ("addr", u64), ("range", u32), ("reserved", u32 * 13)),
        "kvm_one_reg": structure("kvm_one_reg", ("id", u64), ("addr", u64)),
        "kvm_vcpu_init": structure("kvm_vcpu_init", ("target", u32), ("features", u32 * 7)),
        "kvm_reg_list": structure("kvm_reg_list", ("n", u64), ("reg", u64 * 0)),
    }


def _guest_layouts(structure: Callable[..., type[ctypes.Structure]]) -> dict[str, type[ctypes.Structure]]:
    """What an x86 vCPU's state is set by."""
    from ctypes import c_uint8 as u8
    from ctypes import c_uint16 as u16
    from ctypes import c_uint32 as u32
    from ctypes import c_uint64 as u64

    segment = structure(
        "kvm_segment", ("base", u64), ("limit", u32), ("selector", u16), ("attributes", u8 * 10)
    )
    table = structure("kvm_dtable", ("base", u64), ("limit", u16), ("padding", u16 * 3))
    xcr = structure("kvm_xcr", ("xcr", u32), ("reserved", u32), ("value", u64))
    region = ("guest_phys_addr", "memory_size", "userspace_addr")
    return {
        "kvm_userspace_memory_region": structure(
            "kvm_userspace_memory_region", ("slot", u32), ("flags", u32), *((name, u64) for name in region)
        ),
        "kvm_regs": structure("kvm_regs", ("registers", u64 * 16), ("rip", u64), ("rflags", u64)),
        "kvm_sregs": structure(
            "kvm_sregs", ("segments", segment * 8), ("tables", table * 2), ("registers", u64 * 7),
            ("interrupts", u64 * 4),
        ),
        "kvm_signal_mask": structure("kvm_signal_mask", ("len", u32), ("sigset", u8 * 0)),
        "kvm_vcpu_events": structure("kvm_vcpu_events", ("state", u8 * 64)),
        "kvm_xcrs": structure(
            "kvm_xcrs", ("nr_xcrs", u32), ("flags", u32), ("xcrs", xcr * 16), ("padding", u64 * 16)
        ),
    }  # fmt: skip
