/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * kvmneg_ask_guest() on the real KVM while its nth ioctl or system call fails: linked with --wrap for each of them.
 * Prints one line a run, test_guest_faults.py judges:
 *
 *     KIND NTH RESULT TOUCHED MAPPINGS SIGNALS LATER
 *
 * KIND is what failed (none: nothing did), RESULT what the function returned, TOUCHED whether the ret_ parameter
 * changed, MAPPINGS how many mmap(2) were not undone, SIGNALS whether the thread's mask changed or a signal is left,
 * LATER what a second call returned, on the same vCPU and without faults.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kvmneg.h"

enum kind { NONE, IOCTL, MMAP, CALLOC, TIMER, KINDS };
static const char *const kinds[] = { "none", "ioctl", "mmap", "calloc", "timer" };

static enum kind kind;
static int nth, calls[KINDS], mappings;

static int fails(enum kind this) {
        return ++calls[this] == nth && this == kind;
}

int __real_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...) {
        va_list list;
        unsigned long argument;

        va_start(list, request);
        argument = va_arg(list, unsigned long);
        va_end(list);
        if (fails(IOCTL)) {
                errno = EIO;
                return -1;
        }
        return __real_ioctl(fd, request, argument);
}

void *__real_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset);
void *__wrap_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset) {
        void *mapped;

        if (fails(MMAP)) {
                errno = ENOMEM;
                return MAP_FAILED;
        }
        mapped = __real_mmap(address, size, protection, flags, fd, offset);
        mappings += mapped != MAP_FAILED;
        return mapped;
}

int __real_munmap(void *address, size_t size);
int __wrap_munmap(void *address, size_t size);
int __wrap_munmap(void *address, size_t size) {
        int r = __real_munmap(address, size);

        mappings -= r == 0;
        return r;
}

void *__real_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size) {
        return fails(CALLOC) ? NULL : __real_calloc(count, size);
}

int __real_timer_create(clockid_t clock, struct sigevent *event, timer_t *timer);
int __wrap_timer_create(clockid_t clock, struct sigevent *event, timer_t *timer);
int __wrap_timer_create(clockid_t clock, struct sigevent *event, timer_t *timer) {
        if (fails(TIMER)) {
                errno = EAGAIN;
                return -1;
        }
        return __real_timer_create(clock, event, timer);
}

static int signals_differ(const sigset_t *before) {
        sigset_t now, pending;

        pthread_sigmask(SIG_BLOCK, NULL, &now);
        sigpending(&pending);
        for (int number = 1; number <= SIGRTMAX; number++)
                if (sigismember(&now, number) != sigismember(before, number) || sigismember(&pending, number) == 1)
                        return 1;
        return 0;
}

static int ask(int kvm, int vm, int vcpu, struct kvmneg_questions **ret) {
        struct {
                struct kvmneg_questions head;
                struct kvmneg_question rows[3];
        } asked = { .head = { .count = 3 }, .rows = { { .kind = KVMNEG_ASK_CPUID },
                                                       { .kind = KVMNEG_ASK_RUN, .code = { 0xf4, 0xc3 } },
                                                       { .kind = KVMNEG_ASK_CPUID, .index = 1 } } };

        return kvmneg_ask_guest(kvm, vm, vcpu, KVMNEG_MODE_CPL0, 5000, &asked.head, ret, NULL);
}

/* One run with a fault; returns whether the fault was come to. */
static int run(int kvm, enum kind this, int number) {
        struct kvmneg_questions *const untouched = (void *) &kvm, *answers = untouched;
        int vm, vcpu, r, later, reached;
        sigset_t mask;

        if (kvmneg_create_scratch(kvm, &vm, &vcpu, NULL) < 0)
                exit(3);
        pthread_sigmask(SIG_BLOCK, NULL, &mask);
        memset(calls, 0, sizeof(calls));
        mappings = 0;
        kind = this, nth = number;
        r = ask(kvm, vm, vcpu, &answers);
        reached = this != NONE && calls[this] >= number;
        kind = NONE;
        printf("%s %d %d %d %d %d ", kinds[this], number, r, answers != untouched, mappings, signals_differ(&mask));
        if (r >= 0)
                kvmneg_free(answers);
        answers = NULL;
        later = ask(kvm, vm, vcpu, &answers);
        printf("%d\n", later);
        kvmneg_free(answers);
        kvmneg_close(vcpu);
        kvmneg_close(vm);
        return reached;
}

int main(void) {
        int kvm;

        if (kvmneg_open("/dev/kvm", &kvm, NULL) < 0)
                return 3;
        for (int i = 0; i < 2; i++)
                run(kvm, NONE, 0);
        for (enum kind this = IOCTL; this < KINDS; this++)
                for (int number = 1; run(kvm, this, number); number++)
                        continue;
        return 0;
}
