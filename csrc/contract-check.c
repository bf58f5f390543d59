/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Whether bytes are a contract that version 1 writes. Every field is looked at before it is used, in this order: sizes,
 * counts, digest, then entry by entry. kvmneg/policy/contract.py reads the same, and refuses the same.
 */

#include <assert.h>
#include <string.h>

#include "contract.h"

#define VERSION 1
#define GRADES 3
#define RULES 4

static_assert(sizeof(struct contract_header) == 160, "layout");
static_assert(offsetof(struct contract_header, generation) == 64, "layout");
static_assert(offsetof(struct contract_header, counts) == 104, "layout");
static_assert(sizeof(struct contract_cpuid) == 48, "layout");
static_assert(sizeof(struct contract_msr) == 24, "layout");
static_assert(sizeof(struct kvmneg_bound_register) == 24, "layout");
static_assert(sizeof(struct contract_capability) == 64, "layout");
static_assert(sizeof(struct kvmneg_portable) == 24, "layout");

static const struct {
        uint32_t size;    /* of an entry */
        uint32_t maximum; /* entries */
        bool x86, arm64;  /* who has this section */
} sections[SECTIONS] = {
        [CPUIDS] = { sizeof(struct contract_cpuid), KVMNEG_CONTRACT_CPUIDS_MAX, true, false },
        [MSRS] = { sizeof(struct contract_msr), KVMNEG_CONTRACT_MSRS_MAX, true, false },
        [REGISTERS] = { sizeof(struct kvmneg_bound_register), KVMNEG_CONTRACT_REGISTERS_MAX, false, true },
        [CAPABILITIES] = { sizeof(struct contract_capability), KVMNEG_CONTRACT_CAPABILITIES_MAX, true, true },
        [PORTABLE] = { sizeof(struct kvmneg_portable), KVMNEG_CONTRACT_REGISTERS_MAX, false, true },
        [FLAGS] = { sizeof(uint32_t), KVMNEG_CONTRACT_FLAGS_MAX, false, true },
};

/* The kinds of word that have a name, and their width. */
static const struct {
        const char *prefix;
        unsigned bits;
} kinds[] = { { "kvm:", 32 }, { "tap:", 64 }, { "vhost-net:", 64 }, { "tsc:", 64 }, { "state:", 64 }, { "arm:", 64 } };

static int bad(struct kvmneg_contract_error *error, uint64_t offset, const char *what) {
        *error = (struct kvmneg_contract_error) { .offset = offset, .what = what };
        return -EBADMSG;
}

/* The same for a field of an entry, which lies in the contract's own bytes. */
static int bad_at(const struct kvmneg_contract *contract, const void *field, const char *what,
                  struct kvmneg_contract_error *error) {
        return bad(error, (uint64_t) ((const uint8_t *) field - contract->bytes), what);
}

static uint64_t not_zero(const uint8_t *bytes, uint64_t size) {
        uint64_t i = 0;

        while (i < size && bytes[i] == 0)
                i++;
        return i;
}

#define BAD_FIELD(field, what) bad(error, offsetof(struct contract_header, field), what)

static int check_header(const struct contract_header *header, struct kvmneg_contract_error *error) {
        static const uint8_t magic[8] = "KVMNEGC";

        if (memcmp(header->magic, magic, sizeof(magic)) != 0)
                return BAD_FIELD(magic, "no contract begins like this");
        if (header->version != VERSION)
                return BAD_FIELD(version, "not of version 1");
        if (header->architecture != KVMNEG_X86_64 && header->architecture != KVMNEG_ARM64)
                return BAD_FIELD(architecture, "of an unknown architecture");
        if (header->size != sizeof(*header))
                return BAD_FIELD(size, "its header has another size");
        if (header->grade >= GRADES)
                return BAD_FIELD(grade, "an unknown grade");
        if (header->reserved != 0)
                return BAD_FIELD(reserved, "a reserved field is not 0");
        if (header->generation == 0 && not_zero(header->fence, sizeof(header->fence)) < sizeof(header->fence))
                return BAD_FIELD(fence, "a fence without a generation");
        if (not_zero(header->tail, sizeof(header->tail)) < sizeof(header->tail))
                return BAD_FIELD(tail, "a reserved field is not 0");
        return 0;
}

/* Counts against their limits, sizes against each other. Nothing overflows: a count is below 2^14 by then. */
static int check_sizes(const struct contract_header *header, uint64_t size, struct kvmneg_contract_error *error) {
        uint64_t expected = sizeof(*header);

        for (unsigned i = 0; i < SECTIONS; i++) {
                uint64_t offset = offsetof(struct contract_header, counts) + i * sizeof(header->counts[0]);
                bool has = header->architecture == KVMNEG_X86_64 ? sections[i].x86 : sections[i].arm64;

                if (header->counts[i] > 0 && !has)
                        return bad(error, offset, "a section that this architecture does not have");
                if (header->counts[i] > sections[i].maximum)
                        return bad(error, offset, "more entries than the limit");
                expected += (uint64_t) header->counts[i] * sections[i].size;
        }
        if (header->total != expected)
                return BAD_FIELD(total, "its size is not that of its sections");
        if (size < expected)
                return bad(error, size, "ends before its last section");
        if (size > expected)
                return bad(error, expected, "goes on behind its last section");
        return 0;
}

