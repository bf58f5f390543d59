/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The proof guest: it goes through its rows, calls the code of each, and stores what came of it where no memory is.
 * Bytes for arm64-proof.c, which copies them to GUEST_BASE; nothing here ever runs in the process. The same at EL1 and
 * EL0, with the MMU off: memory is written before the guest runs and never by it, so nothing depends on caches.
 * X19 points to the row, X20 to GUEST_RESULTS; a row's own code must leave both alone, and X30.
 *
 * An exception is an outcome like another: its handler tells the syndrome and goes on with the next row.
 */
#include "arm64-layout.h"

        .section .rodata.kvmneg_guest, "a", %progbits
        .globl kvmneg_internal_guest, kvmneg_internal_guest_rows, kvmneg_internal_guest_end
        .hidden kvmneg_internal_guest, kvmneg_internal_guest_rows, kvmneg_internal_guest_end

        .balign 2048
kvmneg_internal_guest:
        .rept 16
        .balign 128
        b       fault
        .endr
        .balign 128
fault:
        mrs     x0, esr_el1
        adr     x1, next_row            /* no return to what faulted */
        msr     elr_el1, x1
        str     x0, [x20, #RESULT_FAULTED]
        eret

kvmneg_internal_guest_rows:
        ldp     x0, x1, [x19, #ROW_ARGUMENT]
        ldp     x2, x3, [x19, #ROW_ARGUMENT + 16]
        add     x4, x19, #ROW_CODE
        blr     x4
        str     x0, [x20, #RESULT_ANSWERED]
next_row:
        add     x19, x19, #ROW_SIZE
        b       kvmneg_internal_guest_rows
        .balign 8
kvmneg_internal_guest_end:

        .section .note.GNU-stack, "", %progbits
