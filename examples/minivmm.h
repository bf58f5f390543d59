/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What minivmm.c and minivmm-move-arm64.c share: parts that any VMM has of its own, and how they tell of failures. */
#pragma once

#define _GNU_SOURCE 1

#include <errno.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <kvmneg-client.h>
#include <kvmneg.h>

enum { MEMORY = 64 * 1024, CODE = 0x1000, TABLE = 0x4000, WORDS = 1024, TIMEOUT_MS = 30000 };

/* A word of the contract, where the guest reads it, and what it saw. */
struct word {
        struct kvmneg_bound_word bound;
        uint32_t leaf, subleaf; /* x86 */
        unsigned place;         /* x86: of the register, eax is 0 */
        uint64_t id;            /* arm64 */
        uint64_t seen;
};

/* The parts of a VM. */
struct machine {
        int kvm, vm, vcpu, vgic;
        unsigned char *memory;
        struct kvm_run *run;
        size_t run_size;
};

static inline int die(const char *what, int r) {
        fprintf(stderr, "minivmm: %s: %s\n", what, strerror(r < 0 ? -r : errno));
        exit(1); /* kvmneg_end() is not needed: the grant ends with this process */
}

static inline int check(const char *what, int r) {
        return r < 0 ? die(what, 0) : r;
}

/* Says which word of a contract failed, and whether to go on. */
static inline void applied(const char *what, int r, const struct kvmneg_failure *failure, bool anyway) {
        if (r >= 0)
                return;
        fprintf(stderr, "minivmm: %s: %s: asked 0x%" PRIx64 " of 0x%" PRIx64 ", got 0x%" PRIx64 ": %s\n", what, failure->word,
                failure->asked, failure->mask, failure->got, strerror(-r));
        if (!anyway)
                exit(1);
}

/* Says why the daemon said no. */
static inline void refused(const char *what, int r, struct kvmneg_refusal *refusal) {
        if (r >= 0)
                return;
        if (r != -EREMOTEIO)
                die(what, r);
        fprintf(stderr, "minivmm: %s: %s\n%s%s\n", refusal->name, refusal->message, refusal->blockers, refusal->hint);
        kvmneg_refusal_free(refusal);
        exit(1);
}

/* Whether the guest sees what the contract promised; says so where it does not. */
static inline bool is_kept(const struct word *word) {
        if (!((word->seen ^ word->bound.value) & word->bound.mask))
                return true;
        printf("%s: promised 0x%" PRIx64 " of 0x%" PRIx64 ", the guest sees 0x%" PRIx64 "\n", word->bound.word,
               word->bound.value, word->bound.mask, word->seen);
        return false;
}

static inline void open_vm(struct machine *machine) {
        int r = kvmneg_open("/dev/kvm", &machine->kvm, NULL);

        if (r < 0)
                die("/dev/kvm", r);
        r = kvmneg_create_vm(machine->kvm, &machine->vm, NULL);
        if (r < 0)
                die("KVM_CREATE_VM", r);
}

/* Gives the VM its memory, and maps what KVM_RUN says. */
static inline void map(struct machine *machine, uint64_t base) {
        struct kvm_userspace_memory_region region = { .guest_phys_addr = base, .memory_size = MEMORY };

        machine->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        machine->run_size = (size_t) check("KVM_GET_VCPU_MMAP_SIZE", ioctl(machine->kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
        machine->run = mmap(NULL, machine->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, machine->vcpu, 0);
        if (machine->memory == MAP_FAILED || machine->run == MAP_FAILED)
                die("mmap", 0);
        region.userspace_addr = (uint64_t) machine->memory;
        check("KVM_SET_USER_MEMORY_REGION", ioctl(machine->vm, KVM_SET_USER_MEMORY_REGION, &region));
}

static inline void destroy(struct machine *machine) {
        munmap(machine->run, machine->run_size);
        munmap(machine->memory, MEMORY);
        kvmneg_close(machine->vgic);
        kvmneg_close(machine->vcpu);
        kvmneg_close(machine->vm);
        kvmneg_close(machine->kvm);
}

#if defined(__aarch64__)
#include "minivmm-arm64.h"
#else
enum { BASE = 0 };
#endif
