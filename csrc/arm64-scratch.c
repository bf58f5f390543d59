/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Scratch VMs of arm64: a vCPU with every feature that KVM takes, and a vGIC. */

#include <assert.h>
#include <errno.h>

#include "arm64.h"

static_assert(sizeof(struct kvmneg_vcpu_init) == sizeof(struct kvm_vcpu_init), "layout");

#define FEATURE(name) (UINT32_C(1) << KVM_ARM_VCPU_##name)
#define ALWAYS (FEATURE(POWER_OFF) | FEATURE(PSCI_0_2)) /* without PSCI 0.2 there are no firmware registers */
#define PTRAUTH (FEATURE(PTRAUTH_ADDRESS) | FEATURE(PTRAUTH_GENERIC)) /* one is not taken without the other */

/* What a vCPU gets as far as KVM takes it: in the order in which it is given up. */
static const uint32_t wanted[] = { FEATURE(SVE), PTRAUTH, FEATURE(PMU_V3) };
#define WANTED (sizeof(wanted) / sizeof(wanted[0]))

int kvmneg_get_preferred_target(int vm_fd, struct kvmneg_vcpu_init *ret_init, struct kvmneg_trace *trace) {
        struct kvmneg_vcpu_init init = {};
        int r = ioctl_pointer(vm_fd, KVM_ARM_PREFERRED_TARGET, &init, trace);

        if (r < 0)
                return r;
        *ret_init = init;
        return 0;
}

/* KVM_ARM_VCPU_INIT (api.rst 4.82). */
static int init_vcpu(int vcpu_fd, uint32_t target, uint32_t features, struct kvmneg_trace *trace) {
        struct kvmneg_vcpu_init init = { .target = target, .features = { features } };
        int r = ioctl_pointer(vcpu_fd, KVM_ARM_VCPU_INIT, &init, trace);

        return r < 0 ? r : 0;
}

/* With the most features that KVM takes. A vCPU that was refused may be asked again (kvm_vcpu_set_target in
 * arch/arm64/kvm/arm.c), one that took some features keeps them. */
static int init_most(int vcpu_fd, uint32_t target, uint32_t *ret_features, struct kvmneg_trace *trace) {
        for (unsigned without = 0; without < 1 << WANTED; without++) {
                uint32_t features = ALWAYS;
                int r;

                for (unsigned i = 0; i < WANTED; i++)
                        if (!(without & 1 << i))
                                features |= wanted[i];
                r = init_vcpu(vcpu_fd, target, features, trace);
                if (r >= 0)
                        *ret_features = features;
                if (!refused(r) || without + 1 == 1 << WANTED)
                        return r;
        }
        return -EINVAL;
}

/* A capability that must be there before the first vCPU; on a KVM without it nothing happens. */
static int enable_implementation_ids(int vm_fd, struct kvmneg_trace *trace) {
        struct kvm_enable_cap enable = { .cap = KVM_CAP_ARM_WRITABLE_IMP_ID_REGS };
        int r = ioctl_pointer(vm_fd, KVM_ENABLE_CAP, &enable, trace);

        return r < 0 && !refused(r) ? r : 0;
}

int kvmneg_internal_create_unfinished(int kvm_fd, bool implementation_ids, int *ret_vm_fd, int *ret_vcpu_fd,
                                      uint32_t *ret_features, struct kvmneg_trace *trace) {
        struct kvmneg_vcpu_init init;
        int vm_fd, vcpu_fd, r;

        r = kvmneg_create_vm(kvm_fd, &vm_fd, trace);
        if (r < 0)
                return r;
        r = implementation_ids ? enable_implementation_ids(vm_fd, trace) : 0;
        if (r >= 0)
                r = kvmneg_internal_create_vcpu(vm_fd, &vcpu_fd, trace);
        if (r < 0) {
                kvmneg_close(vm_fd);
                return r;
        }
        r = kvmneg_get_preferred_target(vm_fd, &init, trace);
        if (r >= 0)
                r = init_most(vcpu_fd, init.target, ret_features, trace);
        if (r < 0) {
                kvmneg_close(vcpu_fd);
                kvmneg_close(vm_fd);
                return r;
        }
        *ret_vm_fd = vm_fd;
        *ret_vcpu_fd = vcpu_fd;
        return 0;
}

