/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * libkvmneg: what a KVM offers to guests, read through its ioctls, and giving a VM what a contract says.
 *
 * A VMM needs two sections of this file: "contracts" and "giving a VM what a contract says". The order of calls, with
 * the VMM's own ioctls between them (examples/minivmm.c is a whole VMM):
 *
 *      kvmneg_begin(..., &contract, ...)        of libkvmneg-client, or kvmneg_contract_open(path, &contract, &error)
 *              vm = KVM_CREATE_VM
 *      kvmneg_vm_apply(contract, vm, NULL, &failure, NULL)
 *              vcpu = KVM_CREATE_VCPU           each vCPU, also one that is plugged in later
 *      kvmneg_vcpu_init(contract, vm, vcpu, &failure, NULL)
 *              arm64: the vGIC, and the PMU's interrupt
 *      kvmneg_vcpu_apply(contract, vcpu, cpuid, &failure, NULL)
 *              KVM_RUN
 *      kvmneg_vcpu_verify(contract, vcpu, &failure, NULL)
 *      kvmneg_contract_free(contract)
 *
 * `cpuid` is an x86 VMM's own table, NULL for none; kvmneg_clamp_cpuid() shows what becomes of it. A call that fails
 * says in `failure` which word, what was asked, what there is, and why. Everything else here measures a KVM: "the
 * system", "x86", "what a running guest sees", "arm64".
 *
 * The contract of every function here:
 *   - it returns 0 (or, where it says so, a count) on success and a negative errno on failure;
 *   - what a `ret_` parameter points to is written on success only;
 *   - it keeps no state, has no globals, never logs, and may be called from any thread;
 *   - a descriptor it returns has O_CLOEXEC and belongs to the caller;
 *   - what it allocates is released by kvmneg_free() or the function named beside it, which take NULL;
 *   - `trace` may be NULL; otherwise each ioctl made is added to it, failed ones too.
 *
 * "api.rst" is the kernel's Documentation/virt/kvm/api.rst.
 *
 * This file is also the source of the Python binding: with KVMNEG_CDEF defined it is plain declarations.
 */
#ifndef KVMNEG_CDEF
#pragma once
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
#endif

enum {
        KVMNEG_CAPABILITIES = 256,      /* capability numbers 0 to 255; Linux 7.2 ends at 249 */
        KVMNEG_CPUID_ENTRIES_MAX = 4096, /* no CPUID table grows over this; KVM itself stops at 256 */
        KVMNEG_MSRS_MAX = 4096,         /* no list of MSRs grows over this */
        KVMNEG_REGISTERS_MAX = 65536,   /* no list of arm64 registers grows over this */
        KVMNEG_TRACE_ROWS = 32,
};

/* -- which ioctls were made ---------------------------------------------------------------------------- */

struct kvmneg_trace_row {
        uint32_t request; /* the ioctl's number */
        int32_t error;    /* 0, or the errno it failed with (positive) */
        uint64_t calls;
};

/* Zero it before the first use. It adds up over calls. */
struct kvmneg_trace {
        uint32_t count;       /* rows in use */
        uint32_t lost;        /* calls that found no free row */
        uint32_t failed;      /* number of the last ioctl that failed, 0 for none; open(2) is no ioctl */
        int32_t failed_error; /* and its errno (positive): a function that returns another failed elsewhere */
        struct kvmneg_trace_row rows[KVMNEG_TRACE_ROWS];
};

/* The kernel's name of an ioctl that this library makes ("KVM_CHECK_EXTENSION"), else NULL. */
const char *kvmneg_ioctl_name(uint32_t request);

/* -- the system: api.rst section 4, "system ioctls" ---------------------------------------------------- */

/* What KVM_CHECK_EXTENSION answered, by capability number (api.rst 4.4): 0 when KVM lacks it or never heard
 * of it, else 1 or the capability's own number. Negative: the errno with which KVM refused the question for
 * this one capability on this kind of descriptor (-EINVAL, -ENXIO, -EOPNOTSUPP). */
struct kvmneg_capabilities {
        int32_t system[KVMNEG_CAPABILITIES]; /* asked on the /dev/kvm descriptor */
        int32_t vm[KVMNEG_CAPABILITIES];     /* asked on a VM's, which is the one that binds; 0 without a VM */
};

/*
 * Opens `path` ("/dev/kvm") and makes sure that it is KVM with the API this library knows (api.rst 4.1).
 *   -ENOENT, -EACCES, -ENODEV, ...  from open(2)
 *   -ENOTTY                         it is something else than KVM
 *   -EPROTONOSUPPORT                KVM_GET_API_VERSION is not 12
 */
int kvmneg_open(const char *path, int *ret_kvm_fd, struct kvmneg_trace *trace);

/* KVM_GET_API_VERSION (api.rst 4.1): 12 on every kernel since 2.6.22. */
int kvmneg_api_version(int kvm_fd, int *ret_version, struct kvmneg_trace *trace);

/* Every KVM_CHECK_EXTENSION (api.rst 4.4), on both descriptors; `vm_fd` may be -1. */
int kvmneg_get_capabilities(int kvm_fd, int vm_fd, struct kvmneg_capabilities *ret_capabilities,
                            struct kvmneg_trace *trace);

/* KVM_CREATE_VM (api.rst 4.2) with the architecture's default machine type. Tries again on EINTR, which a
 * pending signal causes; -EINTR only after a thousand. */
int kvmneg_create_vm(int kvm_fd, int *ret_vm_fd, struct kvmneg_trace *trace);

/* Closes a descriptor, unless it is negative. errno is left alone. Returns -1, so that `fd = kvmneg_close(fd)`. */
int kvmneg_close(int fd);

/* free(3), returning NULL. */
void *kvmneg_free(void *memory);

/*
 * A VM with one vCPU, never to be run. On arm64 the VM has a vGIC (v3, else v2, else none), without which ID
 * registers show none, and the vCPU is of the preferred target, powered off, with PSCI 0.2 and as many of PMU, SVE
 * and pointer authentication as KVM takes, and finalised. Close the vCPU first.
 */
