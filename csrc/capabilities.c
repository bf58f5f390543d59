/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A contract's capabilities against what KVM answers for a VM. */

#include <errno.h>
#include <linux/kvm.h>
#include <string.h>

#include "contract.h"

#define KIND "kvm:"

static bool fits(uint64_t granted, uint64_t mask, int answer, enum compared how) {
        uint64_t has = answer < 0 ? 0 : (uint64_t) answer;

        return how == MINIMUM ? has >= granted : !(granted & mask & ~has);
}

/* One capability. Devices and state are not KVM_CHECK_EXTENSION's: they are looked at where a contract is made. */
static int check(const struct contract_capability *entry, int vm_fd, struct kvmneg_failure *failure,
                 struct kvmneg_trace *trace) {
        struct kvmneg_failure what = { .asked = entry->value, .mask = entry->mask, .stage = KVMNEG_STAGE_CHECK };
        const char *name = entry->name + strlen(KIND);

        if (strncmp(entry->name, KIND, strlen(KIND)) != 0 || entry->value == 0)
                return 0;
        for (size_t i = 0; i < kvmneg_internal_capability_count; i++) {
                int r;

                if (strncmp(name, kvmneg_internal_capabilities[i].name, CAPABILITY_NAME - strlen(KIND)) != 0)
                        continue;
                r = kvmneg_internal_ioctl(vm_fd, KVM_CHECK_EXTENSION, kvmneg_internal_capabilities[i].number, trace);
                if (r < 0 && (r == -ENOTTY || !kvmneg_internal_absent(r))) {
                        what.why = KVMNEG_FAILED;
                        what.request = (uint32_t) KVM_CHECK_EXTENSION;
                } else if (fits(entry->value, entry->mask, r, kvmneg_internal_capabilities[i].how)) {
                        return 0;
                } else {
                        what.why = KVMNEG_MISSING;
                        what.got = r < 0 ? 0 : (uint64_t) r;
                        r = -EBADE;
                }
                kvmneg_internal_name_word(what.word, entry->name);
                return fail(failure, what, r);
        }
        what.why = KVMNEG_UNKNOWN;
        kvmneg_internal_name_word(what.word, entry->name);
        return fail(failure, what, -EOPNOTSUPP);
}

int kvmneg_internal_check_capabilities(const struct kvmneg_contract *contract, int vm_fd, struct kvmneg_failure *failure,
                                       struct kvmneg_trace *trace) {
        for (uint32_t i = 0; i < contract->counts[CAPABILITIES]; i++) {
                int r = check(&contract->capabilities[i], vm_fd, failure, trace);
                if (r < 0)
                        return r;
        }
        return 0;
}

uint64_t kvmneg_internal_granted(const struct kvmneg_contract *contract, const char *name) {
        for (uint32_t i = 0; i < contract->counts[CAPABILITIES]; i++)
                if (strncmp(contract->capabilities[i].name, name, CAPABILITY_NAME) == 0)
                        return contract->capabilities[i].value;
        return 0;
}
