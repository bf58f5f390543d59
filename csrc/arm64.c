/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What an arm64 KVM offers: the twin of x86.c. ID registers are read from a scratch vCPU. */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"
#include "kvm-constants.h"

#define REGISTERS_HINT 1024 /* 330 to 400 registers, 700 with SVE */

static_assert(sizeof(struct kvmneg_vcpu_init) == sizeof(struct kvm_vcpu_init), "layout");
static_assert(offsetof(struct kvmneg_registers, ids) == offsetof(struct kvm_reg_list, reg), "layout");

int kvmneg_get_preferred_target(int vm_fd, struct kvmneg_vcpu_init *ret_init, struct kvmneg_trace *trace) {
        struct kvmneg_vcpu_init init = {};
        int r = ioctl_pointer(vm_fd, KVM_ARM_PREFERRED_TARGET, &init, trace);

        if (r < 0)
                return r;
        *ret_init = init;
        return 0;
}

/* KVM_ARM_VCPU_INIT (api.rst 4.82) with the preferred target and PSCI 0.2, which every guest of today wants:
 * without it the firmware registers do not exist. */
static int init_vcpu(int vm_fd, int vcpu_fd, struct kvmneg_trace *trace) {
        struct kvmneg_vcpu_init init;
        int r = kvmneg_get_preferred_target(vm_fd, &init, trace);

        if (r < 0)
                return r;
        init.features[0] |= UINT32_C(1) << KVM_ARM_VCPU_PSCI_0_2;
        r = ioctl_pointer(vcpu_fd, KVM_ARM_VCPU_INIT, &init, trace);
        return r < 0 ? r : 0;
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
        r = init_vcpu(vm_fd, vcpu_fd, trace);
        if (r < 0) {
                kvmneg_close(vcpu_fd);
                kvmneg_close(vm_fd);
                return r;
        }
        *ret_vm_fd = vm_fd;
        *ret_vcpu_fd = vcpu_fd;
        return 0;
}

/* KVM answers E2BIG together with the number it has. */
int kvmneg_get_registers(int vcpu_fd, uint32_t hint, struct kvmneg_registers **ret_registers,
                         struct kvmneg_trace *trace) {
        uint64_t capacity = hint > 0 ? hint : REGISTERS_HINT;

        for (unsigned tries = 0; tries < 3 && capacity <= KVMNEG_REGISTERS_MAX; tries++) {
                struct kvmneg_registers *table;
                uint64_t told;
                int r;

                table = kvmneg_internal_table(sizeof(*table), capacity, sizeof(table->ids[0]));
                if (!table)
                        return -ENOMEM;
                table->count = capacity;
                r = ioctl_pointer(vcpu_fd, KVM_GET_REG_LIST, table, trace);
                told = table->count;
                if (r >= 0 && told <= capacity) {
                        *ret_registers = table;
                        return 0;
                }
                free(table);
                if (r >= 0)
                        return -EPROTO; /* more registers than there was room for: not KVM */
                if (r != -E2BIG)
                        return r;
                capacity = told;
        }
        return -E2BIG;
}

int kvmneg_get_register(int vcpu_fd, uint64_t id, uint64_t *ret_value, struct kvmneg_trace *trace) {
        uint64_t size = id & KVM_REG_SIZE_MASK, value = 0;
        uint32_t narrow = 0;
        struct kvm_one_reg request = { .id = id };
        int r;

        if (size == KVM_REG_SIZE_U64)
                request.addr = (uint64_t) (uintptr_t) &value;
        else if (size == KVM_REG_SIZE_U32)
                request.addr = (uint64_t) (uintptr_t) &narrow;
        else
                return -EINVAL;
        r = ioctl_pointer(vcpu_fd, KVM_GET_ONE_REG, &request, trace);
        if (r < 0)
                return r;
        *ret_value = size == KVM_REG_SIZE_U64 ? value : narrow;
        return 0;
}

struct kvmneg_probe *kvmneg_probe_free(struct kvmneg_probe *probe) {
        if (probe) {
                free(probe->registers);
                free(probe);
        }
        return NULL;
}

static int probe_all(int kvm_fd, int vm_fd, int vcpu_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace) {
        int r = kvmneg_get_capabilities(kvm_fd, vm_fd, &probe->capabilities, trace);

        if (r < 0)
                return r;
        if (vm_fd >= 0) {
                r = kvmneg_get_preferred_target(vm_fd, &probe->init, trace);
                if (r < 0)
                        return r;
        }
        return vcpu_fd >= 0 ? kvmneg_get_registers(vcpu_fd, 0, &probe->registers, trace) : 0;
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
