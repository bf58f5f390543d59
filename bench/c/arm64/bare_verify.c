/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The floor that `kvmneg verify` is compared with on arm64: as many VMs, tables and guest runs as it has, in the order it
 * has them, without a library and nothing compared. Every guest reads one ID register and stores it where no memory is,
 * again and again: each answer leaves the guest. The twin of ../bare_verify.c.
 *
 *     bare_verify ROUNDS
 *
 * prints the median nanoseconds of a round. Exits with 3 when KVM cannot be used.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <linux/kvm.h>

#if !defined(__aarch64__)
#error "the proof that this is compared with is arm64's"
#endif

#define BASE UINT64_C(0x40000000)
#define SIZE 0x30000     /* of pages of up to 64 KiB */
#define ANSWERS 80       /* what a guest is asked of a table: 100 as a kernel, 60 as a program */
#define SHORT 24         /* about as many instructions as there are to try */
#define REGISTERS 128    /* of a table: set, and read back before and after the first run */
#define GENERAL(number) (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | (number) * 2)
#define PC (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | 64)

static int kvm;
static size_t run_size;

static void die(const char *what) {
        fprintf(stderr, "bare_verify: %s: %s\n", what, strerror(errno));
        exit(3);
}

static int check(int r, const char *what) {
        if (r < 0)
                die(what);
        return r;
}

static int set_register(int vcpu, uint64_t id, uint64_t value) {
        struct kvm_one_reg one = { .id = id, .addr = (uint64_t) (uintptr_t) &value };

        return ioctl(vcpu, KVM_SET_ONE_REG, &one);
}

static int get_register(int vcpu, uint64_t id, uint64_t *ret_value) {
        struct kvm_one_reg one = { .id = id, .addr = (uint64_t) (uintptr_t) ret_value };

        return ioctl(vcpu, KVM_GET_ONE_REG, &one);
}

static void attribute(int vgic, uint32_t group, uint64_t number, uint64_t address) {
        struct kvm_device_attr request = { .group = group, .attr = number,
                                           .addr = group == KVM_DEV_ARM_VGIC_GRP_ADDR ? (uint64_t) (uintptr_t) &address : 0 };

        check(ioctl(vgic, KVM_SET_DEVICE_ATTR, &request), "KVM_SET_DEVICE_ATTR");
}

/* A vGICv3, else v2, in its place. */
static int create_vgic(int vm) {
        struct kvm_create_device device = { .type = KVM_DEV_TYPE_ARM_VGIC_V3 };
        bool old = ioctl(vm, KVM_CREATE_DEVICE, &device) < 0;

        if (old) {
                device.type = KVM_DEV_TYPE_ARM_VGIC_V2;
                check(ioctl(vm, KVM_CREATE_DEVICE, &device), "KVM_CREATE_DEVICE");
        }
        attribute((int) device.fd, KVM_DEV_ARM_VGIC_GRP_ADDR,
                  old ? KVM_VGIC_V2_ADDR_TYPE_DIST : KVM_VGIC_V3_ADDR_TYPE_DIST, 0x08000000);
        attribute((int) device.fd, KVM_DEV_ARM_VGIC_GRP_ADDR,
                  old ? KVM_VGIC_V2_ADDR_TYPE_CPU : KVM_VGIC_V3_ADDR_TYPE_REDIST, old ? 0x08010000 : 0x080a0000);
        attribute((int) device.fd, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, 0);
        return (int) device.fd;
}

/* Each register of the list with 64 bits, as it is: read, written where it can be, read. */
static void table(int vcpu) {
        struct {
                struct kvm_reg_list head;
                uint64_t ids[4096];
        } list = { .head.n = 4096 };
        uint64_t value;
        unsigned seen = 0;

        check(ioctl(vcpu, KVM_GET_REG_LIST, &list), "KVM_GET_REG_LIST");
        for (uint64_t at = 0; at < list.head.n && seen < REGISTERS; at++) {
                uint64_t id = list.head.reg[at];

                if ((id & KVM_REG_SIZE_MASK) != KVM_REG_SIZE_U64 || (id & KVM_REG_ARM_COPROC_MASK) != KVM_REG_ARM64_SYSREG)
                        continue;
                seen++;
                check(get_register(vcpu, id, &value), "KVM_GET_ONE_REG");
                (void) set_register(vcpu, id, value);
                check(get_register(vcpu, id, &value), "KVM_GET_ONE_REG");
        }
}

static void run_guest(int vm, int vcpu, unsigned count) {
        /* again: mrs x0, id_aa64pfr0_el1; str x0, [x20]; b again */
        static const uint32_t code[] = { 0xd5380400, 0xf9000280, 0x17fffffe };
        uint8_t *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
        struct kvm_userspace_memory_region region = { .guest_phys_addr = BASE, .memory_size = SIZE };

        if (memory == MAP_FAILED || run == MAP_FAILED)
                die("mmap");
        memcpy(memory, code, sizeof(code));
        region.userspace_addr = (uint64_t) (uintptr_t) memory;
        check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
        check(set_register(vcpu, GENERAL(20), 0x09000000), "x20");
        check(set_register(vcpu, PC, BASE), "pc");
        for (unsigned answer = 0; answer < count; answer++) {
                check(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
                if (run->exit_reason != KVM_EXIT_MMIO) {
                        errno = EPROTO;
                        die("the guest did not answer");
                }
        }
        region.memory_size = 0;
        run->immediate_exit = 1; /* the last answer is taken before its memory goes */
        (void) ioctl(vcpu, KVM_RUN, 0);
        run->immediate_exit = 0;
        check(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
        munmap(run, run_size);
        munmap(memory, SIZE);
}

/* A VM with a table, and that many guests on it. */
static void run_vm(unsigned guests, unsigned count) {
        struct kvm_vcpu_init init;
        int vm, vcpu, vgic;

        do
                vm = ioctl(kvm, KVM_CREATE_VM, 0);
        while (vm < 0 && errno == EINTR);
        check(vm, "KVM_CREATE_VM");
        check(ioctl(vm, KVM_ARM_PREFERRED_TARGET, &init), "KVM_ARM_PREFERRED_TARGET");
        init.features[0] |= 1U << KVM_ARM_VCPU_PSCI_0_2;
        vcpu = check(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
        check(ioctl(vcpu, KVM_ARM_VCPU_INIT, &init), "KVM_ARM_VCPU_INIT");
        vgic = create_vgic(vm);
        table(vcpu);
        for (unsigned i = 0; i < guests; i++)
                run_guest(vm, vcpu, count);
        close(vgic);
        close(vcpu);
        close(vm);
}

static void round_once(void) {
        run_vm(0, 0);                      /* what KVM offers is measured */
        for (unsigned i = 0; i < 2; i++) { /* as low as KVM takes it, and the offer; as a kernel and as a program */
                run_vm(0, 0);
                run_vm(2, ANSWERS);
        }
        for (unsigned i = 0; i < 2; i++) /* instructions: shown and hidden */
                run_vm(2, SHORT);
}

static int ascending(const void *a, const void *b) {
        int64_t x = *(const int64_t *) a, y = *(const int64_t *) b;

        return (x > y) - (x < y);
}

int main(int argc, char **argv) {
        long rounds = argc > 1 ? strtol(argv[1], NULL, 10) : 0;
        int64_t *times;

        if (rounds < 1 || rounds > 100000) {
                fprintf(stderr, "usage: bare_verify ROUNDS\n");
                return 2;
        }
        times = calloc((size_t) rounds, sizeof(*times));
        if (!times)
                die("calloc");
        kvm = check(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
        run_size = (size_t) check(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
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
