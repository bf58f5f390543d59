/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The steps of a contract on arm64: those of arm64-apply.c with the contract's registers and features. */

#include <assert.h>
#include <string.h>

#include "arm64.h"
#include "contract.h"

static_assert(sizeof(struct kvmneg_register) == sizeof(struct kvmneg_bound_register), "layout");
static_assert(offsetof(struct kvmneg_register, mask) == offsetof(struct kvmneg_bound_register, mask), "layout");

static const struct kvmneg_register *registers(const struct kvmneg_contract *contract) {
        return (const struct kvmneg_register *) (const void *) contract->registers;
}

static int check_architecture(const struct kvmneg_contract *contract) {
        return contract->header->architecture == KVMNEG_ARM64 ? 0 : -ENOEXEC;
}

int kvmneg_vm_apply(const struct kvmneg_contract *contract, int vm_fd, const struct kvmneg_choices *choices,
                    struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        int r = check_architecture(contract);

        if (r < 0)
                return r;
        if (choices && (choices->disable_quirks | choices->x2apic_api | choices->disable_exits | choices->exit_hypercall))
                return -EINVAL;
        r = kvmneg_internal_check_capabilities(contract, vm_fd, failure, trace);
        if (r < 0)
                return r;
        return kvmneg_arm_vm_apply(vm_fd, registers(contract), contract->counts[REGISTERS], failure, trace);
}

int kvmneg_vcpu_init(const struct kvmneg_contract *contract, int vm_fd, int vcpu_fd, struct kvmneg_failure *failure,
                     struct kvmneg_trace *trace) {
        int r = check_architecture(contract);

        return r < 0 ? r
                     : kvmneg_arm_vcpu_init(vm_fd, vcpu_fd, contract->features, registers(contract),
                                            contract->counts[REGISTERS], failure, trace);
}

int kvmneg_vcpu_apply(const struct kvmneg_contract *contract, int vcpu_fd, const struct kvmneg_cpuid *cpuid,
                      struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        int r = check_architecture(contract);

        if (r < 0)
                return r;
        return cpuid ? -EINVAL
                     : kvmneg_arm_vcpu_apply(vcpu_fd, registers(contract), contract->counts[REGISTERS], failure, trace);
}

int kvmneg_vcpu_verify(const struct kvmneg_contract *contract, int vcpu_fd, struct kvmneg_failure *failure,
                       struct kvmneg_trace *trace) {
        int r = check_architecture(contract);

        return r < 0 ? r
                     : kvmneg_arm_vcpu_verify(vcpu_fd, registers(contract), contract->counts[REGISTERS], failure, trace);
}

/* The revision of the vGIC that the contract binds, -ENOENT where it binds none. */
static int bound_revision(const struct kvmneg_contract *contract, uint32_t *ret_revision) {
        int r = check_architecture(contract);

        for (uint32_t i = 0; r == 0 && i < contract->counts[CAPABILITIES]; i++)
                if (strncmp(contract->capabilities[i].name, "arm:vgic-revision", CAPABILITY_NAME) == 0) {
                        *ret_revision = (uint32_t) contract->capabilities[i].value;
                        return 0;
                }
        return r < 0 ? r : -ENOENT;
}

int kvmneg_vgic_apply(const struct kvmneg_contract *contract, int vgic_fd, struct kvmneg_failure *failure,
                      struct kvmneg_trace *trace) {
        uint32_t revision;
        int r = bound_revision(contract, &revision);

        if (r < 0)
                return r == -ENOENT ? 0 : r;
        return kvmneg_arm_vgic_apply(vgic_fd, revision, failure, trace);
}

int kvmneg_vgic_verify(const struct kvmneg_contract *contract, int vgic_fd, struct kvmneg_failure *failure,
                       struct kvmneg_trace *trace) {
        uint32_t revision;
        int r = bound_revision(contract, &revision);

        if (r < 0)
                return r == -ENOENT ? 0 : r;
        return kvmneg_arm_vgic_verify(vgic_fd, revision, failure, trace);
}
