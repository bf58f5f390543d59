/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* The capabilities of arm64 that a contract may have. */

#include "contract.h"

/* Those of kvmneg's catalogue (kvmneg/features/catalog/arm64/capabilities.toml), by name; a test compares them. Numbers
 * are user-space interface (include/uapi/linux/kvm.h) and never change. */
const struct known_capability kvmneg_internal_capabilities[] = {
        { "arm-cacheable-pfnmap-supported", 243, BITS },
        { "arm-el1-32bit",                   93, BITS },
        { "arm-el2",                        240, BITS },
        { "arm-el2-e2h0",                   241, BITS },
        { "arm-inject-ext-dabt",            178, BITS },
        { "arm-inject-serror-esr",          158, BITS },
        { "arm-mte",                        205, BITS },
        { "arm-nisv-to-user",               177, BITS },
        { "arm-pmu-v3",                     126, BITS },
        { "arm-psci-0-2",                   102, BITS },
        { "arm-ptrauth-address",            171, BITS },
        { "arm-ptrauth-generic",            172, BITS },
        { "arm-sea-to-user",                245, BITS },
        { "arm-supported-reg-mask-ranges",  230, BITS },
        { "arm-sve",                        170, BITS },
        { "arm-system-suspend",             216, BITS },
        { "arm-vm-ipa-size",                165, MINIMUM },
        { "arm-writable-imp-id-regs",       239, BITS },
        { "counter-offset",                 227, BITS },
        { "irqchip",                          0, BITS },
        { "max-vcpu-id",                    128, MINIMUM },
        { "max-vcpus",                       66, MINIMUM },
        { "mp-state",                        14, BITS },
        { "ptp-kvm",                        198, BITS },
        { "readonly-mem",                    81, BITS },
        { "steal-time",                     187, BITS },
        { "vcpu-events",                     41, BITS },
};

const size_t kvmneg_internal_capability_count = sizeof(kvmneg_internal_capabilities) / sizeof(kvmneg_internal_capabilities[0]);
