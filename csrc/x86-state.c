/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What an x86 guest carries to another host: state MSRs, machine checks, the rate of its TSC. */

#include <errno.h>

#include "internal.h"
#include "kvm-constants.h"

#define STATE_MSRS_HINT 256 /* 41 to 130 seen */
#define MSR_MCG_CAP 0x179
#define TSC_KHZ_LIMIT 0x7fffffff /* KVM scales to less than this on any CPU (kvm_caps.max_guest_tsc_khz) */

int kvmneg_get_state_msrs(int kvm_fd, uint32_t hint, struct kvmneg_indices **ret_indices, struct kvmneg_trace *trace) {
        return kvmneg_internal_list_msrs(kvm_fd, KVM_GET_MSR_INDEX_LIST, hint > 0 ? hint : STATE_MSRS_HINT, ret_indices, trace);
}

int kvmneg_get_mce_cap(int kvm_fd, uint64_t *ret_capabilities, struct kvmneg_trace *trace) {
        uint64_t capabilities = 0;
        int r = ioctl_pointer(kvm_fd, KVM_X86_GET_MCE_CAP_SUPPORTED, &capabilities, trace);

        if (r < 0)
                return r;
        *ret_capabilities = capabilities;
        return 0;
}

/* The highest rate that KVM takes, between one that it takes and TSC_KHZ_LIMIT; by halves, the usual answer first. */
static int highest_tsc(int vcpu_fd, uint32_t taken, uint32_t *ret_khz, struct kvmneg_trace *trace) {
        uint32_t refused = TSC_KHZ_LIMIT;
        uint32_t khz = refused - 1;

        while (refused - taken > 1) {
                int r = kvmneg_internal_ioctl(vcpu_fd, KVM_SET_TSC_KHZ, khz, trace);

                if (r >= 0)
                        taken = khz;
                else if (r == -EINVAL)
                        refused = khz;
                else
                        return r;
                khz = taken + (refused - taken) / 2;
        }
        *ret_khz = taken;
        return 0;
}

int kvmneg_get_tsc(int vcpu_fd, int scales, struct kvmneg_tsc *ret_tsc, struct kvmneg_trace *trace) {
        struct kvmneg_tsc tsc = {};
        int r = kvmneg_internal_ioctl(vcpu_fd, KVM_GET_TSC_KHZ, 0, trace);

        if (r < 0)
                return r;
        tsc.khz = (uint32_t) r;
        if (scales && tsc.khz > 0 && tsc.khz < TSC_KHZ_LIMIT) {
                r = highest_tsc(vcpu_fd, tsc.khz, &tsc.max_khz, trace);
                if (r < 0)
                        return r;
                r = kvmneg_internal_ioctl(vcpu_fd, KVM_SET_TSC_KHZ, tsc.khz, trace);
                if (r < 0)
                        return r;
        }
        *ret_tsc = tsc;
        return 0;
}

int kvmneg_try_mce(int vcpu_fd, uint64_t capabilities, uint64_t *ret_shown, struct kvmneg_trace *trace) {
        struct {
                struct kvm_msrs head;
                struct kvm_msr_entry entry;
        } msr = { .head = { .nmsrs = 1 }, .entry = { .index = MSR_MCG_CAP } };
        int r = ioctl_pointer(vcpu_fd, KVM_X86_SETUP_MCE, &capabilities, trace);

        if (r < 0)
                return r;
        r = ioctl_pointer(vcpu_fd, KVM_GET_MSRS, &msr, trace);
        if (r < 0)
                return r;
        if (r != 1)
                return -ENXIO;
        *ret_shown = msr.entry.data;
        return 0;
}

/* What is left of the machine checks on a vCPU: SVM drops all but MCG_CTL_P after it accepted them (svm_setup_mce). */
static int probe_mce(int kvm_fd, int vcpu_fd, uint32_t banks, uint64_t *ret_capabilities, struct kvmneg_trace *trace) {
        uint64_t capabilities, shown;
        int r = kvmneg_get_mce_cap(kvm_fd, &capabilities, trace);

        if (r < 0)
                return r;
        if (vcpu_fd >= 0 && banks > 0) {
                r = kvmneg_try_mce(vcpu_fd, capabilities | (banks & 0xff), &shown, trace);
                if (r < 0)
                        return r;
                capabilities &= shown;
        }
        *ret_capabilities = capabilities;
        return 0;
}

int kvmneg_internal_probe_state(int kvm_fd, int vcpu_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace) {
        bool scales = probe->capabilities.system[KVM_CAP_TSC_CONTROL] > 0;
        int32_t banks = probe->capabilities.system[KVM_CAP_MCE];
        int r;

        r = kvmneg_internal_optional(kvmneg_get_state_msrs(kvm_fd, 0, &probe->state_msrs, trace), &probe->state_msrs_error);
        if (r < 0)
                return r;
        r = probe_mce(kvm_fd, vcpu_fd, banks > 0 ? (uint32_t) banks : 0, &probe->mce_cap, trace);
        r = kvmneg_internal_optional(r, &probe->mce_error);
        if (r < 0)
                return r;
        r = vcpu_fd >= 0 ? kvmneg_get_tsc(vcpu_fd, scales, &probe->tsc, trace) : -ENXIO;
        if (r == -EIO) {
                probe->tsc_error = r;
                return 0;
        }
        return kvmneg_internal_optional(r, &probe->tsc_error);
}
