/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A contract's CPUID in a VMM's own table: which bits are bound, which are the VMM's, which are KVM's. What is neither
 * bound nor one of those is 0. The tables are those of kvmneg's catalogue (rules topology, dynamic, derived); a test
 * compares them.
 */

#include <string.h>

#include "x86-leaves.h"

#define HYPERVISORS_END 0x40010000
#define HYPERVISOR_STEP 0x100
#define HYPERV_INTERFACE 0x31237648 /* "Hv#1" in leaf 0x40000001 (Hyper-V TLFS 2.4); the signature may be any */
#define SGX_LEAF 0x12
#define SGX_SECTIONS 2 /* from this subleaf on: where the VMM puts enclaves' memory */

const uint32_t kvmneg_internal_kvm_signature[3] = { 0x4b4d564b, 0x564b4d56, 0x4d };

/* Leaves that the VMM describes: caches, TLBs, threads and cores, names, timing. */
static const uint32_t vmm_leaves[] = {
        0x2,        0x4,        0x5,        0xb,        0x18,       0x1a,       0x1f,       0x40000010, 0x80000002, 0x80000003,
        0x80000004, 0x80000005, 0x80000006, 0x80000019, 0x8000001d, 0x8000001e, 0x80000026,
};

/* Leaves of Hyper-V that only say who is there (TLFS 2.4). */
static const uint32_t hyperv_leaves[] = { 0x40000000, 0x40000001, 0x40000010, 0x40000080, 0x40000081 };

struct bits {
        uint32_t function;
        uint32_t index;
        uint32_t place;
        uint32_t bits;
};

/* The same in registers that hold more than that. */
static const struct bits vmm_bits[] = {
        { 0x1, 0, EBX, 0xffff00ff },        /* brand index, number of threads, APIC id */
        { 0x1, 0, ECX, 0x08000000 },        /* OSXSAVE */
        { 0x1, 0, EDX, 0x10000200 },        /* more than one thread; APIC */
        { 0x7, 0, ECX, 0x00000010 },        /* OSPKE */
        { 0xd, 0, EBX, UINT32_MAX },        /* sizes, computed from the components */
        { 0xd, 0, ECX, UINT32_MAX },
        { 0xd, 1, EBX, UINT32_MAX },
        { 0x12, 0, ECX, UINT32_MAX },       /* reserved, in a leaf that is else the VMM's */
        { 0x80000001, 0, EBX, 0xf000ffff }, /* brand id, package */
        { 0x80000001, 0, ECX, 0x00000002 }, /* more than one core */
        { 0x80000001, 0, EDX, 0x00000200 }, /* APIC */
        { 0x80000008, 0, ECX, 0x0000f0ff }, /* number of threads, width of APIC ids */
};

/* What KVM writes whatever it was given (kvm_update_cpuid_runtime in arch/x86/kvm/cpuid.c). */
static const struct bits kvm_bits[] = {
        { 0x1, 0, ECX, 0x08000008 },        /* OSXSAVE follows CR4; MONITOR follows MSR 0x1a0 without its quirk */
        { 0x1, 0, EDX, 0x00000200 },        /* APIC follows MSR 0x1b */
        { 0x7, 0, ECX, 0x00000010 },        /* OSPKE follows CR4 */
        { 0xd, 0, EBX, UINT32_MAX },        /* the size for what is in XCR0 */
        { 0xd, 1, EBX, UINT32_MAX },
        { 0x12, 1, ECX, 0x00000003 },       /* x87 and SSE of enclaves, where the leaf is there (Linux 5.13 to 6.3) */
        { 0x40000001, 0, EAX, 0x00000080 }, /* PV_UNHALT goes where HLT does not exit */
};

const struct kvmneg_cpuid_entry *kvmneg_internal_find(const struct kvmneg_cpuid_entry *entries, uint32_t count, uint32_t function,
                                             uint32_t index) {
        for (uint32_t i = 0; i < count; i++)
                if (entries[i].function == function && (entries[i].index == index || !(entries[i].flags & 1)))
                        return &entries[i];
        return NULL;
}

