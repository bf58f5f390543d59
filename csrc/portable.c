/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Registers of an arm64 guest that moves: those that its new host does not know. kvmneg/policy/portable.py has the rules. */

#include <errno.h>

#include "contract.h"

#define TIMER_ENABLE 1 /* CNTP_CTL_EL0.ENABLE */

static const struct kvmneg_portable *find(const struct kvmneg_contract *contract, uint64_t id) {
        uint32_t low = 0, high = contract->counts[PORTABLE]; /* in the order of ids, which was checked */

        while (low < high) {
                uint32_t middle = low + (high - low) / 2;

                if (contract->portable[middle].id == id)
                        return &contract->portable[middle];
                if (contract->portable[middle].id < id)
                        low = middle + 1;
                else
                        high = middle;
        }
        return NULL;
}

int kvmneg_judge_register(const struct kvmneg_contract *contract, uint64_t id, uint64_t value, uint64_t timer_control,
                          int listed, struct kvmneg_failure *failure) {
        const struct kvmneg_portable *entry;
        int r;

        if (contract->header->architecture != KVMNEG_ARM64)
                return -ENOEXEC;
        if (listed)
                return 1;
        entry = find(contract, id);
        if (!entry) /* not listed where the guest began: no part of its state. Or nobody knows what was listed there. */
                r = contract->counts[PORTABLE] > 0 ? 0 : -ENOENT;
        else if (entry->rule == KVMNEG_DROP_IF)
                r = value == entry->value ? 0 : -EBADE;
        else if (entry->rule == KVMNEG_DROP_IF_TIMER_OFF)
                r = timer_control & TIMER_ENABLE ? -EBADE : 0;
        else
                r = -ENOENT;
        if (r < 0 && failure) {
                *failure = (struct kvmneg_failure) { .id = id,
                                                     .asked = value,
                                                     .mask = UINT64_MAX,
                                                     .got = r == -EBADE ? entry->value : 0,
                                                     .error = r,
                                                     .stage = KVMNEG_STAGE_STATE,
                                                     .why = KVMNEG_MISSING };
                kvmneg_internal_number_word(failure->word, "arm64:", id);
        }
        return r;
}
