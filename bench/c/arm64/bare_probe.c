/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The floor that kvmneg's measurement of an arm64 KVM is compared with: the same ioctls in the same order with the
 * same content, and nothing else. Which ones these are depends on what KVM answers, so they are noted down once while
 * libkvmneg probes (linked with --wrap=ioctl and --wrap=close), and then made again N times, each time on a new
 * scratch VM, without libkvmneg.
 *
 *     bare_probe ROUNDS
 *
 * prints the number of ioctls, the median nanoseconds of a round, and those of its part that makes and closes VMs,
 * vCPUs and devices. Exits with 3 when KVM cannot be used.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <linux/kvm.h>

#include "kvm-constants.h"
#include "kvmneg.h"

#if !defined(__aarch64__)
#error "the measurement that this is compared with is arm64's"
#endif

#define STEPS 65536
#define FDS 1024
#define ATTRIBUTE_BYTES 64
#define CLOSE 0 /* instead of a request */

struct step {
        unsigned long request;
        uint32_t on, makes; /* the places of descriptors; `makes` 0 for none */
        uintptr_t argument; /* a number, or the content's address */
};

static struct step steps[STEPS];
static uint32_t count, places = 1;
static uint32_t place_of[FDS]; /* while recording: descriptor → place */
static int fds[STEPS];         /* while replaying: place → descriptor */
static bool recording;

int __real_ioctl(int fd, unsigned long request, ...);
int __real_close(int fd);

static void die(const char *what) {
        fprintf(stderr, "bare_probe: %s: %s\n", what, strerror(errno));
        exit(3);
}

static void *copy(const void *content, size_t size) {
        void *copied = malloc(size);

        if (!copied)
                die("malloc");
        return memcpy(copied, content, size);
}

/* The argument as it is before the call, with what it points to. */
static uintptr_t content(unsigned long request, uintptr_t argument) {
        if (_IOC_DIR(request) == _IOC_NONE)
                return argument;
        if (request == KVM_GET_REG_LIST)
                return (uintptr_t) copy((void *) argument, sizeof(uint64_t) * (1 + *(uint64_t *) argument));
        void *copied = copy((void *) argument, _IOC_SIZE(request));
        if (request == KVM_GET_ONE_REG || request == KVM_SET_ONE_REG) {
                struct kvm_one_reg *one = copied;
                one->addr = (uintptr_t) copy((void *) one->addr, UINT64_C(1) << ((one->id >> 52) & 15));
        } else if (request == KVM_SET_DEVICE_ATTR || request == KVM_GET_DEVICE_ATTR) {
                struct kvm_device_attr *attribute = copied;
                if (attribute->addr)
                        attribute->addr = (uintptr_t) copy((void *) attribute->addr, ATTRIBUTE_BYTES);
        } else if (request == KVM_ARM_GET_REG_WRITABLE_MASKS)
                *(uint64_t *) copied = (uintptr_t) calloc(KVMNEG_FEATURE_ID_RANGE_SIZE, sizeof(uint64_t));
        return (uintptr_t) copied;
}

static struct step *note(int fd, unsigned long request, uintptr_t argument) {
        if (count == STEPS || fd < 0 || fd >= FDS || !place_of[fd]) {
                errno = ERANGE;
                die("too much to note down");
        }
        steps[count] = (struct step) { .request = request, .on = place_of[fd], .argument = argument };
        return &steps[count++];
}

static int made(unsigned long request, int r, uintptr_t argument) {
        if (r < 0)
                return -1;
        if (request == KVM_CREATE_DEVICE && !(((struct kvm_create_device *) argument)->flags & KVM_CREATE_DEVICE_TEST))
                return (int) ((struct kvm_create_device *) argument)->fd;
        return request == KVM_CREATE_VM || request == KVM_CREATE_VCPU ? r : -1;
}

int __wrap_ioctl(int fd, unsigned long request, ...) {
        va_list arguments;
        uintptr_t argument;
        struct step *step = NULL;
        int r, new;

        va_start(arguments, request);
        argument = va_arg(arguments, uintptr_t);
        va_end(arguments);
        if (recording)
                step = note(fd, request, content(request, argument));
        r = __real_ioctl(fd, request, argument);
        new = step ? made(request, r, argument) : -1;
        if (new >= 0)
                step->makes = place_of[new] = places++;
        return r;
}

int __wrap_close(int fd) {
        if (recording)
                note(fd, CLOSE, 0);
        return __real_close(fd);
}

static int64_t now(void) {
        struct timespec time;

        clock_gettime(CLOCK_MONOTONIC, &time);
        return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* All of them once; the nanoseconds of making and closing. */
static int64_t replay(void) {
        int64_t making = 0;

        for (uint32_t i = 0; i < count; i++) {
                const struct step *step = &steps[i];
                bool timed = step->makes || step->request == CLOSE;
                int64_t begun = timed ? now() : 0;
                int r = step->request == CLOSE ? __real_close(fds[step->on])
                                               : __real_ioctl(fds[step->on], step->request, step->argument);

                if (step->makes) {
                        fds[step->makes] = made(step->request, r, step->argument);
                        if (fds[step->makes] < 0)
                                die("what was made once is not made again");
                }
                if (timed)
                        making += now() - begun;
        }
        return making;
}

static int ascending(const void *a, const void *b) {
        int64_t x = *(const int64_t *) a, y = *(const int64_t *) b;

        return (x > y) - (x < y);
}

int main(int argc, char **argv) {
        long rounds = argc > 1 ? strtol(argv[1], NULL, 10) : 0;
        struct kvmneg_probe *probe;
        int64_t *total, *making;

        if (rounds < 1 || rounds > 100000)
                return 2;
        total = calloc((size_t) rounds, sizeof(*total));
        making = calloc((size_t) rounds, sizeof(*making));
        fds[1] = open("/dev/kvm", O_RDWR | O_CLOEXEC);
        if (!total || !making || fds[1] < 0)
                die("/dev/kvm");
        for (long i = -1; i < rounds; i++) {
                if (kvmneg_create_scratch(fds[1], &fds[2], &fds[3], NULL) < 0)
                        die("a scratch VM");
                if (i < 0) {
                        for (int place = 1; place <= 3; place++)
                                place_of[fds[place]] = places++;
                        recording = true;
                        if (kvmneg_probe(fds[1], fds[2], fds[3], &probe, NULL) < 0)
                                die("kvmneg_probe");
                        recording = false;
                        kvmneg_probe_free(probe);
                } else {
                        int64_t begun = now();
                        making[i] = replay();
                        total[i] = now() - begun;
                }
                __real_close(fds[3]);
                __real_close(fds[2]);
        }
        qsort(total, (size_t) rounds, sizeof(*total), ascending);
        qsort(making, (size_t) rounds, sizeof(*making), ascending);
        printf("%u %lld %lld\n", count, (long long) total[rounds / 2], (long long) making[rounds / 2]);
        return 0;
}
