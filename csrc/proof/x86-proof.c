/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Runs the proof guest on a vCPU: what a guest sees, whatever KVM says that it shows. */

#define _GNU_SOURCE

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "../internal.h"
#include "../kvm-constants.h"
#include "x86-layout.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid /* until glibc 2.41 */
#endif

#define STOP_SIGNAL SIGRTMAX
#define TSS_ADDRESS 0xfffbd000 /* three pages that no guest of ours uses, below the BIOS; where QEMU has them */
#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_CODE 0x18
#define USER_DATA 0x20
#define TSS_SELECTOR 0x28

/* Intel SDM 3A 2.5, AMD APM 2 3.1 */
#define CR0_LONG 0x80010033u /* PE, MP, ET, NE, WP, PG */
#define CR0_REAL 0x10u       /* ET */
#define CR4_BASE 0x620u      /* PAE, OSFXSR, OSXMMEXCPT */
#define CR4_PAE 0x20u
#define CR4_OSXSAVE 0x40000u
#define EFER_LONG 0x500u /* LME, LMA */
/* Interrupts on: none ever comes, and an emulated CPU may take the host's own only where the guest takes them. */
#define RFLAGS_REAL 0x202u
#define RFLAGS_LONG 0x3202u /* IOPL 3 */

extern const uint8_t kvmneg_internal_guest[], kvmneg_internal_guest_end[], kvmneg_internal_guest_real_stubs[],
        kvmneg_internal_guest_long[], kvmneg_internal_guest_long_stubs[];

static_assert(sizeof(struct kvmneg_question) == ROW_SIZE, "layout");
static_assert(offsetof(struct kvmneg_question, outcome) == ROW_OUTCOME, "layout");
static_assert(offsetof(struct kvmneg_question, detail) == ROW_DETAIL, "layout");
static_assert(offsetof(struct kvmneg_question, answer) == ROW_ANSWER, "layout");
static_assert(offsetof(struct kvmneg_question, code) == ROW_CODE, "layout");
static_assert(GUEST_ROWS + (KVMNEG_QUESTIONS_MAX + 1) * ROW_SIZE <= GUEST_SIZE, "layout");
static_assert(KVMNEG_ASK_CPUID == ASK_CPUID && KVMNEG_ASK_MSR == ASK_MSR && KVMNEG_ASK_XCR == ASK_XCR &&
              KVMNEG_ASK_RUN == ASK_RUN, "layout");
static_assert(KVMNEG_OUTCOME_ANSWERED == OUTCOME_ANSWERED && KVMNEG_OUTCOME_FAULTED == OUTCOME_FAULTED, "layout");

/* What one run needs; everything in it is undone by guest_done(). */
struct guest {
        int vm_fd, vcpu_fd;
        uint32_t mode;
        uint8_t *memory;
        struct kvm_run *run;
        size_t run_size;
        bool slot, timer_set, masked;
        timer_t timer;
        sigset_t before;
        struct kvmneg_trace *trace;
};

static void put64(uint8_t *memory, size_t at, uint64_t value) {
        memcpy(memory + at, &value, sizeof(value));
}

/* A gate of an IDT of long mode (Intel SDM 3A 6.14.1): interrupt gate, DPL 0. */
static void put_gate(uint8_t *memory, unsigned vector, uint64_t to) {
        put64(memory, GUEST_IDT + vector * 16, (to & 0xffff) | KERNEL_CODE << 16 | UINT64_C(0x8e00) << 32 |
                                                       (to >> 16 & 0xffff) << 48);
        put64(memory, GUEST_IDT + vector * 16 + 8, to >> 32);
}

static size_t code_offset(const uint8_t *label) {
        return GUEST_CODE + (size_t) (label - kvmneg_internal_guest);
}

