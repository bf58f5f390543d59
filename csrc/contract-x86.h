/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the x86 files share about contracts. */
#pragma once

#include "contract.h"

/* A table of CPUID as large as KVM takes one (KVM_MAX_CPUID_ENTRIES), for the stack. */
struct cpuid_table {
        uint32_t count;
        uint32_t padding;
        struct kvmneg_cpuid_entry entries[KVMNEG_CONTRACT_CPUIDS_MAX];
};

/* Whether a leaf of CPUID has subleaves. */
bool kvmneg_internal_is_indexed(uint32_t leaf);

/* Makes a table what a contract says; kvmneg_clamp_cpuid() of `capacity` entries. */
int kvmneg_internal_clamp(const struct kvmneg_contract *contract, struct kvmneg_cpuid_entry *entries, uint32_t *count,
                          uint32_t capacity, struct kvmneg_failure *failure);

/* Whether a table that was read back is what a contract says, but for what KVM writes by itself. 0, or -EBADE with
 * `failure` for the first word that is not: its stage and why are the caller's. */
int kvmneg_internal_compare(const struct kvmneg_contract *contract, const struct kvmneg_cpuid_entry *entries,
                            uint32_t count, uint32_t stage, uint32_t why, struct kvmneg_failure *failure);

/* Whether a guest with this table is shown Hyper-V. */
bool kvmneg_internal_shows_hyperv(const struct kvmneg_cpuid_entry *entries, uint32_t count);

/* A register of a leaf as a contract binds it: value and mask, 0 where it does not. */
void kvmneg_internal_bound_cpuid(const struct kvmneg_contract *contract, uint32_t function, uint32_t index,
                                 unsigned place, uint32_t *ret_value, uint32_t *ret_mask);

/* Has KVM refuse what a guest with this table is not shown, of KVM's own features and of Hyper-V's. */
int kvmneg_internal_enforce(const struct kvmneg_contract *contract, int vcpu_fd,
                            const struct kvmneg_cpuid_entry *entries, uint32_t count, struct kvmneg_failure *failure,
                            struct kvmneg_trace *trace);

/* Feature MSRs, and MSR 0x179: written where they differ and read back, or with `write` false read only. */
int kvmneg_internal_apply_msrs(const struct kvmneg_contract *contract, int vcpu_fd, bool write,
                               struct kvmneg_failure *failure, struct kvmneg_trace *trace);

/* Why KVM said no. */
static inline uint32_t why_refused(int r) {
        if (r == -EBUSY)
                return KVMNEG_TOO_LATE;
        return r == -EINVAL || r == -ENXIO || r == -ENOTTY || r == -EOPNOTSUPP || r == -ENODEV || r == -EPERM
                       ? KVMNEG_REFUSED
                       : KVMNEG_FAILED;
}
