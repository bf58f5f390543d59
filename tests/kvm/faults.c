/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libkvmneg against a KVM that fails where the real one never would: linked with --wrap=ioctl,--wrap=calloc,
 * --wrap=free, so that each ioctl and each allocation is ours. Prints one line a run, test_faults.py judges:
 *
 *     SCENARIO KIND NTH RESULT TOUCHED DESCRIPTORS ALLOCATIONS IOCTLS FAILED
 *
 * RESULT is what the function returned, TOUCHED whether a ret_ parameter changed, DESCRIPTORS and ALLOCATIONS
 * how many were left over, IOCTLS how many were made, FAILED the name in the trace ("-" for none).
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kvm-constants.h"
#include "kvmneg.h"

#define CPUIDS 5
#define MSRS 300 /* more than one KVM_GET_MSRS takes */
#define REFUSED_MSR 7
#define UNSET_MSR 260 /* in the second batch */
#define FAKE_KHZ 2600000
#define FAKE_LIMIT_KHZ 5000000
#define REGISTERS 1500 /* more than the library's first guess */

/* -- the fault to make, and what was counted -------------------------------------------------------------- */

enum kind { NONE, ERROR, ALLOCATION, ALWAYS, LIE };
static const char *const kinds[] = { "none", "error", "allocation", "always", "lie" };

static enum kind kind;
static int nth, fault;            /* ERROR, ALLOCATION: the nth call; ALWAYS: of this request */
static unsigned long always_request;
static int ioctls, callocs, outstanding;

void *__real_calloc(size_t count, size_t size);
void __real_free(void *memory);

void *__wrap_calloc(size_t count, size_t size);
void *__wrap_calloc(size_t count, size_t size) {
        void *memory;

        callocs++;
        if (kind == ALLOCATION && callocs == nth)
                return NULL;
        memory = __real_calloc(count, size);
        outstanding += memory != NULL;
        return memory;
}

void __wrap_free(void *memory);
void __wrap_free(void *memory) {
        outstanding -= memory != NULL;
        __real_free(memory);
}

/* -- a KVM --------------------------------------------------------------------------------------------------- */

static int fail(int error) {
        errno = error;
        return -1;
}

static int new_descriptor(void) {
        return open("/dev/null", O_RDWR | O_CLOEXEC);
}

#if defined(__x86_64__)
static bool hyperv_on_vcpu_only;

static int fake_cpuid(struct kvm_cpuid2 *table) {
        if (kind == LIE) {
                table->nent += 1;
                return 0;
        }
        if (table->nent < CPUIDS)
                return fail(E2BIG);
        for (unsigned i = 0; i < CPUIDS; i++)
                table->entries[i] = (struct kvm_cpuid_entry2) { .function = i, .eax = i * 16 };
        table->nent = CPUIDS;
        return 0;
}

/* A vCPU that keeps its table and adds a leaf; like Linux 6.1 it does not say how many entries it wrote. */
static struct kvm_cpuid_entry2 kept[CPUIDS + 1];
static unsigned kept_count;

static int fake_set_cpuid(const struct kvm_cpuid2 *table) {
        for (kept_count = 0; kept_count < table->nent && kept_count < CPUIDS; kept_count++)
                kept[kept_count] = table->entries[kept_count];
        kept[kept_count++] = (struct kvm_cpuid_entry2) { .function = 7, .ebx = 1 };
        return 0;
}

static int fake_get_cpuid(struct kvm_cpuid2 *table) {
        if (kind == LIE)
                return fake_cpuid(table);
        if (table->nent < kept_count)
                return fail(E2BIG);
        memcpy(table->entries, kept, kept_count * sizeof(kept[0]));
        return 0;
}

static uint64_t given[MSRS];

static int fake_set_msrs(const struct kvm_msrs *msrs) {
        unsigned i;

        if (msrs->nmsrs >= 256) /* MAX_IO_MSRS */
                return fail(E2BIG);
        if (kind == LIE)
                return (int) msrs->nmsrs + 1;
        for (i = 0; i < msrs->nmsrs && msrs->entries[i].index != 1000 + UNSET_MSR; i++)
                given[msrs->entries[i].index - 1000] = msrs->entries[i].data;
        return (int) i;
}

static int fake_msr_list(struct kvm_msr_list *list) {
        unsigned room = list->nmsrs;

        list->nmsrs = kind == LIE ? UINT32_MAX : MSRS;
        if (room < list->nmsrs)
                return fail(E2BIG);
        for (unsigned i = 0; i < MSRS; i++)
                list->indices[i] = 1000 + i;
        return 0;
}

static uint64_t mcg_cap;

