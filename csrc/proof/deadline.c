/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Letting a vCPU run for a limited time. */

#define _GNU_SOURCE

#include <pthread.h>
#include <unistd.h>

#include "deadline.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid /* until glibc 2.41 */
#endif

#define STOP_SIGNAL SIGRTMAX
#define SIGNALS 64 /* of the kernel's sigset_t */

int kvmneg_internal_arm(struct kvmneg_internal_deadline *deadline, int vcpu_fd, uint32_t milliseconds,
                        struct kvmneg_trace *trace) {
        struct {
                struct kvm_signal_mask head;
                uint8_t set[SIGNALS / 8];
        } mask = { .head = { .len = sizeof(mask.set) } };
        struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = STOP_SIGNAL };
        struct itimerspec when = {
                .it_value = { .tv_sec = milliseconds / 1000, .tv_nsec = milliseconds % 1000 * 1000000L },
        };
        sigset_t stop;
        int r;

        deadline->vcpu_fd = vcpu_fd;
        sigemptyset(&stop);
        sigaddset(&stop, STOP_SIGNAL);
        r = pthread_sigmask(SIG_BLOCK, &stop, &deadline->before);
        if (r > 0)
                return -r;
        deadline->masked = true;
        for (int number = 1; number <= SIGNALS; number++)
                if (number != STOP_SIGNAL && sigismember(&deadline->before, number) == 1)
                        mask.set[(number - 1) / 8] |= (uint8_t) (1u << (number - 1) % 8);
        r = ioctl_pointer(vcpu_fd, KVM_SET_SIGNAL_MASK, &mask, trace);
        if (r < 0)
                return r;
        event.sigev_notify_thread_id = gettid();
        if (timer_create(CLOCK_MONOTONIC, &event, &deadline->timer) < 0)
                return negative_errno();
        deadline->timer_set = true;
        return timer_settime(deadline->timer, 0, &when, NULL) < 0 ? negative_errno() : 0;
}

static bool time_is_over(const struct kvmneg_internal_deadline *deadline) {
        struct itimerspec left;

        return timer_gettime(deadline->timer, &left) < 0 || (left.it_value.tv_sec == 0 && left.it_value.tv_nsec == 0);
}

int kvmneg_internal_disarm(struct kvmneg_internal_deadline *deadline, struct kvmneg_trace *trace) {
        static const struct timespec now = {};
        sigset_t stop;
        int r = 0;

        if (deadline->timer_set)
                timer_delete(deadline->timer);
        if (deadline->masked) {
                sigemptyset(&stop);
                sigaddset(&stop, STOP_SIGNAL);
                while (sigtimedwait(&stop, NULL, &now) > 0) /* what the timer left behind */
                        continue;
                r = kvmneg_internal_ioctl(deadline->vcpu_fd, KVM_SET_SIGNAL_MASK, 0, trace);
                pthread_sigmask(SIG_SETMASK, &deadline->before, NULL);
        }
        deadline->timer_set = deadline->masked = false;
        return r < 0 ? r : 0;
}

int kvmneg_internal_run(const struct kvmneg_internal_deadline *deadline, const struct kvm_run *run,
                        uint32_t *ret_reason, struct kvmneg_trace *trace) {
        for (;;) {
                int r = kvmneg_internal_ioctl(deadline->vcpu_fd, KVM_RUN, 0, trace);

                if (r >= 0) {
                        *ret_reason = run->exit_reason;
                        return 0;
                }
                if (r != -EINTR && r != -EAGAIN)
                        return r;
                if (time_is_over(deadline)) {
                        *ret_reason = KVMNEG_EXIT_TIME;
                        return 0;
                }
        }
}
