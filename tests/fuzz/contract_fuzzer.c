/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzzing the reader of contracts, with libFuzzer (clang -fsanitize=fuzzer; tools/fuzz.sh builds and runs it).
 *
 * An input is a file that may be a contract. It is opened from memory and by descriptor, which have to agree. One that
 * is refused has an error that names a place within it; one that is taken is looked at through every function that
 * reads a contract, and on x86 applied to tables of CPUID: none, one with hypervisors, one that the input seeds, each
 * with less and with more room than it needs.
 *
 * contract_mutator.c changes entries rather than bytes, and repairs sizes and the digest: without it no change would
 * get past the digest. corpus/contract/ has inputs that reach different code, made from real contracts of x86 and arm64
 * by seeds.py, and what was found later.
 */
#define _GNU_SOURCE

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fuzzer.h"
#include "kvmneg.h"

/* In order, and each entry judged by its rule: as it may be left out, and not. */
static void check_portable(const struct kvmneg_contract *contract, const struct kvmneg_contract_info *info) {
        const struct kvmneg_portable *rows;
        struct kvmneg_failure failure;
        uint32_t count;

        rows = kvmneg_contract_portable(contract, &count);
        REQUIRE(count == info->portable);
        for (uint32_t i = 0; i < count; i++) {
                const struct kvmneg_portable *row = &rows[i];
                bool left_out = row->rule == KVMNEG_DROP_IF || row->rule == KVMNEG_DROP_IF_TIMER_OFF;

                REQUIRE(row->kind == 1 && row->rule >= KVMNEG_CARRY && row->rule <= KVMNEG_REFUSE);
                REQUIRE(i == 0 || rows[i - 1].id < row->id);
                REQUIRE(kvmneg_judge_register(contract, row->id, ~row->value, 1, true, NULL) == 1);
                REQUIRE(kvmneg_judge_register(contract, row->id, row->value, 0, false, NULL) ==
                        (left_out ? 0 : -ENOENT));
                REQUIRE(kvmneg_judge_register(contract, row->id, ~row->value, 1, false, &failure) < 0);
                REQUIRE(failure.id == row->id && failure.error < 0);
                REQUIRE(row->rule != KVMNEG_DROP_IF || (failure.error == -EBADE && failure.got == row->value));
        }
        if (info->architecture == KVMNEG_X86_64)
                REQUIRE(kvmneg_judge_register(contract, 0, 0, 0, false, NULL) == -ENOEXEC);
}

static void look(const struct kvmneg_contract *contract, const uint8_t *data, size_t size) {
        struct kvmneg_contract_info info;
        struct kvmneg_bound_word word;
        uint32_t words = 0, one_each;
        uint64_t kept;

        REQUIRE(memcmp(kvmneg_contract_bytes(contract, &kept), data, size) == 0 && kept == size);
        kvmneg_contract_describe(contract, &info);
        REQUIRE(info.architecture == KVMNEG_X86_64 || info.architecture == KVMNEG_ARM64);
        REQUIRE(info.grade <= 2 && memcmp(info.digest, data + 32, sizeof(info.digest)) == 0);
        REQUIRE(info.flags == (uint32_t) __builtin_popcountll(info.vcpu_features));
        for (; kvmneg_contract_word(contract, words, &word) == 0; words++) {
                size_t length = strnlen(word.word, sizeof(word.word));

                REQUIRE(length >= 5 && length < sizeof(word.word) && strchr(word.word, ':'));
                for (size_t at = 0; at < length; at++)
                        REQUIRE(word.word[at] > ' ' && word.word[at] < 0x7f);
                REQUIRE(word.mask != 0 && (word.value & ~word.mask) == 0);
        }
        one_each = info.msrs + info.registers + info.capabilities;
        REQUIRE(words >= one_each + info.cpuids && words <= one_each + 4 * info.cpuids);
        REQUIRE(kvmneg_contract_word(contract, UINT32_MAX, &word) == -ENOENT);
        check_portable(contract, &info);
}

#if defined(__x86_64__)
#define ENTRIES KVMNEG_CONTRACT_CPUIDS_MAX

