/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* arm64: the guest of both pages, how it runs, and its vGIC. Included by minivmm.h. */
#pragma once

#include <signal.h>
#include <sys/time.h>

enum { CHANGED = 0x800, COUNT = 0x808, GUEST_WORDS = CHANGED / 8 }; /* above RESULTS */
enum { BASE = 0x40000000, RESULTS = 0x09000000, DISTRIBUTOR = 0x08000000, REDISTRIBUTORS = 0x080a0000 };

/* "arm64:0x603000000013c020", an ID register (Arm ARM D23): op0 3, op1 0, CRn 0, CRm 1 to 7. */
static inline bool of_guest(struct word *word) {
        if (sscanf(word->bound.word, "arm64:0x%" SCNx64, &word->id) != 1)
                return false;
        return word->id >> 16 == 0x603000000013 && (word->id >> 7 & 0x1ff) == 0x180 && (word->id >> 3 & 0xf) - 1 < 7;
}

static inline void set_attribute(const char *what, int fd, uint32_t group, uint64_t number, const void *value) {
        struct kvm_device_attr attribute = { .group = group, .attr = number, .addr = (uint64_t) value };

        check(what, ioctl(fd, KVM_SET_DEVICE_ATTR, &attribute));
}

/* ID registers show a vGIC where there is one, and the contract counts on it. */
static inline void create_vgic(struct machine *machine) {
        struct kvm_create_device vgic = { .type = KVM_DEV_TYPE_ARM_VGIC_V3 };
        uint64_t distributor = DISTRIBUTOR, redistributors = REDISTRIBUTORS;

        check("KVM_CREATE_DEVICE", ioctl(machine->vm, KVM_CREATE_DEVICE, &vgic));
        machine->vgic = (int) vgic.fd;
        set_attribute("GICD", machine->vgic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST, &distributor);
        set_attribute("GICR", machine->vgic, KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_REDIST, &redistributors);
}

/* When all vCPUs are there: the vGIC, and the PMU that it interrupts for. */
static inline void start_vgic(struct machine *machine, uint64_t features) {
        int interrupt = 23;

        set_attribute("the vGIC", machine->vgic, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, NULL);
        if (features >> KVM_ARM_VCPU_PMU_V3 & 1) {
                set_attribute("the PMU", machine->vcpu, KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_IRQ, &interrupt);
                set_attribute("the PMU", machine->vcpu, KVM_ARM_VCPU_PMU_V3_CTRL, KVM_ARM_VCPU_PMU_V3_INIT, NULL);
        }
}
static inline struct kvm_one_reg one_register(uint64_t id, void *content) {
        return (struct kvm_one_reg) { .id = id, .addr = (uint64_t) content };
}

/* A guest that never ends, with its MMU off. First it keeps what it sees in a table in its memory; then, step by step, it
 * gives its words, what of them changed, and its count, by storing them where no memory is, which is an exit to us. In
 * x19 it has the count, in x20 RESULTS, in x21 the clock, in x22 the table. */
