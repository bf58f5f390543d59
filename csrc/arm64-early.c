/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What must be tried before a vCPU is complete, on a VM of its own: lengths of SVE vectors, implementation ids,
 * revisions of the vGIC. */

#include "arm64.h"

static struct kvmneg_trial *find(struct kvmneg_trials *trials, uint64_t id) {
        for (uint32_t i = 0; i < trials->count; i++)
                if (trials->entries[i].id == id)
                        return &trials->entries[i];
        return NULL;
}

/* MIDR, REVIDR and AIDR, on a VM that was made for it. */
static int try_implementation_ids(int vcpu_fd, struct kvmneg_trials *trials, struct kvmneg_trace *trace) {
        static const uint64_t ids[] = { MIDR_EL1, REVIDR_EL1, AIDR_EL1 };

        for (size_t i = 0; i < sizeof(ids) / sizeof(ids[0]); i++) {
                struct kvmneg_trial *trial = find(trials, ids[i]);
                int r = trial ? kvmneg_internal_try_fields(vcpu_fd, trial, UINT64_MAX, true, trace) : 0;

                if (r < 0)
                        return r;
        }
        return 0;
}

/* SVE_VLS: KVM takes the lengths up to a maximum. Each maximum is tried, and all lengths put back. */
static int try_lengths(int vcpu_fd, struct kvmneg_trial *trial, struct kvmneg_trace *trace) {
        for (unsigned n = 1; n < 64 && trial->reset >> n; n++) {
                uint64_t below = trial->reset & ((UINT64_C(1) << n) - 1);
                int r;

                if (!(trial->reset >> n & 1) || !below)
                        continue;
                r = kvmneg_internal_try_value(vcpu_fd, trial, trial->reset & ~below, below, trace);
                if (r < 0)
                        return r;
        }
        return 0;
}

/* GICD_IIDR.Revision: each is written and read back. The vGIC must be initialised for it. */
static int try_revisions(int vm_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace) {
        struct kvm_device_attr init = { .group = KVM_DEV_ARM_VGIC_GRP_CTRL, .attr = KVM_DEV_ARM_VGIC_CTRL_INIT };
        uint32_t type, first, got;
        int vgic_fd, r;

        r = kvmneg_internal_create_vgic(vm_fd, &vgic_fd, &type, trace);
        if (r < 0 || vgic_fd < 0)
                return r;
        r = ioctl_pointer(vgic_fd, KVM_SET_DEVICE_ATTR, &init, trace);
        if (r >= 0)
                r = kvmneg_internal_get_iidr(vgic_fd, &first, trace);
        if (r >= 0)
                probe->vgic_iidr = first;
        for (uint32_t n = 0; r >= 0 && n < 16; n++) {
                uint32_t iidr = (first & ~GICD_IIDR_REVISION_MASK) | n << GICD_IIDR_REVISION_SHIFT;

                r = kvmneg_internal_set_iidr(vgic_fd, iidr, trace);
                if (refused(r)) {
                        r = 0;
                        continue;
                }
                if (r >= 0)
                        r = kvmneg_internal_get_iidr(vgic_fd, &got, trace);
                if (r >= 0)
                        *(got == iidr ? &probe->vgic_revisions : &probe->vgic_revisions_dropped) |= UINT32_C(1) << n;
        }
        kvmneg_close(vgic_fd);
        return r < 0 && !refused(r) ? r : 0;
}

int kvmneg_internal_try_unfinished(int kvm_fd, struct kvmneg_probe *probe, struct kvmneg_trace *trace) {
        struct kvmneg_trial *lengths = find(probe->trials, SVE_VLS);
        int vm_fd, vcpu_fd, r;
        uint32_t features;

        r = kvmneg_internal_create_unfinished(kvm_fd, true, &vm_fd, &vcpu_fd, &features, trace);
        if (r < 0)
                return r;
        probe->vcpu_features = features;
        if (lengths)
                r = try_lengths(vcpu_fd, lengths, trace);
        if (r >= 0)
                r = kvmneg_internal_finalize(vcpu_fd, features, trace);
        if (r >= 0)
                r = try_implementation_ids(vcpu_fd, probe->trials, trace);
        if (r >= 0)
                r = try_revisions(vm_fd, probe, trace);
        kvmneg_close(vcpu_fd);
        kvmneg_close(vm_fd);
        return r < 0 ? r : 0;
}