int kvmneg_create_scratch(int kvm_fd, int *ret_vm_fd, int *ret_vcpu_fd, struct kvmneg_trace *trace);

/* -- contracts: what one guest may see ------------------------------------------------------------------ */

enum {
        KVMNEG_CONTRACT_BYTES_MAX = 1048576,
        KVMNEG_CONTRACT_CPUIDS_MAX = 256,      /* CPUID entries; KVM takes no more */
        KVMNEG_CONTRACT_MSRS_MAX = 1024,
        KVMNEG_CONTRACT_REGISTERS_MAX = 8192,  /* arm64 registers, and entries of the portable state */
        KVMNEG_CONTRACT_CAPABILITIES_MAX = 256,
        KVMNEG_CONTRACT_FLAGS_MAX = 64,
        KVMNEG_WORD_CHARACTERS = 48,           /* a word's address with its NUL: "cpuid:0x80000001.0.ecx" */
};

/* A contract that was read and found good. Nothing changes it: any number of threads may use it at once. */
struct kvmneg_contract;

/* Where a file stops being a contract. */
struct kvmneg_contract_error {
        uint64_t offset;  /* of the first byte at fault, in the file */
        const char *what; /* what is wrong with it: a constant text in English */
};

/*
 * Reads a contract and checks all of it: sizes, counts, order, duplicates, reserved fields, bits outside of masks, and
 * the digest. Release with kvmneg_contract_free(), which takes NULL and returns NULL.
 *   open    a file
 *   fd      what is left to read of an open file, memfd or pipe, up to its end; the caller closes it
 *   memory  `size` bytes, which are copied
 *
 *   -EBADMSG         it is not a contract: `ret_error`, which may be NULL, says where and why. Only then is it written
 *   -ENOMEM, and what open(2) and read(2) fail with
 */
int kvmneg_contract_open(const char *path, struct kvmneg_contract **ret_contract,
                         struct kvmneg_contract_error *ret_error);
int kvmneg_contract_open_fd(int fd, struct kvmneg_contract **ret_contract, struct kvmneg_contract_error *ret_error);
int kvmneg_contract_open_memory(const void *data, uint64_t size, struct kvmneg_contract **ret_contract,
                                struct kvmneg_contract_error *ret_error);
struct kvmneg_contract *kvmneg_contract_free(struct kvmneg_contract *contract);

enum {
        KVMNEG_X86_64 = 1,
        KVMNEG_ARM64 = 2,
};

/* What a contract says of itself. */
struct kvmneg_contract_info {
        uint32_t architecture;     /* KVMNEG_X86_64, KVMNEG_ARM64 */
        uint32_t grade;            /* 0 unverified, 1 partial, 2 enforced */
        uint64_t fence_generation; /* 0: no fence was pinned */
        uint8_t fence[32];         /* its digest, SHA-256 */
        uint8_t digest[32];        /* the contract's own */
        uint32_t cpuids;           /* how many of each there are */
        uint32_t msrs;
        uint32_t registers;
        uint32_t capabilities;
        uint32_t portable;
        uint32_t flags;
        uint32_t tsc_khz;          /* the rate that the guest's TSC is pinned to, 0: none */
        uint32_t padding;
        uint64_t vcpu_features;    /* arm64: for KVM_ARM_VCPU_INIT, bit n: KVM_ARM_VCPU_* number n */
};

void kvmneg_contract_describe(const struct kvmneg_contract *contract, struct kvmneg_contract_info *ret_info);

/* The file's bytes, as they were read: what a VMM keeps beside a saved guest. They live as long as the contract. */
const void *kvmneg_contract_bytes(const struct kvmneg_contract *contract, uint64_t *ret_size);

/* The bits of `mask` of a word's `value` are bound. */
struct kvmneg_bound_word {
        char word[KVMNEG_WORD_CHARACTERS];
        uint64_t value;
        uint64_t mask;
};

/* The word number `i` of a contract in the order of the file; -ENOENT behind the last. */
int kvmneg_contract_word(const struct kvmneg_contract *contract, uint32_t i, struct kvmneg_bound_word *ret_word);

enum {
        KVMNEG_CARRY = 1,         /* every member of the pool lists it: saved and restored */
        KVMNEG_DROP_IF,           /* may be left out while it holds `value`, else the move is refused */
        KVMNEG_DROP_IF_TIMER_OFF, /* may be left out while CNTP_CTL_EL0.ENABLE is 0 */
        KVMNEG_REFUSE,            /* a move to a host that does not know it is refused */
};

/* What becomes of one arm64 register when its guest moves. */
struct kvmneg_portable {
        uint32_t kind; /* 1: a register */
        uint32_t rule; /* KVMNEG_CARRY, ... */
        uint64_t id;
        uint64_t value;
};

/* The portable state, in the order of ids. It lives as long as the contract. */
const struct kvmneg_portable *kvmneg_contract_portable(const struct kvmneg_contract *contract, uint32_t *ret_count);

struct kvmneg_failure;

/*
 * What to do with one register of a guest that comes from another host with its contract. Asked where it arrives: what
 * is listed there is set, whatever its rule, and the rules are for what is not. What the contract does not name was not
 * listed where the guest began, but on a host that it visited since: it is no part of the guest's state. A contract
 * without portable state lets nothing be left out.
 *   id, value      the register, and what it held (no register wider than 64 bits can be left out)
 *   timer_control  what CNTP_CTL_EL0 (0x603000000013df11) of the same vCPU held, 1 where it did not come
 *   listed         whether KVM_GET_REG_LIST (api.rst 4.84) of the vCPU that it is for has it
 * Returns 1: set it; 0: leave it out, the guest cannot tell; or
 *   -ENOENT   KVM here does not have it, and the contract does not let it be left out
 *   -EBADE    nor with what it holds: `failure`, which may be NULL, has in `got` the value with which it could be
 *   -ENOEXEC  not a contract of arm64
 * In both of the first `failure` says which register. No KVM is involved: any host may judge a contract of arm64.
 */
