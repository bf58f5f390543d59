/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Gives an arm64 VM the registers of a contract, on its VMM's own descriptors: KVM answers EIO to any other process.
 * The order is what KVM demands: capabilities before vCPUs, SVE before it is final, the vGIC before the ID registers
 * (it changes them), counters and ID registers before firmware registers (a workaround depends on PFR1.SSBS).
 */

#include <errno.h>

#include "arm64.h"
#include "contract.h"

#define REVISIONS (GICD_IIDR_REVISION_MASK >> GICD_IIDR_REVISION_SHIFT) /* the highest there is room for */

/* What was wanted, of which register, and how far it came. Returns `r`. */
static int failed(struct kvmneg_failure *failure, const struct kvmneg_register *wanted, uint32_t stage, uint32_t why,
                  uint64_t got, int r) {
        if (failure) {
                *failure = (struct kvmneg_failure) { .id = wanted->id,
                                                     .asked = wanted->value,
                                                     .mask = wanted->mask,
                                                     .got = got,
                                                     .error = r,
                                                     .stage = stage,
                                                     .why = why };
                if (wanted->id != 0)
                        kvmneg_internal_number_word(failure->word, "arm64:", wanted->id);
                else if (stage == KVMNEG_STAGE_INIT)
                        kvmneg_internal_text_word(failure->word, "arm:vcpu-features");
                else if (stage != KVMNEG_STAGE_VM)
                        kvmneg_internal_text_word(failure->word, "arm:vgic-revision");
        }
        return r;
}

static uint32_t why(uint64_t id, int r) {
        if (r == -EBUSY || (r == -EPERM && id == SVE_VLS)) /* SVE's lengths are final before the first run */
                return KVMNEG_TOO_LATE;
        if (r == -ENOENT)
                return KVMNEG_MISSING;
        return refused(r) ? KVMNEG_REFUSED : KVMNEG_FAILED;
}

/* A KVM without the fourth hypercall bitmap answers none of its calls: that is what zero asks for. And before Linux
 * 6.3 KVM has the sizes of the host's caches only; which caches a guest is told of is CLIDR_EL1's to say, and checked. */
static bool absent_is_fine(const struct kvmneg_register *wanted, int r) {
        if (r != -ENOENT)
                return false;
        return COPROC(wanted->id) == KVM_REG_ARM_DEMUX ||
               (wanted->id == KVMNEG_REG_ARM_VENDOR_HYP_BMAP_2 && !(wanted->value & wanted->mask));
}

static int check(int vcpu_fd, const struct kvmneg_register *wanted, uint32_t stage, uint32_t reason,
                 struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        uint64_t got = 0;
        int r = kvmneg_get_register(vcpu_fd, wanted->id, &got, trace);

        if (r < 0)
                return absent_is_fine(wanted, r) ? 0 : failed(failure, wanted, stage, why(wanted->id, r), 0, r);
        if ((got ^ wanted->value) & wanted->mask)
                return failed(failure, wanted, stage, reason, got, -EBADE);
        return 0;
}

/* Changes the bits of the mask, unless they are as wanted: after the first run the same value is no change. */
static int write_register(int vcpu_fd, const struct kvmneg_register *wanted, uint32_t stage,
                          struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        uint64_t now = 0;
        int r = kvmneg_get_register(vcpu_fd, wanted->id, &now, trace);

        if (r < 0)
                return absent_is_fine(wanted, r) ? 0 : failed(failure, wanted, stage, why(wanted->id, r), 0, r);
        if (!((now ^ wanted->value) & wanted->mask))
                return 0;
        r = kvmneg_set_register(vcpu_fd, wanted->id, (now & ~wanted->mask) | (wanted->value & wanted->mask), trace);
        if (r < 0)
                return failed(failure, wanted, stage, why(wanted->id, r), now, r);
        return check(vcpu_fd, wanted, stage, KVMNEG_DROPPED, failure, trace);
}

