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
static_assert(offsetof(struct kvmneg_indices, entries) == offsetof(struct kvm_msr_list, indices), "layout");

/* One of the four ioctls that fill a struct kvm_cpuid2, with a table that grows. */
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

/* KVM answers E2BIG together with the number it has. */
int kvmneg_internal_list_msrs(int kvm_fd, unsigned long request, uint32_t capacity, struct kvmneg_indices **ret_list,
                              struct kvmneg_trace *trace) {
        for (unsigned tries = 0; tries < 3; tries++) {
                struct kvmneg_indices *list;
                uint32_t told;
                int r;

                if (capacity > KVMNEG_MSRS_MAX)
                        break;
                list = kvmneg_internal_table(sizeof(*list), capacity, sizeof(list->entries[0]));
                if (!list)
                        return -ENOMEM;
                list->count = capacity;
                r = ioctl_pointer(kvm_fd, request, list, trace);
                told = list->count;
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

struct msr_batch {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[KVMNEG_MSRS_PER_CALL];
};

/* Copies the next MSRs, from `done` on, and returns how many these are. */
static uint32_t fill_batch(struct msr_batch *batch, const struct kvmneg_msrs *msrs, uint32_t done) {
        uint32_t n = msrs->count - done;

        if (n > KVMNEG_MSRS_PER_CALL)
                n = KVMNEG_MSRS_PER_CALL;
        batch->head = (struct kvm_msrs) { .nmsrs = n };
        for (uint32_t i = 0; i < n; i++)
                batch->entries[i] = (struct kvm_msr_entry) { .index = msrs->entries[done + i].index,
                                                             .data = msrs->entries[done + i].value };
        return n;
}

static void mark_refused(struct kvmneg_msrs *msrs, uint32_t i, uint32_t how) {
        if (msrs->entries[i].refused == 0)
                msrs->refused++;
        msrs->entries[i].refused |= how;
}

/*
 * Reads the values of `msrs`, KVMNEG_MSRS_PER_CALL at a time. KVM_GET_MSRS stops at the first MSR it refuses and
 * returns how many it read: that one is marked, and reading goes on behind it.
 */
static int read_msrs(int fd, struct kvmneg_msrs *msrs, struct kvmneg_trace *trace) {
        struct msr_batch batch;
        uint32_t done = 0;

        while (done < msrs->count) {
                uint32_t n = fill_batch(&batch, msrs, done);
                int r = ioctl_pointer(fd, KVM_GET_MSRS, &batch, trace);

                if (r < 0)
                        return r;
                if ((uint32_t) r > n)
                        return -EPROTO;
                for (uint32_t i = 0; i < (uint32_t) r; i++)
                        msrs->entries[done + i].value = batch.entries[i].data;
                done += (uint32_t) r;
                if ((uint32_t) r < n) {
                        msrs->entries[done].value = 0;
                        mark_refused(msrs, done++, KVMNEG_MSR_UNREAD);
                }
        }
        return 0;
}

/* Gives a vCPU the values of `msrs`; KVM_SET_MSRS counts as KVM_GET_MSRS does. */
static int write_msrs(int vcpu_fd, struct kvmneg_msrs *msrs, struct kvmneg_trace *trace) {
        struct msr_batch batch;
        uint32_t done = 0;

        while (done < msrs->count) {
                uint32_t n = fill_batch(&batch, msrs, done);
                int r = ioctl_pointer(vcpu_fd, KVM_SET_MSRS, &batch, trace);

                if (r < 0)
                        return r;
                if ((uint32_t) r > n)
                        return -EPROTO;
                done += (uint32_t) r;
                if ((uint32_t) r < n)
                        mark_refused(msrs, done++, KVMNEG_MSR_UNSET);
        }
        return 0;
}

int kvmneg_get_feature_msrs(int kvm_fd, uint32_t hint, struct kvmneg_msrs **ret_msrs, struct kvmneg_trace *trace) {
        struct kvmneg_indices *list;
        struct kvmneg_msrs *msrs;
        int r;

        r = kvmneg_internal_list_msrs(kvm_fd, KVM_GET_MSR_FEATURE_INDEX_LIST, hint > 0 ? hint : MSRS_HINT, &list, trace);
        if (r < 0)
                return r;
        msrs = kvmneg_internal_table(sizeof(*msrs), list->count, sizeof(msrs->entries[0]));
        if (!msrs) {
                free(list);
                return -ENOMEM;
        }
        msrs->count = list->count;
        for (uint32_t i = 0; i < msrs->count; i++)
                msrs->entries[i].index = list->entries[i];
        free(list);
        r = read_msrs(kvm_fd, msrs, trace);
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

int kvmneg_try_cpuid(int vcpu_fd, const struct kvmneg_cpuid *cpuid, struct kvmneg_cpuid **ret_shown,
                     struct kvmneg_trace *trace) {
        static const struct kvmneg_cpuid_entry nothing = {};
        struct kvmneg_cpuid *shown;
        int r;

        if (cpuid->count > KVMNEG_CPUID_ENTRIES_MAX)
                return -E2BIG;
        /* KVM only reads it; its type in the kernel's header is not const */
        r = kvmneg_internal_ioctl(vcpu_fd, KVM_SET_CPUID2, (unsigned long) (uintptr_t) cpuid, trace);
        if (r < 0)
                return r;
        r = get_cpuid(vcpu_fd, KVM_GET_CPUID2, 0, &shown, trace);
        if (r < 0)
                return r;
        /* Linux 6.1 leaves the count at what there was room for; the rest is as we made it, zero. If an entry of
         * zeros was set at the end, it is no loss: a leaf that is missing reads zero. */
        while (shown->count > 0 && memcmp(&shown->entries[shown->count - 1], &nothing, sizeof(nothing)) == 0)
                shown->count--;
        *ret_shown = shown;
        return 0;
}

int kvmneg_try_msrs(int vcpu_fd, const struct kvmneg_msrs *msrs, struct kvmneg_msrs **ret_shown,
                    struct kvmneg_trace *trace) {
        struct kvmneg_msrs *shown;
        int r;

        if (msrs->count > KVMNEG_MSRS_MAX)
                return -E2BIG;
        shown = kvmneg_internal_table(sizeof(*shown), msrs->count, sizeof(shown->entries[0]));
        if (!shown)
                return -ENOMEM;
        shown->count = msrs->count;
        for (uint32_t i = 0; i < msrs->count; i++)
                shown->entries[i] = (struct kvmneg_msr) { .index = msrs->entries[i].index,
                                                          .value = msrs->entries[i].value };
        r = write_msrs(vcpu_fd, shown, trace);
        if (r >= 0)
                r = read_msrs(vcpu_fd, shown, trace);
        if (r < 0) {
                free(shown);
                return r;
        }
        *ret_shown = shown;
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
                free(probe->state_msrs);
                free(probe);
        }
        return NULL;
}

int kvmneg_internal_optional(int r, int32_t *error) {
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
        r = kvmneg_internal_optional(kvmneg_get_emulated_cpuid(kvm_fd, 0, &probe->emulated, trace), &probe->emulated_error);
        if (r < 0)
                return r;
        r = kvmneg_internal_optional(kvmneg_get_hyperv_cpuid(kvm_fd, vcpu_fd, 0, &probe->hyperv, trace), &probe->hyperv_error);
        if (r < 0)
                return r;
        r = kvmneg_internal_optional(kvmneg_get_feature_msrs(kvm_fd, 0, &probe->feature_msrs, trace), &probe->feature_msrs_error);
        if (r < 0)
                return r;
        r = kvmneg_internal_optional(kvmneg_get_xcomp_guest_supp(kvm_fd, &probe->xcomp_guest_supp, trace), &probe->xcomp_error);
        if (r < 0)
                return r;
        return kvmneg_internal_probe_state(kvm_fd, vcpu_fd, probe, trace);
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