int kvmneg_judge_register(const struct kvmneg_contract *contract, uint64_t id, uint64_t value, uint64_t timer_control,
                          int listed, struct kvmneg_failure *failure);

/* -- giving a VM what a contract says ------------------------------------------------------------------- */

enum {
        KVMNEG_STAGE_VM = 1,   /* capabilities, before the first vCPU */
        KVMNEG_STAGE_INIT,     /* arm64: KVM_ARM_VCPU_INIT, lengths of SVE vectors, KVM_ARM_VCPU_FINALIZE */
        KVMNEG_STAGE_PMU,      /* event counters */
        KVMNEG_STAGE_ID,       /* arm64: ID registers, PMCR_EL0 */
        KVMNEG_STAGE_CACHE,    /* arm64: CCSIDR */
        KVMNEG_STAGE_FIRMWARE, /* arm64: workarounds, PSCI_VERSION, hypercall bitmaps */
        KVMNEG_STAGE_VGIC,     /* arm64: GICD_IIDR */
        KVMNEG_STAGE_VERIFY,   /* everything read back */
        KVMNEG_STAGE_CHECK,    /* what KVM has to have, and what the VMM asks for */
        KVMNEG_STAGE_XSAVE,    /* x86: permission for XSAVE components on demand (ARCH_REQ_XCOMP_GUEST_PERM) */
        KVMNEG_STAGE_TSC,      /* x86: the TSC's rate */
        KVMNEG_STAGE_CPUID,    /* x86: KVM_SET_CPUID2, and read back */
        KVMNEG_STAGE_MSR,      /* x86: feature MSRs, and read back */
        KVMNEG_STAGE_ENFORCE,  /* x86: hidden paravirtual features and enlightenments are refused to the guest */
        KVMNEG_STAGE_STATE,    /* arm64: the registers of a guest that comes from another host */
};

enum {
        KVMNEG_REFUSED = 1, /* KVM does not take the value */
        KVMNEG_MISSING,     /* KVM has no such register, or not what a capability has to answer */
        KVMNEG_TOO_LATE,    /* a vCPU of this VM ran or exists, or SVE is final: -EBUSY, -EPERM */
        KVMNEG_DROPPED,     /* KVM took the value and shows another: -EBADE */
        KVMNEG_DIFFERS,     /* read back at the end, the value is another: -EBADE */
        KVMNEG_FAILED,      /* the ioctl failed in a way that says nothing of the register */
        KVMNEG_OUTSIDE,     /* the VMM asks for what the contract does not grant: -EINVAL */
        KVMNEG_UNKNOWN,     /* the contract asks for what this version of the library does not know: -EOPNOTSUPP */
};

/* What went wrong with one word. Written only where a function fails because of a word. */
struct kvmneg_failure {
        uint64_t id;      /* arm64: the register, 0 for the features of KVM_ARM_VCPU_INIT and the vGIC's revision.
                             x86: the MSR's index, or the leaf and, in the low half, the subleaf */
        uint64_t asked;
        uint64_t mask;    /* the bits that are bound and were compared */
        uint64_t got;     /* what there is; 0 where it could not be read */
        int32_t error;    /* what the function returned, a negative errno */
        uint32_t stage;   /* KVMNEG_STAGE_* */
        uint32_t why;     /* KVMNEG_REFUSED, ... */
        uint32_t request; /* the number of the ioctl that failed, 0 where none did (kvmneg_ioctl_name) */
        char word[KVMNEG_WORD_CHARACTERS]; /* its address, like "cpuid:0x7.0.ebx"; "" where KVM does not say which of
                                              a table it refused, and for GICD_IIDR */
};

/* What a VMM wants of its VM besides, each within what the contract grants: bits as KVM_ENABLE_CAP takes them. x86. */
struct kvmneg_choices {
        uint64_t disable_quirks; /* KVM_CAP_DISABLE_QUIRKS2 (api.rst 7.31): quirks that old guests need, off */
        uint64_t x2apic_api;     /* KVM_CAP_X2APIC_API (api.rst 7.7) */
        uint64_t disable_exits;  /* KVM_CAP_X86_DISABLE_EXITS (api.rst 7.13) */
        uint64_t exit_hypercall; /* KVM_CAP_EXIT_HYPERCALL (api.rst 8.34) */
};

struct kvmneg_cpuid;

