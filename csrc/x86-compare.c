/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a vCPU shows, against what a contract says: reads only. */

#include "x86-leaves.h"

static int differs(const struct judgement *judgement, uint32_t index, unsigned place, uint32_t mask, uint32_t got,
                   uint32_t stage, uint32_t why, struct kvmneg_failure *failure) {
        struct kvmneg_failure what = { .id = (uint64_t) judgement->function << 32 | index,
                                       .asked = judgement->values[place] & mask,
                                       .mask = mask,
                                       .got = got,
                                       .stage = stage,
                                       .why = why };

        kvmneg_internal_cpuid_word(what.word, judgement->space, judgement->function, index, place);
        return fail(failure, what, -EBADE);
}

/* The bits that KVM writes itself, and that may differ for that. */
static uint32_t excused(const struct judgement *judgement, unsigned place, uint32_t got) {
        uint32_t kvms = judgement->kvms[place];

        if (judgement->space == SPACE_CPUID && judgement->function == HYPERVISORS + 1)
                kvms &= ~got; /* KVM takes PV_UNHALT away, and never gives it */
        return kvms;
}

/* A register that the contract binds nothing of is not its matter; of one that it binds in part, what is neither bound
 * nor the VMM's nor KVM's has to be 0. */
static int compare_entry(const struct judgement *judgement, const struct kvmneg_cpuid_entry *entry, uint32_t index,
                         uint32_t stage, uint32_t why, struct kvmneg_failure *failure) {
        for (unsigned place = 0; place < 4; place++) {
                uint32_t got = (&entry->eax)[place], mask = ~judgement->kept[place] | judgement->masks[place];

                mask &= ~excused(judgement, place, got);
                if (judgement->masks[place] && (got ^ judgement->values[place]) & mask)
                        return differs(judgement, index, place, mask, got, stage, why, failure);
        }
        return 0;
}

int kvmneg_internal_compare(const struct kvmneg_contract *contract, const struct kvmneg_cpuid_entry *entries,
                            uint32_t count, uint32_t stage, uint32_t why, struct kvmneg_failure *failure) {
        struct view view = kvmneg_internal_look(entries, count);
        int r = kvmneg_internal_check_bound(contract, stage, failure);

        for (uint32_t i = 0; r >= 0 && i < contract->counts[CPUIDS]; i++) {
                const struct contract_cpuid *bound = &contract->cpuids[i];
                const struct kvmneg_cpuid_entry nothing = { .index = bound->index }, *entry;
                struct judgement judgement;
                uint32_t function;

                if (!kvmneg_internal_locate(bound, view, &function))
                        continue;
                entry = kvmneg_internal_find(entries, count, function, bound->index);
                judgement = kvmneg_internal_judge(contract, view, function, bound->index);
                r = compare_entry(&judgement, entry ? entry : &nothing, bound->index, stage, why, failure);
        }
        return r;
}
