/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A contract's capabilities against what KVM answers for a VM. */

#include <errno.h>
#include <string.h>

#include "contract-x86.h"
#include "kvm-constants.h"

#define KIND "kvm:"

/* How an answer has to compare: it has every bound bit that is granted, or it is as large a number. */
enum how { BITS, MINIMUM };

/* Those of kvmneg's catalogue (kvmneg/features/catalog/x86/capabilities.toml), by name; a test compares them. Numbers
 * are user-space interface (include/uapi/linux/kvm.h) and never change. */
static const struct {
        const char *name;
        uint32_t number;
        enum how how;
} known[] = {
        { "adjust-clock",              39, BITS },
        { "async-pf",                  59, BITS },
        { "async-pf-int",             183, BITS },
        { "debugregs",                 50, BITS },
        { "disable-quirks",           116, BITS },
        { "disable-quirks2",          213, BITS },
        { "enforce-pv-feature-cpuid", 190, BITS },
        { "exception-payload",        164, BITS },
        { "exit-hypercall",           201, BITS },
        { "get-tsc-khz",               61, BITS },
        { "hyperv",                    44, BITS },
        { "hyperv-cpuid",             167, BITS },
        { "hyperv-direct-tlbflush",   175, BITS },
        { "hyperv-enforce-cpuid",     199, BITS },
        { "hyperv-enlightened-vmcs",  163, BITS },
        { "hyperv-eventfd",           154, BITS },
        { "hyperv-send-ipi",          161, BITS },
        { "hyperv-spin",               46, BITS },
        { "hyperv-synic",             123, BITS },
        { "hyperv-synic2",            148, BITS },
        { "hyperv-time",               96, BITS },
        { "hyperv-tlbflush",          155, BITS },
        { "hyperv-vapic",              45, BITS },
        { "hyperv-vp-index",          149, BITS },
        { "irqchip",                    0, BITS },
        { "kvmclock-ctrl",             76, BITS },
        { "max-vcpu-id",              128, MINIMUM },
        { "max-vcpus",                 66, MINIMUM },
        { "mce",                       31, MINIMUM },
        { "mp-state",                  14, BITS },
        { "msr-platform-info",        159, BITS },
        { "nested-state",             157, MINIMUM },
        { "pit-state2",                35, BITS },
        { "pit2",                      33, BITS },
        { "pmu-capability",           212, BITS },
        { "ptp-kvm",                  198, BITS },
        { "readonly-mem",              81, BITS },
        { "set-boot-cpu-id",           34, BITS },
        { "sgx-attribute",            196, BITS },
        { "smaller-maxphyaddr",       185, BITS },
        { "split-irqchip",            121, BITS },
        { "sregs2",                   200, BITS },
        { "steal-time",               187, BITS },
        { "sys-hyperv-cpuid",         191, BITS },
        { "tsc-control",               60, BITS },
        { "tsc-deadline-timer",        72, BITS },
        { "vcpu-events",               41, BITS },
        { "vm-tsc-control",           214, BITS },
        { "vm-types",                 235, BITS },
        { "x2apic-api",               129, BITS },
        { "x86-apic-bus-cycles-ns",   237, BITS },
        { "x86-bus-lock-exit",        193, BITS },
        { "x86-disable-exits",        143, BITS },
        { "x86-notify-vmexit",        219, BITS },
        { "x86-smm",                  117, BITS },
        { "x86-triple-fault-event",   218, BITS },
        { "x86-user-space-msr",       188, BITS },
        { "xcrs",                      56, BITS },
        { "xen-hvm",                   38, BITS },
        { "xsave",                     55, BITS },
        { "xsave2",                   208, MINIMUM },
};

static bool fits(uint64_t granted, uint64_t mask, int answer, enum how how) {
        uint64_t has = answer < 0 ? 0 : (uint64_t) answer;

        return how == MINIMUM ? has >= granted : !(granted & mask & ~has);
}

/* One capability. Devices and state are not KVM_CHECK_EXTENSION's: they are looked at where a contract is made. */
static int check(const struct contract_capability *entry, int vm_fd, struct kvmneg_failure *failure,
                 struct kvmneg_trace *trace) {
        struct kvmneg_failure what = { .asked = entry->value, .mask = entry->mask, .stage = KVMNEG_STAGE_CHECK };
        const char *name = entry->name + strlen(KIND);

        if (strncmp(entry->name, KIND, strlen(KIND)) != 0 || entry->value == 0)
                return 0;
        for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
                int r;

                if (strncmp(name, known[i].name, CAPABILITY_NAME - strlen(KIND)) != 0)
                        continue;
                r = kvmneg_internal_ioctl(vm_fd, KVM_CHECK_EXTENSION, known[i].number, trace);
                if (r < 0 && (r == -ENOTTY || !kvmneg_internal_absent(r))) {
                        what.why = KVMNEG_FAILED;
                        what.request = (uint32_t) KVM_CHECK_EXTENSION;
                } else if (fits(entry->value, entry->mask, r, known[i].how)) {
                        return 0;
                } else {
                        what.why = KVMNEG_MISSING;
                        what.got = r < 0 ? 0 : (uint64_t) r;
                        r = -EBADE;
                }
                kvmneg_internal_name_word(what.word, entry->name);
                return fail(failure, what, r);
        }
        what.why = KVMNEG_UNKNOWN;
        kvmneg_internal_name_word(what.word, entry->name);
        return fail(failure, what, -EOPNOTSUPP);
}

int kvmneg_internal_check_capabilities(const struct kvmneg_contract *contract, int vm_fd, struct kvmneg_failure *failure,
                                       struct kvmneg_trace *trace) {
        for (uint32_t i = 0; i < contract->counts[CAPABILITIES]; i++) {
                int r = check(&contract->capabilities[i], vm_fd, failure, trace);
                if (r < 0)
                        return r;
        }
        return 0;
}

uint64_t kvmneg_internal_granted(const struct kvmneg_contract *contract, const char *name) {
        for (uint32_t i = 0; i < contract->counts[CAPABILITIES]; i++)
                if (strncmp(contract->capabilities[i].name, name, CAPABILITY_NAME) == 0)
                        return contract->capabilities[i].value;
        return 0;
}
