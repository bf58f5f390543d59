/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What user space can change of the registers of an arm64 vCPU before it runs: each field is written, read back,
 * and put back. KVM_ARM_GET_REG_WRITABLE_MASKS says where to try, but names fields that no write changes; and KVM
 * takes some writes without an error and drops them.
 */

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "arm64.h"

/* Fields that read 0 and take what an older kernel showed, without an effect (set_id_aa64pfr0_el1() and its
 * neighbours in arch/arm64/kvm/sys_regs.c): only a write upwards shows it. */
static const struct {
        uint64_t id;
        unsigned shift;
        uint64_t values[3];
} suspects[] = {
        { SYSREG(3, 0, 0, 4, 0), 40, { 1 } },       /* ID_AA64PFR0_EL1.MPAM */
        { SYSREG(3, 0, 0, 4, 1), 16, { 1 } },       /* ID_AA64PFR1_EL1.MPAM_frac */
        { SYSREG(3, 0, 0, 7, 2), 24, { 1, 2, 3 } }, /* ID_AA64MMFR2_EL1.NV */
};

int kvmneg_internal_try_value(int vcpu_fd, struct kvmneg_trial *trial, uint64_t field, uint64_t value,
                     struct kvmneg_trace *trace) {
        uint64_t got;
        int r;

        r = kvmneg_set_register(vcpu_fd, trial->id, value, trace);
        if (r < 0)
                return refused(r) ? 0 : r;
        r = kvmneg_get_register(vcpu_fd, trial->id, &got, trace);
        if (r < 0)
                return r;
        if (got != trial->reset) {
                r = kvmneg_set_register(vcpu_fd, trial->id, trial->reset, trace);
                if (r < 0 && !refused(r))
                        return r;
        }
        if ((got ^ value) & field) {
                trial->dropped |= field;
                return 0;
        }
        trial->settable |= field;
        return 1;
}

/* The bits of the field that begins at `start`, which is one of the bits in `starts`. */
static uint64_t field_mask(uint64_t starts, unsigned start) {
        uint64_t above = start < 63 ? starts & ~((UINT64_C(2) << start) - 1) : 0;

        return (above ? (above & -above) - 1 : UINT64_MAX) & ~((UINT64_C(1) << start) - 1);
}

/* What to write into a field: its least, for most are levelled downwards; one less, for some have a floor; and all
 * ones, the least of a signed field, the safe value of one where higher is safe. */
static int try_field(int vcpu_fd, struct kvmneg_trial *trial, uint64_t field, bool zero_only,
                     struct kvmneg_trace *trace) {
        uint64_t rest = trial->reset & ~field, now = trial->reset & field, unit = field & -field;
        uint64_t values[] = { 0, now - unit, field };
        unsigned count = zero_only ? 1 : 3;

        for (unsigned i = now ? 0 : 2; i < count; i++) {
                int r;

                if (values[i] == now || (i == 1 && values[1] == 0))
                        continue;
                r = kvmneg_internal_try_value(vcpu_fd, trial, field, rest | values[i], trace);
                if (r != 0)
                        return r;
        }
        return 0;
}

int kvmneg_internal_try_fields(int vcpu_fd, struct kvmneg_trial *trial, uint64_t tried, bool claimed,
                      struct kvmneg_trace *trace) {
        uint64_t starts = kvmneg_internal_fields(trial->id);

        for (uint64_t left = starts; left; left &= left - 1) {
                uint64_t field = field_mask(starts, (unsigned) __builtin_ctzll(left));
                bool inside = (field & tried) == field;
                int r;

                if (!(trial->reset & field) && !(inside && claimed))
                        continue;
                r = try_field(vcpu_fd, trial, field, !inside, trace);
                if (r < 0)
                        return r;
        }
        return 0;
}

