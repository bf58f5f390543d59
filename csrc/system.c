/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What /dev/kvm offers on every architecture. */

#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "internal.h"
#include "kvm-constants.h"

#define CREATE_VM_TRIES 1000

static const struct {
        uint32_t request;
        const char *name;
} ioctl_names[] = {
#define NAME(request) { (uint32_t) (request), #request }
        NAME(KVM_GET_API_VERSION),
        NAME(KVM_CHECK_EXTENSION),
        NAME(KVM_CREATE_VM),
        NAME(KVM_CREATE_VCPU),
        NAME(KVM_ENABLE_CAP),
#if defined(__x86_64__)
        NAME(KVM_GET_SUPPORTED_CPUID),
        NAME(KVM_GET_EMULATED_CPUID),
        NAME(KVM_GET_SUPPORTED_HV_CPUID),
        NAME(KVM_GET_MSR_FEATURE_INDEX_LIST),
        NAME(KVM_GET_MSRS),
        NAME(KVM_SET_MSRS),
        NAME(KVM_SET_CPUID2),
        NAME(KVM_GET_CPUID2),
        NAME(KVM_GET_DEVICE_ATTR),
        NAME(KVM_GET_MSR_INDEX_LIST),
        NAME(KVM_X86_GET_MCE_CAP_SUPPORTED),
        NAME(KVM_X86_SETUP_MCE),
        NAME(KVM_GET_TSC_KHZ),
        NAME(KVM_SET_TSC_KHZ),
        NAME(KVM_GET_VCPU_MMAP_SIZE),
        NAME(KVM_SET_USER_MEMORY_REGION),
        NAME(KVM_SET_TSS_ADDR),
        NAME(KVM_SET_SIGNAL_MASK),
        NAME(KVM_GET_SREGS),
        NAME(KVM_SET_SREGS),
        NAME(KVM_SET_REGS),
        NAME(KVM_SET_VCPU_EVENTS),
        NAME(KVM_SET_XCRS),
        NAME(KVM_RUN),
#elif defined(__aarch64__)
        NAME(KVM_ARM_PREFERRED_TARGET),
        NAME(KVM_ARM_VCPU_INIT),
        NAME(KVM_ARM_VCPU_FINALIZE),
        NAME(KVM_ARM_GET_REG_WRITABLE_MASKS),
        NAME(KVM_GET_REG_LIST),
        NAME(KVM_GET_ONE_REG),
        NAME(KVM_SET_ONE_REG),
        NAME(KVM_CREATE_DEVICE),
        NAME(KVM_SET_DEVICE_ATTR),
        NAME(KVM_GET_DEVICE_ATTR),
        NAME(KVM_HAS_DEVICE_ATTR),
        NAME(KVM_GET_VCPU_MMAP_SIZE),
        NAME(KVM_SET_USER_MEMORY_REGION),
        NAME(KVM_SET_SIGNAL_MASK),
        NAME(KVM_RUN),
#endif
#undef NAME
};

const char *kvmneg_ioctl_name(uint32_t request) {
        for (size_t i = 0; i < sizeof(ioctl_names) / sizeof(ioctl_names[0]); i++)
                if (ioctl_names[i].request == request)
                        return ioctl_names[i].name;
        return NULL;
}

static void trace_add(struct kvmneg_trace *trace, uint32_t request, int error) {
        if (!trace)
                return;
        if (error) {
                trace->failed = request;
                trace->failed_error = error;
        }

        /* Backwards: a sweep of one ioctl finds its row, the newest, at once. */
        uint32_t count = trace->count < KVMNEG_TRACE_ROWS ? trace->count : KVMNEG_TRACE_ROWS;
        for (uint32_t i = count; i-- > 0;)
                if (trace->rows[i].request == request && trace->rows[i].error == error) {
                        trace->rows[i].calls++;
                        return;
                }
        if (count == KVMNEG_TRACE_ROWS) {
                trace->lost++;
                return;
        }
        trace->rows[count] = (struct kvmneg_trace_row) { .request = request, .error = error, .calls = 1 };
        trace->count = count + 1;
}

int kvmneg_internal_ioctl(int fd, unsigned long request, unsigned long argument, struct kvmneg_trace *trace) {
        int saved = errno;
        int r = ioctl(fd, request, argument);

        if (r < 0) {
                r = negative_errno();
                errno = saved;
        }
        trace_add(trace, (uint32_t) request, r < 0 ? -r : 0);
        return r;
}

void *kvmneg_internal_table(size_t header, size_t count, size_t item) {
        size_t size;

        if (__builtin_mul_overflow(count, item, &size) || __builtin_add_overflow(size, header, &size))
                return NULL;
        return calloc(1, size);
}

