/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A contract's feature MSRs on a vCPU. */

#include <errno.h>

#include "contract-x86.h"
#include "kvm-constants.h"

#define MSR_MCG_CAP 0x179 /* read as an MSR, written by KVM_X86_SETUP_MCE (api.rst 4.105) */

struct msr_table {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[KVMNEG_MSRS_PER_CALL];
};

/* A run of a contract's MSRs that fits one call. */
struct run {
        const struct contract_msr *msrs;
        uint32_t count;
        struct kvm_msr_entry shown[KVMNEG_MSRS_PER_CALL];
        bool unread[KVMNEG_MSRS_PER_CALL];
};

static int fail_msr(struct kvmneg_failure *failure, const struct contract_msr *msr, uint64_t got, unsigned long request,
                    uint32_t stage, uint32_t why, int r) {
        struct kvmneg_failure what = { .id = msr->index,
                                       .asked = msr->value,
                                       .mask = msr->mask,
                                       .got = got,
                                       .stage = stage,
                                       .why = why,
                                       .request = (uint32_t) request };

        kvmneg_internal_number_word(what.word, "msr:", msr->index);
        return fail(failure, what, r);
}

/*
 * KVM_GET_MSRS stops at the first MSR that it refuses and returns how many it read. One that is refused reads 0 here:
 * a KVM that does not have it shows a guest no bit of it.
 */
static int read_run(int vcpu_fd, struct run *run, uint32_t stage, struct kvmneg_failure *failure,
                    struct kvmneg_trace *trace) {
        struct msr_table table;
        uint32_t done = 0;

        while (done < run->count) {
                uint32_t n = run->count - done;
                int r;

                table.head = (struct kvm_msrs) { .nmsrs = n };
                for (uint32_t i = 0; i < n; i++)
                        table.entries[i] = (struct kvm_msr_entry) { .index = run->msrs[done + i].index };
                r = ioctl_pointer(vcpu_fd, KVM_GET_MSRS, &table, trace);
                if (r < 0)
                        return fail_msr(failure, &run->msrs[done], 0, KVM_GET_MSRS, stage, KVMNEG_FAILED, r);
                if ((uint32_t) r > n)
                        return -EPROTO;
                for (uint32_t i = 0; i < (uint32_t) r; i++) {
                        run->shown[done + i] = table.entries[i];
                        run->unread[done + i] = false;
                }
                done += (uint32_t) r;
                if ((uint32_t) r < n) {
                        run->shown[done] = (struct kvm_msr_entry) { .index = run->msrs[done].index };
                        run->unread[done++] = true;
                }
        }
        return 0;
}

/* The first MSR of a run that is not as it is bound. */
static int compare_run(const struct run *run, uint32_t stage, uint32_t why, struct kvmneg_failure *failure) {
        for (uint32_t i = 0; i < run->count; i++) {
                const struct contract_msr *msr = &run->msrs[i];
                if ((run->shown[i].data ^ msr->value) & msr->mask)
                        return fail_msr(failure, msr, run->shown[i].data, 0, stage,
                                        run->unread[i] ? KVMNEG_MISSING : why, run->unread[i] ? -ENOENT : -EBADE);
        }
        return 0;
}

static int setup_mce(int vcpu_fd, const struct contract_msr *msr, uint64_t now, uint64_t value,
                     struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        int r = ioctl_pointer(vcpu_fd, KVM_X86_SETUP_MCE, &value, trace);

        return r < 0 ? fail_msr(failure, msr, now, KVM_X86_SETUP_MCE, KVMNEG_STAGE_MSR, why_refused(r), r) : 0;
}

/* Writes the bound bits of those that differ; returns how many were written. The other bits stay as KVM has them. */
static int write_run(int vcpu_fd, const struct run *run, struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        uint32_t places[KVMNEG_MSRS_PER_CALL], n = 0;
        struct msr_table table;
        int written = 0, r;

        for (uint32_t i = 0; i < run->count; i++) {
                const struct contract_msr *msr = &run->msrs[i];
                uint64_t now = run->shown[i].data, value = (now & ~msr->mask) | msr->value;

                if (now == value)
                        continue;
                if (run->unread[i])
                        return fail_msr(failure, msr, 0, KVM_GET_MSRS, KVMNEG_STAGE_MSR, KVMNEG_MISSING, -ENOENT);
                written++;
                if (msr->index == MSR_MCG_CAP) {
                        r = setup_mce(vcpu_fd, msr, now, value, failure, trace);
                        if (r < 0)
                                return r;
                        continue;
                }
                places[n] = i;
                table.entries[n++] = (struct kvm_msr_entry) { .index = msr->index, .data = value };
        }
        if (n == 0)
                return written;
        table.head = (struct kvm_msrs) { .nmsrs = n };
        r = ioctl_pointer(vcpu_fd, KVM_SET_MSRS, &table, trace);
        if (r < 0 || (uint32_t) r >= n)
                return r < 0 ? fail_msr(failure, &run->msrs[places[0]], 0, KVM_SET_MSRS, KVMNEG_STAGE_MSR, KVMNEG_FAILED, r)
                             : written;
        return fail_msr(failure, &run->msrs[places[r]], run->shown[places[r]].data, KVM_SET_MSRS, KVMNEG_STAGE_MSR,
                        KVMNEG_REFUSED, -EINVAL);
}

int kvmneg_internal_apply_msrs(const struct kvmneg_contract *contract, int vcpu_fd, bool write,
                               struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        uint32_t stage = write ? KVMNEG_STAGE_MSR : KVMNEG_STAGE_VERIFY;
        uint32_t why = write ? KVMNEG_DROPPED : KVMNEG_DIFFERS;

        for (uint32_t done = 0; done < contract->counts[MSRS];) {
                uint32_t left = contract->counts[MSRS] - done;
                struct run run = { .msrs = contract->msrs + done,
                                   .count = left < KVMNEG_MSRS_PER_CALL ? left : KVMNEG_MSRS_PER_CALL };
                int r = read_run(vcpu_fd, &run, stage, failure, trace);

                if (r >= 0 && write) {
                        r = write_run(vcpu_fd, &run, failure, trace);
                        if (r > 0)
                                r = read_run(vcpu_fd, &run, stage, failure, trace);
                }
                if (r >= 0)
                        r = compare_run(&run, stage, why, failure);
                if (r < 0)
                        return r;
                done += run.count;
        }
        return 0;
}