/*
 * A contract is applied in this order, on the VMM's own descriptors (KVM answers -EIO to another process). `choices`,
 * `cpuid`, `failure` and `trace` may be NULL; nothing is allocated, and at most 32 KiB of stack are used. They stop at
 * the first word that fails.
 *
 *   vm_apply     after KVM_CREATE_VM, before the first vCPU.
 *                x86: every capability of the contract is asked for; XSAVE components on demand are permitted; the TSC
 *                rate where KVM sets it for a VM (api.rst 4.55); the PMU off (8.35) where the guest is shown none and
 *                the contract grants the capability; `choices`
 *                arm64: the same of capabilities; MIDR, REVIDR and AIDR may be written if they are bound (8.43)
 *   vcpu_init    after KVM_CREATE_VCPU, each vCPU.
 *                x86: KVM_SET_TSC_KHZ (4.55) unless the rate is there
 *                arm64: KVM_ARM_VCPU_INIT (4.82) with the contract's features, SVE_VLS, KVM_ARM_VCPU_FINALIZE (4.119).
 *                No contract has KVM_ARM_VCPU_POWER_OFF: a vCPU that waits for PSCI CPU_ON gets
 *                KVM_SET_MP_STATE (4.39) with KVM_MP_STATE_STOPPED afterwards. Made again it resets the vCPU, as
 *                KVM_ARM_VCPU_INIT does: general and system registers have the values of a reset, ID registers what
 *                they were given. An exit that is pending has to be completed before (immediate_exit, section 5):
 *                else KVM passes over the first instruction
 *   vcpu_apply   each vCPU; on arm64 after the vGIC is created and KVM_ARM_VCPU_PMU_V3_SET_PMU.
 *                x86: KVM_SET_CPUID2 (4.20) with `cpuid` clamped (kvmneg_clamp_cpuid), feature MSRs by KVM_SET_MSRS
 *                (4.19) and KVM_X86_SETUP_MCE (4.105), both read back. Without `cpuid` the vCPU gets the contract's
 *                leaves alone: APIC id 0, no topology, no names.
 *                Where KVM can, it refuses from then on what the guest is not shown: of KVM's own features
 *                (KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 8.28), their MSRs to the VMM too, and of Hyper-V's where it is
 *                shown Hyper-V (KVM_CAP_HYPERV_ENFORCE_CPUID, 8.33). A contract that grants these capabilities fails
 *                where KVM cannot; up to Linux 5.15 the first is of no use beside Hyper-V, and is left off there
 *                arm64: every other register, then verify; `cpuid` is NULL
 *   vcpu_verify  reads only: after vcpu_apply, and again after the first run
 *   vgic_apply   arm64, where the VM has a vGIC: after its KVM_DEV_ARM_VGIC_CTRL_INIT, before any other of its
 *                registers: GICD_IIDR.Revision, read back
 *   vgic_verify  reads it
 *
 * Read back are the bits that are bound, and of a CPUID register that is bound in part also that it has nothing else
 * but what is the VMM's. What KVM writes by itself is left out: OSXSAVE, OSPKE, APIC, MONITOR, sizes of XSAVE areas.
 *
 * The same calls with the same bytes may be made again at any time, and change nothing: but for vm_apply, of which KVM
 * refuses some while there are vCPUs, and for what vcpu_init does to a vCPU of arm64. So a vCPU that is plugged in later
 * gets the same three. Of `cpuid` this is so while its own part is the same.
 *
 *   -ENOEXEC     the contract is one of the other architecture
 *   -EBADE, -EINVAL, -ENOENT, -EOPNOTSUPP, ...  `failure` says which word
 */
int kvmneg_vm_apply(const struct kvmneg_contract *contract, int vm_fd, const struct kvmneg_choices *choices,
                    struct kvmneg_failure *failure, struct kvmneg_trace *trace);
int kvmneg_vcpu_init(const struct kvmneg_contract *contract, int vm_fd, int vcpu_fd, struct kvmneg_failure *failure,
                     struct kvmneg_trace *trace);
int kvmneg_vcpu_apply(const struct kvmneg_contract *contract, int vcpu_fd, const struct kvmneg_cpuid *cpuid,
                      struct kvmneg_failure *failure, struct kvmneg_trace *trace);
int kvmneg_vcpu_verify(const struct kvmneg_contract *contract, int vcpu_fd, struct kvmneg_failure *failure,
                       struct kvmneg_trace *trace);
#if defined(__aarch64__)
int kvmneg_vgic_apply(const struct kvmneg_contract *contract, int vgic_fd, struct kvmneg_failure *failure,
                      struct kvmneg_trace *trace);
int kvmneg_vgic_verify(const struct kvmneg_contract *contract, int vgic_fd, struct kvmneg_failure *failure,
                       struct kvmneg_trace *trace);
#endif

#if defined(__x86_64__)
/* -- x86 ----------------------------------------------------------------------------------------------- */

/* One CPUID leaf and subleaf; laid out as the kernel's struct kvm_cpuid_entry2. */
struct kvmneg_cpuid_entry {
        uint32_t function;
        uint32_t index;
        uint32_t flags; /* 1: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, the leaf has subleaves */
        uint32_t eax;
        uint32_t ebx;
        uint32_t ecx;
        uint32_t edx;
        uint32_t padding[3];
};

/* Laid out as struct kvm_cpuid2. */
struct kvmneg_cpuid {
        uint32_t count;
        uint32_t padding;
        struct kvmneg_cpuid_entry entries[];
};

/*
 * Makes a VMM's own table what a contract says. `cpuid` has room for `capacity` entries.
 *   - Every bound bit gets the contract's value, up or down, in each entry of its leaf.
 *   - What is the VMM's stays: caches, topology and TLBs (leaves 2, 4, 5, 0xb, 0x12.2, 0x18, 0x1a, 0x1f, 0x80000005,
 *     6, 0x19, 0x1d, 0x1e, 0x26), APIC ids and counts of threads in leaves 1 and 0x80000008, the brand string,
 *     signatures of hypervisors and their timing leaf 0x40000010, and what the guest or KVM writes by itself (OSXSAVE).
 *   - Everything else is 0: no contract grants what it does not know.
 *   - A bound leaf that is not there is added, unless all of it is 0. KVM's leaf is found by its signature, at
 *     0x40000000 or up to 0x4000ff00 in steps of 0x100, Hyper-V's at 0x40000000; without a signature a guest is not
 *     shown that leaf, and an empty table gets KVM's.
 *   - The size of the XSAVE area in leaf 0xd is computed from the components that are left.
 * Returns how many entries it changed or added: 0 for a table that is what the contract says, as it is the second time.
 *   -EOPNOTSUPP the contract binds what is the VMM's, or a leaf where no table has one
 *   -ENOSPC     there is no room for a leaf that is missing; the table is then as far as it went
 *   -E2BIG      `cpuid` has more than KVMNEG_CONTRACT_CPUIDS_MAX entries
 *   -ENOEXEC    not a contract of x86
 */
int kvmneg_clamp_cpuid(const struct kvmneg_contract *contract, struct kvmneg_cpuid *cpuid, uint32_t capacity);

enum {
        KVMNEG_MSR_UNREAD = 1, /* KVM lists it and does not let it be read; the value is 0 then */
        KVMNEG_MSR_UNSET = 2,  /* KVM did not take the value it was given */
};