static void fill_memory(uint8_t *memory) {
        memcpy(memory + GUEST_CODE, kvmneg_internal_guest,
               (size_t) (kvmneg_internal_guest_end - kvmneg_internal_guest));
        for (unsigned vector = 0; vector < GUEST_VECTORS; vector++) {
                uint32_t real = (uint32_t) code_offset(kvmneg_internal_guest_real_stubs) + vector * GUEST_REAL_STUB;

                memcpy(memory + GUEST_IVT + vector * 4, &real, sizeof(real)); /* segment 0 */
                put_gate(memory, vector, code_offset(kvmneg_internal_guest_long_stubs) + vector * GUEST_LONG_STUB);
        }
        put64(memory, GUEST_GDT + KERNEL_CODE, UINT64_C(0x00af9b000000ffff));
        put64(memory, GUEST_GDT + KERNEL_DATA, UINT64_C(0x00cf93000000ffff));
        put64(memory, GUEST_GDT + USER_CODE, UINT64_C(0x00affb000000ffff));
        put64(memory, GUEST_GDT + USER_DATA, UINT64_C(0x00cff3000000ffff));
        put64(memory, GUEST_GDT + TSS_SELECTOR, UINT64_C(0x00008b0000000067) | (uint64_t) GUEST_TSS << 16);
        put64(memory, GUEST_TSS + 4, GUEST_FAULT_STACK);  /* RSP0 */
        put64(memory, GUEST_PML4, GUEST_PDPT | 0x27);     /* present, writable, user, accessed */
        put64(memory, GUEST_PDPT, GUEST_PD | 0x27);
        put64(memory, GUEST_PD, 0xe7); /* 2 MiB from 0, dirty, large */
}

static struct kvm_segment code_segment(unsigned privilege) {
        return (struct kvm_segment) {
                .limit = 0xffffffff, .selector = (uint16_t) (privilege ? USER_CODE | privilege : KERNEL_CODE),
                .type = 11, .present = 1, .dpl = (uint8_t) privilege, .s = 1, .l = 1, .g = 1,
        };
}

static struct kvm_segment data_segment(unsigned privilege) {
        return (struct kvm_segment) {
                .limit = 0xffffffff, .selector = (uint16_t) (privilege ? USER_DATA | privilege : KERNEL_DATA),
                .type = 3, .present = 1, .dpl = (uint8_t) privilege, .db = 1, .s = 1, .g = 1,
        };
}

static void long_segments(struct kvm_sregs *sregs, unsigned privilege) {
        sregs->cs = code_segment(privilege);
        sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = data_segment(privilege);
        sregs->tr = (struct kvm_segment) { .base = GUEST_TSS, .limit = 0x67, .selector = TSS_SELECTOR,
                                           .type = 11, .present = 1 };
        sregs->gdt = (struct kvm_dtable) { .base = GUEST_GDT, .limit = TSS_SELECTOR + 15 };
        sregs->idt = (struct kvm_dtable) { .base = GUEST_IDT, .limit = GUEST_VECTORS * 16 - 1 };
        sregs->cr0 = CR0_LONG;
        sregs->cr3 = GUEST_PML4;
        sregs->cr4 = CR4_BASE;
        sregs->efer = EFER_LONG;
}

static void real_segments(struct kvm_sregs *sregs) {
        struct kvm_segment data = { .limit = 0xffff, .type = 3, .present = 1, .s = 1 };

        sregs->cs = sregs->ss = sregs->fs = sregs->gs = data;
        sregs->cs.type = 11;
        data.base = GUEST_ROWS;
        data.selector = GUEST_ROWS >> 4;
        sregs->ds = sregs->es = data;
        sregs->idt = (struct kvm_dtable) { .base = GUEST_IVT, .limit = GUEST_VECTORS * 4 - 1 };
        sregs->cr0 = CR0_REAL;
        sregs->cr3 = 0;
        sregs->cr4 = CR4_BASE & ~CR4_PAE;
        sregs->efer = 0;
}

