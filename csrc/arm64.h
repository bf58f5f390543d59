/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the arm64 files share. */
#pragma once

#include "internal.h"
#include "kvm-constants.h"

/* Index of a system register: op0, op1, crn, crm, op2 (api.rst 4.68, "arm64 system registers"). */
#define SYSREG(op0, op1, crn, crm, op2) \
        (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | \
         (uint64_t) ((op0) << 14 | (op1) << 11 | (crn) << 7 | (crm) << 3 | (op2)))
#define SYSREG_OP0(id) ((unsigned) ((id) >> 14) & 3)
#define SYSREG_OP1(id) ((unsigned) ((id) >> 11) & 7)
#define SYSREG_CRN(id) ((unsigned) ((id) >> 7) & 15)
#define SYSREG_CRM(id) ((unsigned) ((id) >> 3) & 15)
#define SYSREG_OP2(id) ((unsigned) (id) & 7)
#define COPROC(id) ((id) & KVM_REG_ARM_COPROC_MASK)

#define MIDR_EL1 SYSREG(3, 0, 0, 0, 0)
#define MPIDR_EL1 SYSREG(3, 0, 0, 0, 5)
#define REVIDR_EL1 SYSREG(3, 0, 0, 0, 6)
#define AIDR_EL1 SYSREG(3, 1, 0, 0, 7)
#define PMCR_EL0 SYSREG(3, 3, 9, 12, 0)
#define PMCR_N_SHIFT 11
#define PMCR_N_MASK (UINT64_C(0x1f) << PMCR_N_SHIFT)
#define SVE_VLS KVM_REG_ARM64_SVE_VLS

#define GICD_IIDR 0x8
#define GICD_IIDR_REVISION_SHIFT 12
#define GICD_IIDR_REVISION_MASK (UINT32_C(0xf) << GICD_IIDR_REVISION_SHIFT)

static inline bool is_implementation_id(uint64_t id) {
        return id == MIDR_EL1 || id == REVIDR_EL1 || id == AIDR_EL1;
}

/* Whether a negative errno is KVM's no to this register, value or feature, rather than a failure. */
static inline bool refused(int r) {
        return r == -EINVAL || r == -ENOENT || r == -EPERM || r == -EBUSY || r == -ENXIO || r == -ENODEV ||
               r == -EOPNOTSUPP || r == -ENOTTY;
}

/* Whether a register decides what a guest sees: an ID register, the number of event counters, a firmware register,
 * a hypercall bitmap, the lengths of SVE vectors. The others are a guest's state. */
bool kvmneg_internal_is_word(uint64_t id);

/* A bit at the start of each field of a register: of four bits each, as most ID registers have them. */
uint64_t kvmneg_internal_fields(uint64_t id);

/* A VM with a vCPU that has all it needs before KVM_ARM_VCPU_FINALIZE; the features that it took, bit n: feature n.
 * `implementation_ids`: with KVM_CAP_ARM_WRITABLE_IMP_ID_REGS where KVM has it. */
int kvmneg_internal_create_unfinished(int kvm_fd, bool implementation_ids, int *ret_vm_fd, int *ret_vcpu_fd,
                                      uint32_t *ret_features, struct kvmneg_trace *trace);

/* KVM_ARM_VCPU_FINALIZE of SVE where the features have it. */
int kvmneg_internal_finalize(int vcpu_fd, uint32_t features, struct kvmneg_trace *trace);

/* KVM_CREATE_DEVICE of the best vGIC; the descriptor, or -1 where there is none. `ret_type` is the kernel's type. */
int kvmneg_internal_create_vgic(int vm_fd, int *ret_vgic_fd, uint32_t *ret_type, struct kvmneg_trace *trace);

/* KVM_GET_DEVICE_ATTR and KVM_SET_DEVICE_ATTR of GICD_IIDR. */
int kvmneg_internal_get_iidr(int vgic_fd, uint32_t *ret_iidr, struct kvmneg_trace *trace);
int kvmneg_internal_set_iidr(int vgic_fd, uint32_t iidr, struct kvmneg_trace *trace);

/* Which features of KVM_ARM_VCPU_INIT there are besides `known`. */
int kvmneg_internal_try_features(int kvm_fd, uint64_t known, uint64_t *ret_features, struct kvmneg_trace *trace);

/* Writes a value, notes which of the field's bits it changed, and puts the register back. Returns 1 where the field
 * has the value wanted, 0 where KVM refused or dropped it. */
int kvmneg_internal_try_value(int vcpu_fd, struct kvmneg_trial *trial, uint64_t field, uint64_t value,
                              struct kvmneg_trace *trace);

/* `tried` is where to try, `claimed` whether KVM claims those bits to be writable: then fields that read 0 are worth
 * a write, and the others are only written 0, which shows those that drop it. */
int kvmneg_internal_try_fields(int vcpu_fd, struct kvmneg_trial *trial, uint64_t tried, bool claimed,
                               struct kvmneg_trace *trace);

/* Tries the registers of a scratch vCPU, or those that must be tried before it is complete. */
int kvmneg_internal_try_registers(int vm_fd, int vcpu_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace);
int kvmneg_internal_try_unfinished(int kvm_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace);