/* One feature MSR; laid out as struct kvm_msr_entry. */
struct kvmneg_msr {
        uint32_t index;
        uint32_t refused; /* 0, or KVMNEG_MSR_* joined */
        uint64_t value;
};

struct kvmneg_msrs {
        uint32_t count;
        uint32_t refused; /* how many of them */
        struct kvmneg_msr entries[];
};

/*
 * The tables of CPUID. `hint` is how many entries to begin with, 0 for a size that fits today's hosts; on E2BIG
 * it grows up to KVMNEG_CPUID_ENTRIES_MAX, then fails with -E2BIG. Release with kvmneg_free().
 *   supported  KVM_GET_SUPPORTED_CPUID (api.rst 4.46), /dev/kvm
 *   emulated   KVM_GET_EMULATED_CPUID (api.rst 4.88), /dev/kvm
 *   hyperv     KVM_GET_SUPPORTED_HV_CPUID (api.rst 4.118), /dev/kvm; where that does not know it (up to
 *              Linux 5.10) and `vcpu_fd` is not -1, the vCPU
 */
int kvmneg_get_supported_cpuid(int kvm_fd, uint32_t hint, struct kvmneg_cpuid **ret_cpuid, struct kvmneg_trace *trace);
int kvmneg_get_emulated_cpuid(int kvm_fd, uint32_t hint, struct kvmneg_cpuid **ret_cpuid, struct kvmneg_trace *trace);
int kvmneg_get_hyperv_cpuid(int kvm_fd, int vcpu_fd, uint32_t hint, struct kvmneg_cpuid **ret_cpuid,
                            struct kvmneg_trace *trace);

/* Feature MSRs and their values: KVM_GET_MSR_FEATURE_INDEX_LIST (api.rst 4.3), KVM_GET_MSRS on /dev/kvm (4.18).
 * A listed MSR that KVM refuses to read is marked, not an error. Release with kvmneg_free(). */
int kvmneg_get_feature_msrs(int kvm_fd, uint32_t hint, struct kvmneg_msrs **ret_msrs, struct kvmneg_trace *trace);

/* Indices of MSRs; laid out as struct kvm_msr_list. */
struct kvmneg_indices {
        uint32_t count;
        uint32_t entries[];
};

/* The MSRs that are part of a vCPU's state, those that a VMM has to carry over: KVM_GET_MSR_INDEX_LIST (api.rst 4.3)
 * on /dev/kvm. `hint` as everywhere. Release with kvmneg_free(). */
int kvmneg_get_state_msrs(int kvm_fd, uint32_t hint, struct kvmneg_indices **ret_indices, struct kvmneg_trace *trace);

/* What a vCPU's machine checks can do, without the number of banks: KVM_X86_GET_MCE_CAP_SUPPORTED (api.rst 4.104) on
 * /dev/kvm. Bits as in MSR 0x179 (MCG_CAP). */
int kvmneg_get_mce_cap(int kvm_fd, uint64_t *ret_capabilities, struct kvmneg_trace *trace);

/* TSC rates in kHz. */
struct kvmneg_tsc {
        uint32_t khz;     /* of a vCPU that was given none: the host's own */
        uint32_t max_khz; /* the highest that KVM can scale to; 0 where it does not scale */
};

/*
 * KVM_GET_TSC_KHZ (api.rst 4.56) on a vCPU that never ran and, with `scales`, what KVM_SET_TSC_KHZ (4.55) takes: the
 * vCPU has its first rate again afterwards. Say `scales` where KVM_CAP_TSC_CONTROL is there, and only there: a KVM
 * without it takes any higher rate as well, and lets the guest's clock jump to keep up.
 */
int kvmneg_get_tsc(int vcpu_fd, int scales, struct kvmneg_tsc *ret_tsc, struct kvmneg_trace *trace);

/*
 * Whether KVM keeps what a guest is to see: gives a vCPU a table, and reads back what it would show a guest. For a
 * vCPU that never ran and never will: until it runs, each call may give it another table. What KVM keeps by itself
 * (OSXSAVE, sizes of XSAVE areas) comes back as KVM has it. Release with kvmneg_free().
 *   cpuid  KVM_SET_CPUID2 and KVM_GET_CPUID2; fails as a whole with the errno of the ioctl that the trace names
 *   msrs   KVM_SET_MSRS (api.rst 4.19) and KVM_GET_MSRS (4.18), in the order given; an MSR that KVM refuses is
 *          marked, not an error. What `msrs` says of refusals is not looked at.
 *   mce    KVM_X86_SETUP_MCE (api.rst 4.105) and KVM_GET_MSRS: MSR 0x179 with its number of banks
 */
int kvmneg_try_cpuid(int vcpu_fd, const struct kvmneg_cpuid *cpuid, struct kvmneg_cpuid **ret_shown,
                     struct kvmneg_trace *trace);
int kvmneg_try_msrs(int vcpu_fd, const struct kvmneg_msrs *msrs, struct kvmneg_msrs **ret_shown,
                    struct kvmneg_trace *trace);

int kvmneg_try_mce(int vcpu_fd, uint64_t capabilities, uint64_t *ret_shown, struct kvmneg_trace *trace);
/* -- what a running guest sees ------------------------------------------------------------------------- */

enum {
        KVMNEG_QUESTIONS_MAX = 1023, /* as many as the proof guest's memory has room for */
        KVMNEG_PROOF_SLOT = 0,       /* the VM's memory slot that the guest's memory has while it runs, at address 0 */
};

enum {
        KVMNEG_MODE_REAL, /* real mode */
        KVMNEG_MODE_CPL0, /* long mode, as a kernel */
        KVMNEG_MODE_CPL3, /* long mode, as a user's program */
};

