/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What libkvmneg adds to the ioctls of applying a contract (replay.h).
 *
 *     applying CONTRACT ROUNDS [DEVICE]
 *
 * prints the median nanoseconds of the library's application (VM, vCPU, all of the contract), of the bare ioctls, and
 * of reading the contract's file. VMs and vCPUs are made outside of what is timed. Exits with 3 when KVM cannot be used.
 * Linked with libkvmneg's sources and --wrap=ioctl.
 */
#define _GNU_SOURCE

#include "replay.h"

int main(int argc, char **argv) {
        unsigned rounds = argc > 2 ? (unsigned) strtoul(argv[2], NULL, 10) : 0;
        uint64_t *times = calloc(3 * (size_t) rounds + 1, sizeof(*times));
        struct kvmneg_contract *contract;
        int kvm, r;

        records = calloc(RECORDS, sizeof(*records));
        if (rounds == 0 || !times || !records)
                return 2;
        r = kvmneg_open(argc > 3 ? argv[3] : "/dev/kvm", &kvm, NULL);
        if (r >= 0)
                r = kvmneg_get_supported_cpuid(kvm, 0, &table, NULL);
        if (r < 0)
                die("KVM", r, 3);
        for (unsigned i = 0; i < rounds; i++) {
                uint64_t begun = now();
                r = kvmneg_contract_open(argv[1], &contract, NULL);
                times[2 * rounds + i] = now() - begun;
                if (r < 0)
                        die(argv[1], r, 1);
                for (unsigned turn = 0; turn < 2; turn++) {
                        r = kvmneg_create_scratch(kvm, &vm, &vcpu, NULL);
                        if (r < 0)
                                die("a VM", r, 3);
                        recording = i == 0 && turn == 0;
                        times[turn * rounds + i] = turn == 0 ? ours(contract) : bare();
                        recording = 0;
                        kvmneg_close(vcpu);
                        kvmneg_close(vm);
                }
                kvmneg_contract_free(contract);
        }
        printf("%llu %llu %llu\n", (unsigned long long) median(times, rounds),
               (unsigned long long) median(times + rounds, rounds), (unsigned long long) median(times + 2 * rounds, rounds));
        free(times);
        free(records);
        kvmneg_free(table);
        return 0;
}
