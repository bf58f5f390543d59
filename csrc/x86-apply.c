/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Gives an x86 VM what a contract says, on its VMM's own descriptors. The order is KVM's: capabilities and the VM's TSC
 * rate before vCPUs, permission for XSAVE components before CPUID names them, CPUID before the MSRs that it announces,
 * and paravirtual features are limited to CPUID when that is there.
 */

#define _GNU_SOURCE

#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "contract-x86.h"
#include "kvm-constants.h"

#define TSC_TOLERANCE_PPM 250 /* module parameter tsc_tolerance_ppm: KVM without scaling takes rates this near */
#define PERFCTR_CORE (UINT32_C(1) << 23) /* leaf 0x80000001 ECX */

static int check_architecture(const struct kvmneg_contract *contract) {
        return contract->header->architecture == KVMNEG_X86_64 ? 0 : -ENOEXEC;
}

/* Fails with a word by its name. */
static int fail_name(struct kvmneg_failure *failure, const char *name, struct kvmneg_failure what, int r) {
        kvmneg_internal_text_word(what.word, name);
        return fail(failure, what, r);
}

static int enable(int fd, uint32_t capability, uint64_t value, struct kvmneg_trace *trace) {
        struct kvm_enable_cap enable = { .cap = capability, .args = { value } };

        return ioctl_pointer(fd, KVM_ENABLE_CAP, &enable, trace);
}

/* What the VMM wants besides. All of it is judged before any of it is enabled. */
static int choose(const struct kvmneg_contract *contract, int vm_fd, const struct kvmneg_choices *choices,
                  struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        const struct {
                uint64_t value;
                uint32_t capability;
                const char *name;
        } wanted[] = {
                { choices->disable_quirks, KVM_CAP_DISABLE_QUIRKS2, "kvm:disable-quirks2" },
                { choices->x2apic_api, KVM_CAP_X2APIC_API, "kvm:x2apic-api" },
                { choices->disable_exits, KVM_CAP_X86_DISABLE_EXITS, "kvm:x86-disable-exits" },
                { choices->exit_hypercall, KVM_CAP_EXIT_HYPERCALL, "kvm:exit-hypercall" },
        };
        const size_t count = sizeof(wanted) / sizeof(wanted[0]);

        for (size_t i = 0; i < count; i++) {
                uint64_t granted = kvmneg_internal_granted(contract, wanted[i].name);
                struct kvmneg_failure what = { .asked = wanted[i].value,
                                               .mask = UINT64_MAX,
                                               .got = granted,
                                               .stage = KVMNEG_STAGE_CHECK,
                                               .why = KVMNEG_OUTSIDE };
                if (wanted[i].value & ~granted)
                        return fail_name(failure, wanted[i].name, what, -EINVAL);
        }
        for (size_t i = 0; i < count; i++) {
                struct kvmneg_failure what = { .asked = wanted[i].value,
                                               .mask = UINT64_MAX,
                                               .stage = KVMNEG_STAGE_VM,
                                               .request = (uint32_t) KVM_ENABLE_CAP };
                int r = wanted[i].value ? enable(vm_fd, wanted[i].capability, wanted[i].value, trace) : 0;
                if (r < 0) {
                        what.why = why_refused(r);
                        return fail_name(failure, wanted[i].name, what, r);
                }
        }
        return 0;
}

/* Whether the guest is shown no performance counters: neither Intel's leaf 0xa nor AMD's. */
static bool shows_no_pmu(const struct kvmneg_contract *contract) {
        uint32_t intel, core, amd, mask_intel, mask_core, mask;

        kvmneg_internal_bound_cpuid(contract, 0xa, 0, 0, &intel, &mask_intel);
        kvmneg_internal_bound_cpuid(contract, 0x80000001, 0, 2, &core, &mask_core);
        kvmneg_internal_bound_cpuid(contract, 0x80000022, 0, 0, &amd, &mask);
        return mask_intel & 0xff && !(intel & 0xff) && mask_core & PERFCTR_CORE && !(core & PERFCTR_CORE) && !(amd & 1);
}

static int hide_pmu(const struct kvmneg_contract *contract, int vm_fd, struct kvmneg_failure *failure,
                    struct kvmneg_trace *trace) {
        static const char name[] = "kvm:pmu-capability";
        struct kvmneg_failure what = { .asked = KVM_PMU_CAP_DISABLE,
                                       .mask = KVM_PMU_CAP_DISABLE,
                                       .stage = KVMNEG_STAGE_VM,
                                       .request = (uint32_t) KVM_ENABLE_CAP };
        int r;

        if (!(kvmneg_internal_granted(contract, name) & KVM_PMU_CAP_DISABLE) || !shows_no_pmu(contract))
                return 0;
        r = enable(vm_fd, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, trace);
        what.why = why_refused(r);
        return r < 0 ? fail_name(failure, name, what, r) : 0;
}

