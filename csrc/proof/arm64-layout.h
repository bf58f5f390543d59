/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Where things lie in the memory of a proof guest, for the guest (assembler) and for who runs it (C). */
#pragma once

#define GUEST_BASE 0x40000000
#define GUEST_SIZE 0x30000    /* of pages of up to 64 KiB */
#define GUEST_VECTORS 0x800   /* bytes of the table of exception vectors, where arm64-guest.S begins */
#define GUEST_ROWS 0x1000     /* struct row[] of arm64-proof.c */
#define GUEST_RESULTS 0x09000000 /* no memory there: what is stored leaves the guest (KVM_EXIT_MMIO) */

#define ROW_ARGUMENT 0
#define ROW_CODE 32
#define ROW_SIZE 128

#define RESULT_ANSWERED 0 /* offsets from GUEST_RESULTS: x0 of a row that came to its end */
#define RESULT_FAULTED 8  /* ESR_EL1 of one that did not */
