/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Letting a vCPU run for a limited time. */
#pragma once

#include <signal.h>
#include <time.h>

#include <linux/kvm.h>

#include "../internal.h"

/* All zero before the first use; what arm() does, disarm() undoes. */
struct kvmneg_internal_deadline {
        int vcpu_fd;
        bool timer_set, masked;
        timer_t timer;
        sigset_t before;
};

/*
 * A guest that loops never leaves KVM_RUN by itself. A timer's signal ends it: blocked in this thread but for the time
 * in KVM_RUN (KVM_SET_SIGNAL_MASK, api.rst 4.21), so that no handler is needed and none of the caller's ever runs.
 */
int kvmneg_internal_arm(struct kvmneg_internal_deadline *deadline, int vcpu_fd, uint32_t milliseconds,
                        struct kvmneg_trace *trace);
int kvmneg_internal_disarm(struct kvmneg_internal_deadline *deadline, struct kvmneg_trace *trace);

/* Lets the vCPU run until it leaves; KVM's reason, or KVMNEG_EXIT_TIME. Negative: KVM_RUN failed. */
int kvmneg_internal_run(const struct kvmneg_internal_deadline *deadline, const struct kvm_run *run,
                        uint32_t *ret_reason, struct kvmneg_trace *trace);