static inline void load(struct machine *machine, const struct word *words, uint32_t count) {
        uint32_t *code = (uint32_t *) (machine->memory + CODE), *again;
        uint64_t start = BASE + CODE;
        struct kvm_one_reg pc =
                one_register(KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG(regs.pc), &start);

        *code++ = 0xd2a00014 | RESULTS >> 16 << 5; /* movz x20, #RESULTS */
        *code++ = 0xd2a00016 | BASE >> 16 << 5;    /* movz x22, #BASE */
        *code++ = 0xf2800016 | TABLE << 5;         /* movk x22, #TABLE */
        *code++ = 0xd2800013;                      /* mov x19, #0 */
        *code++ = 0xd2800015;                      /* mov x21, #0 */
        for (uint32_t at = 0; at < count; at++) {
                *code++ = 0xd5380000 | (words[at].id & 0x3fff) << 5; /* mrs x0, the register */
                *code++ = 0xf90002c0 | at << 10;                     /* str x0, [x22, #8 * at] */
        }
        again = code;
        *code++ = 0xd2800002; /* mov x2, #0 */
        for (uint32_t at = 0; at < count; at++) {
                *code++ = 0xd5380000 | (words[at].id & 0x3fff) << 5; /* mrs x0, the register */
                *code++ = 0xf9000280 | at << 10;                     /* str x0, [x20, #8 * at] */
                *code++ = 0xf94002c1 | at << 10;                     /* ldr x1, [x22, #8 * at] */
                *code++ = 0xca010000;                                /* eor x0, x0, x1 */
                *code++ = 0xaa000042;                                /* orr x2, x2, x0 */
        }
        *code++ = 0xd53be040;                     /* mrs x0, cntvct_el0 */
        *code++ = 0xeb15001f;                     /* cmp x0, x21 */
        *code++ = 0xda9f2042;                     /* csinv x2, x2, xzr, cs: all ones where the clock went back */
        *code++ = 0xaa0003f5;                     /* mov x21, x0 */
        *code++ = 0x91000673;                     /* add x19, x19, #1 */
        *code++ = 0xf9000282 | CHANGED / 8 << 10; /* str x2, [x20, #CHANGED] */
        *code++ = 0xf9000293 | COUNT / 8 << 10;   /* str x19, [x20, #COUNT] */
        *code++ = 0xd2a00023;                     /* mov x3, #0x10000: some time without an exit */
        *code++ = 0xf1000463;                     /* subs x3, x3, #1 */
        *code++ = 0x54ffffe1;                     /* b.ne to it */
        *code = 0x14000000 | ((uint32_t) (again - code) & 0x3ffffff); /* b again */
        __builtin___clear_cache((char *) machine->memory, (char *) machine->memory + MEMORY);
        check("pc", ioctl(machine->vcpu, KVM_SET_ONE_REG, &pc));
}

enum { STEPS = 5, STOP_US = 3000 };

/* A guest in its machine, and how far it is. */
struct guest {
        struct machine machine;
        struct kvmneg_contract *contract;
        struct word words[WORDS];
        uint32_t words_count;
        uint64_t count;
        unsigned broken;
};

static struct kvm_run *running; /* for the signal's handler */

static inline void stop(int number) {
        (void) number;
        running->immediate_exit = 1;
}

/* What the guest says: a word, what changed since it started, or its count. */
static inline void hear(struct guest *guest, uint64_t at, uint64_t value) {
        if (at < CHANGED && at / 8 < guest->words_count) {
                guest->words[at / 8].seen = value;
                guest->broken += !is_kept(&guest->words[at / 8]);
        } else if (at == CHANGED && value) {
                guest->broken++;
                printf("the guest saw something change: 0x%" PRIx64 "\n", value);
        } else if (at == COUNT) {
                guest->broken += value != guest->count + 1;
                guest->count = value;
        }
}

/* Runs the guest to its next exit; false where it was stopped: then no exit is pending, and its state is whole. */
static inline bool run_once(struct guest *guest) {
        struct kvm_run *run = guest->machine.run;
        uint64_t value = 0;

        if (ioctl(guest->machine.vcpu, KVM_RUN, 0) < 0) {
                if (errno != EINTR)
                        die("KVM_RUN", 0);
                return !run->immediate_exit;
        }
        if (run->exit_reason != KVM_EXIT_MMIO || !run->mmio.is_write)
                die("the guest stopped", -EPROTO);
        memcpy(&value, run->mmio.data, sizeof(value));
        hear(guest, run->mmio.phys_addr - RESULTS, value);
        return true;
}

/* STEPS steps, and on until a signal stops it somewhere. */
static inline void run_steps(struct guest *guest) {
        const struct itimerval soon = { .it_value.tv_usec = STOP_US };
        struct sigaction action = { .sa_handler = stop };
        uint64_t first = guest->count + 1;

        running = guest->machine.run;
        running->immediate_exit = 0;
        for (uint64_t last = guest->count + STEPS; guest->count < last;)
                run_once(guest);
        sigaction(SIGALRM, &action, NULL);
        setitimer(ITIMER_REAL, &soon, NULL);
        while (run_once(guest))
                ;
        printf("steps %" PRIu64 " to %" PRIu64 ": %" PRIu32 " words looked at by the guest, %u not as promised\n", first,
               guest->count, guest->words_count, guest->broken);
}