/* When a register's turn is. */
static uint32_t stage_of(uint64_t id) {
        if (id == SVE_VLS)
                return KVMNEG_STAGE_INIT;
        switch (COPROC(id)) {
        case KVM_REG_ARM_FW:
        case KVM_REG_ARM_FW_FEAT_BMAP:
                return KVMNEG_STAGE_FIRMWARE;
        case KVM_REG_ARM_DEMUX:
                return KVMNEG_STAGE_CACHE; /* checked against CTR */
        }
        return KVMNEG_STAGE_ID;
}

static int write_stage(int vcpu_fd, const struct kvmneg_register *registers, uint32_t count, uint32_t stage,
                       struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        for (uint32_t i = 0; i < count; i++) {
                int r = stage_of(registers[i].id) == stage
                                ? write_register(vcpu_fd, &registers[i], stage, failure, trace)
                                : 0;
                if (r < 0)
                        return r;
        }
        return 0;
}

int kvmneg_arm_vm_apply(int vm_fd, const struct kvmneg_register *registers, uint32_t count,
                        struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        struct kvm_enable_cap enable = { .cap = KVM_CAP_ARM_WRITABLE_IMP_ID_REGS };

        if (count > KVMNEG_REGISTERS_MAX)
                return -E2BIG;
        for (uint32_t i = 0; i < count; i++) {
                int r;

                if (!is_implementation_id(registers[i].id))
                        continue;
                r = ioctl_pointer(vm_fd, KVM_ENABLE_CAP, &enable, trace);
                /* EINVAL: this KVM does not have it, or there are vCPUs. What it then has may be what is wanted. */
                return r >= 0 || r == -EINVAL ? 0
                                              : failed(failure, &registers[i], KVMNEG_STAGE_VM, why(0, r), 0, r);
        }
        return 0;
}

int kvmneg_arm_vcpu_init(int vm_fd, int vcpu_fd, uint64_t features, const struct kvmneg_register *registers,
                         uint32_t count, struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        struct kvmneg_register wanted = { .value = features, .mask = UINT64_MAX };
        struct kvmneg_vcpu_init init;
        int r;

        if (count > KVMNEG_REGISTERS_MAX)
                return -E2BIG;
        r = kvmneg_get_preferred_target(vm_fd, &init, trace);
        if (r >= 0) {
                init.features[0] = (uint32_t) features;
                init.features[1] = (uint32_t) (features >> 32);
                r = ioctl_pointer(vcpu_fd, KVM_ARM_VCPU_INIT, &init, trace);
        }
        if (r < 0)
                return failed(failure, &wanted, KVMNEG_STAGE_INIT, why(0, r), 0, r);
        r = write_stage(vcpu_fd, registers, count, KVMNEG_STAGE_INIT, failure, trace);
        if (r < 0)
                return r;
        r = kvmneg_internal_finalize(vcpu_fd, (uint32_t) features, trace);
        if (r == -EPERM) /* final already, with the lengths that were just compared: the same call, made again */
                r = 0;
        return r < 0 ? failed(failure, &wanted, KVMNEG_STAGE_INIT, why(SVE_VLS, r), 0, r) : 0;
}

/* The number of event counters, where the PMU has an attribute for it: of a guest with EL2, PMCR_EL0.N is its own.
 * KVM may refuse it (the PMU is initialised): then PMCR_EL0 is written and read back. */
static int set_counters(int vcpu_fd, const struct kvmneg_register *wanted, struct kvmneg_trace *trace) {
        uint32_t counters = (uint32_t) ((wanted->value & PMCR_N_MASK) >> PMCR_N_SHIFT);
        struct kvm_device_attr attribute = { .group = KVM_ARM_VCPU_PMU_V3_CTRL,
                                             .attr = KVMNEG_PMU_V3_SET_NR_COUNTERS,
                                             .addr = (uint64_t) (uintptr_t) &counters };
        uint64_t now;
        int r = kvmneg_get_register(vcpu_fd, PMCR_EL0, &now, trace);

        if (r < 0 || !((now ^ wanted->value) & PMCR_N_MASK))
                return r < 0 && !refused(r) ? r : 0;
        r = ioctl_pointer(vcpu_fd, KVM_SET_DEVICE_ATTR, &attribute, trace);
        return r < 0 && !refused(r) ? r : 0;
}