enum {
        KVMNEG_ASK_CPUID = 1, /* CPUID of `index`, `subleaf`: EAX, EBX, ECX, EDX */
        KVMNEG_ASK_MSR,       /* RDMSR of `index`: EAX is answer[0], EDX answer[3] */
        KVMNEG_ASK_XCR,       /* XGETBV of `index`: the same */
        KVMNEG_ASK_RUN,       /* CALL of `code`, which ends in RET and leaves RDI and RBP alone; not in real mode */
};

enum {
        KVMNEG_OUTCOME_OPEN,     /* it was not come to: time was over before, or real mode passes over it */
        KVMNEG_OUTCOME_ANSWERED, /* it was done */
        KVMNEG_OUTCOME_FAULTED,  /* it raised the exception with the vector in `detail`: 6 #UD, 13 #GP */
        KVMNEG_OUTCOME_ENDED,    /* the guest left by it, for the KVM_EXIT_* in `detail` or KVMNEG_EXIT_TIME */
        KVMNEG_EXIT_TIME = 0x7fff0001, /* it did not come to an end in the time it had */
};

/* One thing the guest does, and what came of it. 64 bytes. */
struct kvmneg_question {
        uint32_t kind; /* KVMNEG_ASK_* */
        uint32_t index;
        uint32_t subleaf;
        uint32_t outcome; /* KVMNEG_OUTCOME_*; this and the next two are not looked at in a question */
        uint32_t detail;
        uint32_t answer[4];
        uint8_t code[28];
};

struct kvmneg_questions {
        uint32_t count;
        uint32_t padding;
        uint64_t xcr0; /* what the guest is to have in XCR0, 0 for what it has; the guest can be asked what it has */
        struct kvmneg_question entries[];
};

/*
 * Runs a guest on a vCPU and has it answer questions, in their order. The VM must have no memory at guest-physical
 * addresses below 128 KiB and none in slot KVMNEG_PROOF_SLOT; it has none of this guest's afterwards. The vCPU has what
 * it was given (CPUID, MSRs, capabilities), and by its first run KVM freezes its CPUID; registers are lost, and it may
 * be asked again, in another mode too. All runs together take at most `milliseconds`.
 *
 * The calling thread has SIGRTMAX blocked meanwhile, and one that is pending for it is taken away. Afterwards the vCPU has
 * no signal mask of its own (KVM_SET_SIGNAL_MASK, 4.21).
 *
 *   -E2BIG   more than KVMNEG_QUESTIONS_MAX
 *   -EINVAL  no such mode or kind of question, no time, or KVM does not take the registers of that mode
 *   -EEXIST  the VM has memory there
 *
 * Release with kvmneg_free(). api.rst 4.10 (KVM_RUN), 4.35 (KVM_SET_USER_MEMORY_REGION), 5 (struct kvm_run).
 */
int kvmneg_ask_guest(int kvm_fd, int vm_fd, int vcpu_fd, uint32_t mode, uint32_t milliseconds,
                     const struct kvmneg_questions *questions, struct kvmneg_questions **ret_answers,
                     struct kvmneg_trace *trace);

/* KVM_CAP_ENFORCE_PV_FEATURE_CPUID (api.rst 8.28) on a vCPU: KVM's own MSRs of features that its CPUID hides raise #GP.
 * -EINVAL up to Linux 5.9. */
int kvmneg_enforce_pv_cpuid(int vcpu_fd, struct kvmneg_trace *trace);

/* KVM_CAP_HYPERV_ENFORCE_CPUID (api.rst 8.33) on a vCPU: Hyper-V's MSRs and hypercalls of features that its CPUID hides
 * are refused. -EINVAL up to Linux 5.13. */
int kvmneg_enforce_hyperv_cpuid(int vcpu_fd, struct kvmneg_trace *trace);

/* XSAVE components a guest can be given: KVM_X86_XCOMP_GUEST_SUPP by KVM_GET_DEVICE_ATTR on /dev/kvm (api.rst 4.80),
 * from Linux 5.17; -EINVAL, -ENOTTY or -ENXIO before. Bits as in XCR0. */
int kvmneg_get_xcomp_guest_supp(int kvm_fd, uint64_t *ret_components, struct kvmneg_trace *trace);

/*
 * What the CPUID instruction says on the logical CPU number `cpu`: every leaf, subleaves where they exist. The
 * calling thread is moved there and its affinity restored. -EINVAL: no such CPU, or not one this process may use.
 * Release with kvmneg_free(). No KVM is involved.
 */
int kvmneg_get_raw_cpuid(int cpu, struct kvmneg_cpuid **ret_cpuid);

/* All of the above but raw CPUID in one call. A part that this KVM does not have (its ioctl fails with -EINVAL,
 * -ENOTTY, -ENXIO or -EOPNOTSUPP) is NULL and its error is kept; any other failure fails the whole. */
struct kvmneg_probe {
        struct kvmneg_capabilities capabilities;
        struct kvmneg_cpuid *supported; /* never NULL */
        struct kvmneg_cpuid *emulated;
        struct kvmneg_cpuid *hyperv;
        struct kvmneg_msrs *feature_msrs;
        struct kvmneg_indices *state_msrs;
        uint64_t xcomp_guest_supp;
        uint64_t mce_cap; /* with a vCPU what it keeps of them: SVM takes more than it keeps */
        struct kvmneg_tsc tsc;
        int32_t emulated_error; /* 0 or a negative errno */
        int32_t hyperv_error;
        int32_t feature_msrs_error;
        int32_t xcomp_error;
        int32_t state_msrs_error;
        int32_t mce_error;
        int32_t tsc_error; /* -EIO too: the host's TSC is not stable */
};

/* `vm_fd` and `vcpu_fd` may be -1. Release with kvmneg_probe_free(). */
int kvmneg_probe(int kvm_fd, int vm_fd, int vcpu_fd, struct kvmneg_probe **ret_probe, struct kvmneg_trace *trace);
struct kvmneg_probe *kvmneg_probe_free(struct kvmneg_probe *probe);

