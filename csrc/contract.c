/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Opening a contract, and what it says of itself. */

#define _GNU_SOURCE

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "contract.h"

#define FIRST_READ 16384 /* an x86 contract has 7 to 10 KiB, one of arm64 20 */

static int too_large(struct kvmneg_contract_error *ret_error) {
        if (ret_error)
                *ret_error = (struct kvmneg_contract_error) { .offset = KVMNEG_CONTRACT_BYTES_MAX,
                                                              .what = "larger than any contract" };
        return -EBADMSG;
}

/* Checks what was read, and hands it over or releases it. */
static int finish(struct kvmneg_contract *contract, uint64_t size, struct kvmneg_contract **ret_contract,
                  struct kvmneg_contract_error *ret_error) {
        struct kvmneg_contract_error error;
        int r = kvmneg_internal_check_contract(contract, size, &error);

        if (r < 0) {
                free(contract);
                if (ret_error)
                        *ret_error = error;
                return r;
        }
        *ret_contract = contract;
        return 0;
}

int kvmneg_contract_open_memory(const void *data, uint64_t size, struct kvmneg_contract **ret_contract,
                                struct kvmneg_contract_error *ret_error) {
        struct kvmneg_contract *contract;

        if (size > KVMNEG_CONTRACT_BYTES_MAX)
                return too_large(ret_error);
        contract = kvmneg_internal_table(sizeof(*contract), size, 1);
        if (!contract)
                return -ENOMEM;
        if (size > 0)
                memcpy(contract->bytes, data, size);
        return finish(contract, size, ret_contract, ret_error);
}

/* Reads until `capacity` or the end. Returns 0 and how much there is. */
static int fill(int fd, uint8_t *bytes, uint64_t capacity, uint64_t *size) {
        while (*size < capacity) {
                ssize_t n = read(fd, bytes + *size, capacity - *size);
                if (n < 0 && errno == EINTR)
                        continue;
                if (n < 0)
                        return negative_errno();
                if (n == 0)
                        return 0;
                *size += (uint64_t) n;
        }
        return 0;
}

int kvmneg_contract_open_fd(int fd, struct kvmneg_contract **ret_contract, struct kvmneg_contract_error *ret_error) {
        struct kvmneg_contract *contract = NULL;
        uint64_t capacity = FIRST_READ, size = 0;
        int saved = errno, r;

        for (;;) {
                struct kvmneg_contract *larger = realloc(contract, sizeof(*contract) + capacity);
                if (!larger) {
                        free(contract);
                        return -ENOMEM;
                }
                contract = larger;
                r = fill(fd, contract->bytes, capacity, &size);
                if (r < 0 || size < capacity)
                        break;
                if (capacity > KVMNEG_CONTRACT_BYTES_MAX) {
                        free(contract);
                        return too_large(ret_error);
                }
                capacity *= 4; /* the last size is one above the limit, so that a longer file is told apart */
                if (capacity > KVMNEG_CONTRACT_BYTES_MAX)
                        capacity = KVMNEG_CONTRACT_BYTES_MAX + 1;
        }
        errno = saved;
        if (r < 0) {
                free(contract);
                return r;
        }
        memset(contract, 0, sizeof(*contract));
        return finish(contract, size, ret_contract, ret_error);
}

int kvmneg_contract_open(const char *path, struct kvmneg_contract **ret_contract, struct kvmneg_contract_error *ret_error) {
        int saved = errno, fd, r;

        /* O_NONBLOCK: a FIFO without a writer is a bad path, not a reason to wait. */
        fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
        if (fd < 0) {
                r = negative_errno();
                errno = saved;
                return r;
        }
        r = kvmneg_contract_open_fd(fd, ret_contract, ret_error);
        kvmneg_close(fd);
        return r;
}

struct kvmneg_contract *kvmneg_contract_free(struct kvmneg_contract *contract) {
        free(contract);
        return NULL;
}

void kvmneg_contract_describe(const struct kvmneg_contract *contract, struct kvmneg_contract_info *ret_info) {
        const struct contract_header *header = contract->header;
        uint64_t tsc = contract->tsc;

        *ret_info = (struct kvmneg_contract_info) {
                .architecture = header->architecture,
                .grade = header->grade,
                .fence_generation = header->generation,
                .cpuids = contract->counts[CPUIDS],
                .msrs = contract->counts[MSRS],
                .registers = contract->counts[REGISTERS],
                .capabilities = contract->counts[CAPABILITIES],
                .portable = contract->counts[PORTABLE],
                .flags = contract->counts[FLAGS],
                .tsc_khz = (uint32_t) tsc == tsc >> 32 ? (uint32_t) tsc : 0,
                .vcpu_features = contract->features,
        };
        memcpy(ret_info->fence, header->fence, sizeof(ret_info->fence));
        memcpy(ret_info->digest, header->digest, sizeof(ret_info->digest));
}

const void *kvmneg_contract_bytes(const struct kvmneg_contract *contract, uint64_t *ret_size) {
        *ret_size = contract->header->total;
        return contract->bytes;
}

const struct kvmneg_portable *kvmneg_contract_portable(const struct kvmneg_contract *contract, uint32_t *ret_count) {
        *ret_count = contract->counts[PORTABLE];
        return contract->portable;
}

/* The register number `i` of the CPUID section, those without bound bits left out; counts `i` down by them. */
static bool cpuid_word(const struct kvmneg_contract *contract, uint32_t *i, struct kvmneg_bound_word *ret_word) {
        for (uint32_t n = 0; n < contract->counts[CPUIDS]; n++) {
                const struct contract_cpuid *entry = &contract->cpuids[n];
                for (unsigned place = 0; place < 4; place++) {
                        if (entry->masks[place] == 0)
                                continue;
                        if (*i > 0) {
                                (*i)--;
                                continue;
                        }
                        ret_word->value = entry->values[place];
                        ret_word->mask = entry->masks[place];
                        kvmneg_internal_cpuid_word(ret_word->word, entry->space, entry->function, entry->index, place);
                        return true;
                }
        }
        return false;
}

int kvmneg_contract_word(const struct kvmneg_contract *contract, uint32_t i, struct kvmneg_bound_word *ret_word) {
        if (cpuid_word(contract, &i, ret_word))
                return 0;
        if (i < contract->counts[MSRS]) {
                const struct contract_msr *msr = &contract->msrs[i];
                *ret_word = (struct kvmneg_bound_word) { .value = msr->value, .mask = msr->mask };
                kvmneg_internal_number_word(ret_word->word, "msr:", msr->index);
                return 0;
        }
        i -= contract->counts[MSRS];
        if (i < contract->counts[REGISTERS]) {
                const struct kvmneg_bound_register *entry = &contract->registers[i];
                *ret_word = (struct kvmneg_bound_word) { .value = entry->value, .mask = entry->mask };
                kvmneg_internal_number_word(ret_word->word, "arm64:", entry->id);
                return 0;
        }
        i -= contract->counts[REGISTERS];
        if (i < contract->counts[CAPABILITIES]) {
                const struct contract_capability *entry = &contract->capabilities[i];
                *ret_word = (struct kvmneg_bound_word) { .value = entry->value, .mask = entry->mask };
                kvmneg_internal_name_word(ret_word->word, entry->name);
                return 0;
        }
        return -ENOENT;
}