static int fake_msrs(struct kvm_msrs *msrs) {
        unsigned i;

        if (msrs->nmsrs >= 256) /* MAX_IO_MSRS */
                return fail(E2BIG);
        if (msrs->nmsrs == 1 && msrs->entries[0].index == 0x179) {
                msrs->entries[0].data = mcg_cap | 32;
                return kind == LIE ? 0 : 1;
        }
        for (i = 0; i < msrs->nmsrs && msrs->entries[i].index != 1000 + REFUSED_MSR; i++)
                msrs->entries[i].data = msrs->entries[i].index * UINT64_C(0x100000000);
        return (int) i;
}

static unsigned khz = FAKE_KHZ;
static unsigned long limit_khz = 0x7fffffff; /* the first rate that is refused */

static int fake_set_tsc(unsigned long rate) {
        if (rate == 0 || (rate >= limit_khz && kind != LIE))
                return fail(EINVAL);
        khz = (unsigned) rate;
        return 0;
}

static int fake_architecture(int fd, unsigned long request, void *argument) {
        switch (request) {
        case KVM_GET_TSC_KHZ:
                return (int) khz;
        case KVM_SET_TSC_KHZ:
                return fake_set_tsc((unsigned long) argument);
        case KVM_X86_GET_MCE_CAP_SUPPORTED:
                *(uint64_t *) argument = 0x1000100;
                return 0;
        case KVM_X86_SETUP_MCE:
                mcg_cap = *(uint64_t *) argument;
                return 0;
        case KVM_GET_SUPPORTED_HV_CPUID:
                if (hyperv_on_vcpu_only && fd != 99)
                        return fail(EINVAL);
                return fake_cpuid(argument);
        case KVM_GET_SUPPORTED_CPUID:
        case KVM_GET_EMULATED_CPUID:
                return fake_cpuid(argument);
        case KVM_GET_MSR_FEATURE_INDEX_LIST:
        case KVM_GET_MSR_INDEX_LIST:
                return fake_msr_list(argument);
        case KVM_GET_MSRS:
                return fake_msrs(argument);
        case KVM_SET_MSRS:
                return fake_set_msrs(argument);
        case KVM_SET_CPUID2:
                return fake_set_cpuid(argument);
        case KVM_GET_CPUID2:
                return fake_get_cpuid(argument);
        case KVM_GET_DEVICE_ATTR:
                *(uint64_t *) (uintptr_t) ((struct kvm_device_attr *) argument)->addr = 0xe7;
                return 0;
        }
        return fail(ENOTTY);
}
#elif defined(__aarch64__)
/* Registers of a vCPU that was not run: the first ones of the list, the others are state. */
enum { VLS, PSCI, BITMAP, WORKAROUND, PFR0, MIDR, PMCR, CACHE, WORDS };
#define SYSTEM(index) (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG | (index))
static const uint64_t ids[WORDS] = {
        [VLS] = KVM_REG_ARM64_SVE_VLS,
        [PSCI] = KVM_REG_ARM_PSCI_VERSION,
        [BITMAP] = KVM_REG_ARM_STD_BMAP,
        [WORKAROUND] = KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1,
        [PFR0] = SYSTEM(0xc020),
        [MIDR] = SYSTEM(0xc000),
        [PMCR] = SYSTEM(0xdce0),
        [CACHE] = KVM_REG_ARM64 | KVM_REG_SIZE_U32 | KVM_REG_ARM_DEMUX,
};
#define CSV3 (UINT64_C(0xf) << 60) /* the one field of PFR0 that can be written */
#define MPAM (UINT64_C(0xf) << 40) /* takes 1 and stays 0 */
static const uint64_t resets[WORDS] = { [VLS] = 0xf,    [PSCI] = 0x10001,   [BITMAP] = 0, [WORKAROUND] = 2,
                                        [PFR0] = UINT64_C(0x1000000000000011), [MIDR] = 0x410fd0c0,
                                        [PMCR] = 6 << 11, [CACHE] = 2 };
static uint64_t values[WORDS];

static void reset_fake(void) {
        memcpy(values, resets, sizeof(values));
}

static int fake_registers(struct kvm_reg_list *list) {
        uint64_t room = list->n;

        list->n = kind == LIE ? UINT32_MAX : REGISTERS;
        if (room < list->n)
                return fail(E2BIG);
        for (unsigned i = 0; i < REGISTERS; i++)
                list->reg[i] = i < WORDS ? ids[i] : KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | i;
        return 0;
}

static int which(uint64_t id) {
        for (int i = 0; i < WORDS; i++)
                if (ids[i] == id)
                        return i;
        return -1;
}

/* What a proof guest is started with: general registers, SCTLR_EL1, CPACR_EL1, VBAR_EL1. There is no PMUSERENR_EL0. */
static bool is_state(uint64_t id) {
        return (id & KVM_REG_ARM_COPROC_MASK) == KVM_REG_ARM_CORE || id == SYSTEM(0xc080) || id == SYSTEM(0xc082) ||
               id == SYSTEM(0xc600);
}

