/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a run of the proof guest needs on either architecture: its memory in the VM, and the vCPU's shared page. */
#pragma once

#include <linux/kvm.h>

#include "deadline.h"

/* Everything in it is undone by kvmneg_internal_guest_done(). */
struct guest {
        int vm_fd, vcpu_fd;
        uint32_t mode;
        uint64_t base; /* the guest-physical address of its memory */
        size_t size;
        uint8_t *memory;
        struct kvm_run *run;
        size_t run_size;
        bool slot;
        struct kvmneg_internal_deadline deadline;
        struct kvmneg_trace *trace;
};

/* Maps `run`, and `memory`, which is zero. */
int kvmneg_internal_map_guest(struct guest *guest, int kvm_fd);

/* Gives the VM that memory, in KVMNEG_PROOF_SLOT. */
int kvmneg_internal_plug_guest(struct guest *guest);

/* Finishes what KVM_RUN left for, which the next one would do, and begins nothing else (api.rst 5, immediate_exit). */
int kvmneg_internal_finish_exit(struct guest *guest);

/* Undoes all. Returns `r` where that is an error, else what it fails with itself, else 0. */
int kvmneg_internal_guest_done(struct guest *guest, int r);