static int try_suspects(int vcpu_fd, struct kvmneg_trial *trial, struct kvmneg_trace *trace) {
        for (size_t i = 0; i < sizeof(suspects) / sizeof(suspects[0]); i++) {
                uint64_t field = UINT64_C(0xf) << suspects[i].shift;

                for (unsigned n = 0; n < 3 && suspects[i].id == trial->id && suspects[i].values[n]; n++) {
                        int r = trial->reset & field
                                        ? 0
                                        : kvmneg_internal_try_value(vcpu_fd, trial, field,
                                                    trial->reset | suspects[i].values[n] << suspects[i].shift, trace);
                        if (r < 0)
                                return r;
                }
        }
        return 0;
}

static int try_id_register(int vcpu_fd, struct kvmneg_trial *trial, bool claimed, struct kvmneg_trace *trace) {
        int r;

        if (trial->id == PMCR_EL0)
                return try_field(vcpu_fd, trial, PMCR_N_MASK, false, trace);
        if (is_implementation_id(trial->id))
                return 0; /* on a VM of their own: try_implementation_ids() */
        if (trial->reset == 0 && trial->writable == 0)
                /* AArch32's on a CPU without, and places without a register: all they can do is drop */
                return kvmneg_internal_try_value(vcpu_fd, trial, UINT64_MAX, 1, trace);
        r = kvmneg_internal_try_fields(vcpu_fd, trial, claimed ? trial->writable : UINT64_MAX, claimed, trace);
        return r < 0 ? r : try_suspects(vcpu_fd, trial, trace);
}

/* A hypercall bitmap: KVM takes any of its bits, and shows at first all of them or, of VENDOR_HYP_BMAP_2, none. */
static int try_bitmap(int vcpu_fd, struct kvmneg_trial *trial, struct kvmneg_trace *trace) {
        uint64_t found = 0, got, zero;
        int r;

        for (unsigned n = 0; n < 64; n++) {
                r = kvmneg_set_register(vcpu_fd, trial->id, UINT64_C(1) << n, trace);
                if (r < 0 && !refused(r))
                        return r;
                if (r >= 0)
                        found |= UINT64_C(1) << n;
        }
        r = kvmneg_set_register(vcpu_fd, trial->id, found, trace);
        if (r >= 0)
                r = kvmneg_get_register(vcpu_fd, trial->id, &got, trace);
        if (r >= 0)
                r = kvmneg_set_register(vcpu_fd, trial->id, 0, trace);
        if (r >= 0)
                r = kvmneg_get_register(vcpu_fd, trial->id, &zero, trace);
        if (r >= 0) {
                trial->value = got;
                trial->settable = got & ~zero;
                trial->dropped = found & ~trial->settable;
                r = kvmneg_set_register(vcpu_fd, trial->id, trial->reset, trace);
        }
        return r < 0 && !refused(r) ? r : 0;
}

/* The versions of PSCI that were made, and some that were not yet. */
static int try_psci(int vcpu_fd, struct kvmneg_trial *trial, struct kvmneg_probe *probe, struct kvmneg_trace *trace) {
        static const uint32_t versions[] = { 0x1,     0x2,     0x10000, 0x10001, 0x10002, 0x10003, 0x10004,
                                             0x10005, 0x10006, 0x10007, 0x10008, 0x20000, 0x20001 };
        int r;

        for (size_t i = 0; i < sizeof(versions) / sizeof(versions[0]); i++) {
                uint64_t got;

                r = kvmneg_set_register(vcpu_fd, trial->id, versions[i], trace);
                if (refused(r))
                        continue;
                if (r >= 0)
                        r = kvmneg_get_register(vcpu_fd, trial->id, &got, trace);
                if (r < 0)
                        return r;
                if (got == versions[i] && probe->psci_count < KVMNEG_PSCI_VERSIONS) {
                        probe->psci_versions[probe->psci_count++] = versions[i];
                        if (got != trial->reset)
                                trial->settable = UINT32_MAX; /* a number: all of it */
                        trial->value = got;
                }
        }
        r = kvmneg_set_register(vcpu_fd, trial->id, trial->reset, trace);
        return r < 0 && !refused(r) ? r : 0;
}