static int fake_set(const struct kvm_one_reg *request) {
        int i = which(request->id);
        uint64_t value = i == CACHE ? *(uint32_t *) (uintptr_t) request->addr : *(uint64_t *) (uintptr_t) request->addr;
        uint64_t changed = i < 0 ? 0 : value ^ values[i];

        switch (i) {
        case -1:
                return is_state(request->id) ? 0 : fail(ENOENT);
        case BITMAP:
                if (value > 3)
                        return fail(EINVAL);
                break;
        case PSCI:
                if (value != 2 && (value < 0x10000 || value > 0x10001))
                        return fail(EINVAL);
                break;
        case WORKAROUND:
                return value <= 2 ? 0 : fail(EINVAL);
        case PFR0:
                if (changed & ~CSV3)
                        return (changed & ~MPAM) == 0 ? 0 : fail(EINVAL);
        }
        values[i] = value;
        return 0;
}

static int fake_get(const struct kvm_one_reg *request) {
        int i = which(request->id);
        void *to = (void *) (uintptr_t) request->addr;

        if (i < 0 && (request->id & KVM_REG_ARM_COPROC_MASK) == KVM_REG_ARM_FW_FEAT_BMAP)
                return fail(ENOENT);
        if (i < 0 || i == CACHE)
                *(uint32_t *) to = i < 0 ? 0x1234 : (uint32_t) values[i];
        else
                *(uint64_t *) to = values[i];
        return 0;
}

static int fake_init(const struct kvm_vcpu_init *init) {
        uint32_t always = 1 << KVM_ARM_VCPU_PSCI_0_2, features = init->features[0];

        if (features >> 7)
                return fail(ENOENT);
        /* this KVM has no pointer authentication, and the others need 64 bits */
        if (features & (1 << KVM_ARM_VCPU_PTRAUTH_ADDRESS | 1 << KVM_ARM_VCPU_PTRAUTH_GENERIC))
                return fail(EINVAL);
        return features & always ? 0 : fail(EINVAL);
}

#define RUN_BYTES 65536

#if defined(WITH_TIMERS)
/* Timers that are over at once: qemu-user cannot have one of SIGRTMAX. */
int __wrap_timer_create(clockid_t clock, struct sigevent *event, timer_t *timer);
int __wrap_timer_create(clockid_t clock, struct sigevent *event, timer_t *timer) {
        (void) clock, (void) event;
        memset(timer, 0, sizeof(*timer));
        return 0;
}

int __wrap_timer_settime(timer_t timer, int flags, const struct itimerspec *when, struct itimerspec *before);
int __wrap_timer_settime(timer_t timer, int flags, const struct itimerspec *when, struct itimerspec *before) {
        (void) timer, (void) flags, (void) when, (void) before;
        return 0;
}

int __wrap_timer_gettime(timer_t timer, struct itimerspec *left);
int __wrap_timer_gettime(timer_t timer, struct itimerspec *left) {
        (void) timer;
        memset(left, 0, sizeof(*left));
        return 0;
}

int __wrap_timer_delete(timer_t timer);
int __wrap_timer_delete(timer_t timer) {
        (void) timer;
        return 0;
}
#endif

/* A guest of four rows: it answers, raises an exception, leaves for a reason of its own, and never comes back. */
static struct kvm_run *fake_run_page;
static unsigned fake_row;

static int fake_run(void) {
        static const struct timespec late = { .tv_nsec = 3000000 };
        struct kvm_run *page = fake_run_page;
        uint64_t value = UINT64_C(0x2000000) + fake_row;

        if (page->immediate_exit)
                return fail(EINTR);
        if (fake_row == 3) {
                nanosleep(&late, NULL);
                return fail(EINTR);
        }
        page->exit_reason = fake_row == 2 ? KVM_EXIT_SYSTEM_EVENT : KVM_EXIT_MMIO;
        page->mmio.phys_addr = UINT64_C(0x09000000) + 8 * fake_row;
        page->mmio.is_write = 1;
        page->mmio.len = sizeof(value);
        memcpy(page->mmio.data, &value, sizeof(value));
        fake_row++;
        return 0;
}

static int fake_create_device(struct kvm_create_device *device) {
        if (device->type == KVM_DEV_TYPE_ARM_VGIC_V2)
                return fail(ENODEV);
        if (!(device->flags & KVM_CREATE_DEVICE_TEST))
                device->fd = (uint32_t) new_descriptor();
        return 0;
}

