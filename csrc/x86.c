/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What an x86 KVM offers: CPUID tables, feature MSRs, XSAVE components. */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "kvm-constants.h"

#define CPUID_HINT 128 /* fits every host seen (40 to 110 entries), so that the usual case is one ioctl */
#define MSRS_HINT 64

static_assert(sizeof(struct kvmneg_cpuid_entry) == sizeof(struct kvm_cpuid_entry2), "layout");
static_assert(offsetof(struct kvmneg_cpuid_entry, edx) == offsetof(struct kvm_cpuid_entry2, edx), "layout");
static_assert(offsetof(struct kvmneg_cpuid, entries) == offsetof(struct kvm_cpuid2, entries), "layout");
static_assert(sizeof(struct kvmneg_msr) == sizeof(struct kvm_msr_entry), "layout");
static_assert(offsetof(struct kvmneg_msr, value) == offsetof(struct kvm_msr_entry, data), "layout");

/* One of the three ioctls that fill a struct kvm_cpuid2, with a table that grows. */
static int get_cpuid(int fd, unsigned long request, uint32_t hint, struct kvmneg_cpuid **ret_cpuid,
                     struct kvmneg_trace *trace) {
        uint32_t capacity = hint > 0 ? hint : CPUID_HINT;

        if (capacity > KVMNEG_CPUID_ENTRIES_MAX)
                return -E2BIG;
        for (;;) {
                struct kvmneg_cpuid *table;
                int r;

                table = kvmneg_internal_table(sizeof(*table), capacity, sizeof(table->entries[0]));
                if (!table)
                        return -ENOMEM;
                table->count = capacity;
                r = ioctl_pointer(fd, request, table, trace);
                if (r >= 0 && table->count <= capacity) {
                        *ret_cpuid = table;
                        return 0;
                }
                free(table);
                if (r >= 0)
                        return -EPROTO; /* more entries than there was room for: not KVM */
                if (r != -E2BIG)
                        return r;
                capacity = kvmneg_internal_grow(capacity, KVMNEG_CPUID_ENTRIES_MAX);
                if (capacity == 0)
                        return -E2BIG;
        }
}

int kvmneg_get_supported_cpuid(int kvm_fd, uint32_t hint, struct kvmneg_cpuid **ret_cpuid, struct kvmneg_trace *trace) {
        return get_cpuid(kvm_fd, KVM_GET_SUPPORTED_CPUID, hint, ret_cpuid, trace);
}

int kvmneg_get_emulated_cpuid(int kvm_fd, uint32_t hint, struct kvmneg_cpuid **ret_cpuid, struct kvmneg_trace *trace) {
        return get_cpuid(kvm_fd, KVM_GET_EMULATED_CPUID, hint, ret_cpuid, trace);
}

int kvmneg_get_hyperv_cpuid(int kvm_fd, int vcpu_fd, uint32_t hint, struct kvmneg_cpuid **ret_cpuid,
                            struct kvmneg_trace *trace) {
        int r = get_cpuid(kvm_fd, KVM_GET_SUPPORTED_HV_CPUID, hint, ret_cpuid, trace);

        if (vcpu_fd >= 0 && kvmneg_internal_absent(r))
                r = get_cpuid(vcpu_fd, KVM_GET_SUPPORTED_HV_CPUID, hint, ret_cpuid, trace);
        return r;
}

/* The indices of KVM's feature MSRs. KVM answers E2BIG together with the number it has. */
static int list_feature_msrs(int kvm_fd, uint32_t hint, struct kvm_msr_list **ret_list, struct kvmneg_trace *trace) {
        uint32_t capacity = hint > 0 ? hint : MSRS_HINT;

        for (unsigned tries = 0; tries < 3; tries++) {
                struct kvm_msr_list *list;
                uint32_t told;
                int r;

                if (capacity > KVMNEG_MSRS_MAX)
                        break;
                list = kvmneg_internal_table(sizeof(*list), capacity, sizeof(list->indices[0]));
                if (!list)
                        return -ENOMEM;
                list->nmsrs = capacity;
                r = ioctl_pointer(kvm_fd, KVM_GET_MSR_FEATURE_INDEX_LIST, list, trace);
                told = list->nmsrs;
                if (r >= 0 && told <= capacity) {
                        *ret_list = list;
                        return 0;
                }
                free(list);
                if (r >= 0)
                        return -EPROTO;
                if (r != -E2BIG)
                        return r;
                capacity = told;
        }
        return -E2BIG;
}

/*
 * Reads the values of `msrs`, KVMNEG_MSRS_PER_CALL at a time. KVM_GET_MSRS stops at the first MSR it refuses and
 * returns how many it read: that one is marked, and reading goes on behind it.
 */
