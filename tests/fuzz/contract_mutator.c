/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How contract_fuzzer.c's inputs are changed: bytes as libFuzzer does it, or entries as a whole. Most of the time the
 * sizes are made to agree and the digest is repaired, often entries are put in order and under their masks too, so that
 * a change is judged by the check that looks for it and not by one before it; sometimes not, so that those run as well.
 */
#include <string.h>

#include "contract.h"
#include "fuzzer.h"

#define HEADER sizeof(struct contract_header)

static const uint32_t entry_sizes[SECTIONS] = {
        sizeof(struct contract_cpuid),      sizeof(struct contract_msr),    sizeof(struct kvmneg_bound_register),
        sizeof(struct contract_capability), sizeof(struct kvmneg_portable), sizeof(uint32_t),
};

struct sections {
        uint32_t starts[SECTIONS];
        uint32_t counts[SECTIONS];
        uint32_t total;
};

static uint32_t draw(uint32_t *state) {
        *state = *state * 1664525 + 1013904223;
        return *state >> 8;
}

static bool one_in(uint32_t *state, uint32_t n) {
        return draw(state) % n == 0;
}

/* The sections that a header names, cut off where the bytes end. */
static struct sections locate(const uint8_t *data, size_t size) {
        struct sections found = { .total = HEADER };
        struct contract_header header;

        memcpy(&header, data, sizeof(header));
        for (unsigned i = 0; i < SECTIONS; i++) {
                uint32_t room = (uint32_t) (size - found.total) / entry_sizes[i];

                found.starts[i] = found.total;
                found.counts[i] = header.counts[i] < room ? header.counts[i] : room;
                found.total += found.counts[i] * entry_sizes[i];
        }
        return found;
}

static void count(uint8_t *data, unsigned section, uint32_t number) {
        memcpy(data + offsetof(struct contract_header, counts) + 4 * section, &number, sizeof(number));
}

/* -- changes of one entry ------------------------------------------------------------------------------- */

static void change_field(uint8_t *entry, uint32_t size, uint32_t *state) {
        static const uint32_t numbers[] = { 0,   1,    2,          3,          4,          5,          7,
                                            0xd, 0x12, 0x40000000, 0x40000001, 0x80000000, 0x80000008, UINT32_MAX };
        uint32_t at = draw(state) % (size / 4) * 4, number = numbers[draw(state) % (sizeof(numbers) / 4)];

        memcpy(entry + at, &number, sizeof(number));
}

/* A whole entry more or less: one that is there again behind itself, or away. Returns the new size. */
static size_t resize(uint8_t *data, size_t size, size_t most, const struct sections *where, unsigned section,
                     uint32_t at, bool more) {
        uint32_t entry = entry_sizes[section];

        if (more && size + entry > most)
                return size;
        if (more)
                memmove(data + at + entry, data + at, size - at);
        else
                memmove(data + at, data + at + entry, size - at - entry);
        count(data, section, more ? where->counts[section] + 1 : where->counts[section] - 1);
        return more ? size + entry : size - entry;
}

static void swap(uint8_t *a, uint8_t *b, uint32_t size) {
        for (uint32_t i = 0; i < size; i++) {
                uint8_t kept = a[i];
                a[i] = b[i];
                b[i] = kept;
        }
}

static size_t change_entry(uint8_t *data, size_t size, size_t most, uint32_t *state) {
        struct sections where = locate(data, size);
        unsigned section = draw(state) % SECTIONS;
        uint32_t entry = entry_sizes[section], n, at;

        if (where.counts[section] == 0) { /* the first of its kind, of what comes next in the file */
                if (where.starts[section] + entry <= size)
                        count(data, section, 1);
                return size;
        }
        n = draw(state) % where.counts[section];
        at = where.starts[section] + n * entry;
        switch (draw(state) % 6) {
        case 0:
                LLVMFuzzerMutate(data + at, entry, entry);
                return size;
        case 1:
                return resize(data, size, most, &where, section, at, true);
        case 2:
                return resize(data, size, most, &where, section, at, false);
        case 3:
                if (n > 0)
                        swap(data + at - entry, data + at, entry);
                return size;
        default:
                change_field(data + at, entry, state);
                return size;
        }
}

/* -- repairs -------------------------------------------------------------------------------------------- */

static uint32_t key32(const uint8_t *entry, unsigned at) {
        uint32_t number;

        memcpy(&number, entry + at, sizeof(number));
        return number;
}

/* The order of a section's entries, as memcmp(3) says it. */
static int compare(unsigned section, const uint8_t *a, const uint8_t *b) {
        static const unsigned cpuid[] = { 8, 0, 4 }, msr[] = { 0 }, id[] = { 4, 0 }, state[] = { 12, 8 };
        static const struct {
                const unsigned *places;
                unsigned count;
        } keys[SECTIONS] = { { cpuid, 3 }, { msr, 1 }, { id, 2 }, { NULL, 0 }, { state, 2 }, { msr, 1 } };

        if (section == CAPABILITIES)
                return memcmp(a, b, CAPABILITY_NAME);
        for (unsigned i = 0; i < keys[section].count; i++) {
                uint32_t x = key32(a, keys[section].places[i]), y = key32(b, keys[section].places[i]);
                if (x != y)
                        return x < y ? -1 : 1;
        }
        return 0;
}