/* Where each section begins. Entries are of 8 bytes' multiples but for flags, which are the last. */
static void place(struct kvmneg_contract *contract) {
        const uint8_t *at = contract->bytes + sizeof(struct contract_header);
        const void *starts[SECTIONS];

        for (unsigned i = 0; i < SECTIONS; i++) {
                contract->counts[i] = contract->header->counts[i];
                starts[i] = at;
                at += (size_t) contract->counts[i] * sections[i].size;
        }
        contract->cpuids = starts[CPUIDS];
        contract->msrs = starts[MSRS];
        contract->registers = starts[REGISTERS];
        contract->capabilities = starts[CAPABILITIES];
        contract->portable = starts[PORTABLE];
        contract->flags = starts[FLAGS];
}

/* Sorts by space, leaf, subleaf. */
static bool cpuid_before(const struct contract_cpuid *a, const struct contract_cpuid *b) {
        if (a->space != b->space)
                return a->space < b->space;
        return a->function != b->function ? a->function < b->function : a->index < b->index;
}

static int check_cpuids(const struct kvmneg_contract *contract, struct kvmneg_contract_error *error) {
        for (uint32_t i = 0; i < contract->counts[CPUIDS]; i++) {
                const struct contract_cpuid *entry = &contract->cpuids[i];
                uint32_t bound = 0;

                if (entry->space > SPACE_HYPERV)
                        return bad_at(contract, &entry->space, "an unknown space of CPUID", error);
                if (entry->reserved != 0)
                        return bad_at(contract, &entry->reserved, "a reserved field is not 0", error);
                if (i > 0 && !cpuid_before(entry - 1, entry))
                        return bad_at(contract, entry, "a CPUID entry is not at its place", error);
                for (unsigned place = 0; place < 4; place++) {
                        if (entry->values[place] & ~entry->masks[place])
                                return bad_at(contract, &entry->values[place], "has bits that it does not bind", error);
                        bound |= entry->masks[place];
                }
                if (bound == 0)
                        return bad_at(contract, entry->masks, "a CPUID entry that binds nothing", error);
        }
        return 0;
}

static int check_msrs(const struct kvmneg_contract *contract, struct kvmneg_contract_error *error) {
        for (uint32_t i = 0; i < contract->counts[MSRS]; i++) {
                const struct contract_msr *msr = &contract->msrs[i];

                if (msr->reserved != 0)
                        return bad_at(contract, &msr->reserved, "a reserved field is not 0", error);
                if (i > 0 && msr[-1].index >= msr->index)
                        return bad_at(contract, msr, "an MSR is not at its place", error);
                if (msr->value & ~msr->mask)
                        return bad_at(contract, &msr->value, "has bits that it does not bind", error);
                if (msr->mask == 0)
                        return bad_at(contract, &msr->mask, "an MSR that binds nothing", error);
        }
        return 0;
}

/* The order of application (kvmneg/policy/contract_arm64.py, place): lengths of SVE vectors, ID registers with CTR_EL0
 * and CLIDR_EL1 first, PMCR_EL0, workarounds, PSCI_VERSION, hypercall bitmaps. Higher is later. */
static unsigned turn(uint64_t id) {
        switch (id) {
        case UINT64_C(0x603000000013d801):
                return 1; /* CTR_EL0 */
        case UINT64_C(0x603000000013c801):
                return 2; /* CLIDR_EL1 */
        case UINT64_C(0x603000000013dce0):
                return 4; /* PMCR_EL0 */
        case UINT64_C(0x6030000000140000):
                return 6; /* PSCI_VERSION */
        }
        switch (id >> 16 & 0xfff) {
        case 0x15:
                return 0; /* SVE */
        case 0x13:
        case 0x11:
                return 3; /* system registers, CCSIDR */
        case 0x14:
                return 5; /* firmware */
        case 0x16:
                return 7; /* hypercall bitmaps */
        }
        return 8;
}

static int check_registers(const struct kvmneg_contract *contract, struct kvmneg_contract_error *error) {
        for (uint32_t i = 0; i < contract->counts[REGISTERS]; i++) {
                const struct kvmneg_bound_register *entry = &contract->registers[i];

                if (i > 0) {
                        unsigned before = turn(entry[-1].id), here = turn(entry->id);
                        if (before > here || (before == here && entry[-1].id >= entry->id))
                                return bad_at(contract, entry, "a register is not at its place", error);
                }
                if (entry->value & ~entry->mask)
                        return bad_at(contract, &entry->value, "has bits that it does not bind", error);
                if (entry->mask == 0)
                        return bad_at(contract, &entry->mask, "a register that binds nothing", error);
        }
        return 0;
}