/* Brings the vCPU to the row number `row`, whatever it did before. */
static int start_at(struct guest *guest, uint32_t row) {
        bool real = guest->mode == KVMNEG_MODE_REAL;
        struct kvm_vcpu_events events = {};
        struct kvm_sregs sregs;
        struct kvm_regs regs = {
                .rflags = real ? RFLAGS_REAL : RFLAGS_LONG,
                .rip = real ? GUEST_CODE : code_offset(kvmneg_internal_guest_long),
                .rdi = (real ? 0 : GUEST_ROWS) + (uint64_t) row * ROW_SIZE,
                .rsp = GUEST_STACK,
                .rbp = GUEST_STACK,
        };
        int r;

        r = ioctl_pointer(guest->vcpu_fd, KVM_GET_SREGS, &sregs, guest->trace);
        if (r < 0)
                return r;
        if (real)
                real_segments(&sregs);
        else
                long_segments(&sregs, guest->mode == KVMNEG_MODE_CPL3 ? 3 : 0);
        sregs.cr4 |= CR4_OSXSAVE;
        r = ioctl_pointer(guest->vcpu_fd, KVM_SET_SREGS, &sregs, guest->trace);
        if (r == -EINVAL) { /* a guest without XSAVE in its table */
                sregs.cr4 &= ~CR4_OSXSAVE;
                r = ioctl_pointer(guest->vcpu_fd, KVM_SET_SREGS, &sregs, guest->trace);
        }
        if (r == -EINVAL) { /* or without FXSR and SSE */
                sregs.cr4 &= CR4_PAE;
                r = ioctl_pointer(guest->vcpu_fd, KVM_SET_SREGS, &sregs, guest->trace);
        }
        if (r >= 0)
                r = ioctl_pointer(guest->vcpu_fd, KVM_SET_REGS, &regs, guest->trace);
        if (r >= 0 && row > 0) /* the run before may have died with an exception on its way */
                r = ioctl_pointer(guest->vcpu_fd, KVM_SET_VCPU_EVENTS, &events, guest->trace);
        return r < 0 ? r : 0;
}

/* XCR0, where the vCPU can have it at all: the guest says what became of it. */
static int set_xcr0(struct guest *guest, uint64_t value) {
        struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs = { { .xcr = 0, .value = value } } };
        int r = value ? ioctl_pointer(guest->vcpu_fd, KVM_SET_XCRS, &xcrs, guest->trace) : 0;

        return r < 0 && !kvmneg_internal_absent(r) ? r : 0;
}

static int set_slot(struct guest *guest, uint64_t size) {
        struct kvm_userspace_memory_region region = {
                .slot = KVMNEG_PROOF_SLOT,
                .memory_size = size,
                .userspace_addr = (uint64_t) (uintptr_t) guest->memory,
        };

        return ioctl_pointer(guest->vm_fd, KVM_SET_USER_MEMORY_REGION, &region, guest->trace);
}

static void *map(size_t size, int fd) {
        int kind = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
        void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, kind, fd, 0);

        return memory == MAP_FAILED ? NULL : memory;
}

static int map_guest(int kvm_fd, struct guest *guest) {
        int r = kvmneg_internal_ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0, guest->trace);

        if (r < 0)
                return r;
        if ((size_t) r < sizeof(struct kvm_run))
                return -EPROTO;
        guest->run_size = (size_t) r;
        guest->run = map(guest->run_size, guest->vcpu_fd);
        guest->memory = guest->run ? map(GUEST_SIZE, -1) : NULL;
        if (!guest->memory)
                return negative_errno();
        fill_memory(guest->memory);
        /* Intel without "unrestricted guest" needs three pages for real mode (api.rst 4.59); once for each VM. */
        r = kvmneg_internal_ioctl(guest->vm_fd, KVM_SET_TSS_ADDR, TSS_ADDRESS, guest->trace);
        if (r < 0 && r != -EEXIST)
                return r;
        r = set_slot(guest, GUEST_SIZE);
        guest->slot = r >= 0;
        return r < 0 ? r : 0;
}

/*
 * A guest that loops never leaves KVM_RUN by itself. A timer's signal ends it: blocked in this thread but for the time
 * in KVM_RUN (KVM_SET_SIGNAL_MASK, api.rst 4.21), so that no handler is needed and none of the caller's ever runs.
 */
