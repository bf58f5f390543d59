/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the CPUID instruction itself says on one CPU: the silicon (or the hypervisor below), before KVM. */

#define _GNU_SOURCE

#include <cpuid.h>
#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#include "contract-x86.h"
#include "kvm-constants.h"

#define RAW_ENTRIES 1024     /* room for all ranges; far over any CPU's 60 to 150 */
#define LEAVES_PER_RANGE 256 /* a range that claims more is cut: its end is a number from outside */
#define SUBLEAVES 64
#define AFFINITY_CPUS_MAX (1 << 20)

/* How a leaf says which subleaves it has (Intel SDM vol. 2A CPUID; AMD APM vol. 3 appendix E). */
enum subleaves {
        SUB_COUNT,     /* subleaf 0's EAX is the last one */
        SUB_CACHE,     /* until EAX[4:0], the cache's type, is 0 */
        SUB_LEVEL,     /* until ECX[15:8], the level's type, is 0 */
        SUB_SGX,       /* 0, 1, then until EAX[3:0] is 0 */
        SUB_PCONFIG,   /* until EAX[11:0] is 0 */
        SUB_XSAVE,     /* 0, 1, and the components of XCR0 and XSS */
        SUB_EAX_MASK,  /* subleaf 0's EAX is a mask of them */
        SUB_EBX_MASK,  /* subleaf 0's EBX is a mask of them, from 1 */
        SUB_EDX_MASK,  /* subleaf 0's EDX is a mask of them, from 1 */
};

static const struct {
        uint32_t leaf;
        enum subleaves how;
} with_subleaves[] = {
        { 0x4, SUB_CACHE },         { 0x7, SUB_COUNT },     { 0xb, SUB_LEVEL },    { 0xd, SUB_XSAVE },
        { 0xf, SUB_EDX_MASK },      { 0x10, SUB_EBX_MASK }, { 0x12, SUB_SGX },     { 0x14, SUB_COUNT },
        { 0x17, SUB_COUNT },        { 0x18, SUB_COUNT },    { 0x1b, SUB_PCONFIG }, { 0x1d, SUB_COUNT },
        { 0x1e, SUB_COUNT },        { 0x1f, SUB_LEVEL },    { 0x20, SUB_COUNT },   { 0x23, SUB_EAX_MASK },
        { 0x24, SUB_COUNT },        { 0x8000001d, SUB_CACHE }, { 0x80000020, SUB_EBX_MASK },
        { 0x80000026, SUB_LEVEL },
};

bool kvmneg_internal_is_indexed(uint32_t leaf) {
        for (size_t i = 0; i < sizeof(with_subleaves) / sizeof(with_subleaves[0]); i++)
                if (with_subleaves[i].leaf == leaf)
                        return true;
        return false;
}

/* Executes CPUID and appends what it says; the table has RAW_ENTRIES. Returns the entry, NULL when full. */
static struct kvmneg_cpuid_entry *append(struct kvmneg_cpuid *table, uint32_t leaf, uint32_t subleaf, bool indexed) {
        struct kvmneg_cpuid_entry *entry;

        if (table->count >= RAW_ENTRIES)
                return NULL;
        entry = &table->entries[table->count++];
        entry->function = leaf;
        entry->index = subleaf;
        entry->flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
        __cpuid_count(leaf, subleaf, entry->eax, entry->ebx, entry->ecx, entry->edx);
        return entry;
}

/* Appends the subleaves from 1 on whose bit in `mask` is set. */
static void append_mask(struct kvmneg_cpuid *table, uint32_t leaf, uint64_t mask) {
        for (uint32_t subleaf = 1; subleaf < SUBLEAVES; subleaf++)
                if (mask & UINT64_C(1) << subleaf)
                        append(table, leaf, subleaf, true);
}

/* Whether an entry of a leaf that is walked until a type of 0 has that type. */
static bool at_end(const struct kvmneg_cpuid_entry *entry, enum subleaves how) {
        switch (how) {
        case SUB_CACHE:
                return (entry->eax & 0x1f) == 0;
        case SUB_LEVEL:
                return (entry->ecx & 0xff00) == 0;
        case SUB_SGX:
                return entry->index >= 2 && (entry->eax & 0xf) == 0;
        case SUB_PCONFIG:
                return (entry->eax & 0xfff) == 0;
        default:
                return true;
        }
}

static void append_until_end(struct kvmneg_cpuid *table, uint32_t leaf, enum subleaves how) {
        for (uint32_t subleaf = 1; subleaf < SUBLEAVES; subleaf++) {
                const struct kvmneg_cpuid_entry *entry = append(table, leaf, subleaf, true);
                if (!entry)
                        return;
                if (at_end(entry, how)) {
                        table->entries[--table->count] = (struct kvmneg_cpuid_entry) {};
                        return;
                }
        }
}