static int fake_architecture(int fd, unsigned long request, void *argument) {
        (void) fd;
        switch (request) {
        case KVM_ARM_PREFERRED_TARGET:
                *(struct kvm_vcpu_init *) argument = (struct kvm_vcpu_init) { .target = KVM_ARM_TARGET_GENERIC_V8 };
                return 0;
        case KVM_ARM_VCPU_INIT:
                return fake_init(argument);
        case KVM_GET_REG_LIST:
                return fake_registers(argument);
        case KVM_GET_ONE_REG:
                return fake_get(argument);
        case KVM_SET_ONE_REG:
                return fake_set(argument);
        case KVM_CREATE_DEVICE:
                return fake_create_device(argument);
        case KVM_GET_DEVICE_ATTR:
                *(uint32_t *) (uintptr_t) ((struct kvm_device_attr *) argument)->addr = 0x4b00243b;
                return 0;
        case KVM_ARM_GET_REG_WRITABLE_MASKS:
                return fail(EINVAL); /* Linux 6.6 and before */
        case KVM_ENABLE_CAP:
        case KVM_ARM_VCPU_FINALIZE:
        case KVM_SET_DEVICE_ATTR:
        case KVM_HAS_DEVICE_ATTR:
        case KVM_SET_USER_MEMORY_REGION:
        case KVM_SET_SIGNAL_MASK:
                return 0;
        case KVM_GET_VCPU_MMAP_SIZE:
                return RUN_BYTES;
        case KVM_RUN:
                return fake_run();
        }
        return fail(ENOTTY);
}
#endif

int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...) {
        unsigned long argument;
        va_list arguments;

        va_start(arguments, request);
        argument = va_arg(arguments, unsigned long);
        va_end(arguments);
        ioctls++;
        if (kind == ERROR && ioctls == nth)
                return fail(fault);
        if (kind == ALWAYS && request == always_request)
                return fail(fault);
        switch (request) {
        case KVM_GET_API_VERSION:
                return kind == LIE ? 13 : 12;
        case KVM_CHECK_EXTENSION:
                return (int) argument;
        case KVM_CREATE_VM:
        case KVM_CREATE_VCPU:
                return new_descriptor();
        }
        return fake_architecture(fd, request, (void *) argument);
}

/* -- what is run: each returns the function's result and says whether a ret_ parameter changed ---------------- */

#define UNTOUCHED ((void *) 0x5a5a)

static int run_open(bool *ret_touched, struct kvmneg_trace *trace) {
        int fd = -77, r = kvmneg_open("/dev/null", &fd, trace);
        *ret_touched = fd != -77;
        if (r == 0)
                kvmneg_close(fd);
        return r;
}

static int run_create_vm(bool *ret_touched, struct kvmneg_trace *trace) {
        int fd = -77, r = kvmneg_create_vm(3, &fd, trace);
        *ret_touched = fd != -77;
        if (r == 0)
                kvmneg_close(fd);
        return r;
}

static int run_scratch(bool *ret_touched, struct kvmneg_trace *trace) {
        int vm = -77, vcpu = -77, r = kvmneg_create_scratch(3, &vm, &vcpu, trace);
        *ret_touched = vm != -77 || vcpu != -77;
        if (r == 0) {
                kvmneg_close(vcpu);
                kvmneg_close(vm);
        }
        return r;
}

static int run_capabilities(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_capabilities got, before;
        int r;

        memset(&got, 0x5a, sizeof(got));
        before = got;
        r = kvmneg_get_capabilities(3, 4, &got, trace);
        *ret_touched = memcmp(&got, &before, sizeof(got)) != 0;
        if (r == 0 && kind == NONE)
                for (int i = 0; i < KVMNEG_CAPABILITIES; i++)
                        if (got.system[i] != i || got.vm[i] != i)
                                return -EILSEQ;
        return r;
}

#if defined(__x86_64__)
static bool as_made(const struct kvmneg_probe *probe) {
        return probe->supported != NULL;
}
#elif defined(__aarch64__)
static bool found(const struct kvmneg_probe *probe, int i, uint64_t value, uint64_t settable, uint64_t dropped) {
        const struct kvmneg_trial *trial = &probe->trials->entries[i];

        return trial->id == ids[i] && trial->reset == resets[i] && trial->value == value &&
               trial->settable == settable && trial->dropped == dropped;
}

/* What the fake KVM lets be changed is found, and all is put back. */
static bool as_made(const struct kvmneg_probe *probe) {
        return probe->trials->count == WORDS && probe->psci_count == 3 && probe->vgic_revisions == 1 << 2 &&
               probe->vcpu_features == 0x1f && probe->vgic_models == (KVMNEG_VGIC_V3 | KVMNEG_VGIC_ITS) &&
               found(probe, VLS, 0xf, 0xe, 0) && found(probe, PSCI, 0x10001, UINT32_MAX, 0) &&
               found(probe, BITMAP, 3, 3, 0) && found(probe, WORKAROUND, 2, 0, 0xf) &&
               found(probe, PFR0, resets[PFR0], CSV3, MPAM) && found(probe, MIDR, resets[MIDR], UINT64_MAX, 0) &&
               found(probe, PMCR, resets[PMCR], 0xf800, 0) && found(probe, CACHE, 2, UINT32_MAX, 0) &&
               memcmp(values, resets, sizeof(values)) == 0;
}
#endif

static int run_probe(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_probe *probe = UNTOUCHED;
        int r = kvmneg_probe(3, 4, 99, &probe, trace);

        *ret_touched = probe != UNTOUCHED;
        if (r < 0)
                return r;
        r = as_made(probe) ? 0 : -EILSEQ;
        return kvmneg_probe_free(probe) ? -EILSEQ : r;
}