/* Leaves with subleaves and without, those of the VMM, and of hypervisors. */
static const uint32_t leaves[] = {
        0x0, 0x1, 0x2, 0x4, 0x7, 0xb, 0xd, 0xf, 0x12, 0x14, 0x40000000, 0x40000001, 0x40000003, 0x40000004, 0x40000010,
        0x40000080, 0x40000100, 0x40000101, 0x80000001, 0x80000008, 0x8000001d, 0x80000021, 0x80000022,
};

/* Those of which all bound bits are the contract's after a clamp: their address is the same everywhere. */
static bool is_plain(uint32_t leaf) {
        return leaf == 0x1 || leaf == 0x7 || leaf == 0x80000001 || leaf == 0x80000008 || leaf == 0x80000021;
}

/* A table with room for `capacity` entries and not one byte more: a look behind it is seen. */
static struct kvmneg_cpuid *table(uint32_t capacity, const struct kvmneg_cpuid_entry *entries, uint32_t count) {
        struct kvmneg_cpuid *made = malloc(sizeof(*made) + capacity * sizeof(made->entries[0]));

        REQUIRE(made && count <= capacity);
        made->count = count;
        made->padding = 0;
        memcpy(made->entries, entries, count * sizeof(made->entries[0]));
        return made;
}

static void check_bound(const struct kvmneg_contract *contract, const struct kvmneg_cpuid *cpuid) {
        struct kvmneg_bound_word word;

        for (uint32_t n = 0; kvmneg_contract_word(contract, n, &word) == 0; n++) {
                char *at, last;
                uint32_t function, index;
                unsigned place;

                if (strncmp(word.word, "cpuid:", 6) != 0)
                        return; /* behind them: Hyper-V's are the last of CPUID */
                function = (uint32_t) strtoul(word.word + 6, &at, 16);
                if (!is_plain(function))
                        continue;
                index = (uint32_t) strtoul(at + 1, &at, 10);
                last = at[2]; /* of ".eax" to ".edx" */
                place = (unsigned) (last - 'a');
                for (uint32_t i = 0; i < cpuid->count; i++) {
                        const struct kvmneg_cpuid_entry *entry = &cpuid->entries[i];

                        if (entry->function == function && entry->index == index)
                                REQUIRE(((&entry->eax)[place] & word.mask) == word.value);
                }
        }
}

/* Returns how many entries there were at the end, 0 where there was no room or the contract binds what is the VMM's. */
static uint32_t clamp(const struct kvmneg_contract *contract, uint32_t capacity,
                      const struct kvmneg_cpuid_entry *entries, uint32_t count) {
        struct kvmneg_cpuid *cpuid = table(capacity, entries, count), *again;
        int r = kvmneg_clamp_cpuid(contract, cpuid, capacity);
        uint32_t now = cpuid->count;

        REQUIRE(r == -ENOSPC || r == -EOPNOTSUPP || (r >= 0 && r <= (int) now));
        REQUIRE(now <= capacity && now >= count && (r != -ENOSPC || now == capacity));
        if (r == -EOPNOTSUPP)
                REQUIRE(now == count && memcmp(cpuid->entries, entries, count * sizeof(entries[0])) == 0);
        if (r >= 0) {
                check_bound(contract, cpuid);
                again = table(now, cpuid->entries, now);
                REQUIRE(kvmneg_clamp_cpuid(contract, again, now) == 0 && again->count == now);
                REQUIRE(memcmp(again->entries, cpuid->entries, now * sizeof(cpuid->entries[0])) == 0);
                free(again);
        }
        free(cpuid);
        return r >= 0 ? now : 0;
}

static uint32_t draw(uint64_t *state) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        return (uint32_t) (*state >> 33);
}

