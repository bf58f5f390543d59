/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The proof guest: it goes through its rows, does to each what its kind says, writes down what came of it, and leaves
 * by port I/O at a row of kind 0. Bytes for x86-machine.c, which copies them to GUEST_CODE; nothing here ever runs in
 * the process. The same for each mode: DI points to the row, BP holds the top of the stack; a row's own code must
 * leave both alone.
 *
 * A fault is an outcome like another: its handler notes the vector and goes on with the next row.
 */
#include "x86-layout.h"

#define AT(label) (GUEST_CODE + (label) - kvmneg_internal_guest)

        .section .rodata.kvmneg_guest, "a", @progbits
        .globl kvmneg_internal_guest, kvmneg_internal_guest_end
        .globl kvmneg_internal_guest_real_stubs, kvmneg_internal_guest_long, kvmneg_internal_guest_long_stubs
        .hidden kvmneg_internal_guest, kvmneg_internal_guest_end
        .hidden kvmneg_internal_guest_real_stubs, kvmneg_internal_guest_long, kvmneg_internal_guest_long_stubs

/* -- real mode: CS:IP = 0:GUEST_CODE, SS = 0, DS = GUEST_ROWS / 16, DI = 0 ------------------------------- */
        .balign 16
        .code16
kvmneg_internal_guest:
real_row:
        movl    ROW_INDEX(%di), %eax
        movl    ROW_SUBLEAF(%di), %ecx
        cmpl    $ASK_CPUID, (%di)
        jne     1f
        cpuid
        jmp     real_answered
1:      movl    %eax, %ecx
        cmpl    $ASK_MSR, (%di)
        jne     2f
        rdmsr
        jmp     real_answered
2:      cmpl    $ASK_XCR, (%di)
        jne     3f
        xgetbv
        jmp     real_answered
3:      cmpl    $0, (%di)
        jne     real_next               /* ASK_RUN is code of 64 bits: its outcome stays open */
4:      outb    %al, $GUEST_PORT
        jmp     4b
real_answered:
        movl    %eax, ROW_ANSWER(%di)
        movl    %ebx, ROW_ANSWER + 4(%di)
        movl    %ecx, ROW_ANSWER + 8(%di)
        movl    %edx, ROW_ANSWER + 12(%di)
        movl    $OUTCOME_ANSWERED, ROW_OUTCOME(%di)
real_next:
        addw    $ROW_SIZE, %di
        jmp     real_row

        .balign GUEST_REAL_STUB
kvmneg_internal_guest_real_stubs:
        .set vector, 0
        .rept GUEST_VECTORS
        .balign GUEST_REAL_STUB
        pushw   $vector
        jmp     real_fault
        .set vector, vector + 1
        .endr
real_fault:
        popw    %ax
        movzwl  %ax, %eax
        movl    %eax, ROW_DETAIL(%di)
        movl    $OUTCOME_FAULTED, ROW_OUTCOME(%di)
        movw    %bp, %sp                /* no return to what faulted */
        jmp     real_next

/* -- long mode, at any CPL: RIP = kvmneg_internal_guest_long, RDI = GUEST_ROWS --------------------------- */
        .balign 16
        .code64
kvmneg_internal_guest_long:
long_row:
        movl    ROW_INDEX(%rdi), %eax
        movl    ROW_SUBLEAF(%rdi), %ecx
        movl    ROW_KIND(%rdi), %edx
        cmpl    $ASK_CPUID, %edx
        jne     1f
        cpuid
        jmp     long_answered
1:      movl    %eax, %ecx
        cmpl    $ASK_MSR, %edx
        jne     2f
        rdmsr
        jmp     long_answered
2:      cmpl    $ASK_XCR, %edx
        jne     3f
        xgetbv
        jmp     long_answered
3:      cmpl    $ASK_RUN, %edx
        jne     4f
        leaq    ROW_CODE(%rdi), %rax
        callq   *%rax
        jmp     long_answered
4:      outb    %al, $GUEST_PORT        /* CPL 3 may: IOPL is 3 */
        jmp     4b
long_answered:
        movl    %eax, ROW_ANSWER(%rdi)
        movl    %ebx, ROW_ANSWER + 4(%rdi)
        movl    %ecx, ROW_ANSWER + 8(%rdi)
        movl    %edx, ROW_ANSWER + 12(%rdi)
        movl    $OUTCOME_ANSWERED, ROW_OUTCOME(%rdi)
long_next:
        addq    $ROW_SIZE, %rdi
        jmp     long_row

        .balign GUEST_LONG_STUB
kvmneg_internal_guest_long_stubs:
        .set vector, 0
        .rept GUEST_VECTORS
        .balign GUEST_LONG_STUB
        /* 8, 10 to 14, 17, 21, 29 and 30 come with an error code (Intel SDM 3A 6.3.1, AMD APM 2 8.2) */
        .if !((1 << vector) & 0x60227d00)
        pushq   $0
        .endif
        pushq   $vector
        jmp     long_fault
        .set vector, vector + 1
        .endr
long_fault:                             /* vector, error code, RIP, CS, RFLAGS, RSP, SS */
        popq    %rax
        movl    %eax, ROW_DETAIL(%rdi)
        popq    %rax
        movl    $OUTCOME_FAULTED, ROW_OUTCOME(%rdi)
        movq    $AT(long_next), (%rsp)
        movq    %rbp, 24(%rsp)
        iretq
kvmneg_internal_guest_end:

        .section .note.GNU-stack, "", @progbits
