/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A contract in memory: the file's bytes, and where each section of it begins. kvmneg/policy/contract.py has the form. */
#pragma once

#include "internal.h"
#include "sha256.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "contracts are little-endian, and read as they are"
#endif

struct contract_header {
        uint8_t magic[8];
        uint32_t version;
        uint32_t architecture;
        uint32_t total;
        uint32_t size;
        uint32_t grade;
        uint32_t reserved;
        uint8_t digest[SHA256_BYTES];
        uint64_t generation;
        uint8_t fence[SHA256_BYTES];
        uint32_t counts[6]; /* in the order of enum contract_section */
        uint8_t tail[32];
};

enum contract_section { CPUIDS, MSRS, REGISTERS, CAPABILITIES, PORTABLE, FLAGS, SECTIONS };

enum { SPACE_CPUID, SPACE_HYPERV };

struct contract_cpuid {
        uint32_t function;
        uint32_t index;
        uint32_t space;
        uint32_t reserved;
        uint32_t values[4]; /* eax, ebx, ecx, edx */
        uint32_t masks[4];
};

struct contract_msr {
        uint32_t index;
        uint32_t reserved;
        uint64_t value;
        uint64_t mask;
};

#define CAPABILITY_NAME 40

struct contract_capability {
        char name[CAPABILITY_NAME]; /* padded with NUL, none where it fills it */
        uint32_t action;
        uint32_t reserved;
        uint64_t value;
        uint64_t mask;
};

/* Offsets are those of the file; the bytes lie behind it, aligned to 8 as malloc(3) gives it. */
struct kvmneg_contract {
        const struct contract_header *header;
        const struct contract_cpuid *cpuids;
        const struct contract_msr *msrs;
        const struct kvmneg_bound_register *registers;
        const struct contract_capability *capabilities;
        const struct kvmneg_portable *portable;
        const uint32_t *flags;
        uint32_t counts[SECTIONS];
        uint64_t tsc;      /* tsc:khz, 0 where it is not bound */
        uint64_t features; /* arm:vcpu-features */
        uint8_t bytes[] __attribute__((aligned(8)));
};

/* An arm64 register of a contract: what struct kvmneg_register is on arm64. */
struct kvmneg_bound_register {
        uint64_t id;
        uint64_t value;
        uint64_t mask;
};

/* Fills in all but `bytes`, of which there are `size`. Returns 0, or -EBADMSG with `error`. */
int kvmneg_internal_check_contract(struct kvmneg_contract *contract, uint64_t size, struct kvmneg_contract_error *error);

/* Room for a word's address, and the address: of a CPUID register, of another number ("msr:", "arm64:"), of a name. */
typedef char word_text[KVMNEG_WORD_CHARACTERS];
void kvmneg_internal_cpuid_word(word_text ret_word, uint32_t space, uint32_t function, uint32_t index, unsigned place);
void kvmneg_internal_number_word(word_text ret_word, const char *kind, uint64_t number);
void kvmneg_internal_name_word(word_text ret_word, const char name[static CAPABILITY_NAME]);
void kvmneg_internal_text_word(word_text ret_word, const char *word);

/* How an answer to KVM_CHECK_EXTENSION has to compare: it has every bound bit that is granted, or is as large a number. */
enum compared { BITS, MINIMUM };

/* The capabilities that this architecture's contracts may have, in the order of names without "kvm:". */
struct known_capability {
        const char *name;
        uint32_t number;
        enum compared how;
};
extern const struct known_capability kvmneg_internal_capabilities[];
extern const size_t kvmneg_internal_capability_count;

/* Every capability of a contract against what this VM's KVM answers. */
int kvmneg_internal_check_capabilities(const struct kvmneg_contract *contract, int vm_fd, struct kvmneg_failure *failure,
                                       struct kvmneg_trace *trace);

/* What a contract grants of a capability, 0 where it does not name it. */
uint64_t kvmneg_internal_granted(const struct kvmneg_contract *contract, const char *name);

/* Fills in `failure`, which may be NULL, but for its word. Returns `r`. */
static inline int fail(struct kvmneg_failure *failure, struct kvmneg_failure what, int r) {
        if (failure) {
                what.error = r;
                *failure = what;
        }
        return r;
}