static int read_feature_msrs(int kvm_fd, struct kvmneg_msrs *msrs, struct kvmneg_trace *trace) {
        struct {
                struct kvm_msrs head;
                struct kvm_msr_entry entries[KVMNEG_MSRS_PER_CALL];
        } batch;
        uint32_t done = 0;

        while (done < msrs->count) {
                uint32_t n = msrs->count - done;
                int r;

                if (n > KVMNEG_MSRS_PER_CALL)
                        n = KVMNEG_MSRS_PER_CALL;
                batch.head = (struct kvm_msrs) { .nmsrs = n };
                for (uint32_t i = 0; i < n; i++)
                        batch.entries[i] = (struct kvm_msr_entry) { .index = msrs->entries[done + i].index };
                r = ioctl_pointer(kvm_fd, KVM_GET_MSRS, &batch, trace);
                if (r < 0)
                        return r;
                if ((uint32_t) r > n)
                        return -EPROTO;
                for (uint32_t i = 0; i < (uint32_t) r; i++)
                        msrs->entries[done + i].value = batch.entries[i].data;
                done += (uint32_t) r;
                if ((uint32_t) r < n) {
                        msrs->entries[done++].refused = 1;
                        msrs->refused++;
                }
        }
        return 0;
}

int kvmneg_get_feature_msrs(int kvm_fd, uint32_t hint, struct kvmneg_msrs **ret_msrs, struct kvmneg_trace *trace) {
        struct kvm_msr_list *list;
        struct kvmneg_msrs *msrs;
        int r;

        r = list_feature_msrs(kvm_fd, hint, &list, trace);
        if (r < 0)
                return r;
        msrs = kvmneg_internal_table(sizeof(*msrs), list->nmsrs, sizeof(msrs->entries[0]));
        if (!msrs) {
                free(list);
                return -ENOMEM;
        }
        msrs->count = list->nmsrs;
        for (uint32_t i = 0; i < msrs->count; i++)
                msrs->entries[i].index = list->indices[i];
        free(list);
        r = read_feature_msrs(kvm_fd, msrs, trace);
        if (r < 0) {
                free(msrs);
                return r;
        }
        *ret_msrs = msrs;
        return 0;
}

int kvmneg_get_xcomp_guest_supp(int kvm_fd, uint64_t *ret_components, struct kvmneg_trace *trace) {
        uint64_t components = 0;
        struct kvm_device_attr attribute = {
                .group = 0, /* the system's own attributes have no group */
                .attr = KVM_X86_XCOMP_GUEST_SUPP,
                .addr = (uint64_t) (uintptr_t) &components,
        };
        int r = ioctl_pointer(kvm_fd, KVM_GET_DEVICE_ATTR, &attribute, trace);

        if (r < 0)
                return r;
        *ret_components = components;
        return 0;
}

int kvmneg_create_scratch(int kvm_fd, int *ret_vm_fd, int *ret_vcpu_fd, struct kvmneg_trace *trace) {
        int vm_fd, vcpu_fd, r;

        r = kvmneg_create_vm(kvm_fd, &vm_fd, trace);
        if (r < 0)
                return r;
        r = kvmneg_internal_create_vcpu(vm_fd, &vcpu_fd, trace);
        if (r < 0) {
                kvmneg_close(vm_fd);
                return r;
        }
        *ret_vm_fd = vm_fd;
        *ret_vcpu_fd = vcpu_fd;
        return 0;
}

struct kvmneg_probe *kvmneg_probe_free(struct kvmneg_probe *probe) {
        if (probe) {
                free(probe->supported);
                free(probe->emulated);
                free(probe->hyperv);
                free(probe->feature_msrs);
                free(probe);
        }
        return NULL;
}

/* Keeps the error of a part that this KVM may lack; passes any other failure on. */
static int optional(int r, int32_t *error) {
        if (!kvmneg_internal_absent(r))
                return r;
        *error = r;
        return 0;
}

static int probe_all(int kvm_fd, int vm_fd, int vcpu_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace) {
        int r;

        r = kvmneg_get_capabilities(kvm_fd, vm_fd, &probe->capabilities, trace);
        if (r < 0)
                return r;
        r = kvmneg_get_supported_cpuid(kvm_fd, 0, &probe->supported, trace);
        if (r < 0)
                return r;
        r = optional(kvmneg_get_emulated_cpuid(kvm_fd, 0, &probe->emulated, trace), &probe->emulated_error);
        if (r < 0)
                return r;
        r = optional(kvmneg_get_hyperv_cpuid(kvm_fd, vcpu_fd, 0, &probe->hyperv, trace), &probe->hyperv_error);
        if (r < 0)
                return r;
        r = optional(kvmneg_get_feature_msrs(kvm_fd, 0, &probe->feature_msrs, trace), &probe->feature_msrs_error);
        if (r < 0)
                return r;
        return optional(kvmneg_get_xcomp_guest_supp(kvm_fd, &probe->xcomp_guest_supp, trace), &probe->xcomp_error);
}

int kvmneg_probe(int kvm_fd, int vm_fd, int vcpu_fd, struct kvmneg_probe **ret_probe, struct kvmneg_trace *trace) {
        struct kvmneg_probe *probe = calloc(1, sizeof(*probe));
        int r;

        if (!probe)
                return -ENOMEM;
        r = probe_all(kvm_fd, vm_fd, vcpu_fd, probe, trace);
        if (r < 0) {
                kvmneg_probe_free(probe);
                return r;
        }
        *ret_probe = probe;
        return 0;
}
