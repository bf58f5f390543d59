/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What an arm64 KVM offers: the twin of x86.c. What it gives a vCPU is tried on scratch VMs (arm64-trial.c). */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "arm64.h"

#define PMU_ATTRIBUTES 5 /* KVM_ARM_VCPU_PMU_V3_CTRL: IRQ, INIT, FILTER, SET_PMU, SET_NR_COUNTERS */

static_assert(sizeof(struct kvmneg_mask_range) == 64, "layout");

/* GICD_IIDR of vCPU 0's distributor view; the vCPU's MPIDR, or its number with a GICv2, is 0. */
static struct kvm_device_attr iidr_attribute(uint32_t *iidr) {
        return (struct kvm_device_attr) { .group = KVM_DEV_ARM_VGIC_GRP_DIST_REGS,
                                          .attr = GICD_IIDR,
                                          .addr = (uint64_t) (uintptr_t) iidr };
}

int kvmneg_internal_get_iidr(int vgic_fd, uint32_t *ret_iidr, struct kvmneg_trace *trace) {
        uint32_t iidr = 0;
        struct kvm_device_attr attribute = iidr_attribute(&iidr);
        int r = ioctl_pointer(vgic_fd, KVM_GET_DEVICE_ATTR, &attribute, trace);

        if (r < 0)
                return r;
        *ret_iidr = iidr;
        return 0;
}

int kvmneg_internal_set_iidr(int vgic_fd, uint32_t iidr, struct kvmneg_trace *trace) {
        struct kvm_device_attr attribute = iidr_attribute(&iidr);
        int r = ioctl_pointer(vgic_fd, KVM_SET_DEVICE_ATTR, &attribute, trace);

        return r < 0 ? r : 0;
}

/* KVM_CREATE_DEVICE that only asks (api.rst 4.79). */
static int get_vgic_models(int vm_fd, uint32_t *ret_models, struct kvmneg_trace *trace) {
        static const uint32_t types[] = { KVM_DEV_TYPE_ARM_VGIC_V2, KVM_DEV_TYPE_ARM_VGIC_V3,
                                          KVM_DEV_TYPE_ARM_VGIC_ITS };
        uint32_t models = 0;

        for (unsigned i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
                struct kvm_create_device device = { .type = types[i], .flags = KVM_CREATE_DEVICE_TEST };
                int r = ioctl_pointer(vm_fd, KVM_CREATE_DEVICE, &device, trace);

                if (r < 0 && !refused(r))
                        return r;
                if (r >= 0)
                        models |= UINT32_C(1) << i;
        }
        *ret_models = models;
        return 0;
}

/* 1 where a VM or a vCPU has an attribute, 0 where it has not. */
static int has_attribute(int fd, uint32_t group, uint64_t number, struct kvmneg_trace *trace) {
        struct kvm_device_attr attribute = { .group = group, .attr = number };
        int r = ioctl_pointer(fd, KVM_HAS_DEVICE_ATTR, &attribute, trace);

        if (r < 0)
                return refused(r) ? 0 : r;
        return 1;
}

static int get_pmu_attributes(int vcpu_fd, uint32_t *ret_attributes, struct kvmneg_trace *trace) {
        uint32_t attributes = 0;

        for (unsigned n = 0; n < PMU_ATTRIBUTES; n++) {
                int r = has_attribute(vcpu_fd, KVM_ARM_VCPU_PMU_V3_CTRL, n, trace);
                if (r < 0)
                        return r;
                attributes |= (uint32_t) r << n;
        }
        *ret_attributes = attributes;
        return 0;
}

/* Only a KVM in protected mode makes a protected VM; one that does not know the type says EINVAL. */
static int get_protected(int kvm_fd, uint32_t *ret_protected, struct kvmneg_trace *trace) {
        int r = kvmneg_internal_ioctl(kvm_fd, KVM_CREATE_VM, KVMNEG_VM_TYPE_PROTECTED, trace);

        if (r < 0 && !refused(r) && r != -EINTR)
                return r;
        *ret_protected = r >= 0;
        kvmneg_close(r);
        return 0;
}

struct kvmneg_probe *kvmneg_probe_free(struct kvmneg_probe *probe) {
        if (probe) {
                free(probe->registers);
                free(probe->trials);
                free(probe);
        }
        return NULL;
}

/* What a VM says without a vCPU. */
static int probe_vm(int kvm_fd, int vm_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace) {
        int r = kvmneg_get_preferred_target(vm_fd, &probe->init, trace);

        if (r >= 0)
                r = get_vgic_models(vm_fd, &probe->vgic_models, trace);
        if (r >= 0)
                r = has_attribute(vm_fd, KVMNEG_VM_SMCCC_CTRL, KVMNEG_VM_SMCCC_FILTER, trace);
        if (r < 0)
                return r;
        probe->vm_attributes = (uint32_t) r;
        return get_protected(kvm_fd, &probe->protected_vms, trace);
}

static int probe_all(int kvm_fd, int vm_fd, int vcpu_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace) {
        int r = kvmneg_get_capabilities(kvm_fd, vm_fd, &probe->capabilities, trace);

        if (r >= 0 && vm_fd >= 0)
                r = probe_vm(kvm_fd, vm_fd, probe, trace);
        if (r < 0 || vcpu_fd < 0)
                return r;
        r = get_pmu_attributes(vcpu_fd, &probe->pmu_attributes, trace);
        if (r >= 0)
                r = kvmneg_get_registers(vcpu_fd, 0, &probe->registers, trace);
        if (r >= 0)
                r = kvmneg_internal_try_registers(vm_fd, vcpu_fd, probe, trace);
        if (r >= 0)
                r = kvmneg_internal_try_unfinished(kvm_fd, probe, trace);
        if (r < 0)
                return r;
        return kvmneg_internal_try_features(kvm_fd, probe->vcpu_features, &probe->vcpu_features, trace);
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