static int arm(struct guest *guest, uint32_t milliseconds) {
        struct {
                struct kvm_signal_mask head;
                uint8_t set[8];
        } mask = { .head = { .len = 8 } };
        struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = STOP_SIGNAL };
        struct itimerspec when = {
                .it_value = { .tv_sec = milliseconds / 1000, .tv_nsec = milliseconds % 1000 * 1000000L },
        };
        sigset_t stop;
        int r;

        sigemptyset(&stop);
        sigaddset(&stop, STOP_SIGNAL);
        r = pthread_sigmask(SIG_BLOCK, &stop, &guest->before);
        if (r > 0)
                return -r;
        guest->masked = true;
        for (int number = 1; number <= 64; number++)
                if (number != STOP_SIGNAL && sigismember(&guest->before, number) == 1)
                        mask.set[(number - 1) / 8] |= (uint8_t) (1u << (number - 1) % 8);
        r = ioctl_pointer(guest->vcpu_fd, KVM_SET_SIGNAL_MASK, &mask, guest->trace);
        if (r < 0)
                return r;
        event.sigev_notify_thread_id = gettid();
        if (timer_create(CLOCK_MONOTONIC, &event, &guest->timer) < 0)
                return negative_errno();
        guest->timer_set = true;
        return timer_settime(guest->timer, 0, &when, NULL) < 0 ? negative_errno() : 0;
}

static bool time_is_over(const struct guest *guest) {
        struct itimerspec left;

        return timer_gettime(guest->timer, &left) < 0 || (left.it_value.tv_sec == 0 && left.it_value.tv_nsec == 0);
}

static int disarm(struct guest *guest) {
        static const struct timespec now = {};
        sigset_t stop;
        int r = 0;

        if (guest->timer_set)
                timer_delete(guest->timer);
        if (guest->masked) {
                sigemptyset(&stop);
                sigaddset(&stop, STOP_SIGNAL);
                while (sigtimedwait(&stop, NULL, &now) > 0) /* what the timer left behind */
                        continue;
                r = kvmneg_internal_ioctl(guest->vcpu_fd, KVM_SET_SIGNAL_MASK, 0, guest->trace);
                pthread_sigmask(SIG_SETMASK, &guest->before, NULL);
        }
        guest->timer_set = guest->masked = false;
        return r;
}

static int guest_done(struct guest *guest, int r) {
        int undone = disarm(guest);

        if (guest->slot) {
                int gone = set_slot(guest, 0);
                undone = undone < 0 ? undone : gone;
        }
        if (guest->memory)
                munmap(guest->memory, GUEST_SIZE);
        if (guest->run)
                munmap(guest->run, guest->run_size);
        return r < 0 ? r : undone < 0 ? undone : 0;
}

/* Lets the vCPU run until it leaves; KVM's reason, or KVMNEG_EXIT_TIME. Negative: KVM_RUN failed. */
static int run_once(struct guest *guest, uint32_t *ret_reason) {
        for (;;) {
                int r = kvmneg_internal_ioctl(guest->vcpu_fd, KVM_RUN, 0, guest->trace);

                if (r >= 0) {
                        *ret_reason = guest->run->exit_reason;
                        break;
                }
                if (r != -EINTR && r != -EAGAIN)
                        return r;
                if (time_is_over(guest)) {
                        *ret_reason = KVMNEG_EXIT_TIME;
                        break;
                }
        }
        /* api.rst 5: what it left for is finished by the next KVM_RUN, which must not begin anything else */
        guest->run->immediate_exit = 1;
        (void) kvmneg_internal_ioctl(guest->vcpu_fd, KVM_RUN, 0, NULL);
        guest->run->immediate_exit = 0;
        return 0;
}

static bool said_goodbye(const struct guest *guest, uint32_t reason) {
        return reason == KVM_EXIT_IO && guest->run->io.direction == KVM_EXIT_IO_OUT &&
               guest->run->io.port == GUEST_PORT;
}

/* The first row from `row` on of which nothing came; rows that real mode passes over count as done. */
static uint32_t next_open(const struct guest *guest, const struct kvmneg_question *rows, uint32_t row,
                          uint32_t count) {
        while (row < count && (rows[row].outcome != KVMNEG_OUTCOME_OPEN ||
                               (guest->mode == KVMNEG_MODE_REAL && rows[row].kind == KVMNEG_ASK_RUN)))
                row++;
        return row;
}

