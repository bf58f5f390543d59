/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Runs the proof guest on a vCPU: what a guest sees, whatever KVM says that it shows. */

#define _GNU_SOURCE

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "../arm64.h"
#include "arm64-layout.h"
#include "guest.h"

#define CORE(member) (KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(regs.member))
#define X(n) (CORE(regs) + 2 * (uint64_t) (n)) /* core registers are numbered in words of 32 bits */

/* Arm ARM (DDI 0487), D24.2 and C5.2 */
#define SCTLR_EL1 SYSREG(3, 0, 1, 0, 0)
#define CPACR_EL1 SYSREG(3, 0, 1, 0, 2)
#define VBAR_EL1 SYSREG(3, 0, 12, 0, 0)
#define PMUSERENR_EL0 SYSREG(3, 3, 9, 14, 0)
/* MMU and caches off. What is always 1; instructions that EL0 may execute: WFE, WFI, DC and IC, DC ZVA, CTR_EL0, RCTX,
 * memory copies; pointer authentication with each key. */
#define SCTLR_VALUE \
        (UINT64_C(0x30d00980) | 1 << 18 | 1 << 16 | 1 << 26 | 1 << 14 | 1 << 15 | 1 << 10 | UINT64_C(1) << 33 | \
         UINT64_C(1) << 31 | 1 << 30 | 1 << 27 | 1 << 13)
#define CPACR_VALUE (UINT64_C(3) << 24 | 3 << 20 | 3 << 16) /* SME, SIMD, SVE */
#define PMUSERENR_VALUE 1                                   /* EN */
#define PSTATE_EL1 0x3c5u                                   /* EL1h, everything masked */
#define PSTATE_EL0 0x3c0u

extern const uint32_t kvmneg_internal_guest[], kvmneg_internal_guest_rows[], kvmneg_internal_guest_end[];

/* A question as the guest has it. */
struct row {
        uint64_t argument[4];
        uint32_t code[24];
};

static_assert(sizeof(struct row) == ROW_SIZE && offsetof(struct row, code) == ROW_CODE, "layout");
static_assert(sizeof(struct kvmneg_question) == 128, "layout");
static_assert(GUEST_ROWS + (KVMNEG_QUESTIONS_MAX + 1) * ROW_SIZE <= GUEST_SIZE, "layout");

/* Word by word: a long copy is SVE's, after which QEMU 7.2's TCG forgets to drop what it has translated of the page
 * when it was another guest's. */
static void put_words(uint8_t *memory, size_t at, const uint32_t *words, size_t count) {
        volatile uint32_t *to = (volatile uint32_t *) (void *) (memory + at);

        for (size_t i = 0; i < count; i++)
                to[i] = words[i];
}

static void fill_memory(uint8_t *memory, const struct kvmneg_questions *questions) {
        put_words(memory, 0, kvmneg_internal_guest, (size_t) (kvmneg_internal_guest_end - kvmneg_internal_guest));
        for (uint32_t i = 0; i < questions->count; i++) {
                size_t at = GUEST_ROWS + (size_t) i * ROW_SIZE;
                uint32_t argument[8];

                memcpy(argument, questions->entries[i].argument, sizeof(argument));
                put_words(memory, at + ROW_ARGUMENT, argument, 8);
                put_words(memory, at + ROW_CODE, questions->entries[i].code, KVMNEG_QUESTION_CODE);
        }
}

static int set_registers(struct guest *guest, const uint64_t (*registers)[2], size_t count) {
        for (size_t i = 0; i < count; i++) {
                int r = kvmneg_set_register(guest->vcpu_fd, registers[i][0], registers[i][1], guest->trace);

                if (r < 0 && !(registers[i][0] == PMUSERENR_EL0 && refused(r))) /* a guest without a PMU */
                        return r;
        }
        return 0;
}

/* Brings the vCPU to the row number `row`, whatever it did before. */
static int start_at(struct guest *guest, uint32_t row) {
        uint64_t rows = GUEST_BASE + (uint64_t) ((const uint8_t *) kvmneg_internal_guest_rows -
                                                 (const uint8_t *) kvmneg_internal_guest);
        const uint64_t registers[][2] = {
                { SCTLR_EL1, SCTLR_VALUE },
                { CPACR_EL1, CPACR_VALUE },
                { VBAR_EL1, GUEST_BASE },
                { PMUSERENR_EL0, PMUSERENR_VALUE },
                { X(19), GUEST_BASE + GUEST_ROWS + (uint64_t) row * ROW_SIZE },
                { X(20), GUEST_RESULTS },
                { CORE(pstate), guest->mode == KVMNEG_MODE_EL0 ? PSTATE_EL0 : PSTATE_EL1 },
                { CORE(pc), rows },
        };

        return set_registers(guest, registers, sizeof(registers) / sizeof(registers[0]));
}