uint32_t kvmneg_internal_grow(uint32_t capacity, uint32_t maximum) {
        if (capacity >= maximum)
                return 0;
        return capacity > maximum / 2 ? maximum : capacity * 2;
}

bool kvmneg_internal_absent(int r) {
        return r == -EINVAL || r == -ENOTTY || r == -ENXIO || r == -EOPNOTSUPP;
}

int kvmneg_close(int fd) {
        if (fd >= 0) {
                int saved = errno;
                (void) close(fd); /* on Linux the descriptor is gone whatever close(2) answers */
                errno = saved;
        }
        return -1;
}

void *kvmneg_free(void *memory) {
        free(memory);
        return NULL;
}

int kvmneg_api_version(int kvm_fd, int *ret_version, struct kvmneg_trace *trace) {
        int r = kvmneg_internal_ioctl(kvm_fd, KVM_GET_API_VERSION, 0, trace);

        if (r < 0)
                return r;
        *ret_version = r;
        return 0;
}

/* Whether an open descriptor is a KVM that this library can talk to. */
static int verify_kvm(int fd, struct kvmneg_trace *trace) {
        struct stat st;
        int version, r;

        if (fstat(fd, &st) < 0)
                return negative_errno();
        if (!S_ISCHR(st.st_mode))
                return -ENOTTY; /* as KVM's ioctl would say, without asking something that may be anything */
        r = kvmneg_api_version(fd, &version, trace);
        if (r < 0)
                return r;
        return version == KVMNEG_KVM_API_VERSION ? 0 : -EPROTONOSUPPORT;
}

int kvmneg_open(const char *path, int *ret_kvm_fd, struct kvmneg_trace *trace) {
        /* O_NOCTTY, O_NONBLOCK: the path may be wrong, and a terminal or a FIFO must not take hold of us. */
        int fd = open(path, O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
        int r;

        if (fd < 0)
                return negative_errno();
        r = verify_kvm(fd, trace);
        if (r < 0) {
                kvmneg_close(fd);
                return r;
        }
        *ret_kvm_fd = fd;
        return 0;
}

/* Asks one descriptor for every capability. What KVM refuses for one capability is an answer about that one. */
static int sweep(int fd, int32_t values[static KVMNEG_CAPABILITIES], struct kvmneg_trace *trace) {
        for (unsigned long number = 0; number < KVMNEG_CAPABILITIES; number++) {
                int r = kvmneg_internal_ioctl(fd, KVM_CHECK_EXTENSION, number, trace);
                if (r < 0 && (r == -ENOTTY || !kvmneg_internal_absent(r)))
                        return r;
                values[number] = r;
        }
        return 0;
}

int kvmneg_get_capabilities(int kvm_fd, int vm_fd, struct kvmneg_capabilities *ret_capabilities,
                            struct kvmneg_trace *trace) {
        struct kvmneg_capabilities capabilities = {};
        int r;

        r = sweep(kvm_fd, capabilities.system, trace);
        if (r < 0)
                return r;
        if (vm_fd >= 0) {
                r = sweep(vm_fd, capabilities.vm, trace);
                if (r < 0)
                        return r;
        }
        *ret_capabilities = capabilities;
        return 0;
}

/* KVM_CREATE_VM of a type. */
static int create_vm(int kvm_fd, unsigned long type, struct kvmneg_trace *trace) {
        int r = -EINTR;

        /* A signal that is pending while KVM takes the address space's locks makes it give up; the next try
         * finds the signal handled. */
        for (unsigned tries = 0; r == -EINTR && tries < CREATE_VM_TRIES; tries++)
                r = kvmneg_internal_ioctl(kvm_fd, KVM_CREATE_VM, type, trace);
        return r;
}

int kvmneg_create_vm(int kvm_fd, int *ret_vm_fd, struct kvmneg_trace *trace) {
        int r = create_vm(kvm_fd, 0, trace);

#if defined(__aarch64__)
        /* Type 0 is a VM with 40 bits of guest address; a CPU with fewer has only smaller ones (api.rst 4.2). */
        if (r == -EINVAL) {
                int bits = kvmneg_internal_ioctl(kvm_fd, KVM_CHECK_EXTENSION, KVM_CAP_ARM_VM_IPA_SIZE, trace);
                if (bits > 0)
                        r = create_vm(kvm_fd, KVM_VM_TYPE_ARM_IPA_SIZE(bits), trace);
        }
#endif
        if (r < 0)
                return r;
        *ret_vm_fd = r;
        return 0;
}

int kvmneg_internal_create_vcpu(int vm_fd, int *ret_vcpu_fd, struct kvmneg_trace *trace) {
        int r = kvmneg_internal_ioctl(vm_fd, KVM_CREATE_VCPU, 0, trace);

        if (r < 0)
                return r;
        *ret_vcpu_fd = r;
        return 0;
}
