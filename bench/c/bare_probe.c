/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The floor that kvmneg's measurement is compared with: the same ioctls in the same order, no library, nothing
 * decoded. Makes a VM and a vCPU once, then N rounds.
 *
 *     bare_probe ROUNDS [DEVICE]
 *
 * prints the median nanoseconds of a round. Exits with 3 when KVM cannot be used.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

#include <linux/kvm.h>

#define CAPABILITIES 256
#define ENTRIES 128
#define MSRS 64
#define STATE_MSRS 256
#define MCG_CAP 0x179
#define TSC_KHZ_LIMIT 0x7fffffff

#if !defined(__x86_64__)
#error "the measurement that this is compared with is x86's"
#endif

static struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entries[ENTRIES];
} supported, emulated, hyperv;
static struct {
        struct kvm_msr_list head;
        uint32_t indices[MSRS];
} list;
static struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entries[MSRS];
} msrs;
static struct {
        struct kvm_msr_list head;
        uint32_t indices[STATE_MSRS];
} state;
static int capabilities[2][CAPABILITIES];

static void die(const char *what) {
        fprintf(stderr, "bare_probe: %s: %s\n", what, strerror(errno));
        exit(3);
}

/* One CPUID table. A part that this KVM does not have costs its failed ioctl, as in the library. */
static int cpuid(int fd, unsigned long request, void *table) {
        ((struct kvm_cpuid2 *) table)->nent = ENTRIES;
        return ioctl(fd, request, table);
}

/* The host's rate, and the highest that KVM scales to. */
static void tsc(int vcpu, int scales) {
        int taken = ioctl(vcpu, KVM_GET_TSC_KHZ, 0), own = taken;

        if (taken <= 0 || !scales)
                return;
        for (int refused = TSC_KHZ_LIMIT, khz = refused - 1; refused - taken > 1; khz = taken + (refused - taken) / 2) {
                if (ioctl(vcpu, KVM_SET_TSC_KHZ, khz) >= 0)
                        taken = khz;
                else
                        refused = khz;
        }
        ioctl(vcpu, KVM_SET_TSC_KHZ, own);
}

/* What a vCPU keeps of the machine checks that /dev/kvm names. */
static void mce(int kvm, int vcpu, int banks) {
        uint64_t supported;

        if (ioctl(kvm, KVM_X86_GET_MCE_CAP_SUPPORTED, &supported) < 0 || banks <= 0)
                return;
        supported |= (uint64_t) banks & 0xff;
        if (ioctl(vcpu, KVM_X86_SETUP_MCE, &supported) < 0)
                return;
        msrs.head.nmsrs = 1;
        msrs.entries[0].index = MCG_CAP;
        ioctl(vcpu, KVM_GET_MSRS, &msrs);
}

static void round_once(int kvm, int vm, int vcpu) {
        uint64_t components;
        struct kvm_device_attr attribute = { .attr = 0, .addr = (uint64_t) (uintptr_t) &components };
        uint32_t done = 0;

        for (int n = 0; n < CAPABILITIES; n++)
                capabilities[0][n] = ioctl(kvm, KVM_CHECK_EXTENSION, n);
        for (int n = 0; n < CAPABILITIES; n++)
                capabilities[1][n] = ioctl(vm, KVM_CHECK_EXTENSION, n);
        if (cpuid(kvm, KVM_GET_SUPPORTED_CPUID, &supported) < 0)
                die("KVM_GET_SUPPORTED_CPUID");
        cpuid(kvm, KVM_GET_EMULATED_CPUID, &emulated);
        if (cpuid(kvm, KVM_GET_SUPPORTED_HV_CPUID, &hyperv) < 0)
                cpuid(vcpu, KVM_GET_SUPPORTED_HV_CPUID, &hyperv);
        list.head.nmsrs = MSRS;
        if (ioctl(kvm, KVM_GET_MSR_FEATURE_INDEX_LIST, &list) < 0)
                die("KVM_GET_MSR_FEATURE_INDEX_LIST");
        while (done < list.head.nmsrs) {
                msrs.head.nmsrs = list.head.nmsrs - done;
                for (uint32_t i = 0; i < msrs.head.nmsrs; i++)
                        msrs.entries[i].index = list.indices[done + i];
                int read = ioctl(kvm, KVM_GET_MSRS, &msrs);
                if (read < 0)
                        die("KVM_GET_MSRS");
                done += (uint32_t) read + ((uint32_t) read < msrs.head.nmsrs); /* one that is refused is skipped */
        }
        ioctl(kvm, KVM_GET_DEVICE_ATTR, &attribute);
        state.head.nmsrs = STATE_MSRS;
        if (ioctl(kvm, KVM_GET_MSR_INDEX_LIST, &state) < 0)
                die("KVM_GET_MSR_INDEX_LIST");
        mce(kvm, vcpu, capabilities[0][KVM_CAP_MCE]);
        tsc(vcpu, capabilities[0][KVM_CAP_TSC_CONTROL] > 0);
}

static int ascending(const void *a, const void *b) {
        int64_t x = *(const int64_t *) a, y = *(const int64_t *) b;
        return (x > y) - (x < y);
}

int main(int argc, char **argv) {
        long rounds = argc > 1 ? strtol(argv[1], NULL, 10) : 0;
        int64_t *times;
        int kvm, vm, vcpu;

        if (rounds < 1 || rounds > 1000000) {
                fprintf(stderr, "usage: bare_probe ROUNDS [DEVICE]\n");
                return 2;
        }
        times = calloc((size_t) rounds, sizeof(*times));
        if (!times)
                die("calloc");
        kvm = open(argc > 2 ? argv[2] : "/dev/kvm", O_RDWR | O_CLOEXEC);
        if (kvm < 0)
                die("open");
        do
                vm = ioctl(kvm, KVM_CREATE_VM, 0);
        while (vm < 0 && errno == EINTR);
        if (vm < 0)
                die("KVM_CREATE_VM");
        vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
        if (vcpu < 0)
                die("KVM_CREATE_VCPU");
        for (long i = 0; i < rounds; i++) {
                struct timespec start, end;
                clock_gettime(CLOCK_MONOTONIC, &start);
                round_once(kvm, vm, vcpu);
                clock_gettime(CLOCK_MONOTONIC, &end);
                times[i] = (end.tv_sec - start.tv_sec) * INT64_C(1000000000) + end.tv_nsec - start.tv_nsec;
        }
        qsort(times, (size_t) rounds, sizeof(*times), ascending);
        printf("%lld\n", (long long) times[rounds / 2]);
        return 0;
}
