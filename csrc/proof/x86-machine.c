/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the proof guest finds: its memory, and a vCPU in each mode (x86-layout.h has the places). */

#include <errno.h>
#include <string.h>

#include <linux/kvm.h>

#include "x86-layout.h"
#include "x86-machine.h"

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

void kvmneg_internal_fill_guest(uint8_t *memory) {
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

int kvmneg_internal_start_guest(int vcpu_fd, uint32_t mode, uint32_t row, struct kvmneg_trace *trace) {
        bool real = mode == KVMNEG_MODE_REAL;
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

        r = ioctl_pointer(vcpu_fd, KVM_GET_SREGS, &sregs, trace);
        if (r < 0)
                return r;
        if (real)
                real_segments(&sregs);
        else
                long_segments(&sregs, mode == KVMNEG_MODE_CPL3 ? 3 : 0);
        sregs.cr4 |= CR4_OSXSAVE;
        r = ioctl_pointer(vcpu_fd, KVM_SET_SREGS, &sregs, trace);
        if (r == -EINVAL) { /* a guest without XSAVE in its table */
                sregs.cr4 &= ~CR4_OSXSAVE;
                r = ioctl_pointer(vcpu_fd, KVM_SET_SREGS, &sregs, trace);
        }
        if (r == -EINVAL) { /* or without FXSR and SSE */
                sregs.cr4 &= CR4_PAE;
                r = ioctl_pointer(vcpu_fd, KVM_SET_SREGS, &sregs, trace);
        }
        if (r >= 0)
                r = ioctl_pointer(vcpu_fd, KVM_SET_REGS, &regs, trace);
        if (r >= 0) /* the run before, also of an earlier call, may have died with an exception on its way */
                r = ioctl_pointer(vcpu_fd, KVM_SET_VCPU_EVENTS, &events, trace);
        return r < 0 ? r : 0;
}