/* Entries by a seed, duplicates and odd flags among them. */
static uint32_t fill(struct kvmneg_cpuid_entry *entries, uint32_t most, uint64_t state) {
        uint32_t count = draw(&state) % (most + 1);

        for (uint32_t i = 0; i < count; i++) {
                entries[i] = (struct kvmneg_cpuid_entry) { .function = leaves[draw(&state) % (sizeof(leaves) / 4)] };
                entries[i].index = draw(&state) % 8 ? draw(&state) % 3 : draw(&state);
                entries[i].flags = draw(&state) % 4 ? entries[i].index != 0 : draw(&state);
                for (unsigned place = 0; place < 4; place++)
                        (&entries[i].eax)[place] = draw(&state) % 3 ? draw(&state) << 1 : 0;
        }
        return count;
}

static void clamp_all(const struct kvmneg_contract *contract, const uint8_t digest[static 32]) {
        static const struct kvmneg_cpuid_entry hypervisors[] = {
                { .function = 0x40000000, .eax = 0x40000005 },
                { .function = 0x40000001, .eax = 0x31237648 },                                   /* "Hv#1" */
                { .function = 0x40000100, .ebx = 0x4b4d564b, .ecx = 0x564b4d56, .edx = 0x4d },   /* "KVMKVMKVM" */
                { .function = 0xd, .flags = 1, .eax = 0xff, .edx = 0x80000000 },
        };
        struct kvmneg_cpuid_entry drawn[ENTRIES];
        struct kvmneg_cpuid *large;
        uint32_t needed, count;
        uint64_t seed;

        needed = clamp(contract, ENTRIES, drawn, 0);
        if (needed > 0)
                REQUIRE(clamp(contract, needed - 1, drawn, 0) == 0);
        clamp(contract, ENTRIES, hypervisors, 4);
        memcpy(&seed, digest, sizeof(seed));
        count = fill(drawn, seed % 8 ? 24 : ENTRIES, seed);
        clamp(contract, ENTRIES, drawn, count);
        clamp(contract, count, drawn, count);
        large = calloc(1, sizeof(*large) + (ENTRIES + 1) * sizeof(large->entries[0]));
        REQUIRE(large);
        large->count = ENTRIES + 1;
        REQUIRE(kvmneg_clamp_cpuid(contract, large, ENTRIES + 1) == -E2BIG);
        free(large);
}

static void clamp_if_x86(const struct kvmneg_contract *contract, const uint8_t *data) {
        struct kvmneg_contract_info info;
        struct kvmneg_cpuid none = {};

        kvmneg_contract_describe(contract, &info);
        if (info.architecture == KVMNEG_X86_64)
                clamp_all(contract, data + 32);
        else
                REQUIRE(kvmneg_clamp_cpuid(contract, &none, 0) == -ENOEXEC);
}
#endif

/* The same bytes by a descriptor: the same answer. */
static void open_fd(const uint8_t *data, size_t size, int expected, const struct kvmneg_contract_error *error) {
        static int fd = -1;
        struct kvmneg_contract_error found = {};
        struct kvmneg_contract *contract = NULL;
        uint64_t kept;

        if (fd < 0)
                fd = memfd_create("contract", MFD_CLOEXEC);
        REQUIRE(fd >= 0 && ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t) size);
        REQUIRE(lseek(fd, 0, SEEK_SET) == 0);
        REQUIRE(kvmneg_contract_open_fd(fd, &contract, &found) == expected);
        if (expected == 0)
                REQUIRE(memcmp(kvmneg_contract_bytes(contract, &kept), data, size) == 0 && kept == size);
        else
                REQUIRE(!contract && found.offset == error->offset && strcmp(found.what, error->what) == 0);
        kvmneg_contract_free(contract);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
        struct kvmneg_contract_error error = { .offset = UINT64_MAX };
        struct kvmneg_contract *contract = NULL;
        int r = kvmneg_contract_open_memory(data, size, &contract, &error);

        if (r < 0) {
                REQUIRE(r == -EBADMSG && !contract && error.offset <= size && error.what && *error.what);
        } else {
                REQUIRE(r == 0 && error.offset == UINT64_MAX && !error.what);
                look(contract, data, size);
#if defined(__x86_64__)
                clamp_if_x86(contract, data);
#endif
        }
        open_fd(data, size, r, &error);
        kvmneg_contract_free(contract);
        return 0;
}