#if defined(__x86_64__)
static bool five_leaves(const struct kvmneg_cpuid *table) {
        for (unsigned i = 0; i < CPUIDS; i++)
                if (table->entries[i].function != i || table->entries[i].eax != i * 16)
                        return false;
        return table->count == CPUIDS;
}

static int run_supported(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_cpuid *table = UNTOUCHED;
        int r = kvmneg_get_supported_cpuid(3, 1, &table, trace);

        *ret_touched = table != UNTOUCHED;
        if (r < 0)
                return r;
        r = five_leaves(table) ? 0 : -EILSEQ;
        kvmneg_free(table);
        return r;
}

static int run_hyperv(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_cpuid *table = UNTOUCHED;
        int r;

        hyperv_on_vcpu_only = true;
        r = kvmneg_get_hyperv_cpuid(3, 99, 0, &table, trace);
        hyperv_on_vcpu_only = false;
        *ret_touched = table != UNTOUCHED;
        if (r < 0)
                return r;
        r = five_leaves(table) ? 0 : -EILSEQ;
        kvmneg_free(table);
        return r;
}

static int run_list(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_msrs *msrs = UNTOUCHED;
        int r = kvmneg_get_feature_msrs(3, 1, &msrs, trace);

        *ret_touched = msrs != UNTOUCHED;
        if (r < 0)
                return r;
        r = msrs->count == MSRS && msrs->refused == 1 ? 0 : -EILSEQ;
        for (unsigned i = 0; i < MSRS && r == 0; i++) {
                bool refused = i == REFUSED_MSR;
                if (msrs->entries[i].index != 1000 + i || msrs->entries[i].refused != refused ||
                    msrs->entries[i].value != (refused ? 0 : (1000 + i) * UINT64_C(0x100000000)))
                        r = -EILSEQ;
        }
        kvmneg_free(msrs);
        return r;
}

static int run_one(bool *ret_touched, struct kvmneg_trace *trace) {
        uint64_t components = 77;
        int r = kvmneg_get_xcomp_guest_supp(3, &components, trace);

        *ret_touched = components != 77;
        return r == 0 && components != 0xe7 ? -EILSEQ : r;
}

static int run_state_msrs(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_indices *indices = UNTOUCHED;
        int r = kvmneg_get_state_msrs(3, 1, &indices, trace);

        *ret_touched = indices != UNTOUCHED;
        if (r < 0)
                return r;
        r = indices->count == MSRS && indices->entries[MSRS - 1] == 1000 + MSRS - 1 ? 0 : -EILSEQ;
        kvmneg_free(indices);
        return r;
}

static int run_mce(bool *ret_touched, struct kvmneg_trace *trace) {
        uint64_t capabilities = 77;
        int r = kvmneg_get_mce_cap(3, &capabilities, trace);

        *ret_touched = capabilities != 77;
        return r == 0 && capabilities != 0x1000100 ? -EILSEQ : r;
}

/* A single step that fails by EINVAL is an answer: then only the last rate, the first one again, is known. */
static int run_tsc(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_tsc tsc = { 77, 77 };
        int r;

        limit_khz = FAKE_LIMIT_KHZ;
        r = kvmneg_get_tsc(99, 1, &tsc, trace);
        limit_khz = 0x7fffffff;
        *ret_touched = tsc.khz != 77 || tsc.max_khz != 77;
        if (r == 0 && (tsc.khz != FAKE_KHZ || khz != FAKE_KHZ))
                return -EILSEQ;
        return r == 0 && kind == NONE && tsc.max_khz != FAKE_LIMIT_KHZ - 1 ? -EILSEQ : r;
}

static int run_no_scaling(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_tsc tsc = { 77, 77 };
        int r;

        r = kvmneg_get_tsc(99, 0, &tsc, trace);
        *ret_touched = tsc.khz != 77 || tsc.max_khz != 77;
        return r == 0 && (tsc.khz != FAKE_KHZ || tsc.max_khz != 0) ? -EILSEQ : r;
}

static int run_try_mce(bool *ret_touched, struct kvmneg_trace *trace) {
        uint64_t shown = 77;
        int r = kvmneg_try_mce(99, 0x1000100, &shown, trace);

        *ret_touched = shown != 77;
        return r == 0 && shown != 0x1000120 ? -EILSEQ : r;
}

static int run_try_cpuid(bool *ret_touched, struct kvmneg_trace *trace) {
        struct {
                struct kvmneg_cpuid head;
                struct kvmneg_cpuid_entry entries[2];
        } table = { { .count = 2 }, { { .function = 1, .eax = 5 }, { .function = 2, .edx = 6 } } };
        struct kvmneg_cpuid *shown = UNTOUCHED;
        int r = kvmneg_try_cpuid(99, &table.head, &shown, trace);

        *ret_touched = shown != UNTOUCHED;
        if (r < 0)
                return r;
        if (shown->count != 3 || shown->entries[0].eax != 5 || shown->entries[1].edx != 6 ||
            shown->entries[2].function != 7 || shown->entries[2].ebx != 1)
                r = -EILSEQ;
        kvmneg_free(shown);
        return r;
}