/* Row by row: one that ends the run is noted, and the next run begins behind it. */
static int run_rows(struct guest *guest, struct kvmneg_question *rows, uint32_t count) {
        uint32_t row = 0, reason;

        while ((row = next_open(guest, rows, row, count)) < count) {
                int r = start_at(guest, row);

                if (r >= 0)
                        r = run_once(guest, &reason);
                if (r < 0)
                        return r;
                if (said_goodbye(guest, reason))
                        return 0;
                row = next_open(guest, rows, row, count);
                if (row == count)
                        return 0;
                rows[row].outcome = KVMNEG_OUTCOME_ENDED;
                rows[row].detail = reason;
                if (reason == KVMNEG_EXIT_TIME)
                        return 0;
        }
        return 0;
}

static int check_questions(const struct kvmneg_questions *questions, uint32_t mode, uint32_t milliseconds) {
        if (mode > KVMNEG_MODE_CPL3 || milliseconds == 0)
                return -EINVAL;
        if (questions->count > KVMNEG_QUESTIONS_MAX)
                return -E2BIG;
        for (uint32_t i = 0; i < questions->count; i++)
                if (questions->entries[i].kind < KVMNEG_ASK_CPUID || questions->entries[i].kind > KVMNEG_ASK_RUN)
                        return -EINVAL;
        return 0;
}

/* Copies the questions into the guest, with nothing answered. */
static void copy_in(struct kvmneg_question *rows, const struct kvmneg_questions *questions) {
        memcpy(rows, questions->entries, questions->count * sizeof(rows[0]));
        for (uint32_t i = 0; i < questions->count; i++) {
                rows[i].outcome = KVMNEG_OUTCOME_OPEN;
                rows[i].detail = 0;
                memset(rows[i].answer, 0, sizeof(rows[i].answer));
        }
}

int kvmneg_ask_guest(int kvm_fd, int vm_fd, int vcpu_fd, uint32_t mode, uint32_t milliseconds,
                     const struct kvmneg_questions *questions, struct kvmneg_questions **ret_answers,
                     struct kvmneg_trace *trace) {
        struct guest guest = { .vm_fd = vm_fd, .vcpu_fd = vcpu_fd, .mode = mode, .trace = trace };
        struct kvmneg_questions *answers;
        int r = check_questions(questions, mode, milliseconds);

        if (r < 0)
                return r;
        answers = kvmneg_internal_table(sizeof(*answers), questions->count, sizeof(answers->entries[0]));
        if (!answers)
                return -ENOMEM;
        answers->count = questions->count;
        answers->xcr0 = questions->xcr0;
        r = map_guest(kvm_fd, &guest);
        if (r >= 0) {
                struct kvmneg_question *rows = (struct kvmneg_question *) (void *) (guest.memory + GUEST_ROWS);

                copy_in(rows, questions);
                r = set_xcr0(&guest, questions->xcr0);
                if (r >= 0)
                        r = arm(&guest, milliseconds);
                if (r >= 0)
                        r = run_rows(&guest, rows, questions->count);
                memcpy(answers->entries, rows, questions->count * sizeof(rows[0]));
        }
        r = guest_done(&guest, r);
        if (r < 0) {
                free(answers);
                return r;
        }
        *ret_answers = answers;
        return 0;
}

static int enforce(int vcpu_fd, uint32_t capability, struct kvmneg_trace *trace) {
        struct kvm_enable_cap enable = { .cap = capability, .args = { 1 } };
        int r = ioctl_pointer(vcpu_fd, KVM_ENABLE_CAP, &enable, trace);

        return r < 0 ? r : 0;
}

int kvmneg_enforce_pv_cpuid(int vcpu_fd, struct kvmneg_trace *trace) {
        return enforce(vcpu_fd, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, trace);
}

int kvmneg_enforce_hyperv_cpuid(int vcpu_fd, struct kvmneg_trace *trace) {
        return enforce(vcpu_fd, KVM_CAP_HYPERV_ENFORCE_CPUID, trace);
}
