/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Whose a leaf of a CPUID table is, and what a contract says of it. */
#pragma once

#include "contract-x86.h"

#define HYPERVISORS 0x40000000
#define XSAVE_LEAF 0xd

enum { EAX, EBX, ECX, EDX };

/* Where hypervisors' leaves are in one table. */
struct view {
        uint32_t kvm_base; /* 0: KVM is not shown */
        bool hyperv;
};

/* What becomes of one entry. */
struct judgement {
        uint32_t values[4];
        uint32_t masks[4];
        uint32_t kept[4];   /* the VMM's bits */
        uint32_t kvms[4];   /* KVM's own */
        uint32_t space;     /* its address in contracts */
        uint32_t function;
        uint32_t found;     /* number in the contract, UINT32_MAX for none */
        bool vmms;          /* all of it is the VMM's */
};

/* What a guest reads of a leaf: the first entry that has this index, or whose index does not count
 * (kvm_find_cpuid_entry_index() in arch/x86/kvm/cpuid.c). */
const struct kvmneg_cpuid_entry *kvmneg_internal_find(const struct kvmneg_cpuid_entry *entries, uint32_t count,
                                                      uint32_t function, uint32_t index);

/* Where this table has hypervisors' leaves. */
struct view kvmneg_internal_look(const struct kvmneg_cpuid_entry *entries, uint32_t count);

/* The number of an entry of the contract, UINT32_MAX for none. */
uint32_t kvmneg_internal_search(const struct kvmneg_contract *contract, uint32_t space, uint32_t function, uint32_t index);

struct judgement kvmneg_internal_judge(const struct kvmneg_contract *contract, struct view view, uint32_t function,
                                       uint32_t index);

/* Where an entry of the contract stands in a table with this view; false where its guest is not shown it. */
bool kvmneg_internal_locate(const struct contract_cpuid *entry, struct view view, uint32_t *ret_function);

/* Contracts bind nothing that is the VMM's. One that does is of a later version: better refused than half kept. */
int kvmneg_internal_check_bound(const struct kvmneg_contract *contract, uint32_t stage, struct kvmneg_failure *failure);

extern const uint32_t kvmneg_internal_kvm_signature[3]; /* "KVMKVMKVM" */