/* Bits of a word by its name, 0 where it is no name: a kind, then lower-case letters, digits and hyphens. */
static unsigned bits_of_name(const char name[static CAPABILITY_NAME]) {
        size_t length = strnlen(name, CAPABILITY_NAME), prefix = 0;
        unsigned bits = 0;

        for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++)
                if (strncmp(name, kinds[i].prefix, strlen(kinds[i].prefix)) == 0) {
                        prefix = strlen(kinds[i].prefix);
                        bits = kinds[i].bits;
                }
        if (bits == 0 || length == prefix)
                return 0;
        for (size_t i = prefix; i < length; i++)
                if (!(name[i] >= 'a' && name[i] <= 'z') && !(name[i] >= '0' && name[i] <= '9') && name[i] != '-')
                        return 0;
        for (size_t i = length; i < CAPABILITY_NAME; i++)
                if (name[i] != 0)
                        return 0;
        return bits;
}

static bool is_named(const struct contract_capability *entry, const char *name) {
        return strncmp(entry->name, name, CAPABILITY_NAME) == 0;
}

static int check_capability(struct kvmneg_contract *contract, const struct contract_capability *entry,
                            struct kvmneg_contract_error *error) {
        unsigned bits = bits_of_name(entry->name);

        if (bits == 0)
                return bad_at(contract, entry, "no name of a word", error);
        if (entry->action != 0)
                return bad_at(contract, &entry->action, "an unknown action", error);
        if (entry->reserved != 0)
                return bad_at(contract, &entry->reserved, "a reserved field is not 0", error);
        if (entry->value & ~entry->mask)
                return bad_at(contract, &entry->value, "has bits that it does not bind", error);
        if (entry->mask == 0)
                return bad_at(contract, &entry->mask, "a word that binds nothing", error);
        if (bits == 32 && entry->mask >> 32)
                return bad_at(contract, &entry->mask, "binds more bits than the word has", error);
        if (is_named(entry, "tsc:khz"))
                contract->tsc = entry->value;
        else if (is_named(entry, "arm:vcpu-features"))
                contract->features = entry->value;
        return 0;
}

static int check_capabilities(struct kvmneg_contract *contract, struct kvmneg_contract_error *error) {
        for (uint32_t i = 0; i < contract->counts[CAPABILITIES]; i++) {
                const struct contract_capability *entry = &contract->capabilities[i];
                int r = check_capability(contract, entry, error);

                if (r < 0)
                        return r;
                if (i > 0 && memcmp(entry[-1].name, entry->name, CAPABILITY_NAME) >= 0)
                        return bad_at(contract, entry, "a capability is not at its place", error);
        }
        return 0;
}

static int check_portable(const struct kvmneg_contract *contract, struct kvmneg_contract_error *error) {
        for (uint32_t i = 0; i < contract->counts[PORTABLE]; i++) {
                const struct kvmneg_portable *entry = &contract->portable[i];

                if (entry->kind != 1)
                        return bad_at(contract, &entry->kind, "an unknown kind of portable state", error);
                if (entry->rule < KVMNEG_CARRY || entry->rule > RULES)
                        return bad_at(contract, &entry->rule, "an unknown rule", error);
                if (i > 0 && entry[-1].id >= entry->id)
                        return bad_at(contract, &entry->id, "an entry of the portable state is not at its place", error);
                if (entry->value != 0 && entry->rule != KVMNEG_DROP_IF)
                        return bad_at(contract, &entry->value, "a value that its rule does not use", error);
        }
        return 0;
}

/* The flags repeat the bits of arm:vcpu-features; x86 has neither. */
static int check_flags(const struct kvmneg_contract *contract, struct kvmneg_contract_error *error) {
        uint64_t left = contract->features;

        for (uint32_t i = 0; i < contract->counts[FLAGS]; i++) {
                if (left == 0 || contract->flags[i] != (unsigned) __builtin_ctzll(left))
                        return bad_at(contract, &contract->flags[i], "not a flag of arm:vcpu-features", error);
                left &= left - 1;
        }
        if (left != 0)
                return BAD_FIELD(counts[FLAGS], "fewer flags than arm:vcpu-features");
        return 0;
}

int kvmneg_internal_check_contract(struct kvmneg_contract *contract, uint64_t size, struct kvmneg_contract_error *error) {
        uint8_t digest[SHA256_BYTES];
        int r;

        if (size < sizeof(struct contract_header))
                return bad(error, size, "shorter than a contract's header");
        contract->header = (const struct contract_header *) contract->bytes;
        r = check_header(contract->header, error);
        if (r >= 0)
                r = check_sizes(contract->header, size, error);
        if (r < 0)
                return r;
        kvmneg_internal_sha256(contract->bytes, size, offsetof(struct contract_header, digest), digest);
        if (memcmp(digest, contract->header->digest, sizeof(digest)) != 0)
                return BAD_FIELD(digest, "its digest is not that of its content");
        place(contract);
        r = check_cpuids(contract, error);
        if (r >= 0)
                r = check_msrs(contract, error);
        if (r >= 0)
                r = check_registers(contract, error);
        if (r >= 0)
                r = check_capabilities(contract, error);
        if (r >= 0)
                r = check_portable(contract, error);
        return r < 0 ? r : check_flags(contract, error);
}
