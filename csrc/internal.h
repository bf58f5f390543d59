/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the files of libkvmneg share and nobody else sees. */
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>

#include "kvmneg.h"

/* -errno, and never 0: the compiler and we may rely on it. */
static inline int negative_errno(void) {
        return errno > 0 ? -errno : -EIO;
}

/* ioctl(2) with an argument, as a negative errno or what it returned; counted in `trace`. */
int kvmneg_internal_ioctl(int fd, unsigned long request, unsigned long argument, struct kvmneg_trace *trace);

static inline int ioctl_pointer(int fd, unsigned long request, void *argument, struct kvmneg_trace *trace) {
        return kvmneg_internal_ioctl(fd, request, (unsigned long) argument, trace);
}

/* Zeroed memory for a header and `count` items behind it. NULL when the size overflows or there is none. */
void *kvmneg_internal_table(size_t header, size_t count, size_t item);

/* The next size to try after E2BIG, at most `maximum`; 0 when that was already tried. */
uint32_t kvmneg_internal_grow(uint32_t capacity, uint32_t maximum);

/* Whether a negative errno says "this KVM does not have it" rather than "it went wrong". */
bool kvmneg_internal_absent(int r);

/* KVM_CREATE_VCPU (api.rst 4.7), number 0. */
int kvmneg_internal_create_vcpu(int vm_fd, int *ret_vcpu_fd, struct kvmneg_trace *trace);

#if defined(__x86_64__)
/* Keeps the error of a part that this KVM may lack; passes any other failure on. */
int kvmneg_internal_optional(int r, int32_t *error);

/* KVM_GET_MSR_FEATURE_INDEX_LIST or KVM_GET_MSR_INDEX_LIST (api.rst 4.3), beginning with room for `capacity`. */
int kvmneg_internal_list_msrs(int kvm_fd, unsigned long request, uint32_t capacity, struct kvmneg_indices **ret_list,
                              struct kvmneg_trace *trace);

/* What guests carry, into a probe that has its capabilities; `vcpu_fd` may be -1. */
int kvmneg_internal_probe_state(int kvm_fd, int vcpu_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace);
#endif
