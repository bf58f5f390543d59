/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Drives libkvmneg's reader of contracts.
 *
 *     reader mutate CONTRACT all|bits|one   changes of each byte: to all others, each bit, one bit; with the digest
 *                                         as it was and repaired
 *     reader truncate CONTRACT            every length below, as it is and with size and digest repaired
 *     reader open CONTRACT                a file, a descriptor, memory; allocations and reads that fail
 *     reader digests                      SHA-256 of 0 to 300 bytes, one a line
 *     reader words                        addresses of words at the ends of what they may be, one a line
 *     reader look FILE...                 takes or refuses each: "1" or "0"
 *
 * Prints what it counted; exits with 1 and says what, where the reader did something that it may not. Linked with
 * --wrap=calloc, realloc and read.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "contract.h"
#include "kvmneg.h"

#define DIGEST 32
#define TOTAL 16

static int fail_allocation = -1, fail_read = -1, read_error;

void *__real_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t size);
void *__wrap_realloc(void *memory, size_t size);
ssize_t __real_read(int fd, void *data, size_t size);
ssize_t __wrap_read(int fd, void *data, size_t size);

void *__wrap_calloc(size_t count, size_t size) {
        return fail_allocation >= 0 && fail_allocation-- == 0 ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *memory, size_t size) {
        return fail_allocation >= 0 && fail_allocation-- == 0 ? NULL : __real_realloc(memory, size);
}

/* Short reads, and now and then an error: what a pipe does. */
ssize_t __wrap_read(int fd, void *data, size_t size) {
        if (fail_read >= 0 && fail_read-- == 0) {
                errno = read_error;
                return -1;
        }
        return __real_read(fd, data, size > 1000 ? 1000 : size);
}

static void die(const char *what, uint64_t offset) {
        fprintf(stderr, "reader: %s at %llu\n", what, (unsigned long long) offset);
        exit(1);
}

static uint8_t *load(const char *path, uint64_t *size) {
        uint8_t *data = malloc(KVMNEG_CONTRACT_BYTES_MAX + 64);
        FILE *file = fopen(path, "rb");

        if (!file || !data)
                die("cannot read the contract", 0);
        *size = fread(data, 1, KVMNEG_CONTRACT_BYTES_MAX + 64, file);
        fclose(file);
        return data;
}

static void repair(uint8_t *data, uint64_t size) {
        uint8_t digest[SHA256_BYTES];

        kvmneg_internal_sha256(data, size, DIGEST, digest);
        memcpy(data + DIGEST, digest, sizeof(digest));
}

/* Whether it is taken. One that is taken is held in full: its words and bytes are looked at. */
static bool taken(const uint8_t *data, uint64_t size, uint64_t offset) {
        struct kvmneg_contract_error error = { .offset = UINT64_MAX };
        struct kvmneg_contract *contract = (void *) &error;
        struct kvmneg_bound_word word;
        struct kvmneg_contract_info info;
        uint64_t kept;
        uint32_t n = 0, expected, count;
        int r = kvmneg_contract_open_memory(data, size, &contract, &error);

        if (r < 0) {
                if (r != -EBADMSG || contract != (void *) &error || error.offset > size || !error.what)
                        die("refused without saying where", offset);
                return false;
        }
        if (error.offset != UINT64_MAX)
                die("taken with an error", offset);
        if (memcmp(kvmneg_contract_bytes(contract, &kept), data, size) != 0 || kept != size)
                die("taken and other than it was", offset);
        kvmneg_contract_describe(contract, &info);
        while (kvmneg_contract_word(contract, n, &word) == 0) {
                if (word.value & ~word.mask || !word.mask || strlen(word.word) < 4)
                        die("a word that is none", offset);
                n++;
        }
        expected = info.msrs + info.registers + info.capabilities;
        if (n < expected + info.cpuids || n > expected + 4 * info.cpuids)
                die("words are lost", offset);
        if (kvmneg_contract_portable(contract, &count) == NULL || count != info.portable)
                die("portable state is lost", offset);
        kvmneg_contract_free(contract);
        return true;
}

static int mutate(const char *path, const char *how) {
        bool all = strcmp(how, "all") == 0, one = strcmp(how, "one") == 0;
        uint64_t size, tried = 0, repaired_taken = 0;
        uint8_t *data = load(path, &size), *copy = malloc(size);

        if (!taken(data, size, 0))
                die("the contract itself is refused", 0);
        for (uint64_t at = 0; at < size; at++)
                for (unsigned flip = one ? 1u << at % 8 : 1; flip < 256; flip += one ? 256 : all ? 1 : flip) {
                        bool in_digest = at >= DIGEST && at < DIGEST + SHA256_BYTES;

                        memcpy(copy, data, size);
                        copy[at] ^= (uint8_t) flip;
                        tried++;
                        if (taken(copy, size, at))
                                die("a change that the digest does not know is taken", at);
                        repair(copy, size);
                        if (taken(copy, size, at)) {
                                if (!in_digest && memcmp(copy, data, size) == 0)
                                        die("two contracts are one", at);
                                repaired_taken++;
                        }
                }
        printf("%llu %llu\n", (unsigned long long) tried, (unsigned long long) repaired_taken);
        free(copy);
        free(data);
        return 0;
}

