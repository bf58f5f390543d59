/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a build against Debian 12's <linux/kvm.h> (Linux 6.1) lacks. Numbers are the kernel's user-space
 * interface (include/uapi/linux/kvm.h, arch/{x86,arm64}/include/uapi/asm/kvm.h) and never change.
 */
#pragma once

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
/* KVM_GET_MSRS refuses this many in one call (MAX_IO_MSRS in arch/x86/kvm/x86.c). */
#define KVMNEG_MSRS_PER_CALL 255
#elif defined(__aarch64__)
#ifndef KVM_ARM_VCPU_HAS_EL2
#define KVM_ARM_VCPU_HAS_EL2 7
#endif
#endif
