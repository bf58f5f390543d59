/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Where things lie in the memory of a proof guest, for the guest (assembler) and for who runs it (C). All of it is
 * below 128 KiB, mapped one to one, so that real mode reaches the rows through one segment.
 */
#pragma once

#define GUEST_SIZE 0x20000
#define GUEST_IVT 0x0      /* real mode's vectors */
#define GUEST_CODE 0x1000  /* x86-guest.S, at most a page */
#define GUEST_GDT 0x2000
#define GUEST_TSS 0x2800
#define GUEST_IDT 0x3000
#define GUEST_PML4 0x4000
#define GUEST_PDPT 0x5000
#define GUEST_PD 0x6000
#define GUEST_STACK 0x8000       /* top of the stack of whoever asks, in every mode */
#define GUEST_FAULT_STACK 0x9000 /* top of the one that faults of CPL 3 are handled on */
#define GUEST_ROWS 0x10000       /* struct kvmneg_question[]; to the end of the memory */

#define GUEST_VECTORS 32
#define GUEST_REAL_STUB 8  /* bytes of a vector's entry in real mode */
#define GUEST_LONG_STUB 16 /* and in long mode */
#define GUEST_PORT 0xf4    /* a byte written here says that all rows are done */

/* struct kvmneg_question, held by static assertions in x86-proof.c */
#define ROW_KIND 0
#define ROW_INDEX 4
#define ROW_SUBLEAF 8
#define ROW_OUTCOME 12
#define ROW_DETAIL 16
#define ROW_ANSWER 20
#define ROW_CODE 36
#define ROW_SIZE 64

#define ASK_CPUID 1
#define ASK_MSR 2
#define ASK_XCR 3
#define ASK_RUN 4

#define OUTCOME_ANSWERED 1
#define OUTCOME_FAULTED 2
