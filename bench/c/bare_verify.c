/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The floor that `kvmneg verify` is compared with: as many VMs, tables and guest runs as it has, in the order it has
 * them, without a library and nothing compared. Every guest is a loop of CPUID in real mode that halts.
 *
 *     bare_verify ROUNDS
 *
 * prints the median nanoseconds of a round. Exits with 3 when KVM cannot be used.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/kvm.h>

#define ENTRIES 128
#define SIZE 0x20000
#define CODE 0x1000
#define SHORT 40 /* about as many questions as there are instructions to try */

#if !defined(__x86_64__)
#error "the proof that this is compared with is x86's"
#endif

static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[ENTRIES];
} supported, shown;
static int kvm;
static size_t run_size;

static void die(const char *what) {
        fprintf(stderr, "bare_verify: %s: %s\n", what, strerror(errno));
        exit(3);
}

static void check(int r, const char *what) {
        if (r < 0)
                die(what);
}

/* mov si, count; again: xor eax, eax; cpuid; dec si; jnz again; hlt */
static void put_guest(uint8_t *memory, unsigned count) {
        const uint8_t code[] = { 0xbe, (uint8_t) count, (uint8_t) (count >> 8), 0x66, 0x31, 0xc0, 0x0f, 0xa2, 0x4e,
                                 0x75, 0xf8, 0xf4 };

        memcpy(memory + CODE, code, sizeof(code));
}

static void run_guest(int vm, int vcpu, unsigned count) {
        uint8_t *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
        struct kvm_userspace_memory_region region = { .memory_size = SIZE };
        struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
        struct kvm_sregs sregs;

        if (memory == MAP_FAILED || run == MAP_FAILED)
                die("mmap");
        put_guest(memory, count);
        region.userspace_addr = (uint64_t) (uintptr_t) memory;
        check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
        check(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
        sregs.cs.base = sregs.cs.selector = 0;
        check(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
        check(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
        check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason != KVM_EXIT_HLT) {
                errno = EPROTO;
                die("the guest did not halt");
        }
        region.memory_size = 0;
        check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
        munmap(run, run_size);
        munmap(memory, SIZE);
}

/* A VM with the table, and that many guests on it. */
static void run_vm(unsigned guests, unsigned count) {
        int vm, vcpu;

        do
                vm = ioctl(kvm, KVM_CREATE_VM, 0);
        while (vm < 0 && errno == EINTR);
        check(vm, "KVM_CREATE_VM");
        check(ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000), "KVM_SET_TSS_ADDR");
        vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
        check(vcpu, "KVM_CREATE_VCPU");
        check(ioctl(vcpu, KVM_SET_CPUID2, &supported), "KVM_SET_CPUID2");
        shown.head.nent = ENTRIES;
        check(ioctl(vcpu, KVM_GET_CPUID2, &shown), "KVM_GET_CPUID2");
        for (unsigned i = 0; i < guests; i++)
                run_guest(vm, vcpu, count);
        close(vcpu);
        close(vm);
}

static void round_once(void) {
        for (unsigned table = 0; table < 3; table++) /* the offer, without CPUID's bits, without MSRs', in three modes */
                run_vm(3, supported.head.nent);
        for (unsigned i = 0; i < 2; i++) /* KVM's own MSRs, enforced and not */
                run_vm(1, SHORT);
        for (unsigned i = 0; i < 4; i++) /* instructions: two groups, shown and hidden, as a kernel and a program */
                run_vm(2, SHORT);
}

static int ascending(const void *a, const void *b) {
        int64_t x = *(const int64_t *) a, y = *(const int64_t *) b;
        return (x > y) - (x < y);
}

int main(int argc, char **argv) {
        long rounds = argc > 1 ? strtol(argv[1], NULL, 10) : 0;
        int64_t *times;
        int r;

        if (rounds < 1 || rounds > 1000000) {
                fprintf(stderr, "usage: bare_verify ROUNDS\n");
                return 2;
        }
        times = calloc((size_t) rounds, sizeof(*times));
        if (!times)
                die("calloc");
        kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
        check(kvm, "open");
        r = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
        check(r, "KVM_GET_VCPU_MMAP_SIZE");
        run_size = (size_t) r;
        supported.head.nent = ENTRIES;
        check(ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &supported), "KVM_GET_SUPPORTED_CPUID");
        for (long i = 0; i < rounds; i++) {
                struct timespec start, end;
                clock_gettime(CLOCK_MONOTONIC, &start);
                round_once();
                clock_gettime(CLOCK_MONOTONIC, &end);
                times[i] = (end.tv_sec - start.tv_sec) * INT64_C(1000000000) + end.tv_nsec - start.tv_nsec;
        }
        qsort(times, (size_t) rounds, sizeof(*times), ascending);
        printf("%lld\n", (long long) times[rounds / 2]);
        return 0;
}
