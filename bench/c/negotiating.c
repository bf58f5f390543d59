/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * What a VMM in C waits for until its vCPU has its contract: kvmneg_negotiate(), kvmneg_contract_open(), and the whole of
 * it applied. Beside it the least that this could take: a server that only sends the same bytes (echo_server.c) is asked
 * for them in the same way, on a connection of its own, and the ioctls are made by themselves (replay.h).
 *
 *     negotiating SOCKET ECHO-SOCKET REQUEST CONTRACT ROUNDS [DEVICE]
 *
 * prints nanoseconds, of each the lower decile of the rounds: all of ours, all of theirs, then the parts: negotiate,
 * open, apply, echo, ioctls. Both servers wake up for each call; where others use their CPU, most rounds tell how long
 * the scheduler took, and the lower decile is what is left without it. VMs and vCPUs are made outside of what is timed.
 * Exits with 3 when KVM cannot be used. Linked with the sources of both libraries and --wrap=ioctl.
 */
#define _GNU_SOURCE

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "kvmneg-client.h"
#include "replay.h"

enum { NEGOTIATE, OPEN, APPLY, ECHO, IOCTLS, OURS, THEIRS, TIMES };

static char call[KVMNEG_CLIENT_CALL_MAX];
static size_t call_size;

/* One connection, the call's bytes, a reply up to its NUL. */
static uint64_t exchange(const char *path) {
        static char reply[KVMNEG_CLIENT_REPLY_MAX];
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        uint64_t begun = now();
        ssize_t got;
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

        strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
        if (fd < 0 || connect(fd, (struct sockaddr *) &address, sizeof(address)) < 0)
                die(path, -errno, 1);
        if (send(fd, call, call_size, MSG_NOSIGNAL) != (ssize_t) call_size)
                die("send", -errno, 1);
        do {
                got = recv(fd, reply, sizeof(reply), 0);
                if (got <= 0)
                        die("recv", -errno, 1);
        } while (reply[got - 1] != 0);
        close(fd);
        return now() - begun;
}

static uint64_t decile(uint64_t *values, unsigned rounds) {
        qsort(values, rounds, sizeof(values[0]), compare);
        return values[rounds / 10];
}

static void negotiated(const char *socket, const char *request, const char *file, uint64_t times[static TIMES]) {
        struct kvmneg_contract *contract;
        struct kvmneg_offer *offer;
        uint64_t begun = now(), asked, opened;
        int r = kvmneg_negotiate(socket, request, 10000, &offer, NULL);

        asked = now();
        if (r < 0)
                die("kvmneg_negotiate", r, 1);
        r = kvmneg_contract_open(file, &contract, NULL);
        opened = now();
        if (r < 0)
                die(file, r, 1);
        times[APPLY] = ours(contract);
        times[NEGOTIATE] = asked - begun;
        times[OPEN] = opened - asked;
        kvmneg_contract_free(contract);
        kvmneg_offer_free(offer);
        times[OURS] = times[NEGOTIATE] + times[OPEN] + times[APPLY];
}

static void round_of(char **argv, int kvm, unsigned number, uint64_t times[static TIMES]) {
        for (unsigned turn = 0; turn < 2; turn++) {
                int r = kvmneg_create_scratch(kvm, &vm, &vcpu, NULL);

                if (r < 0)
                        die("a VM", r, 3);
                recording = number == 0 && turn == 0;
                if (turn == 0)
                        negotiated(argv[1], argv[3], argv[4], times);
                else {
                        times[ECHO] = exchange(argv[2]);
                        times[IOCTLS] = bare();
                }
                recording = 0;
                kvmneg_close(vcpu);
                kvmneg_close(vm);
        }
        times[THEIRS] = times[ECHO] + times[IOCTLS];
}

int main(int argc, char **argv) {
        unsigned rounds = argc > 5 ? (unsigned) strtoul(argv[5], NULL, 10) : 0;
        uint64_t (*times)[TIMES] = calloc(rounds, sizeof(*times)), *column = calloc(rounds, sizeof(*column));
        static const int order[] = { OURS, THEIRS, NEGOTIATE, OPEN, APPLY, ECHO, IOCTLS };
        int kvm, r;

        records = calloc(RECORDS, sizeof(*records));
        if (rounds == 0 || !times || !column || !records)
                return 2;
        call_size = (size_t) snprintf(call, sizeof(call), "{\"method\":\"org.kvmneg.Negotiate\",\"parameters\":%s}", argv[3]) + 1;
        if (call_size > sizeof(call))
                return 2;
        r = kvmneg_open(argc > 6 ? argv[6] : "/dev/kvm", &kvm, NULL);
        if (r >= 0)
                r = kvmneg_get_supported_cpuid(kvm, 0, &table, NULL);
        if (r < 0)
                die("KVM", r, 3);
        for (unsigned i = 0; i < rounds; i++)
                round_of(argv, kvm, i, times[i]);
        for (size_t k = 0; k < sizeof(order) / sizeof(order[0]); k++) {
                for (unsigned i = 0; i < rounds; i++)
                        column[i] = times[i][order[k]];
                printf("%llu ", (unsigned long long) decile(column, rounds));
        }
        putchar('\n');
        free(times);
        free(column);
        free(records);
        kvmneg_free(table);
        return 0;
}