/* The fake reads an MSR's index, shifted, whatever it was given: the library shows what was read. */
static int run_try_msrs(bool *ret_touched, struct kvmneg_trace *trace) {
        static struct {
                struct kvmneg_msrs head;
                struct kvmneg_msr entries[MSRS];
        } table;
        struct kvmneg_msrs *shown = UNTOUCHED;
        int r;

        table.head.count = MSRS;
        for (unsigned i = 0; i < MSRS; i++)
                table.entries[i] = (struct kvmneg_msr) { .index = 1000 + i, .value = i + 1 };
        r = kvmneg_try_msrs(99, &table.head, &shown, trace);
        *ret_touched = shown != UNTOUCHED;
        if (r < 0)
                return r;
        r = shown->count == MSRS && shown->refused == 2 ? 0 : -EILSEQ;
        for (unsigned i = 0; i < MSRS && r == 0; i++) {
                uint32_t refused = i == REFUSED_MSR ? KVMNEG_MSR_UNREAD : i == UNSET_MSR ? KVMNEG_MSR_UNSET : 0;
                uint64_t value = i == REFUSED_MSR ? 0 : (1000 + i) * UINT64_C(0x100000000);
                if (shown->entries[i].refused != refused || shown->entries[i].value != value ||
                    (i != UNSET_MSR && given[i] != i + 1))
                        r = -EILSEQ;
        }
        kvmneg_free(shown);
        return r;
}

#define LIST_REQUEST KVM_GET_MSR_FEATURE_INDEX_LIST
#elif defined(__aarch64__)
static int run_list(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_registers *registers = UNTOUCHED;
        int r = kvmneg_get_registers(99, 0, &registers, trace);

        *ret_touched = registers != UNTOUCHED;
        if (r < 0)
                return r;
        r = registers->count == REGISTERS && (registers->ids[REGISTERS - 1] & 0xffff) == REGISTERS - 1 ? 0 : -EILSEQ;
        kvmneg_free(registers);
        return r;
}

static int run_one(bool *ret_touched, struct kvmneg_trace *trace) {
        uint64_t value = 77;
        int r = kvmneg_get_register(99, KVM_REG_ARM64 | KVM_REG_SIZE_U32 | 1, &value, trace);

        *ret_touched = value != 77;
        return r == 0 && value != 0x1234 ? -EILSEQ : r;
}

/* Out of order on purpose; PFR0 may only lose CSV3, the workaround keeps what it has. */
static const struct kvmneg_register contract[] = {
        { KVM_REG_ARM_STD_BMAP, 1, UINT64_MAX },
        { KVM_REG_ARM_PSCI_VERSION, 2, UINT64_MAX },
        { SYSTEM(0xdce0), 2 << 11, 0x1f << 11 },
        { SYSTEM(0xc020), 0, CSV3 },
        { SYSTEM(0xc000), 0x410fd0c1, UINT64_MAX },
        { KVM_REG_ARM64_SVE_VLS, 1, UINT64_MAX },
        { KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1, 2, UINT64_MAX },
        { KVMNEG_REG_ARM_VENDOR_HYP_BMAP_2, 0, UINT64_MAX }, /* which this KVM does not have */
};
#define CONTRACT (uint32_t) (sizeof(contract) / sizeof(contract[0]))

/* The failure is filled in with the errno that is returned, and only then. */
static int run_apply(bool *ret_touched, struct kvmneg_trace *trace) {
        struct kvmneg_failure failure = {};
        int r = kvmneg_arm_vm_apply(4, contract, CONTRACT, &failure, trace);

        *ret_touched = true;
        if (r >= 0)
                r = kvmneg_arm_vcpu_init(4, 99, 1 << KVM_ARM_VCPU_PSCI_0_2 | 1 << KVM_ARM_VCPU_SVE, contract, CONTRACT,
                                         &failure, trace);
        if (r >= 0)
                r = kvmneg_arm_vcpu_apply(99, contract, CONTRACT, &failure, trace);
        if (r >= 0)
                r = kvmneg_arm_vgic_apply(5, 2, &failure, trace);
        if (r >= 0)
                r = kvmneg_arm_vgic_verify(5, 2, &failure, trace);
        if (r >= 0)
                r = kvmneg_arm_vcpu_verify(99, contract, CONTRACT, &failure, trace);
        *ret_touched = r == 0;
        if (r < 0)
                return failure.error == r && failure.stage && failure.why ? r : -EILSEQ;
        return failure.stage == 0 && values[PFR0] == 0x11 && values[BITMAP] == 1 && values[PSCI] == 2 &&
               values[PMCR] == 2 << 11 && values[VLS] == 1 ? 0 : -EILSEQ;
}