/* Nothing outside of its mask, and nothing in reserved fields. */
static void clean(unsigned section, uint8_t *entry) {
        static const struct {
                unsigned zero, zeros, values, masks, size;
        } shapes[SECTIONS] = { { 12, 4, 16, 32, 16 }, { 4, 4, 8, 16, 8 }, { 0, 0, 8, 16, 8 }, { 40, 8, 48, 56, 8 } };

        if (section == PORTABLE) {
                struct kvmneg_portable *portable = (void *) entry;
                portable->kind = 1;
                portable->rule = portable->rule % 4 + 1;
                portable->value = portable->rule == KVMNEG_DROP_IF ? portable->value : 0;
        } else if (section != FLAGS) {
                memset(entry + shapes[section].zero, 0, shapes[section].zeros);
                for (unsigned i = 0; i < shapes[section].size; i++)
                        entry[shapes[section].values + i] &= entry[shapes[section].masks + i];
        }
}

/* Sorted by insertion, for it mostly is; of two with one key the first stays. Returns the new size. */
static size_t tidy(uint8_t *data, size_t size) {
        for (unsigned section = 0; section < FLAGS; section++) {
                struct sections where = locate(data, size);
                uint32_t entry = entry_sizes[section], kept = 0;
                uint8_t *first = data + where.starts[section];

                for (uint32_t i = 0; i < where.counts[section]; i++)
                        for (uint8_t *at = first + i * entry; at > first; at -= entry)
                                if (compare(section, at - entry, at) > 0)
                                        swap(at - entry, at, entry);
                                else
                                        break;
                for (uint32_t i = 0; i < where.counts[section]; i++) {
                        clean(section, first + i * entry);
                        if (kept == 0 || compare(section, first + (kept - 1) * entry, first + i * entry) != 0)
                                memmove(first + kept++ * entry, first + i * entry, entry);
                }
                memmove(first + kept * entry, first + where.counts[section] * entry,
                        size - where.starts[section] - where.counts[section] * entry);
                size -= (where.counts[section] - kept) * entry;
                count(data, section, kept);
        }
        return size;
}

/* The flags that arm:vcpu-features says, as far as there is room. */
static size_t match_flags(uint8_t *data, size_t size, size_t most) {
        struct sections where = locate(data, size);
        uint64_t features = 0;
        uint32_t flags = 0;

        for (uint32_t i = 0; i < where.counts[CAPABILITIES]; i++) {
                struct contract_capability entry;
                memcpy(&entry, data + where.starts[CAPABILITIES] + i * sizeof(entry), sizeof(entry));
                if (strncmp(entry.name, "arm:vcpu-features", sizeof(entry.name)) == 0)
                        features = entry.value;
        }
        for (uint32_t bit = 0; bit < 64 && where.starts[FLAGS] + 4 * (flags + 1) <= most; bit++)
                if (features >> bit & 1)
                        memcpy(data + where.starts[FLAGS] + 4 * flags++, &bit, sizeof(bit));
        count(data, FLAGS, flags);
        return where.starts[FLAGS] + 4 * flags;
}

/* A header that its sections agree with. Returns the size that it says. */
static size_t fit(uint8_t *data, size_t size) {
        struct sections where;
        struct contract_header header;

        memcpy(&header, data, sizeof(header));
        memcpy(header.magic, "KVMNEGC", sizeof(header.magic));
        header.version = 1;
        header.size = HEADER;
        header.grade %= 3;
        header.reserved = 0;
        header.architecture = header.counts[CPUIDS] || header.counts[MSRS] ? KVMNEG_X86_64 : header.architecture;
        if (header.architecture != KVMNEG_X86_64)
                header.architecture = KVMNEG_ARM64;
        for (unsigned i = 0; i < SECTIONS && header.architecture == KVMNEG_X86_64; i++)
                if (i == REGISTERS || i == PORTABLE || i == FLAGS)
                        header.counts[i] = 0;
        if (header.generation == 0)
                memset(header.fence, 0, sizeof(header.fence));
        memset(header.tail, 0, sizeof(header.tail));
        memcpy(data, &header, sizeof(header));
        where = locate(data, size);
        memcpy(header.counts, where.counts, sizeof(header.counts));
        header.total = where.total;
        memcpy(data, &header, sizeof(header));
        return where.total;
}

static void seal(uint8_t *data, size_t size) {
        uint8_t digest[SHA256_BYTES];

        kvmneg_internal_sha256(data, size, offsetof(struct contract_header, digest), digest);
        memcpy(data + offsetof(struct contract_header, digest), digest, sizeof(digest));
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
        uint32_t state = seed;

        if (size < HEADER || one_in(&state, 6)) {
                size = LLVMFuzzerMutate(data, size, most);
        } else if (one_in(&state, 8)) {
                LLVMFuzzerMutate(data, HEADER, HEADER);
        } else {
                do
                        size = change_entry(data, size, most, &state);
                while (!one_in(&state, 3));
        }
        if (size < HEADER || one_in(&state, 16))
                return size; /* as it is, but for nothing: most of these end at the digest */
        if (!one_in(&state, 8))
                size = fit(data, size);
        if (!one_in(&state, 4)) {
                size = match_flags(data, tidy(data, size), most);
                size = fit(data, size);
        }
        if (one_in(&state, 32) && size > HEADER + 64)
                size -= 1 + draw(&state) % 64; /* shorter than it says */
        seal(data, size);
        return size;
}
