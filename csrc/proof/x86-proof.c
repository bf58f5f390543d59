/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Runs the proof guest on a vCPU: what a guest sees, whatever KVM says that it shows. */

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "../kvm-constants.h"
#include "guest.h"
#include "x86-layout.h"
#include "x86-machine.h"

#define TSS_ADDRESS 0xfffbd000 /* three pages that no guest of ours uses, below the BIOS; where QEMU has them */

static_assert(sizeof(struct kvmneg_question) == ROW_SIZE, "layout");
static_assert(offsetof(struct kvmneg_question, outcome) == ROW_OUTCOME, "layout");
static_assert(offsetof(struct kvmneg_question, detail) == ROW_DETAIL, "layout");
static_assert(offsetof(struct kvmneg_question, answer) == ROW_ANSWER, "layout");
static_assert(offsetof(struct kvmneg_question, code) == ROW_CODE, "layout");
static_assert(GUEST_ROWS + (KVMNEG_QUESTIONS_MAX + 1) * ROW_SIZE <= GUEST_SIZE, "layout");
static_assert(KVMNEG_ASK_CPUID == ASK_CPUID && KVMNEG_ASK_MSR == ASK_MSR && KVMNEG_ASK_XCR == ASK_XCR &&
              KVMNEG_ASK_RUN == ASK_RUN, "layout");
static_assert(KVMNEG_OUTCOME_ANSWERED == OUTCOME_ANSWERED && KVMNEG_OUTCOME_FAULTED == OUTCOME_FAULTED, "layout");

/* XCR0, where the vCPU can have it at all: the guest says what became of it. */
static int set_xcr0(struct guest *guest, uint64_t value) {
        struct kvm_xcrs xcrs = { .nr_xcrs = 1, .xcrs = { { .xcr = 0, .value = value } } };
        int r = value ? ioctl_pointer(guest->vcpu_fd, KVM_SET_XCRS, &xcrs, guest->trace) : 0;

        return r < 0 && !kvmneg_internal_absent(r) ? r : 0;
}

/* The guest in the VM, ready to be started. */
static int place_guest(int kvm_fd, struct guest *guest) {
        int r = kvmneg_internal_map_guest(guest, kvm_fd);

        if (r < 0)
                return r;
        kvmneg_internal_fill_guest(guest->memory);
        /* Intel without "unrestricted guest" needs three pages for real mode (api.rst 4.36); once for each VM. */
        r = kvmneg_internal_ioctl(guest->vm_fd, KVM_SET_TSS_ADDR, TSS_ADDRESS, guest->trace);
        return r < 0 && r != -EEXIST ? r : kvmneg_internal_plug_guest(guest);
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
                int r = kvmneg_internal_start_guest(guest->vcpu_fd, guest->mode, row, guest->trace);

                if (r >= 0)
                        r = kvmneg_internal_run(&guest->deadline, guest->run, &reason, guest->trace);
                if (r >= 0)
                        r = kvmneg_internal_finish_exit(guest);
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
        struct guest guest = { .vm_fd = vm_fd, .vcpu_fd = vcpu_fd, .mode = mode, .size = GUEST_SIZE, .trace = trace };
        struct kvmneg_questions *answers;
        int r = check_questions(questions, mode, milliseconds);

        if (r < 0)
                return r;
        answers = kvmneg_internal_table(sizeof(*answers), questions->count, sizeof(answers->entries[0]));
        if (!answers)
                return -ENOMEM;
        answers->count = questions->count;
        answers->xcr0 = questions->xcr0;
        r = place_guest(kvm_fd, &guest);
        if (r >= 0) {
                struct kvmneg_question *rows = (struct kvmneg_question *) (void *) (guest.memory + GUEST_ROWS);

                copy_in(rows, questions);
                r = set_xcr0(&guest, questions->xcr0);
                if (r >= 0)
                        r = kvmneg_internal_arm(&guest.deadline, vcpu_fd, milliseconds, trace);
                if (r >= 0)
                        r = run_rows(&guest, rows, questions->count);
                memcpy(answers->entries, rows, questions->count * sizeof(rows[0]));
        }
        r = kvmneg_internal_guest_done(&guest, r);
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
