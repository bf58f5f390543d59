/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * A contract applied by the library, and the ioctls of that application by themselves: they are written down, with their
 * arguments, and made again, the same ones in the same order, nothing computed, nothing compared. For programs that are
 * linked with --wrap=ioctl.
 */
#pragma once

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <linux/kvm.h>

#include "kvmneg.h"

#define RECORDS 256
#define ARGUMENT 16384

struct record {
        int of_vcpu;
        unsigned long request;
        unsigned long number; /* an argument that is no pointer */
        size_t size;          /* of what a pointer leads to */
        uint64_t argument[ARGUMENT / 8];
};

static struct record *records;
static unsigned count;
static int recording, vm, vcpu;
static struct kvmneg_cpuid *table;

int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);

static int is_number(unsigned long request) {
        return request == KVM_CHECK_EXTENSION || request == KVM_SET_TSC_KHZ || request == KVM_GET_TSC_KHZ;
}

static size_t size_of(unsigned long request, const void *argument) {
        if (request == KVM_SET_CPUID2 || request == KVM_GET_CPUID2)
                return sizeof(struct kvm_cpuid2) + ((const struct kvm_cpuid2 *) argument)->nent * sizeof(struct kvm_cpuid_entry2);
        if (request == KVM_GET_MSRS || request == KVM_SET_MSRS)
                return sizeof(struct kvm_msrs) + ((const struct kvm_msrs *) argument)->nmsrs * sizeof(struct kvm_msr_entry);
        return request >> 16 & 0x3fff;
}

int __wrap_ioctl(int fd, unsigned long request, ...) {
        va_list arguments;
        unsigned long argument;

        va_start(arguments, request);
        argument = va_arg(arguments, unsigned long);
        va_end(arguments);
        if (recording && count < RECORDS) {
                struct record *record = &records[count++];
                record->of_vcpu = fd == vcpu;
                record->request = request;
                record->number = argument;
                record->size = is_number(request) ? 0 : size_of(request, (void *) argument);
                memcpy(record->argument, (void *) (record->size ? argument : (unsigned long) record), record->size);
        }
        return __real_ioctl(fd, request, argument);
}

static uint64_t now(void) {
        struct timespec time;

        clock_gettime(CLOCK_MONOTONIC, &time);
        return (uint64_t) time.tv_sec * 1000000000 + (uint64_t) time.tv_nsec;
}

static void die(const char *what, int r, int status) {
        fprintf(stderr, "%s: %s: %s\n", program_invocation_short_name, what, strerror(-r));
        exit(status);
}

static uint64_t ours(const struct kvmneg_contract *contract) {
        struct kvmneg_failure failure = {};
        uint64_t begun = now();
        int r = kvmneg_vm_apply(contract, vm, NULL, &failure, NULL);

        if (r >= 0)
                r = kvmneg_vcpu_init(contract, vm, vcpu, &failure, NULL);
        if (r >= 0)
                r = kvmneg_vcpu_apply(contract, vcpu, table, &failure, NULL);
        if (r < 0)
                die(failure.word, r, 1);
        return now() - begun;
}

/* What an ioctl wrote over its head is put back while the clock runs: eight bytes each. */
static uint64_t bare(void) {
        uint64_t begun = now();

        for (unsigned i = 0; i < count; i++) {
                struct record *record = &records[i];
                uint64_t head = record->argument[0];
                unsigned long argument = record->size ? (unsigned long) record->argument : record->number;

                if (__real_ioctl(record->of_vcpu ? vcpu : vm, record->request, argument) < 0)
                        die("an ioctl that worked before", -1, 1);
                record->argument[0] = head;
        }
        return now() - begun;
}

static int compare(const void *a, const void *b) {
        uint64_t x = *(const uint64_t *) a, y = *(const uint64_t *) b;

        return (x > y) - (x < y);
}

__attribute__((unused)) static uint64_t median(uint64_t *values, unsigned rounds) {
        qsort(values, rounds, sizeof(values[0]), compare);
        return values[rounds / 2];
}