bool kvmneg_internal_shows_hyperv(const struct kvmneg_cpuid_entry *entries, uint32_t count) {
        const struct kvmneg_cpuid_entry *entry = kvmneg_internal_find(entries, count, HYPERVISORS + 1, 0);

        return entry && entry->eax == HYPERV_INTERFACE;
}

struct view kvmneg_internal_look(const struct kvmneg_cpuid_entry *entries, uint32_t count) {
        struct view view = {};

        for (uint32_t i = 0; i < count; i++) {
                const struct kvmneg_cpuid_entry *entry = &entries[i];
                if (entry->function >= HYPERVISORS && entry->function < HYPERVISORS_END &&
                    entry->function % HYPERVISOR_STEP == 0 && memcmp(&entry->ebx, kvmneg_internal_kvm_signature, sizeof(kvmneg_internal_kvm_signature)) == 0 &&
                    (view.kvm_base == 0 || entry->function < view.kvm_base) && kvmneg_internal_find(entries, count, entry->function, 0) == entry)
                        view.kvm_base = entry->function;
        }
        view.hyperv = view.kvm_base != HYPERVISORS && kvmneg_internal_shows_hyperv(entries, count);
        return view;
}

static bool is_among(uint32_t function, const uint32_t *leaves, size_t count) {
        for (size_t i = 0; i < count; i++)
                if (leaves[i] == function)
                        return true;
        return false;
}

#define AMONG(function, leaves) is_among(function, leaves, sizeof(leaves) / sizeof((leaves)[0]))

static void join(uint32_t registers[static 4], const struct bits *rows, size_t count, uint32_t function, uint32_t index) {
        for (size_t i = 0; i < count; i++)
                if (rows[i].function == function && rows[i].index == index)
                        registers[rows[i].place] |= rows[i].bits;
}

uint32_t kvmneg_internal_search(const struct kvmneg_contract *contract, uint32_t space, uint32_t function, uint32_t index) {
        uint32_t low = 0, high = contract->counts[CPUIDS];

        while (low < high) {
                uint32_t middle = low + (high - low) / 2;
                const struct contract_cpuid *entry = &contract->cpuids[middle];
                if (entry->space == space && entry->function == function && entry->index == index)
                        return middle;
                if (entry->space < space || (entry->space == space && (entry->function < function ||
                    (entry->function == function && entry->index < index))))
                        low = middle + 1;
                else
                        high = middle;
        }
        return UINT32_MAX;
}

/* Whether all of a leaf, as contracts address it, is the VMM's. */
static bool is_vmms(uint32_t space, uint32_t function, uint32_t index) {
        if (space == SPACE_HYPERV)
                return AMONG(function, hyperv_leaves);
        return AMONG(function, vmm_leaves) || function == HYPERVISORS || (function == SGX_LEAF && index >= SGX_SECTIONS);
}

/* How contracts address a leaf. False: it is of a hypervisor that no contract knows. */
static bool address(struct view view, uint32_t function, struct judgement *judgement) {
        if (function < HYPERVISORS || function >= HYPERVISORS_END)
                return true;
        if (view.kvm_base != 0 && function - view.kvm_base < HYPERVISOR_STEP) {
                judgement->function = function - view.kvm_base + HYPERVISORS;
                return true;
        }
        judgement->space = SPACE_HYPERV;
        return view.hyperv && function < HYPERVISORS + HYPERVISOR_STEP;
}

struct judgement kvmneg_internal_judge(const struct kvmneg_contract *contract, struct view view, uint32_t function, uint32_t index) {
        struct judgement judgement = { .space = SPACE_CPUID, .function = function, .found = UINT32_MAX };

