/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* libkvmneg on a KVM that shows a given table of CPUID and has nothing else. A shared library, with --wrap=ioctl. */
#include <errno.h>
#include <linux/kvm.h>
#include <stdarg.h>
#include <string.h>

#include "kvmneg.h"

static const struct kvmneg_cpuid *shown;

int __wrap_ioctl(int fd, unsigned long request, ...);
int verify_shown(const struct kvmneg_contract *contract, const struct kvmneg_cpuid *table, struct kvmneg_failure *failure);

int __wrap_ioctl(int fd, unsigned long request, ...) {
        struct kvm_cpuid2 *wanted;
        va_list arguments;

        (void) fd;
        va_start(arguments, request);
        wanted = va_arg(arguments, void *);
        va_end(arguments);
        if (request != KVM_GET_CPUID2) {
                errno = ENOTTY;
                return -1;
        }
        memcpy(wanted, shown, sizeof(*shown) + shown->count * sizeof(shown->entries[0]));
        return 0;
}

int verify_shown(const struct kvmneg_contract *contract, const struct kvmneg_cpuid *table, struct kvmneg_failure *failure) {
        shown = table;
        return kvmneg_vcpu_verify(contract, -1, failure, NULL);
}