#elif defined(__aarch64__)
/* -- arm64 --------------------------------------------------------------------------------------------- */

/* Laid out as struct kvm_vcpu_init. */
struct kvmneg_vcpu_init {
        uint32_t target;
        uint32_t features[7]; /* bit n of word n / 32: KVM_ARM_VCPU_* number n */
};

/* Laid out as struct kvm_reg_list. */
struct kvmneg_registers {
        uint64_t count;
        uint64_t ids[];
};

/* KVM_ARM_PREFERRED_TARGET on a VM (api.rst 4.83). */
int kvmneg_get_preferred_target(int vm_fd, struct kvmneg_vcpu_init *ret_init, struct kvmneg_trace *trace);

/* KVM_GET_REG_LIST on an initialised vCPU (api.rst 4.84); `hint` as everywhere. Release with kvmneg_free(). */
int kvmneg_get_registers(int vcpu_fd, uint32_t hint, struct kvmneg_registers **ret_registers,
                         struct kvmneg_trace *trace);

/* KVM_GET_ONE_REG and KVM_SET_ONE_REG (api.rst 4.69, 4.68) of a register of 32 or 64 bits, or of SVE_VLS
 * (0x606000000015ffff), of which the first 64 bits are the value and the others zero; -EINVAL for other sizes. */
int kvmneg_get_register(int vcpu_fd, uint64_t id, uint64_t *ret_value, struct kvmneg_trace *trace);
int kvmneg_set_register(int vcpu_fd, uint64_t id, uint64_t value, struct kvmneg_trace *trace);

/* A register that decides what a guest sees, as a trial found it. */
struct kvmneg_trial {
        uint64_t id;
        uint64_t reset;    /* what the first KVM_GET_ONE_REG said */
        uint64_t value;    /* what can be given: `reset`; of a hypercall bitmap every bit that KVM takes, of
                              PSCI_VERSION the highest version */
        uint64_t settable; /* bits that user space can change: written, read back, and put back */
        uint64_t dropped;  /* bits that KVM never changed, though it took a write of them without an error */
        uint64_t writable; /* what KVM_ARM_GET_REG_WRITABLE_MASKS claims, 0 without it */
};

struct kvmneg_trials {
        uint32_t count;
        uint32_t padding;
        struct kvmneg_trial entries[];
};

enum {
        KVMNEG_VGIC_V2 = 1, /* bits of `vgic_models` */
        KVMNEG_VGIC_V3 = 2,
        KVMNEG_VGIC_ITS = 4,
        KVMNEG_PSCI_VERSIONS = 16,
};

struct kvmneg_probe {
        struct kvmneg_capabilities capabilities;
        struct kvmneg_vcpu_init init;       /* the preferred target; zero without a VM */
        uint64_t vcpu_features;             /* bit n: KVM_ARM_VCPU_INIT takes feature n, alone or with those it needs */
        uint32_t vgic_models;               /* KVMNEG_VGIC_* joined */
        uint32_t vgic_iidr;                 /* GICD_IIDR as it is at first; 0 where no vGIC could be asked */
        uint32_t vgic_revisions;            /* bit n: GICD_IIDR.Revision n is taken and read back */
        uint32_t vgic_revisions_dropped;    /* bit n: revision n is taken, and another one read back */
        uint32_t vm_attributes;             /* bit 0: the SMCCC filter exists (KVM_ARM_VM_SMCCC_FILTER) */
        uint32_t pmu_attributes;            /* bit n: the vCPU has attribute n of KVM_ARM_VCPU_PMU_V3_CTRL */
        uint32_t protected_vms;             /* 1: KVM makes protected VMs (pKVM) */
        uint32_t psci_count;
        uint32_t psci_versions[KVMNEG_PSCI_VERSIONS]; /* those that PSCI_VERSION takes, major << 16 | minor */
        struct kvmneg_registers *registers; /* NULL without a vCPU */
        struct kvmneg_trials *trials;       /* NULL without a vCPU */
};

/*
 * The twin of x86's: `vm_fd` and `vcpu_fd` may be -1. They are those of kvmneg_create_scratch(): the vCPU is
 * tried out and must not be used for anything else. What must be tried before a vCPU is complete (lengths of SVE
 * vectors, implementation ids, other features) is tried on VMs that it makes and closes. Release with
 * kvmneg_probe_free().
 */
int kvmneg_probe(int kvm_fd, int vm_fd, int vcpu_fd, struct kvmneg_probe **ret_probe, struct kvmneg_trace *trace);
struct kvmneg_probe *kvmneg_probe_free(struct kvmneg_probe *probe);

/* -- the steps of kvmneg_vm_apply() and the others, for registers that come from elsewhere ---------------- */

/* One register of a contract, laid out as there: the bits of `mask` are bound, the others are left as they are. */
struct kvmneg_register {
        uint64_t id;
        uint64_t value;
        uint64_t mask;
};

/*
 * In this order, on the VMM's own descriptors (KVM answers -EIO to another process), with the same registers each
 * time; `failure` may be NULL. Only bits that differ are written, each write is read back, nothing is allocated,
 * and a register that is as it should be may be given again at any time: so a vCPU that is plugged in later gets the
 * same calls. They stop at the first register that fails.
 *   vm_apply     after KVM_CREATE_VM: lets MIDR, REVIDR and AIDR be written if they are among the registers (api.rst
 *                8.43, KVM_CAP_ARM_WRITABLE_IMP_ID_REGS); a KVM without may have what is wanted
 *   vcpu_init    after KVM_CREATE_VCPU, each vCPU: KVM_ARM_VCPU_INIT (api.rst 4.82) with the preferred target and
 *                `features` (bit n: KVM_ARM_VCPU_* number n), SVE_VLS, KVM_ARM_VCPU_FINALIZE (api.rst 4.119). It
 *                resets the vCPU, and leaves it ready to run, as kvmneg_vcpu_init() does
 *   vcpu_apply   after the vGIC is created and KVM_ARM_VCPU_PMU_V3_SET_PMU, each vCPU: everything else, then verify
 *   vgic_apply   after KVM_DEV_ARM_VGIC_CTRL_INIT, before other vGIC registers: GICD_IIDR.Revision; vgic_verify reads it
 *   vcpu_verify  reads only: after vcpu_apply, and again after the first run, at which KVM changes ID registers
 */