/* Components that a process has to ask for before a guest may have them. Once per process; again is no harm. */
static int permit_xsave(const struct kvmneg_contract *contract, struct kvmneg_failure *failure) {
        uint32_t components, mask;

        kvmneg_internal_bound_cpuid(contract, 0xd, 0, 0, &components, &mask);
        if (components & KVMNEG_XFEATURE_XTILEDATA) {
                struct kvmneg_failure what = { .id = UINT64_C(0xd) << 32,
                                               .asked = components,
                                               .mask = KVMNEG_XFEATURE_XTILEDATA,
                                               .stage = KVMNEG_STAGE_XSAVE };
                int saved = errno, r;

                if (syscall(SYS_arch_prctl, KVMNEG_ARCH_REQ_XCOMP_GUEST_PERM, KVMNEG_XFEATURE_XTILEDATA_NUMBER) == 0)
                        return 0;
                r = negative_errno();
                errno = saved;
                what.why = why_refused(r);
                kvmneg_internal_cpuid_word(what.word, SPACE_CPUID, 0xd, 0, 0);
                return fail(failure, what, r);
        }
        return 0;
}

/* The rate that the TSC is pinned to, 0 for none. */
static uint32_t pinned(const struct kvmneg_contract *contract) {
        return (uint32_t) contract->tsc == contract->tsc >> 32 ? (uint32_t) contract->tsc : 0;
}

static int fail_tsc(struct kvmneg_failure *failure, uint32_t khz, int now, unsigned long request, uint32_t why, int r) {
        struct kvmneg_failure what = { .asked = khz,
                                       .mask = UINT32_MAX,
                                       .got = now < 0 ? 0 : (uint32_t) now,
                                       .stage = KVMNEG_STAGE_TSC,
                                       .why = why,
                                       .request = (uint32_t) request };

        return fail_name(failure, "tsc:khz", what, r);
}

static bool has(int vm_fd, uint32_t capability, struct kvmneg_trace *trace) {
        return kvmneg_internal_ioctl(vm_fd, KVM_CHECK_EXTENSION, capability, trace) > 0;
}

/* For vCPUs to come. Without scaling each vCPU is looked at by itself: KVM would take what it cannot give. */
static int set_vm_tsc(const struct kvmneg_contract *contract, int vm_fd, struct kvmneg_failure *failure,
                      struct kvmneg_trace *trace) {
        uint32_t khz = pinned(contract);
        int r;

        if (khz == 0 || !has(vm_fd, KVM_CAP_TSC_CONTROL, trace) || !has(vm_fd, KVM_CAP_VM_TSC_CONTROL, trace))
                return 0;
        r = kvmneg_internal_ioctl(vm_fd, KVM_SET_TSC_KHZ, khz, trace);
        return r < 0 ? fail_tsc(failure, khz, 0, KVM_SET_TSC_KHZ, why_refused(r), r) : 0;
}

int kvmneg_vm_apply(const struct kvmneg_contract *contract, int vm_fd, const struct kvmneg_choices *choices,
                    struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        int r = check_architecture(contract);

        if (r >= 0)
                r = kvmneg_internal_check_capabilities(contract, vm_fd, failure, trace);
        if (r >= 0 && choices)
                r = choose(contract, vm_fd, choices, failure, trace);
        if (r >= 0)
                r = hide_pmu(contract, vm_fd, failure, trace);
        if (r >= 0)
                r = permit_xsave(contract, failure);
        return r < 0 ? r : set_vm_tsc(contract, vm_fd, failure, trace);
}

/* KVM without scaling takes a rate above its own, and lets the guest's clock jump to keep up: that is none. */
static bool reaches(int vm_fd, uint32_t khz, uint32_t host, struct kvmneg_trace *trace) {
        uint64_t least = (uint64_t) host * (1000000 - TSC_TOLERANCE_PPM) / 1000000; /* rounded as kvm_set_tsc_khz does */
        uint64_t most = (uint64_t) host * (1000000 + TSC_TOLERANCE_PPM) / 1000000;

        return (khz >= least && khz <= most) || has(vm_fd, KVM_CAP_TSC_CONTROL, trace);
}