static int truncate_all(const char *path) {
        uint64_t size;
        uint8_t *data = load(path, &size);

        for (uint64_t length = 0; length < size; length++) {
                uint8_t *copy = malloc(length ? length : 1); /* of that size: a look behind it is seen */
                uint32_t total = (uint32_t) length;

                memcpy(copy, data, length);
                if (taken(copy, length, length))
                        die("a part is taken", length);
                if (length >= DIGEST + SHA256_BYTES) {
                        repair(copy, length);
                        if (taken(copy, length, length))
                                die("a part with a good digest is taken", length);
                        memcpy(copy + TOTAL, &total, sizeof(total));
                        repair(copy, length);
                        if (taken(copy, length, length))
                                die("a part with a good size is taken", length);
                }
                free(copy);
        }
        data[size] = 0;
        if (taken(data, size + 1, size))
                die("more than a contract is taken", size);
        printf("%llu\n", (unsigned long long) size);
        free(data);
        return 0;
}

static int open_fd(const char *path) {
        int fd = open(path, O_RDONLY | O_CLOEXEC), r;
        struct kvmneg_contract *contract = NULL;

        r = kvmneg_contract_open_fd(fd, &contract, NULL);
        if ((r == 0) != (contract != NULL))
                die("a result without a contract", 0);
        kvmneg_contract_free(contract);
        close(fd);
        return r;
}

static int open_memory(const uint8_t *data, uint64_t size) {
        struct kvmneg_contract *contract = NULL;
        int r = kvmneg_contract_open_memory(data, size, &contract, NULL);

        kvmneg_contract_free(contract);
        return r;
}

static int open_all(const char *path) {
        struct kvmneg_contract_error error = {};
        struct kvmneg_contract *contract;
        uint64_t size;
        uint8_t *data = load(path, &size);

        printf("%d %d", kvmneg_contract_open(path, &contract, &error), open_fd(path));
        kvmneg_contract_free(contract);
        printf(" %d", open_memory(data, KVMNEG_CONTRACT_BYTES_MAX + 1));
        printf(" %d", open_memory(data, size - 1));
        printf(" %d", kvmneg_contract_open("/nonexistent", &contract, &error));
        printf(" %d", kvmneg_contract_open("/dev/zero", &contract, &error)); /* larger than any */
        printf(" %d", kvmneg_contract_open("/", &contract, NULL));
        for (unsigned i = 0; i < 2; i++) {
                fail_allocation = (int) i;
                printf(" %d", i == 0 ? open_memory(data, size) : kvmneg_contract_open("/dev/zero", &contract, NULL));
        }
        fail_allocation = -1;
        for (unsigned i = 0; i < 2; i++) {
                fail_read = 1;
                read_error = i == 0 ? EINTR : EIO;
                printf(" %d", open_fd(path));
        }
        errno = 77;
        printf(" %d %d\n", kvmneg_contract_open("/nonexistent", &contract, NULL), errno);
        free(data);
        return 0;
}

static int digests(void) {
        uint8_t data[300], digest[SHA256_BYTES];

        for (unsigned size = 0; size <= sizeof(data); size++) {
                for (unsigned zeroed = 0; zeroed < 2; zeroed++) {
                        for (unsigned i = 0; i < size; i++)
                                data[i] = (uint8_t) (i * 7 + size);
                        kvmneg_internal_sha256(data, size, zeroed && size >= 160 ? size / 2 : size, digest);
                        for (unsigned i = 0; i < sizeof(digest); i++)
                                printf("%02x", digest[i]);
                        printf(zeroed ? "\n" : " ");
                }
        }
        return 0;
}

static int words(void) {
        static const uint32_t numbers[] = { 0, 9, 10, 0x40000001, UINT32_MAX };
        char text[KVMNEG_WORD_CHARACTERS], name[CAPABILITY_NAME + 1] = "kvm:"; /* one more than it is to read */

        for (unsigned i = 0; i < 5; i++)
                for (unsigned place = 0; place < 4; place++) {
                        kvmneg_internal_cpuid_word(text, place % 2, numbers[i], numbers[4 - i], place);
                        puts(text);
                }
        for (unsigned i = 0; i < 5; i++) {
                kvmneg_internal_number_word(text, "msr:", numbers[i]);
                puts(text);
                kvmneg_internal_number_word(text, "arm64:", (uint64_t) numbers[i] << 32 | numbers[4 - i]);
                puts(text);
        }
        kvmneg_internal_name_word(text, name);
        puts(text);
        memset(name + 4, 'x', sizeof(name) - 4);
        kvmneg_internal_name_word(text, name);
        puts(text);
        kvmneg_internal_text_word(text, "arm:vcpu-features");
        puts(text);
        return 0;
}

static int look(int count, char **files) {
        for (int i = 0; i < count; i++) {
                uint64_t size;
                uint8_t *data = load(files[i], &size);

                printf("%d\n", taken(data, size, 0));
                free(data);
        }
        return 0;
}

int main(int argc, char **argv) {
        if (argc >= 3 && strcmp(argv[1], "look") == 0)
                return look(argc - 2, argv + 2);
        if (argc == 2 && strcmp(argv[1], "words") == 0)
                return words();
        if (argc == 4 && strcmp(argv[1], "mutate") == 0)
                return mutate(argv[2], argv[3]);
        if (argc == 3 && strcmp(argv[1], "truncate") == 0)
                return truncate_all(argv[2]);
        if (argc == 3 && strcmp(argv[1], "open") == 0)
                return open_all(argv[2]);
        if (argc == 2 && strcmp(argv[1], "digests") == 0)
                return digests();
        fprintf(stderr, "usage: reader mutate CONTRACT all|bits|one | truncate CONTRACT | open CONTRACT | look FILE... |"
                        " digests | words\n");
        return 2;
}