static void append_subleaves(struct kvmneg_cpuid *table, const struct kvmneg_cpuid_entry *first, enum subleaves how) {
        uint64_t components;

        switch (how) {
        case SUB_COUNT:
                for (uint32_t subleaf = 1; subleaf <= first->eax && subleaf < SUBLEAVES; subleaf++)
                        append(table, first->function, subleaf, true);
                break;
        case SUB_XSAVE:
                components = (uint64_t) first->edx << 32 | first->eax;
                first = append(table, first->function, 1, true);
                if (first)
                        append_mask(table, 0xd, (components | (uint64_t) first->edx << 32 | first->ecx) & ~UINT64_C(3));
                break;
        case SUB_EAX_MASK:
                append_mask(table, first->function, first->eax);
                break;
        case SUB_EBX_MASK:
                append_mask(table, first->function, first->ebx);
                break;
        case SUB_EDX_MASK:
                append_mask(table, first->function, first->edx);
                break;
        default:
                if (how == SUB_SGX || !at_end(first, how))
                        append_until_end(table, first->function, how);
        }
}

/* One leaf with all its subleaves. */
static void append_leaf(struct kvmneg_cpuid *table, uint32_t leaf) {
        for (size_t i = 0; i < sizeof(with_subleaves) / sizeof(with_subleaves[0]); i++)
                if (with_subleaves[i].leaf == leaf) {
                        const struct kvmneg_cpuid_entry *first = append(table, leaf, 0, true);
                        if (first)
                                append_subleaves(table, first, with_subleaves[i].how);
                        return;
                }
        append(table, leaf, 0, false);
}

/* A range of leaves begins with its last leaf in EAX; a CPU that lacks the range says something else there. */
static void append_range(struct kvmneg_cpuid *table, uint32_t base) {
        uint32_t last, ebx, ecx, edx;

        __cpuid_count(base, 0, last, ebx, ecx, edx);
        (void) ebx, (void) ecx, (void) edx;
        if (last < base || last - base > 0xffff)
                return;
        if (last - base >= LEAVES_PER_RANGE)
                last = base + LEAVES_PER_RANGE - 1;
        for (uint32_t leaf = base;; leaf++) {
                append_leaf(table, leaf);
                if (leaf == last)
                        return;
        }
}

static void append_everything(struct kvmneg_cpuid *table) {
        uint32_t eax, ebx, ecx = 0, edx;

        append_range(table, 0);
        __cpuid_count(1, 0, eax, ebx, ecx, edx);
        (void) eax, (void) ebx, (void) edx;
        if (ecx & UINT32_C(1) << 31) { /* under a hypervisor, which may have a second set beside Hyper-V's */
                append_range(table, 0x40000000);
                append_range(table, 0x40000100);
        }
        append_range(table, 0x80000000);
        append_range(table, 0xc0000000); /* Centaur and Zhaoxin */
}

/* The calling thread's affinity. The kernel answers EINVAL for a set smaller than its own. */
static int get_affinity(cpu_set_t **ret_set, size_t *ret_size) {
        for (size_t cpus = 1024; cpus <= AFFINITY_CPUS_MAX; cpus *= 4) {
                size_t size = CPU_ALLOC_SIZE(cpus);
                cpu_set_t *set = CPU_ALLOC(cpus);

                if (!set)
                        return -ENOMEM;
                if (sched_getaffinity(0, size, set) >= 0) {
                        *ret_set = set;
                        *ret_size = size;
                        return 0;
                }
                int r = negative_errno();
                CPU_FREE(set);
                if (r != -EINVAL)
                        return r;
        }
        return -EINVAL;
}

/* Moves the calling thread to `cpu`. */
static int pin(int cpu, size_t size) {
        cpu_set_t *set;
        int r = 0;

        if (cpu < 0 || (size_t) cpu >= size * 8)
                return -EINVAL;
        set = CPU_ALLOC(size * 8);
        if (!set)
                return -ENOMEM;
        CPU_ZERO_S(size, set);
        CPU_SET_S((size_t) cpu, size, set);
        if (sched_setaffinity(0, size, set) < 0)
                r = negative_errno();
        CPU_FREE(set);
        return r;
}

int kvmneg_get_raw_cpuid(int cpu, struct kvmneg_cpuid **ret_cpuid) {
        struct kvmneg_cpuid *table = kvmneg_internal_table(sizeof(*table), RAW_ENTRIES, sizeof(table->entries[0]));
        cpu_set_t *before;
        size_t size;
        int r;

        if (!table)
                return -ENOMEM;
        r = get_affinity(&before, &size);
        if (r < 0) {
                free(table);
                return r;
        }
        r = pin(cpu, size);
        if (r >= 0) {
                append_everything(table);
                if (sched_setaffinity(0, size, before) < 0)
                        r = negative_errno();
        }
        CPU_FREE(before);
        if (r >= 0 && table->count >= RAW_ENTRIES)
                r = -E2BIG;
        if (r < 0) {
                free(table);
                return r;
        }
        *ret_cpuid = table;
        return 0;
}
