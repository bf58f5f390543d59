/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Registers of an arm64 vCPU: which there are, reading, writing, and how they are laid out. */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#include "arm64.h"

#define REGISTERS_HINT 1024 /* 330 to 400 registers, 700 with SVE */

static_assert(offsetof(struct kvmneg_registers, ids) == offsetof(struct kvm_reg_list, reg), "layout");

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

/* Room for the widest register there is: SVE_VLS has eight words; on little-endian, all there is, any narrower
 * value is the beginning of the first. */
struct content {
        uint64_t words[KVM_ARM64_SVE_VLS_WORDS];
};

static bool known_size(uint64_t id) {
        uint64_t size = id & KVM_REG_SIZE_MASK;

        return size == KVM_REG_SIZE_U64 || size == KVM_REG_SIZE_U32 || id == SVE_VLS;
}

int kvmneg_get_register(int vcpu_fd, uint64_t id, uint64_t *ret_value, struct kvmneg_trace *trace) {
        struct content content = {};
        struct kvm_one_reg request = { .id = id, .addr = (uint64_t) (uintptr_t) &content };
        int r;

        if (!known_size(id))
                return -EINVAL;
        r = ioctl_pointer(vcpu_fd, KVM_GET_ONE_REG, &request, trace);
        if (r < 0)
                return r;
        *ret_value = content.words[0];
        return 0;
}

int kvmneg_set_register(int vcpu_fd, uint64_t id, uint64_t value, struct kvmneg_trace *trace) {
        struct content content = { .words = { value } };
        struct kvm_one_reg request = { .id = id, .addr = (uint64_t) (uintptr_t) &content };
        int r;

        if (!known_size(id) || ((id & KVM_REG_SIZE_MASK) == KVM_REG_SIZE_U32 && value > UINT32_MAX))
                return -EINVAL;
        r = ioctl_pointer(vcpu_fd, KVM_SET_ONE_REG, &request, trace);
        return r < 0 ? r : 0;
}

/* Of the space op0 = 3, crn = 0: crm 1 to 7 are the ID registers, among crm 0 a few are. */
static bool is_id(uint64_t id) {
        unsigned op1 = SYSREG_OP1(id), crm = SYSREG_CRM(id), op2 = SYSREG_OP2(id);

        if (id == PMCR_EL0)
                return true;
        if (SYSREG_OP0(id) != 3 || SYSREG_CRN(id) != 0)
                return false;
        if (op1 == 0)
                return crm == 0 ? id == MIDR_EL1 || id == REVIDR_EL1 : crm < 8; /* MPIDR is each vCPU's own */
        if (op1 == 1)
                return crm == 0; /* CLIDR, SMIDR, AIDR */
        return op1 == 3 && crm == 0 && (op2 == 1 || op2 == 7); /* CTR, DCZID */
}

bool kvmneg_internal_is_word(uint64_t id) {
        if (id == SVE_VLS)
                return true;
        if (!known_size(id))
                return false;
        switch (COPROC(id)) {
        case KVM_REG_ARM64_SYSREG:
                return is_id(id);
        case KVM_REG_ARM_DEMUX: /* CCSIDR of each cache level */
        case KVM_REG_ARM_FW:
        case KVM_REG_ARM_FW_FEAT_BMAP:
                return true;
        }
        return false;
}

#define BIT(n) (UINT64_C(1) << (n))

/* Arm's Architecture Reference Manual (DDI 0487), D24.2; registers whose fields are not four bits each. */
uint64_t kvmneg_internal_fields(uint64_t id) {
        if (COPROC(id) == KVM_REG_ARM_DEMUX) /* CCSIDR: LineSize, Associativity, NumSets, policies; 32 bits in all */
                return BIT(0) | BIT(3) | BIT(13) | BIT(28) | BIT(32);
        switch (id) {
        case MIDR_EL1: /* Revision, PartNum, Architecture, Variant, Implementer */
                return BIT(0) | BIT(4) | BIT(16) | BIT(20) | BIT(24) | BIT(32);
        case REVIDR_EL1:
        case AIDR_EL1:
                return BIT(0);
        case PMCR_EL0:
                return BIT(0) | BIT(PMCR_N_SHIFT) | BIT(16);
        case SYSREG(3, 1, 0, 0, 1): /* CLIDR: Ctype1 to 7, LoUIS, LoC, LoUU, ICB, Ttype1 to 7 */
                return UINT64_C(0x0000aaaa49249249);
        case SYSREG(3, 3, 0, 0, 1): /* CTR: IminLine, L1Ip, DminLine, ERG, CWG, IDC, DIC, TminLine */
                return BIT(0) | BIT(4) | BIT(14) | BIT(16) | BIT(20) | BIT(24) | BIT(28) | BIT(29) | BIT(30) | BIT(32) |
                       BIT(38);
        case SYSREG(3, 0, 0, 4, 5): /* SMFR0: single bits, but for I8I32, I16I32, I16I64, SMEver */
                return UINT64_C(0xf11f1f1fffffffff);
        case SYSREG(3, 0, 0, 4, 7): /* FPFR0 */
                return UINT64_MAX;
        }
        return UINT64_C(0x1111111111111111);
}
