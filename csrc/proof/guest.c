/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What a run of the proof guest needs on either architecture. */

#include <errno.h>
#include <sys/mman.h>

#include "guest.h"

static void *map(size_t size, int fd) {
        int kind = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
        void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, kind, fd, 0);

        return memory == MAP_FAILED ? NULL : memory;
}

int kvmneg_internal_map_guest(struct guest *guest, int kvm_fd) {
        int r = kvmneg_internal_ioctl(kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0, guest->trace);

        if (r < 0)
                return r;
        if ((size_t) r < sizeof(struct kvm_run))
                return -EPROTO;
        guest->run_size = (size_t) r;
        guest->run = map(guest->run_size, guest->vcpu_fd);
        guest->memory = guest->run ? map(guest->size, -1) : NULL;
        return guest->memory ? 0 : negative_errno();
}

static int set_slot(struct guest *guest, uint64_t size) {
        struct kvm_userspace_memory_region region = {
                .slot = KVMNEG_PROOF_SLOT,
                .guest_phys_addr = guest->base,
                .memory_size = size,
                .userspace_addr = (uint64_t) (uintptr_t) guest->memory,
        };
        int r = ioctl_pointer(guest->vm_fd, KVM_SET_USER_MEMORY_REGION, &region, guest->trace);

        return r < 0 ? r : 0;
}

int kvmneg_internal_plug_guest(struct guest *guest) {
        int r = set_slot(guest, guest->size);

        guest->slot = r == 0;
        return r;
}

int kvmneg_internal_finish_exit(struct guest *guest) {
        int r;

        guest->run->immediate_exit = 1;
        r = kvmneg_internal_ioctl(guest->vcpu_fd, KVM_RUN, 0, NULL); /* EINTR is what it is to fail with */
        guest->run->immediate_exit = 0;
        return r < 0 && r != -EINTR && r != -EAGAIN ? r : 0;
}

int kvmneg_internal_guest_done(struct guest *guest, int r) {
        int undone = kvmneg_internal_disarm(&guest->deadline, guest->trace);

        if (guest->slot) {
                int gone = set_slot(guest, 0);
                undone = undone < 0 ? undone : gone;
        }
        if (guest->memory)
                munmap(guest->memory, guest->size);
        if (guest->run)
                munmap(guest->run, guest->run_size);
        return r < 0 ? r : undone;
}