int kvmneg_arm_vm_apply(int vm_fd, const struct kvmneg_register *registers, uint32_t count,
                        struct kvmneg_failure *failure, struct kvmneg_trace *trace);
int kvmneg_arm_vcpu_init(int vm_fd, int vcpu_fd, uint64_t features, const struct kvmneg_register *registers,
                         uint32_t count, struct kvmneg_failure *failure, struct kvmneg_trace *trace);
int kvmneg_arm_vcpu_apply(int vcpu_fd, const struct kvmneg_register *registers, uint32_t count,
                          struct kvmneg_failure *failure, struct kvmneg_trace *trace);
int kvmneg_arm_vgic_apply(int vgic_fd, uint32_t revision, struct kvmneg_failure *failure, struct kvmneg_trace *trace);
int kvmneg_arm_vgic_verify(int vgic_fd, uint32_t revision, struct kvmneg_failure *failure, struct kvmneg_trace *trace);
int kvmneg_arm_vcpu_verify(int vcpu_fd, const struct kvmneg_register *registers, uint32_t count,
                           struct kvmneg_failure *failure, struct kvmneg_trace *trace);

/* -- what a running guest sees ------------------------------------------------------------------------- */

/* A VM with a vCPU that can run, and its vGIC, -1 where there is none. */
struct kvmneg_machine {
        int vm_fd, vcpu_fd, vgic_fd;
};

/*
 * Makes one in the order of a VMM: kvmneg_arm_vm_apply, KVM_CREATE_VCPU, kvmneg_arm_vcpu_init with these features and
 * registers (among which only MIDR, REVIDR, AIDR and SVE_VLS count), the best vGIC of `vgic_models` (KVMNEG_VGIC_*)
 * initialised at the addresses of QEMU's "virt" machine, the PMU with interrupt 23 where there is one. What is left are
 * the other registers: kvmneg_set_register() or kvmneg_arm_vcpu_apply(). `failure` as there.
 * Release with kvmneg_machine_close(), which returns a machine of three times -1.
 */
int kvmneg_create_machine(int kvm_fd, uint32_t features, uint32_t vgic_models, const struct kvmneg_register *registers,
                          uint32_t count, struct kvmneg_machine *ret_machine, struct kvmneg_failure *failure,
                          struct kvmneg_trace *trace);
struct kvmneg_machine kvmneg_machine_close(struct kvmneg_machine machine);

enum {
        KVMNEG_QUESTIONS_MAX = 1023, /* as many as the proof guest's memory has room for */
        KVMNEG_QUESTION_CODE = 12,
        KVMNEG_PROOF_SLOT = 0, /* the VM's memory slot that the guest's memory has while it runs, at 0x40000000 */
};

enum {
        KVMNEG_MODE_EL1, /* as a kernel, MMU and caches off */
        KVMNEG_MODE_EL0, /* as a user's program, the same */
};

enum {
        KVMNEG_OUTCOME_OPEN,     /* it was not come to: time was over before */
        KVMNEG_OUTCOME_ANSWERED, /* it was done */
        KVMNEG_OUTCOME_FAULTED,  /* it raised an exception to EL1, with the syndrome in `detail` (ESR_EL1) */
        KVMNEG_OUTCOME_ENDED,    /* the guest left by it, for the KVM_EXIT_* in `detail` or KVMNEG_EXIT_TIME */
        KVMNEG_EXIT_TIME = 0x7fff0001, /* it did not come to an end in the time it had */
};

/* One thing the guest does, and what came of it. 128 bytes. */
struct kvmneg_question {
        uint64_t argument[4]; /* x0 to x3 */
        uint64_t answer[4];   /* and as they come back; this and the next two are not looked at in a question */
        uint64_t detail;
        uint32_t outcome; /* KVMNEG_OUTCOME_* */
        uint32_t answers; /* how many of x0 to x3 are wanted, 1 to 4 */
        uint32_t code[12]; /* instructions that end in RET and leave X19, X20 and X30 alone; no memory but itself */
};

struct kvmneg_questions {
        uint32_t count;
        uint32_t padding;
        struct kvmneg_question entries[];
};

/*
 * The twin of x86's. The VM must have no memory from 0x40000000 on for 192 KiB, none at 0x09000000, and none in slot
 * KVMNEG_PROOF_SLOT; it has none of this guest's afterwards. The vCPU has what it was given, is powered on, and by its
 * first run KVM freezes its ID registers; general and some system registers are lost, and it may be asked again, in
 * another mode too. All runs together take at most `milliseconds`.
 *
 * The calling thread has SIGRTMAX blocked meanwhile, and one that is pending for it is taken away. Afterwards the vCPU has
 * no signal mask of its own (KVM_SET_SIGNAL_MASK, 4.21).
 *
 *   -E2BIG   more than KVMNEG_QUESTIONS_MAX
 *   -EINVAL  no such mode, no time, or not 1 to 4 answers
 *   -EEXIST  the VM has memory there
 *
 * Release with kvmneg_free(). api.rst 4.10 (KVM_RUN), 4.35 (KVM_SET_USER_MEMORY_REGION), 5 (struct kvm_run).
 */
int kvmneg_ask_guest(int kvm_fd, int vm_fd, int vcpu_fd, uint32_t mode, uint32_t milliseconds,
                     const struct kvmneg_questions *questions, struct kvmneg_questions **ret_answers,
                     struct kvmneg_trace *trace);
#endif

#ifndef KVMNEG_CDEF
#ifdef __cplusplus
}
#endif
#endif