/* What KVM takes and does not keep, and what it does not take, by name. */
static int run_dropped(bool *ret_touched, struct kvmneg_trace *trace) {
        static const struct kvmneg_register dropped = { KVM_REG_ARM_SMCCC_ARCH_WORKAROUND_1, 1, UINT64_MAX };
        static const struct kvmneg_register too_much = { KVM_REG_ARM_STD_BMAP, 4, 4 };
        struct kvmneg_failure failure = {};
        int r = kvmneg_arm_vcpu_apply(99, &dropped, 1, &failure, trace);

        *ret_touched = true;
        if (r == -EBADE && failure.why == KVMNEG_DROPPED && failure.got == 2 && failure.id == dropped.id) {
                r = kvmneg_arm_vcpu_apply(99, &too_much, 1, &failure, trace);
                if (r == -EINVAL && failure.why == KVMNEG_REFUSED && failure.stage == KVMNEG_STAGE_FIRMWARE)
                        return kvmneg_arm_vcpu_apply(99, &too_much, UINT32_MAX, NULL, trace) == -E2BIG ? 0 : -EILSEQ;
        }
        *ret_touched = false;
        return r;
}

/* With a vGIC and without; vector lengths that the fake has not. */
static int run_machine(bool *ret_touched, struct kvmneg_trace *trace) {
        uint32_t features = 1 << KVM_ARM_VCPU_PSCI_0_2 | 1 << KVM_ARM_VCPU_SVE | 1 << KVM_ARM_VCPU_PMU_V3;
        struct kvmneg_machine machine = { -77, -77, -77 };
        int r = kvmneg_create_machine(3, features, KVMNEG_VGIC_V3, contract, CONTRACT, &machine, NULL, trace);

        *ret_touched = machine.vm_fd != -77 || machine.vcpu_fd != -77 || machine.vgic_fd != -77;
        if (r < 0)
                return r;
        if (machine.vgic_fd < 0 || values[VLS] != 1)
                r = -EILSEQ;
        machine = kvmneg_machine_close(machine);
        return machine.vm_fd == -1 && machine.vcpu_fd == -1 && machine.vgic_fd == -1 ? r : -EILSEQ;
}