int kvmneg_internal_finalize(int vcpu_fd, uint32_t features, struct kvmneg_trace *trace) {
        int feature = KVM_ARM_VCPU_SVE, r;

        if (!(features & FEATURE(SVE)))
                return 0;
        r = ioctl_pointer(vcpu_fd, KVM_ARM_VCPU_FINALIZE, &feature, trace);
        return r < 0 ? r : 0;
}

int kvmneg_internal_create_vgic(int vm_fd, int *ret_vgic_fd, uint32_t *ret_type, struct kvmneg_trace *trace) {
        static const uint32_t types[] = { KVM_DEV_TYPE_ARM_VGIC_V3, KVM_DEV_TYPE_ARM_VGIC_V2 };

        for (unsigned i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
                struct kvm_create_device device = { .type = types[i] };
                int r = ioctl_pointer(vm_fd, KVM_CREATE_DEVICE, &device, trace);

                if (r >= 0) {
                        *ret_vgic_fd = (int) device.fd;
                        *ret_type = types[i];
                        return 0;
                }
                if (!refused(r))
                        return r;
        }
        *ret_vgic_fd = -1;
        *ret_type = 0;
        return 0;
}

int kvmneg_create_scratch(int kvm_fd, int *ret_vm_fd, int *ret_vcpu_fd, struct kvmneg_trace *trace) {
        int vm_fd, vcpu_fd, vgic_fd = -1, r;
        uint32_t features, type;

        r = kvmneg_internal_create_unfinished(kvm_fd, false, &vm_fd, &vcpu_fd, &features, trace);
        if (r < 0)
                return r;
        r = kvmneg_internal_finalize(vcpu_fd, features, trace);
        if (r >= 0)
                r = kvmneg_internal_create_vgic(vm_fd, &vgic_fd, &type, trace);
        kvmneg_close(vgic_fd); /* the VM keeps its vGIC */
        if (r < 0) {
                kvmneg_close(vcpu_fd);
                kvmneg_close(vm_fd);
                return r;
        }
        *ret_vm_fd = vm_fd;
        *ret_vcpu_fd = vcpu_fd;
        return 0;
}

/* The features that feature n is taken together with. */
static uint32_t company(unsigned n) {
        switch (n) {
        case KVM_ARM_VCPU_PTRAUTH_ADDRESS:
        case KVM_ARM_VCPU_PTRAUTH_GENERIC:
                return ALWAYS | PTRAUTH;
        case KVM_ARM_VCPU_HAS_EL2_E2H0:
                return ALWAYS | FEATURE(HAS_EL2);
        case KVMNEG_ARM_VCPU_PMU_V3_STRICT:
                return ALWAYS | FEATURE(PMU_V3);
        }
        return ALWAYS;
}

/* Features are a VM's: one that took some is of no use for another trial, one that refused is. */
int kvmneg_internal_try_features(int kvm_fd, uint64_t known, uint64_t *ret_features, struct kvmneg_trace *trace) {
        struct kvmneg_vcpu_init init = {};
        uint64_t features = known;
        int vm_fd = -1, vcpu_fd = -1, r = 0;

        for (unsigned n = 0; n < 32 && r >= 0; n++) {
                if (features & UINT64_C(1) << n)
                        continue;
                if (vm_fd < 0) {
                        r = kvmneg_create_vm(kvm_fd, &vm_fd, trace);
                        if (r >= 0)
                                r = kvmneg_internal_create_vcpu(vm_fd, &vcpu_fd, trace);
                        if (r >= 0)
                                r = kvmneg_get_preferred_target(vm_fd, &init, trace);
                        if (r < 0)
                                break;
                }
                r = init_vcpu(vcpu_fd, init.target, company(n) | UINT32_C(1) << n, trace);
                if (r >= 0) {
                        features |= company(n) | UINT32_C(1) << n;
                        vcpu_fd = kvmneg_close(vcpu_fd);
                        vm_fd = kvmneg_close(vm_fd);
                } else if (refused(r))
                        r = 0;
        }
        kvmneg_close(vcpu_fd);
        kvmneg_close(vm_fd);
        if (r < 0)
                return r;
        *ret_features = features;
        return 0;
}
