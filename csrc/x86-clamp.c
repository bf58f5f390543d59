/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A VMM's own CPUID table, made what a contract says. */

#include <string.h>

#include "x86-leaves.h"

#define XSAVE_LEGACY 576 /* bytes of the legacy region and the header (Intel SDM vol. 1, 13.4) */
#define XSAVE_COMPACTED 0xa /* leaf 0xd.1 EAX: XSAVEC, XSAVES */

typedef uint64_t seen_set[KVMNEG_CONTRACT_CPUIDS_MAX / 64];

static void see(seen_set seen, uint32_t i) {
        seen[i / 64] |= UINT64_C(1) << i % 64;
}

static bool any(const uint32_t registers[static 4]) {
        return registers[0] | registers[1] | registers[2] | registers[3];
}

/* Adds what is bound, not all zero, and not there. */
static int add_missing(const struct kvmneg_contract *contract, struct view view, const seen_set seen,
                       struct kvmneg_cpuid_entry *entries, uint32_t *count, uint32_t capacity) {
        for (uint32_t i = 0; i < contract->counts[CPUIDS]; i++) {
                const struct contract_cpuid *entry = &contract->cpuids[i];
                uint32_t function;

                if (seen[i / 64] >> i % 64 & 1 || !any(entry->values) || !kvmneg_internal_locate(entry, view, &function))
                        continue;
                if (*count >= capacity)
                        return -ENOSPC;
                entries[(*count)++] = (struct kvmneg_cpuid_entry) { .function = function,
                                                                    .index = entry->index,
                                                                    .flags = kvmneg_internal_is_indexed(function),
                                                                    .eax = entry->values[EAX],
                                                                    .ebx = entry->values[EBX],
                                                                    .ecx = entry->values[ECX],
                                                                    .edx = entry->values[EDX] };
        }
        return 0;
}

/* The sizes in leaf 0xd: of all components that are left, and for XCR0 as a vCPU begins with it. */
static void size_xsave(struct kvmneg_cpuid_entry *entries, uint32_t count) {
        for (uint32_t i = 0; i < count; i++) {
                struct kvmneg_cpuid_entry *entry = &entries[i];
                uint64_t components = (uint64_t) entry->edx << 32 | entry->eax;

                if (entry->function != XSAVE_LEAF || entry->index > 1)
                        continue;
                if (entry->index == 1) {
                        if (!(entry->eax & XSAVE_COMPACTED))
                                entry->ebx = 0;
                        continue;
                }
                entry->ebx = entry->ecx = components ? XSAVE_LEGACY : 0;
                for (uint32_t n = 2; n < 64; n++) {
                        const struct kvmneg_cpuid_entry *component =
                                components >> n & 1 ? kvmneg_internal_find(entries, count, XSAVE_LEAF, n) : NULL;
                        if (component && component->index == n && component->eax + component->ebx > entry->ecx)
                                entry->ecx = component->eax + component->ebx;
                }
        }
}

/* Subleaves are told apart where a leaf has them, and only there: else a guest reads the first entry, whichever index
 * it has (find). */
static void index_entry(struct kvmneg_cpuid_entry *entry, bool vmms) {
        if (kvmneg_internal_is_indexed(entry->function))
                entry->flags |= 1;
        else if (!vmms) {
                entry->flags &= ~UINT32_C(1);
                entry->index = 0;
        }
}

int kvmneg_internal_clamp(const struct kvmneg_contract *contract, struct kvmneg_cpuid_entry *entries, uint32_t *count,
                          uint32_t capacity, struct kvmneg_failure *failure) {
        seen_set seen = {};
        struct view view;
        int r = kvmneg_internal_check_bound(contract, KVMNEG_STAGE_CPUID, failure);

        if (r < 0)
                return r;
        if (*count == 0 && capacity > 0 && kvmneg_internal_search(contract, SPACE_CPUID, HYPERVISORS + 1, 0) != UINT32_MAX)
                entries[(*count)++] = (struct kvmneg_cpuid_entry) { .function = HYPERVISORS,
                                                                    .eax = HYPERVISORS + 1,
                                                                    .ebx = kvmneg_internal_kvm_signature[0],
                                                                    .ecx = kvmneg_internal_kvm_signature[1],
                                                                    .edx = kvmneg_internal_kvm_signature[2] };
        view = kvmneg_internal_look(entries, *count);
        for (uint32_t i = 0; i < *count; i++) {
                struct kvmneg_cpuid_entry *entry = &entries[i];
                struct judgement judgement;

                index_entry(entry, kvmneg_internal_judge(contract, view, entry->function, entry->index).vmms);
                judgement = kvmneg_internal_judge(contract, view, entry->function, entry->index);
                if (judgement.found != UINT32_MAX)
                        see(seen, judgement.found);
                for (unsigned place = 0; place < 4; place++) {
                        uint32_t *value = &entry->eax + place;
                        *value = judgement.values[place] | (*value & judgement.kept[place] & ~judgement.masks[place]);
                }
        }
        r = add_missing(contract, view, seen, entries, count, capacity);
        size_xsave(entries, *count);
        return r;
}

int kvmneg_clamp_cpuid(const struct kvmneg_contract *contract, struct kvmneg_cpuid *cpuid, uint32_t capacity) {
        struct cpuid_table before;
        int changed = 0, r;

        if (contract->header->architecture != KVMNEG_X86_64)
                return -ENOEXEC;
        if (cpuid->count > KVMNEG_CONTRACT_CPUIDS_MAX)
                return -E2BIG;
        if (capacity > KVMNEG_CONTRACT_CPUIDS_MAX)
                capacity = KVMNEG_CONTRACT_CPUIDS_MAX;
        before.count = cpuid->count;
        memcpy(before.entries, cpuid->entries, before.count * sizeof(before.entries[0]));
        r = kvmneg_internal_clamp(contract, cpuid->entries, &cpuid->count, capacity, NULL);
        if (r < 0)
                return r;
        for (uint32_t i = 0; i < cpuid->count; i++)
                changed += i >= before.count || memcmp(&before.entries[i], &cpuid->entries[i], sizeof(before.entries[0])) != 0;
        return changed;
}