#if defined(WITH_TIMERS)
/* Each outcome once; the guest's memory, the signal's mask and the timer are gone afterwards. */
static int run_ask(bool *ret_touched, struct kvmneg_trace *trace) {
        struct {
                struct kvmneg_questions head;
                struct kvmneg_question rows[5];
        } asked = { .head = { .count = 5 },
                    .rows = { { .answers = 4 }, { .answers = 1 }, { .answers = 1 }, { .answers = 1 }, { .answers = 1 } } };
        struct kvmneg_questions *answers = UNTOUCHED;
        int vcpu = memfd_create("vcpu", MFD_CLOEXEC), r;
        const struct kvmneg_question *row;
        sigset_t before, after;

        if (vcpu < 0 || ftruncate(vcpu, RUN_BYTES) < 0)
                return -EILSEQ;
        fake_run_page = mmap(NULL, RUN_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
        fake_row = 0;
        pthread_sigmask(SIG_BLOCK, NULL, &before);
        r = kvmneg_ask_guest(3, 4, vcpu, KVMNEG_MODE_EL0, 1, &asked.head, &answers, trace);
        pthread_sigmask(SIG_BLOCK, NULL, &after);
        munmap(fake_run_page, RUN_BYTES);
        kvmneg_close(vcpu);
        *ret_touched = answers != UNTOUCHED;
        if (sigismember(&before, SIGRTMAX) != sigismember(&after, SIGRTMAX))
                return -EILSEQ;
        if (r < 0)
                return r;
        row = answers->entries;
        r = row[0].outcome == KVMNEG_OUTCOME_ANSWERED && row[0].answer[0] == 0x2000000 && row[0].answer[3] == 0x1234 &&
            row[1].outcome == KVMNEG_OUTCOME_FAULTED && row[1].detail == 0x2000001 &&
            row[2].outcome == KVMNEG_OUTCOME_ENDED && row[2].detail == KVM_EXIT_SYSTEM_EVENT &&
            row[3].outcome == KVMNEG_OUTCOME_ENDED && row[3].detail == KVMNEG_EXIT_TIME &&
            row[4].outcome == KVMNEG_OUTCOME_OPEN ? 0 : -EILSEQ;
        kvmneg_free(answers);
        return r;
}
#endif

/* What is no question is refused before anything is done. */
static int run_no_question(bool *ret_touched, struct kvmneg_trace *trace) {
        struct {
                struct kvmneg_questions head;
                struct kvmneg_question row;
        } asked = { .head = { .count = 1 }, .row = { .answers = 5 } };
        struct kvmneg_questions *answers = UNTOUCHED;
        int none = kvmneg_ask_guest(3, 4, 99, KVMNEG_MODE_EL1, 1, &asked.head, &answers, trace);
        int mode = kvmneg_ask_guest(3, 4, 99, KVMNEG_MODE_EL0 + 1, 1, &asked.head, &answers, trace);
        int time = kvmneg_ask_guest(3, 4, 99, KVMNEG_MODE_EL1, 0, &asked.head, &answers, trace);
        int many;

        asked.head.count = KVMNEG_QUESTIONS_MAX + 1;
        many = kvmneg_ask_guest(3, 4, 99, KVMNEG_MODE_EL1, 1, &asked.head, &answers, trace);
        *ret_touched = true;
        return none == -EINVAL && mode == -EINVAL && time == -EINVAL && many == -E2BIG && answers == UNTOUCHED &&
               trace->count == 0 ? 0 : -EILSEQ;
}
#define LIST_REQUEST KVM_GET_REG_LIST
#endif

static const struct {
        const char *name;
        int (*run)(bool *, struct kvmneg_trace *);
} scenarios[] = {
        { "open", run_open },           { "create_vm", run_create_vm }, { "scratch", run_scratch },
        { "capabilities", run_capabilities }, { "probe", run_probe },   { "list", run_list },
        { "one", run_one },
#if defined(__x86_64__)
        { "supported", run_supported }, { "hyperv", run_hyperv },
        { "try_cpuid", run_try_cpuid }, { "try_msrs", run_try_msrs },
        { "state_msrs", run_state_msrs }, { "mce", run_mce },
        { "tsc", run_tsc },             { "no_scaling", run_no_scaling },
        { "try_mce", run_try_mce },
#elif defined(__aarch64__)
        { "apply", run_apply },         { "dropped", run_dropped },
        { "machine", run_machine },     { "no_question", run_no_question },
#if defined(WITH_TIMERS)
        { "ask", run_ask },
#endif
#endif
};
#define SCENARIOS (sizeof(scenarios) / sizeof(scenarios[0]))

/* -- the driver ------------------------------------------------------------------------------------------- */

static int open_descriptors(void) {
        int n = 0;

        for (int fd = 0; fd < 256; fd++)
                n += fcntl(fd, F_GETFD) >= 0;
        return n;
}

/* One run with the fault that is set; prints its line and returns the number of ioctls. */
static int run(size_t scenario) {
        struct kvmneg_trace trace = {};
        int before = open_descriptors(), r;
        bool touched = false;
        const char *failed;

        ioctls = callocs = outstanding = 0;
#if defined(__x86_64__)
        khz = FAKE_KHZ;
#elif defined(__aarch64__)
        reset_fake();
#endif
        r = scenarios[scenario].run(&touched, &trace);
        failed = trace.failed ? kvmneg_ioctl_name(trace.failed) : NULL;
        printf("%s %s %d %d %d %d %d %d %s\n", scenarios[scenario].name, kinds[kind], nth, r, touched,
               open_descriptors() - before, outstanding, ioctls, failed ? failed : "-");
        return ioctls;
}

static void sweep(int error) {
        for (size_t i = 0; i < SCENARIOS; i++) {
                int total, allocations;

                kind = NONE;
                nth = 0;
                total = run(i);
                allocations = callocs;
                kind = ERROR;
                fault = error;
                for (nth = 1; nth <= total; nth++)
                        run(i);
                kind = ALLOCATION;
                for (nth = 1; nth <= allocations; nth++)
                        run(i);
        }
}

/* A fault that stays, or a KVM that answers nonsense. */
static void stubborn(void) {
        nth = 0;
        kind = ALWAYS;
        fault = EINTR;
        always_request = KVM_CREATE_VM;
        run(1);
        fault = E2BIG;
        always_request = LIST_REQUEST;
        run(5);
#if defined(__x86_64__)
        always_request = KVM_GET_SUPPORTED_CPUID;
        run(7);
#endif
        kind = LIE;
        for (size_t i = 0; i < SCENARIOS; i++)
                run(i);
}

/* What real KVM is not needed for. */
static void null_arguments(void) {
        int fd = -1;

        printf("%d %d %d %d\n", kvmneg_close(-1), kvmneg_free(NULL) == NULL, kvmneg_probe_free(NULL) == NULL,
               kvmneg_ioctl_name(0) == NULL);
        printf("%d %d\n", kvmneg_open("/nonexistent/kvm", &fd, NULL), kvmneg_open("/", &fd, NULL));
        printf("%d\n", kvmneg_open(__FILE__, &fd, NULL));
        printf("%d\n", fd);
}

int main(int argc, char **argv) {
        if (argc == 3 && strcmp(argv[1], "sweep") == 0)
                sweep(atoi(argv[2]));
        else if (argc == 2 && strcmp(argv[1], "stubborn") == 0)
                stubborn();
        else if (argc == 2 && strcmp(argv[1], "null") == 0)
                null_arguments();
        else
                return 2;
        return 0;
}