int kvmneg_arm_vcpu_apply(int vcpu_fd, const struct kvmneg_register *registers, uint32_t count,
                          struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        static const uint32_t order[] = { KVMNEG_STAGE_ID, KVMNEG_STAGE_CACHE, KVMNEG_STAGE_FIRMWARE };

        if (count > KVMNEG_REGISTERS_MAX)
                return -E2BIG;
        for (uint32_t i = 0; i < count; i++)
                if (registers[i].id == PMCR_EL0 && (registers[i].mask & PMCR_N_MASK) == PMCR_N_MASK) {
                        int r = set_counters(vcpu_fd, &registers[i], trace);
                        if (r < 0)
                                return failed(failure, &registers[i], KVMNEG_STAGE_PMU, KVMNEG_FAILED, 0, r);
                }
        for (unsigned i = 0; i < sizeof(order) / sizeof(order[0]); i++) {
                int r = write_stage(vcpu_fd, registers, count, order[i], failure, trace);
                if (r < 0)
                        return r;
        }
        return kvmneg_arm_vcpu_verify(vcpu_fd, registers, count, failure, trace);
}

int kvmneg_arm_vcpu_verify(int vcpu_fd, const struct kvmneg_register *registers, uint32_t count,
                           struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        if (count > KVMNEG_REGISTERS_MAX)
                return -E2BIG;
        for (uint32_t i = 0; i < count; i++) {
                int r = check(vcpu_fd, &registers[i], KVMNEG_STAGE_VERIFY, KVMNEG_DIFFERS, failure, trace);
                if (r < 0)
                        return r;
        }
        return 0;
}

/* GICD_IIDR.Revision alone, as a number. */
static int get_revision(int vgic_fd, uint32_t *ret_iidr, uint32_t *ret_revision, struct kvmneg_trace *trace) {
        int r = kvmneg_internal_get_iidr(vgic_fd, ret_iidr, trace);

        if (r >= 0)
                *ret_revision = (*ret_iidr & GICD_IIDR_REVISION_MASK) >> GICD_IIDR_REVISION_SHIFT;
        return r;
}

int kvmneg_arm_vgic_apply(int vgic_fd, uint32_t revision, struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        struct kvmneg_register wanted = { .value = revision, .mask = REVISIONS };
        uint32_t iidr = 0, now = 0;
        int r;

        if (revision > REVISIONS)
                return -EINVAL;
        r = get_revision(vgic_fd, &iidr, &now, trace);
        if (r >= 0 && now == revision)
                return 0;
        if (r >= 0) {
                iidr = (iidr & ~GICD_IIDR_REVISION_MASK) | revision << GICD_IIDR_REVISION_SHIFT;
                r = kvmneg_internal_set_iidr(vgic_fd, iidr, trace);
        }
        if (r >= 0)
                r = get_revision(vgic_fd, &iidr, &now, trace);
        if (r < 0)
                return failed(failure, &wanted, KVMNEG_STAGE_VGIC, why(0, r), now, r);
        return now == revision ? 0 : failed(failure, &wanted, KVMNEG_STAGE_VGIC, KVMNEG_DROPPED, now, -EBADE);
}

int kvmneg_arm_vgic_verify(int vgic_fd, uint32_t revision, struct kvmneg_failure *failure, struct kvmneg_trace *trace) {
        struct kvmneg_register wanted = { .value = revision, .mask = REVISIONS };
        uint32_t iidr, now = 0;
        int r;

        if (revision > REVISIONS)
                return -EINVAL;
        r = get_revision(vgic_fd, &iidr, &now, trace);
        if (r < 0)
                return failed(failure, &wanted, KVMNEG_STAGE_VERIFY, why(0, r), 0, r);
        return now == revision ? 0 : failed(failure, &wanted, KVMNEG_STAGE_VERIFY, KVMNEG_DIFFERS, now, -EBADE);
}