/* A workaround: KVM checks what it is given, and keeps what it has. */
static int try_firmware(int vcpu_fd, struct kvmneg_trial *trial, struct kvmneg_trace *trace) {
        for (uint64_t value = 0; value < 4; value++) {
                int r = value == trial->reset ? 0 : kvmneg_internal_try_value(vcpu_fd, trial, 0xf, value, trace);
                if (r < 0)
                        return r;
        }
        return 0;
}

static int try_one(int vcpu_fd, struct kvmneg_trial *trial, bool claimed, struct kvmneg_probe *probe,
                   struct kvmneg_trace *trace) {
        if (trial->id == KVM_REG_ARM_PSCI_VERSION)
                return try_psci(vcpu_fd, trial, probe, trace);
        if (trial->id == SVE_VLS)
                return 0; /* final by now: try_lengths() */
        switch (COPROC(trial->id)) {
        case KVM_REG_ARM_FW:
                return try_firmware(vcpu_fd, trial, trace);
        case KVM_REG_ARM_FW_FEAT_BMAP:
                return try_bitmap(vcpu_fd, trial, trace);
        case KVM_REG_ARM_DEMUX:
                return kvmneg_internal_try_fields(vcpu_fd, trial, UINT32_MAX, true, trace); /* from Linux 6.3 */
        }
        return try_id_register(vcpu_fd, trial, claimed, trace);
}

/* KVM_ARM_GET_REG_WRITABLE_MASKS (api.rst 4.139); 0 where this KVM does not have it, else 1. */
static int get_writable_masks(int vm_fd, uint64_t masks[static KVMNEG_FEATURE_ID_RANGE_SIZE],
                              struct kvmneg_trace *trace) {
        struct kvmneg_mask_range range = { .addr = (uint64_t) (uintptr_t) masks };
        int r = ioctl_pointer(vm_fd, KVM_ARM_GET_REG_WRITABLE_MASKS, &range, trace);

        if (r < 0)
                return refused(r) ? 0 : r;
        return 1;
}

/* KVM_ARM_FEATURE_ID_RANGE_IDX(): op1 is 0, 1 or 3. */
static uint64_t claimed_mask(uint64_t id, const uint64_t masks[static KVMNEG_FEATURE_ID_RANGE_SIZE]) {
        unsigned op1 = SYSREG_OP1(id);

        if (COPROC(id) != KVM_REG_ARM64_SYSREG || SYSREG_CRN(id) != 0)
                return 0;
        return masks[(op1 == 3 ? 2 : op1 & 1) << 6 | (SYSREG_CRM(id) & 7) << 3 | SYSREG_OP2(id)];
}

int kvmneg_internal_try_registers(int vm_fd, int vcpu_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace) {
        uint64_t masks[KVMNEG_FEATURE_ID_RANGE_SIZE] = {};
        struct kvmneg_trials *trials;
        uint32_t count = 0;
        int claimed, r;

        for (uint64_t i = 0; i < probe->registers->count; i++)
                count += kvmneg_internal_is_word(probe->registers->ids[i]);
        trials = probe->trials = kvmneg_internal_table(sizeof(*trials), count, sizeof(trials->entries[0]));
        if (!trials)
                return -ENOMEM;
        claimed = vm_fd >= 0 ? get_writable_masks(vm_fd, masks, trace) : 0;
        if (claimed < 0)
                return claimed;
        for (uint64_t i = 0; i < probe->registers->count; i++) {
                struct kvmneg_trial *trial = &trials->entries[trials->count];

                if (!kvmneg_internal_is_word(probe->registers->ids[i]))
                        continue;
                trial->id = probe->registers->ids[i];
                r = kvmneg_get_register(vcpu_fd, trial->id, &trial->reset, trace);
                if (refused(r)) /* listed and not to be read: no word */
                        continue;
                if (r < 0)
                        return r;
                trial->value = trial->reset;
                trial->writable = claimed_mask(trial->id, masks);
                trials->count++;
        }
        for (uint32_t i = 0; i < trials->count; i++) {
                r = try_one(vcpu_fd, &trials->entries[i], claimed, probe, trace);
                if (r < 0)
                        return r;
                trials->entries[i].dropped &= ~trials->entries[i].settable;
        }
        return 0;
}