int kvmneg_vcpu_init(const struct kvmneg_contract *contract, int vm_fd, int vcpu_fd, struct kvmneg_failure *failure,
                     struct kvmneg_trace *trace) {
        uint32_t khz = pinned(contract);
        int now, r = check_architecture(contract);

        if (r < 0 || khz == 0)
                return r;
        now = kvmneg_internal_ioctl(vcpu_fd, KVM_GET_TSC_KHZ, 0, trace);
        if (now < 0)
                return fail_tsc(failure, khz, 0, KVM_GET_TSC_KHZ, KVMNEG_FAILED, now);
        if ((uint32_t) now == khz)
                return 0;
        if (!reaches(vm_fd, khz, (uint32_t) now, trace))
                return fail_tsc(failure, khz, now, 0, KVMNEG_REFUSED, -ERANGE);
        r = kvmneg_internal_ioctl(vcpu_fd, KVM_SET_TSC_KHZ, khz, trace);
        if (r < 0)
                return fail_tsc(failure, khz, now, KVM_SET_TSC_KHZ, why_refused(r), r);
        now = kvmneg_internal_ioctl(vcpu_fd, KVM_GET_TSC_KHZ, 0, trace);
        return now < 0 || (uint32_t) now != khz ? fail_tsc(failure, khz, now, 0, KVMNEG_DROPPED, -EBADE) : 0;
}

/* KVM_SET_CPUID2 or KVM_GET_CPUID2. KVM does not say which entry it refuses. */
static int cpuid_ioctl(int vcpu_fd, unsigned long request, struct cpuid_table *table, uint32_t stage,
                       struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        int r = ioctl_pointer(vcpu_fd, request, table, trace);
        struct kvmneg_failure what = { .stage = stage, .request = (uint32_t) request };

        if (r >= 0)
                return table->count <= KVMNEG_CONTRACT_CPUIDS_MAX ? 0 : -EPROTO;
        what.why = why_refused(r);
        return fail(failure, what, r);
}

static int check_cpuid(const struct kvmneg_contract *contract, int vcpu_fd, uint32_t stage, uint32_t why,
                       struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        struct cpuid_table shown = { .count = KVMNEG_CONTRACT_CPUIDS_MAX };
        int r = cpuid_ioctl(vcpu_fd, KVM_GET_CPUID2, &shown, stage, failure, trace);

        return r < 0 ? r : kvmneg_internal_compare(contract, shown.entries, shown.count, stage, why, failure);
}

int kvmneg_vcpu_apply(const struct kvmneg_contract *contract, int vcpu_fd, const struct kvmneg_cpuid *cpuid,
                      struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        struct cpuid_table table = {};
        int r = check_architecture(contract);

        if (r < 0)
                return r;
        if (cpuid) {
                if (cpuid->count > KVMNEG_CONTRACT_CPUIDS_MAX)
                        return -E2BIG;
                table.count = cpuid->count;
                memcpy(table.entries, cpuid->entries, cpuid->count * sizeof(table.entries[0]));
        }
        r = kvmneg_internal_clamp(contract, table.entries, &table.count, KVMNEG_CONTRACT_CPUIDS_MAX, failure);
        if (r < 0)
                return r;
        r = cpuid_ioctl(vcpu_fd, KVM_SET_CPUID2, &table, KVMNEG_STAGE_CPUID, failure, trace);
        if (r >= 0)
                r = check_cpuid(contract, vcpu_fd, KVMNEG_STAGE_CPUID, KVMNEG_DROPPED, failure, trace);
        if (r >= 0)
                r = kvmneg_internal_apply_msrs(contract, vcpu_fd, true, failure, trace);
        return r < 0 ? r : kvmneg_internal_enforce(contract, vcpu_fd, table.entries, table.count, failure, trace);
}

int kvmneg_vcpu_verify(const struct kvmneg_contract *contract, int vcpu_fd, struct kvmneg_failure *failure,
                       struct kvmneg_trace *trace) {
        uint32_t khz = pinned(contract);
        int r = check_architecture(contract);

        if (r >= 0)
                r = check_cpuid(contract, vcpu_fd, KVMNEG_STAGE_VERIFY, KVMNEG_DIFFERS, failure, trace);
        if (r >= 0)
                r = kvmneg_internal_apply_msrs(contract, vcpu_fd, false, failure, trace);
        if (r < 0 || khz == 0)
                return r;
        r = kvmneg_internal_ioctl(vcpu_fd, KVM_GET_TSC_KHZ, 0, trace);
        if (r < 0)
                return fail_tsc(failure, khz, 0, KVM_GET_TSC_KHZ, KVMNEG_FAILED, r);
        return (uint32_t) r == khz ? 0 : fail_tsc(failure, khz, r, 0, KVMNEG_DIFFERS, -EBADE);
}