        if (!address(view, function, &judgement) || is_vmms(judgement.space, judgement.function, index)) {
                memset(judgement.kept, 0xff, sizeof(judgement.kept));
                judgement.vmms = true;
                return judgement;
        }
        judgement.found = kvmneg_internal_search(contract, judgement.space, judgement.function, index);
        if (judgement.found != UINT32_MAX) {
                memcpy(judgement.values, contract->cpuids[judgement.found].values, sizeof(judgement.values));
                memcpy(judgement.masks, contract->cpuids[judgement.found].masks, sizeof(judgement.masks));
        }
        if (judgement.space == SPACE_CPUID) {
                join(judgement.kept, vmm_bits, sizeof(vmm_bits) / sizeof(vmm_bits[0]), judgement.function, index);
                join(judgement.kvms, kvm_bits, sizeof(kvm_bits) / sizeof(kvm_bits[0]), judgement.function, index);
        }
        return judgement;
}

bool kvmneg_internal_locate(const struct contract_cpuid *entry, struct view view, uint32_t *ret_function) {
        *ret_function = entry->function;
        if (entry->space == SPACE_HYPERV)
                return view.hyperv;
        if (entry->function < HYPERVISORS || entry->function >= HYPERVISORS_END)
                return true;
        *ret_function += view.kvm_base - HYPERVISORS;
        return view.kvm_base != 0;
}

/* Whether no table has an entry with this address: added to one, it would not be found there again. */
static bool is_nowhere(const struct contract_cpuid *entry) {
        bool known = entry->function >= HYPERVISORS && entry->function < HYPERVISORS + HYPERVISOR_STEP;

        if (entry->index != 0 && !kvmneg_internal_is_indexed(entry->function))
                return true;
        if (entry->space == SPACE_HYPERV)
                return !known;
        return !known && entry->function >= HYPERVISORS && entry->function < HYPERVISORS_END;
}

/* The bits of a contract's entry that are not for it to bind: leaves of the VMM, sizes that are computed. */
static void foreign(const struct contract_cpuid *entry, uint32_t ret_bits[static 4]) {
        bool xsave = entry->space == SPACE_CPUID && entry->function == XSAVE_LEAF;
        bool all = is_nowhere(entry) || is_vmms(entry->space, entry->function, entry->index);

        memset(ret_bits, all ? 0xff : 0, 4 * sizeof(ret_bits[0]));
        if (xsave && entry->index <= 1)
                ret_bits[EBX] = UINT32_MAX;
        if (xsave && entry->index == 0)
                ret_bits[ECX] = UINT32_MAX;
}

int kvmneg_internal_check_bound(const struct kvmneg_contract *contract, uint32_t stage, struct kvmneg_failure *failure) {
        for (uint32_t i = 0; i < contract->counts[CPUIDS]; i++) {
                const struct contract_cpuid *entry = &contract->cpuids[i];
                uint32_t bits[4];

                foreign(entry, bits);
                for (unsigned place = 0; place < 4; place++) {
                        struct kvmneg_failure what = { .id = (uint64_t) entry->function << 32 | entry->index,
                                                       .asked = entry->values[place],
                                                       .mask = entry->masks[place] & bits[place],
                                                       .stage = stage,
                                                       .why = KVMNEG_UNKNOWN };
                        if (what.mask == 0)
                                continue;
                        kvmneg_internal_cpuid_word(what.word, entry->space, entry->function, entry->index, place);
                        return fail(failure, what, -EOPNOTSUPP);
                }
        }
        return 0;
}

void kvmneg_internal_bound_cpuid(const struct kvmneg_contract *contract, uint32_t function, uint32_t index,
                                 unsigned place, uint32_t *ret_value, uint32_t *ret_mask) {
        uint32_t i = kvmneg_internal_search(contract, SPACE_CPUID, function, index);

        *ret_value = i == UINT32_MAX ? 0 : contract->cpuids[i].values[place];
        *ret_mask = i == UINT32_MAX ? 0 : contract->cpuids[i].masks[place];
}
