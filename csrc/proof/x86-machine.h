/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The machine that the proof guest finds. */
#pragma once

#include "../internal.h"

/* Puts the guest, its tables and its stubs into GUEST_SIZE bytes of memory that are zero. */
void kvmneg_internal_fill_guest(uint8_t *memory);

/* Brings the vCPU to the row number `row` in one of KVMNEG_MODE_*, whatever it did before. */
int kvmneg_internal_start_guest(int vcpu_fd, uint32_t mode, uint32_t row, struct kvmneg_trace *trace);
