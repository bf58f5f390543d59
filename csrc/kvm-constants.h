/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a build against Debian 12's <linux/kvm.h> (Linux 6.1) lacks. Numbers are the kernel's user-space
 * interface (include/uapi/linux/kvm.h, arch/{x86,arm64}/include/uapi/asm/kvm.h) and never change.
 */
#pragma once

#include <stdint.h>

#include <linux/kvm.h>

#define KVMNEG_KVM_API_VERSION 12 /* KVM_API_VERSION; frozen since Linux 2.6.22 */

/* Capabilities newer than Linux 6.1. */
#ifndef KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES
#define KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES 230
#endif
#ifndef KVM_CAP_VM_TYPES
#define KVM_CAP_VM_TYPES 235
#endif
#ifndef KVM_CAP_X86_APIC_BUS_CYCLES_NS
#define KVM_CAP_X86_APIC_BUS_CYCLES_NS 237
#endif
#ifndef KVM_CAP_X86_GUEST_MODE
#define KVM_CAP_X86_GUEST_MODE 238
#endif
#ifndef KVM_CAP_ARM_WRITABLE_IMP_ID_REGS
#define KVM_CAP_ARM_WRITABLE_IMP_ID_REGS 239
#endif
#ifndef KVM_CAP_ARM_EL2
#define KVM_CAP_ARM_EL2 240
#endif

#if defined(__x86_64__)
#ifndef KVM_X86_XCOMP_GUEST_SUPP
#define KVM_X86_XCOMP_GUEST_SUPP 0
#endif
/* arch_prctl(2): XSAVE components on demand (arch/x86/include/uapi/asm/prctl.h); AMX's tiles are the only ones */
#define KVMNEG_ARCH_REQ_XCOMP_GUEST_PERM 0x1025
#define KVMNEG_XFEATURE_XTILEDATA_NUMBER 18
#define KVMNEG_XFEATURE_XTILEDATA (UINT32_C(1) << KVMNEG_XFEATURE_XTILEDATA_NUMBER)
/* KVM_GET_MSRS refuses this many in one call (MAX_IO_MSRS in arch/x86/kvm/x86.c). */
#define KVMNEG_MSRS_PER_CALL 255
#elif defined(__aarch64__)
/* Features of KVM_ARM_VCPU_INIT newer than Linux 6.1. */
#ifndef KVM_ARM_VCPU_HAS_EL2
#define KVM_ARM_VCPU_HAS_EL2 7
#endif
#ifndef KVM_ARM_VCPU_HAS_EL2_E2H0
#define KVM_ARM_VCPU_HAS_EL2_E2H0 8
#endif
#define KVMNEG_ARM_VCPU_PMU_V3_STRICT 9 /* KVM_ARM_VCPU_PMU_V3_STRICT, capability 251 */

/* The fourth hypercall bitmap (Linux 6.15). */
#define KVMNEG_REG_ARM_VENDOR_HYP_BMAP_2 KVM_REG_ARM_FW_FEAT_BMAP_REG(3)

/* KVM_ARM_GET_REG_WRITABLE_MASKS (Linux 6.7): a mask for each register of the ID space, by
 * KVM_ARM_FEATURE_ID_RANGE_IDX(). */
#define KVMNEG_FEATURE_ID_RANGE_SIZE (3 * 8 * 8)
struct kvmneg_mask_range { /* struct reg_mask_range */
        uint64_t addr;
        uint32_t range; /* 0: the feature ID registers */
        uint32_t reserved[13];
};
#ifndef KVM_ARM_GET_REG_WRITABLE_MASKS
#define KVM_ARM_GET_REG_WRITABLE_MASKS _IOR(KVMIO, 0xb6, struct kvmneg_mask_range)
#endif

/* KVM_HAS_DEVICE_ATTR on a VM: KVM_ARM_VM_SMCCC_CTRL, KVM_ARM_VM_SMCCC_FILTER (Linux 6.4). */
#define KVMNEG_VM_SMCCC_CTRL 0
#define KVMNEG_VM_SMCCC_FILTER 0
/* KVM_ARM_VCPU_PMU_V3_SET_NR_COUNTERS (Linux 6.16) */
#define KVMNEG_PMU_V3_SET_NR_COUNTERS 4
/* KVM_CREATE_VM's type of a protected VM: KVM_VM_TYPE_ARM_PROTECTED */
#define KVMNEG_VM_TYPE_PROTECTED (UINT32_C(1) << 31)
#endif
