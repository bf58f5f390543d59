/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A contract's CPUID in a VMM's own table: which bits are bound, which are the VMM's, which are KVM's. What is neither
 * bound nor one of those is 0. The tables are those of kvmneg's catalogue (rules topology, dynamic, derived); a test
 * compares them.
 */

#include <string.h>

#include "contract-x86.h"

#define HYPERVISORS 0x40000000
#define HYPERVISORS_END 0x40010000
#define HYPERVISOR_STEP 0x100
#define HYPERV_INTERFACE 0x31237648 /* "Hv#1" in leaf 0x40000001 (Hyper-V TLFS 2.4); the signature may be any */
#define SGX_LEAF 0x12
#define SGX_SECTIONS 2 /* from this subleaf on: where the VMM puts enclaves' memory */
#define XSAVE_LEAF 0xd
#define XSAVE_LEGACY 576 /* bytes of the legacy region and the header (Intel SDM vol. 1, 13.4) */
#define XSAVE_COMPACTED 0xa /* leaf 0xd.1 EAX: XSAVEC, XSAVES */

enum { EAX, EBX, ECX, EDX };

static const uint32_t kvm_signature[] = { 0x4b4d564b, 0x564b4d56, 0x4d }; /* "KVMKVMKVM" */

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

/* Where hypervisors' leaves are in one table. */
struct view {
        uint32_t kvm_base; /* 0: KVM is not shown */
        bool hyperv;
};

/* What becomes of one entry. */
struct judgement {
        uint32_t values[4];
        uint32_t masks[4];
        uint32_t kept[4];   /* the VMM's bits */
        uint32_t kvms[4];   /* KVM's own */
        uint32_t space;     /* its address in contracts */
        uint32_t function;
        uint32_t found;     /* number in the contract, UINT32_MAX for none */
};

typedef uint64_t seen_set[KVMNEG_CONTRACT_CPUIDS_MAX / 64];

static bool see(seen_set seen, uint32_t i) {
        bool first = !(seen[i / 64] >> i % 64 & 1);

        seen[i / 64] |= UINT64_C(1) << i % 64;
        return first;
}

static const struct kvmneg_cpuid_entry *find(const struct kvmneg_cpuid_entry *entries, uint32_t count, uint32_t function,
                                             uint32_t index) {
        for (uint32_t i = 0; i < count; i++)
                if (entries[i].function == function && (entries[i].index == index || !(entries[i].flags & 1)))
                        return &entries[i];
        return NULL;
}

bool kvmneg_internal_shows_hyperv(const struct kvmneg_cpuid_entry *entries, uint32_t count) {
        const struct kvmneg_cpuid_entry *entry = find(entries, count, HYPERVISORS + 1, 0);

        return entry && entry->eax == HYPERV_INTERFACE;
}

static struct view look(const struct kvmneg_cpuid_entry *entries, uint32_t count) {
        struct view view = { .hyperv = kvmneg_internal_shows_hyperv(entries, count) };