/* The guest in the VM, ready to be started. */
static int place_guest(int kvm_fd, struct guest *guest, const struct kvmneg_questions *questions) {
        int r = kvmneg_internal_map_guest(guest, kvm_fd);

        if (r < 0)
                return r;
        fill_memory(guest->memory, questions);
        return kvmneg_internal_plug_guest(guest);
}

/* Whether the guest left to tell what became of a row. */
static bool tells(const struct kvm_run *run, uint32_t reason) {
        return reason == KVM_EXIT_MMIO && run->mmio.is_write && run->mmio.len == sizeof(uint64_t) &&
               (run->mmio.phys_addr == GUEST_RESULTS + RESULT_ANSWERED ||
                run->mmio.phys_addr == GUEST_RESULTS + RESULT_FAULTED);
}

static int take(struct guest *guest, struct kvmneg_question *row) {
        uint64_t value;

        memcpy(&value, guest->run->mmio.data, sizeof(value));
        if (guest->run->mmio.phys_addr == GUEST_RESULTS + RESULT_FAULTED) {
                row->outcome = KVMNEG_OUTCOME_FAULTED;
                row->detail = value;
                return 0;
        }
        row->answer[0] = value;
        for (uint32_t n = 1; n < row->answers; n++) {
                int r = kvmneg_get_register(guest->vcpu_fd, X(n), &row->answer[n], guest->trace);
                if (r < 0)
                        return r;
        }
        row->outcome = KVMNEG_OUTCOME_ANSWERED;
        return 0;
}

/* Row by row: one that ends the run is noted, and the next run begins behind it. */
static int run_rows(struct guest *guest, struct kvmneg_question *rows, uint32_t count) {
        uint32_t reason = 0;
        bool started = false;
        int r = 0;

        for (uint32_t row = 0; row < count && r >= 0 && reason != KVMNEG_EXIT_TIME; row++) {
                if (!started)
                        r = start_at(guest, row);
                if (r >= 0)
                        r = kvmneg_internal_run(&guest->deadline, guest->run, &reason, guest->trace);
                if (r < 0)
                        break;
                started = tells(guest->run, reason);
                if (started) {
                        r = take(guest, &rows[row]);
                } else {
                        r = kvmneg_internal_finish_exit(guest);
                        rows[row].outcome = KVMNEG_OUTCOME_ENDED;
                        rows[row].detail = reason;
                }
        }
        return r >= 0 && started ? kvmneg_internal_finish_exit(guest) : r;
}

static int check_questions(const struct kvmneg_questions *questions, uint32_t mode, uint32_t milliseconds) {
        if (mode > KVMNEG_MODE_EL0 || milliseconds == 0)
                return -EINVAL;
        if (questions->count > KVMNEG_QUESTIONS_MAX)
                return -E2BIG;
        for (uint32_t i = 0; i < questions->count; i++)
                if (questions->entries[i].answers < 1 || questions->entries[i].answers > 4)
                        return -EINVAL;
        return 0;
}

/* The questions, with nothing answered. */
static struct kvmneg_questions *copy(const struct kvmneg_questions *questions) {
        struct kvmneg_questions *answers =
                kvmneg_internal_table(sizeof(*answers), questions->count, sizeof(answers->entries[0]));

        if (!answers)
                return NULL;
        answers->count = questions->count;
        for (uint32_t i = 0; i < questions->count; i++) {
                struct kvmneg_question *row = &answers->entries[i];

                *row = questions->entries[i];
                row->outcome = KVMNEG_OUTCOME_OPEN;
                row->detail = 0;
                memset(row->answer, 0, sizeof(row->answer));
        }
        return answers;
}

int kvmneg_ask_guest(int kvm_fd, int vm_fd, int vcpu_fd, uint32_t mode, uint32_t milliseconds,
                     const struct kvmneg_questions *questions, struct kvmneg_questions **ret_answers,
                     struct kvmneg_trace *trace) {
        struct guest guest = { .vm_fd = vm_fd, .vcpu_fd = vcpu_fd, .mode = mode, .base = GUEST_BASE, .size = GUEST_SIZE,
                               .trace = trace };
        struct kvmneg_questions *answers;
        int r = check_questions(questions, mode, milliseconds);

        if (r < 0)
                return r;
        answers = copy(questions);
        if (!answers)
                return -ENOMEM;
        r = place_guest(kvm_fd, &guest, questions);
        if (r >= 0)
                r = kvmneg_internal_arm(&guest.deadline, vcpu_fd, milliseconds, trace);
        if (r >= 0)
                r = run_rows(&guest, answers->entries, answers->count);
        r = kvmneg_internal_guest_done(&guest, r);
        if (r < 0) {
                free(answers);
                return r;
        }
        *ret_answers = answers;
        return 0;
}
