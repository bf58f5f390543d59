/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A VM whose vCPU can run: made in the order of a VMM, with what a contract says before a vCPU is complete. */

#include <errno.h>

#include "../arm64.h"

#define DISTRIBUTOR UINT64_C(0x08000000) /* where QEMU's "virt" machine has them */
#define CPU_INTERFACE UINT64_C(0x08010000)
#define REDISTRIBUTOR UINT64_C(0x080a0000)
#define PMU_INTERRUPT 23 /* a PPI, as there */

static int set_attribute(int fd, uint32_t group, uint64_t attribute, void *value, struct kvmneg_trace *trace) {
        struct kvm_device_attr request = { .group = group, .attr = attribute, .addr = (uint64_t) (uintptr_t) value };
        int r = ioctl_pointer(fd, KVM_SET_DEVICE_ATTR, &request, trace);

        return r < 0 ? r : 0;
}

static int place(int vgic_fd, uint64_t kind, uint64_t address, struct kvmneg_trace *trace) {
        return set_attribute(vgic_fd, KVM_DEV_ARM_VGIC_GRP_ADDR, kind, &address, trace);
}

/* The best vGIC of the models, in its place and initialised; -1 where there is none. */
static int create_vgic(int vm_fd, uint32_t models, int *ret_vgic_fd, struct kvmneg_trace *trace) {
        bool v3 = models & KVMNEG_VGIC_V3;
        struct kvm_create_device device = { .type = v3 ? KVM_DEV_TYPE_ARM_VGIC_V3 : KVM_DEV_TYPE_ARM_VGIC_V2 };
        int r;

        *ret_vgic_fd = -1;
        if (!(models & (KVMNEG_VGIC_V3 | KVMNEG_VGIC_V2)))
                return 0;
        r = ioctl_pointer(vm_fd, KVM_CREATE_DEVICE, &device, trace);
        if (r < 0)
                return r;
        *ret_vgic_fd = (int) device.fd;
        r = place(*ret_vgic_fd, v3 ? KVM_VGIC_V3_ADDR_TYPE_DIST : KVM_VGIC_V2_ADDR_TYPE_DIST, DISTRIBUTOR, trace);
        if (r >= 0)
                r = v3 ? place(*ret_vgic_fd, KVM_VGIC_V3_ADDR_TYPE_REDIST, REDISTRIBUTOR, trace)
                       : place(*ret_vgic_fd, KVM_VGIC_V2_ADDR_TYPE_CPU, CPU_INTERFACE, trace);
        if (r >= 0)
                r = set_attribute(*ret_vgic_fd, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, NULL, trace);
        return r;
}

/* What a vCPU with a PMU needs before it runs. */
static int init_pmu(int vcpu_fd, bool has_vgic, struct kvmneg_trace *trace) {
        int interrupt = PMU_INTERRUPT, r = 0;

        if (has_vgic)
                r = set_attribute(vcpu_fd, KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_IRQ, &interrupt, trace);
        return r < 0 ? r : set_attribute(vcpu_fd, KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT, NULL, trace);
}

struct kvmneg_machine kvmneg_machine_close(struct kvmneg_machine machine) {
        kvmneg_close(machine.vgic_fd);
        kvmneg_close(machine.vcpu_fd);
        kvmneg_close(machine.vm_fd);
        return (struct kvmneg_machine) { -1, -1, -1 };
}

int kvmneg_create_machine(int kvm_fd, uint32_t features, uint32_t vgic_models, const struct kvmneg_register *registers,
                          uint32_t count, struct kvmneg_machine *ret_machine, struct kvmneg_failure *failure,
                          struct kvmneg_trace *trace) {
        struct kvmneg_machine machine = { -1, -1, -1 };
        int r = kvmneg_create_vm(kvm_fd, &machine.vm_fd, trace);

        if (r >= 0)
                r = kvmneg_arm_vm_apply(machine.vm_fd, registers, count, failure, trace);
        if (r >= 0)
                r = kvmneg_internal_create_vcpu(machine.vm_fd, &machine.vcpu_fd, trace);
        if (r >= 0)
                r = kvmneg_arm_vcpu_init(machine.vm_fd, machine.vcpu_fd, features, registers, count, failure, trace);
        if (r >= 0)
                r = create_vgic(machine.vm_fd, vgic_models, &machine.vgic_fd, trace);
        if (r >= 0 && features & UINT32_C(1) << KVM_ARM_VCPU_PMU_V3)
                r = init_pmu(machine.vcpu_fd, machine.vgic_fd >= 0, trace);
        if (r < 0) {
                kvmneg_machine_close(machine);
                return r;
        }
        *ret_machine = machine;
        return 0;
}
