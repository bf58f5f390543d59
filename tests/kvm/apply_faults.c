/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Applies and verifies a contract once for each of its ioctls, which fails. Linked with libkvmneg and --wrap=ioctl.
 *
 *     apply_faults CONTRACT ERRNO
 *
 * prints for each: the result, the failure's error, stage, why and ioctl; at last "whole" for the run without a fault.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "kvmneg.h"

static int left = -1, error;

int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);

int __wrap_ioctl(int fd, unsigned long request, ...) {
        va_list arguments;
        unsigned long argument;

        va_start(arguments, request);
        argument = va_arg(arguments, unsigned long);
        va_end(arguments);
        if (left >= 0 && left-- == 0) {
                errno = error;
                return -1;
        }
        return __real_ioctl(fd, request, argument);
}

static int apply(const struct kvmneg_contract *contract, int vm, int vcpu, const struct kvmneg_cpuid *table,
                 struct kvmneg_failure *failure) {
        int r = kvmneg_vm_apply(contract, vm, NULL, failure, NULL);

        if (r >= 0)
                r = kvmneg_vcpu_init(contract, vm, vcpu, failure, NULL);
        if (r >= 0)
                r = kvmneg_vcpu_apply(contract, vcpu, table, failure, NULL);
        return r < 0 ? r : kvmneg_vcpu_verify(contract, vcpu, failure, NULL);
}

int main(int argc, char **argv) {
        struct kvmneg_contract *contract;
        struct kvmneg_cpuid *table;
        int kvm;

        if (argc != 3 || kvmneg_contract_open(argv[1], &contract, NULL) < 0 || kvmneg_open("/dev/kvm", &kvm, NULL) < 0 ||
            kvmneg_get_supported_cpuid(kvm, 0, &table, NULL) < 0)
                return 2;
        error = atoi(argv[2]);
        for (int n = 0;; n++) {
                struct kvmneg_failure failure = {};
                int vm, vcpu, r;

                if (kvmneg_create_scratch(kvm, &vm, &vcpu, NULL) < 0)
                        return 3;
                errno = 99;
                left = n;
                r = apply(contract, vm, vcpu, table, &failure);
                if (errno != 99)
                        return 4; /* the library leaves it alone */
                kvmneg_close(vcpu);
                kvmneg_close(vm);
                if (left >= 0) {
                        left = -1;
                        printf("whole %d\n", r);
                        break;
                }
                printf("%d %d %u %u %s %s\n", r, failure.error, failure.stage, failure.why,
                       failure.request ? kvmneg_ioctl_name(failure.request) : "-", failure.word[0] ? failure.word : "-");
        }
        kvmneg_free(table);
        kvmneg_contract_free(contract);
        kvmneg_close(kvm);
        return 0;
}
