/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What CPUID hides is refused to the guest: MSRs and hypercalls of KVM's own features, and Hyper-V's where the guest is
 * shown Hyper-V. No contract has to grant that, for it gives a guest nothing; one that grants the capability relies on it.
 */

#include <errno.h>

#include "kvm-constants.h"
#include "x86-leaves.h"

/* KVM's own MSRs by the bit of leaf 0x40000001 EAX that announces them (Documentation/virt/kvm/x86/cpuid.rst): those
 * that every KVM has which can refuse them. */
static const struct {
        uint32_t bit;
        uint32_t msr;
} announced[] = {
        { 0, 0x12 }, { 3, 0x4b564d01 }, { 4, 0x4b564d02 }, { 5, 0x4b564d03 }, { 6, 0x4b564d04 },
};

static int set(int vcpu_fd, uint32_t capability, uint64_t value, struct kvmneg_trace *trace) {
        struct kvm_enable_cap enable = { .cap = capability, .args = { value } };

        return ioctl_pointer(vcpu_fd, KVM_ENABLE_CAP, &enable, trace);
}

/* Whether KVM refuses what the guest is not shown, and nothing else. As a guest's is a VMM's KVM_GET_MSRS refused. */
static int goes_by(int vcpu_fd, uint32_t shown, struct kvmneg_trace *trace) {
        for (size_t i = 0; i < sizeof(announced) / sizeof(announced[0]); i++) {
                struct {
                        struct kvm_msrs head;
                        struct kvm_msr_entry entry;
                } table = { .head = { .nmsrs = 1 }, .entry = { .index = announced[i].msr } };
                int r = ioctl_pointer(vcpu_fd, KVM_GET_MSRS, &table, trace);

                if (r < 0)
                        return r;
                if ((r == 1) != (shown >> announced[i].bit & 1))
                        return -EBADE;
        }
        return 0;
}

/*
 * KVM's own features. Up to Linux 5.15 KVM looks for them in leaf 0x40000001, whatever hypervisor's that is: beside
 * Hyper-V it would refuse what the guest is shown (hypercalls that send interrupts among it). Then it is not to refuse
 * anything.
 */
static int enforce_own(int vcpu_fd, const struct kvmneg_cpuid_entry *entries, uint32_t count,
                       struct kvmneg_trace *trace) {
        struct view view = kvmneg_internal_look(entries, count);
        const struct kvmneg_cpuid_entry *features = NULL;
        int undone, r = set(vcpu_fd, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1, trace);

        if (r < 0 || view.kvm_base == 0 || view.kvm_base == HYPERVISORS)
                return r;
        features = kvmneg_internal_find(entries, count, view.kvm_base + 1, 0);
        r = goes_by(vcpu_fd, features ? features->eax : 0, trace);
        if (r >= 0)
                return 0;
        undone = set(vcpu_fd, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0, trace);
        return undone < 0 ? undone : r;
}

/* What became of a capability: one that KVM lacks, or that it gets wrong, is missed by contracts that grant it only. */
static int judge(const struct kvmneg_contract *contract, const char *name, int r, struct kvmneg_failure *failure) {
        struct kvmneg_failure what = { .asked = 1, .mask = 1, .stage = KVMNEG_STAGE_ENFORCE };

        if (r >= 0 || ((r == -EBADE || kvmneg_internal_absent(r)) && !kvmneg_internal_granted(contract, name)))
                return 0;
        what.why = r == -EBADE ? KVMNEG_DROPPED : why_refused(r);
        what.request = r == -EBADE ? 0 : (uint32_t) KVM_ENABLE_CAP;
        kvmneg_internal_text_word(what.word, name);
        return fail(failure, what, r);
}

int kvmneg_internal_enforce(const struct kvmneg_contract *contract, int vcpu_fd,
                            const struct kvmneg_cpuid_entry *entries, uint32_t count, struct kvmneg_failure *failure,
                            struct kvmneg_trace *trace) {
        int r = enforce_own(vcpu_fd, entries, count, trace);

        r = judge(contract, "kvm:enforce-pv-feature-cpuid", r, failure);
        if (r < 0 || !kvmneg_internal_shows_hyperv(entries, count))
                return r;
        return judge(contract, "kvm:hyperv-enforce-cpuid", set(vcpu_fd, KVM_CAP_HYPERV_ENFORCE_CPUID, 1, trace), failure);
}