        for (uint32_t i = 0; i < count; i++) {
                const struct kvmneg_cpuid_entry *entry = &entries[i];
                if (entry->function >= HYPERVISORS && entry->function < HYPERVISORS_END &&
                    entry->function % HYPERVISOR_STEP == 0 && memcmp(&entry->ebx, kvm_signature, sizeof(kvm_signature)) == 0 &&
                    (view.kvm_base == 0 || entry->function < view.kvm_base))
                        view.kvm_base = entry->function;
        }
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

static uint32_t search(const struct kvmneg_contract *contract, uint32_t space, uint32_t function, uint32_t index) {
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

/* A hypervisor's leaf: KVM's as contracts address it, Hyper-V's. Returns whether all of it is the VMM's. */
static bool place_hypervisor(struct view view, uint32_t function, struct judgement *judgement) {
        if (view.kvm_base != 0 && function - view.kvm_base < HYPERVISOR_STEP) {
                judgement->function = function - view.kvm_base + HYPERVISORS;
                return function == view.kvm_base || judgement->function == HYPERVISORS + 0x10;
        }
        judgement->space = SPACE_HYPERV;
        return !view.hyperv || function >= HYPERVISORS + HYPERVISOR_STEP || AMONG(function, hyperv_leaves);
}

static struct judgement judge(const struct kvmneg_contract *contract, struct view view, uint32_t function, uint32_t index) {
        struct judgement judgement = { .space = SPACE_CPUID, .function = function, .found = UINT32_MAX };
        bool hypervisor = function >= HYPERVISORS && function < HYPERVISORS_END;
        bool sections = function == SGX_LEAF && index >= SGX_SECTIONS;

        if (hypervisor ? place_hypervisor(view, function, &judgement) : sections || AMONG(function, vmm_leaves)) {
                memset(judgement.kept, 0xff, sizeof(judgement.kept));
                return judgement;
        }
        judgement.found = search(contract, judgement.space, judgement.function, index);
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

/* Where an entry of the contract stands in a table with this view; false where its guest is not shown it. */
static bool locate(const struct contract_cpuid *entry, struct view view, uint32_t *ret_function) {
        *ret_function = entry->function;
        if (entry->space == SPACE_HYPERV)
                return view.hyperv;
        if (entry->function < HYPERVISORS || entry->function >= HYPERVISORS_END)
                return true;
        *ret_function += view.kvm_base - HYPERVISORS;
        return view.kvm_base != 0;
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

                if (seen[i / 64] >> i % 64 & 1 || !any(entry->values) || !locate(entry, view, &function))
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
                                components >> n & 1 ? find(entries, count, XSAVE_LEAF, n) : NULL;
                        if (component && component->index == n && component->eax + component->ebx > entry->ecx)
                                entry->ecx = component->eax + component->ebx;
                }
        }
}

int kvmneg_internal_clamp(const struct kvmneg_contract *contract, struct kvmneg_cpuid_entry *entries, uint32_t *count,
                          uint32_t capacity) {
        seen_set seen = {};
        struct view view;
        int r;

        if (*count == 0 && capacity > 0 && search(contract, SPACE_CPUID, HYPERVISORS + 1, 0) != UINT32_MAX)
                entries[(*count)++] = (struct kvmneg_cpuid_entry) { .function = HYPERVISORS,
                                                                    .eax = HYPERVISORS + 1,
                                                                    .ebx = kvm_signature[0],
                                                                    .ecx = kvm_signature[1],
                                                                    .edx = kvm_signature[2] };
        view = look(entries, *count);
        for (uint32_t i = 0; i < *count; i++) {
                struct kvmneg_cpuid_entry *entry = &entries[i];
                struct judgement judgement;

                if (kvmneg_internal_is_indexed(entry->function))
                        entry->flags |= 1; /* without it the other subleaves would read the same */
                judgement = judge(contract, view, entry->function, entry->index);
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
static int compare_entry(const struct judgement *judgement, const struct kvmneg_cpuid_entry *entry, uint32_t stage,
                         uint32_t why, struct kvmneg_failure *failure) {
        for (unsigned place = 0; place < 4; place++) {
                uint32_t got = (&entry->eax)[place], mask = ~judgement->kept[place] | judgement->masks[place];

                mask &= ~excused(judgement, place, got);
                if (judgement->masks[place] && (got ^ judgement->values[place]) & mask)
                        return differs(judgement, entry->index, place, mask, got, stage, why, failure);
        }
        return 0;
}

int kvmneg_internal_compare(const struct kvmneg_contract *contract, const struct kvmneg_cpuid_entry *entries,
                            uint32_t count, uint32_t stage, uint32_t why, struct kvmneg_failure *failure) {
        struct view view = look(entries, count);
        seen_set seen = {};

        for (uint32_t i = 0; i < count; i++) {
                struct judgement judgement = judge(contract, view, entries[i].function, entries[i].index);
                /* The first of two entries is what a guest reads. Linux 6.1 says more entries than there are, of zeros. */
                if (judgement.found != UINT32_MAX && see(seen, judgement.found)) {
                        int r = compare_entry(&judgement, &entries[i], stage, why, failure);
                        if (r < 0)
                                return r;
                }
        }
        for (uint32_t i = 0; i < contract->counts[CPUIDS]; i++) {
                const struct contract_cpuid *bound = &contract->cpuids[i];
                struct kvmneg_cpuid_entry nothing = { .index = bound->index };

                if (!(seen[i / 64] >> i % 64 & 1) && locate(bound, view, &nothing.function)) {
                        struct judgement judgement = judge(contract, view, nothing.function, bound->index);
                        int r = compare_entry(&judgement, &nothing, stage, why, failure);
                        if (r < 0)
                                return r;
                }
        }
        return 0;
}

void kvmneg_internal_bound_cpuid(const struct kvmneg_contract *contract, uint32_t function, uint32_t index,
                                 unsigned place, uint32_t *ret_value, uint32_t *ret_mask) {
        uint32_t i = search(contract, SPACE_CPUID, function, index);

        *ret_value = i == UINT32_MAX ? 0 : contract->cpuids[i].values[place];
        *ret_mask = i == UINT32_MAX ? 0 : contract->cpuids[i].masks[place];
}

int kvmneg_clamp_cpuid(const struct kvmneg_contract *contract, struct kvmneg_cpuid *cpuid, uint32_t capacity) {
        if (contract->header->architecture != KVMNEG_X86_64)
                return -ENOEXEC;
        if (cpuid->count > KVMNEG_CONTRACT_CPUIDS_MAX)
                return -E2BIG;
        if (capacity > KVMNEG_CONTRACT_CPUIDS_MAX)
                capacity = KVMNEG_CONTRACT_CPUIDS_MAX;
        return kvmneg_internal_clamp(contract, cpuid->entries, &cpuid->count, capacity);
}
