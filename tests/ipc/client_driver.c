/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Calls libkvmneg-client for a test: client_driver SOCKET TIMEOUT-MS METHOD [ARGUMENT ...], "-" is NULL.
 * Prints names and values in turn, each with a NUL behind it. SIGPIPE and SIGALRM are as the tests want them: the
 * first kills, the second interrupts every 10 ms where METHOD begins with "interrupted-".
 */

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>

#include <kvmneg-client.h>
#include <kvmneg.h>

static void text(const char *name, const char *value) {
        printf("%s%c%s%c", name, 0, value, 0);
}

static void number(const char *name, int64_t value) {
        printf("%s%c%" PRId64 "%c", name, 0, value, 0);
}

static void nothing(int signal) {
        (void) signal;
}

static void interrupt_all_the_time(void) {
        struct sigaction action = { .sa_handler = nothing }; /* without SA_RESTART */
        struct itimerval every = { { 0, 10000 }, { 0, 10000 } };

        sigaction(SIGALRM, &action, NULL);
        setitimer(ITIMER_REAL, &every, NULL);
}

static int descriptors(void) {
        int count = 0;

        for (int fd = 0; fd < 256; fd++)
                count += fcntl(fd, F_GETFD) >= 0;
        return count;
}

static void print_offer(struct kvmneg_offer *offer) {
        text("digest", offer->digest);
        number("generation", (int64_t) offer->generation);
        text("not_granted", offer->not_granted);
        number("not_granted_count", offer->not_granted_count);
        text("scope", offer->scope);
        text("reply", offer->reply);
        kvmneg_offer_free(offer);
}

static void print_grant(struct kvmneg_grant *grant) {
        text("digest", grant->digest);
        number("generation", (int64_t) grant->generation);
        number("expires_in_seconds", (int64_t) grant->expires_in_seconds);
        text("path", grant->path);
        kvmneg_grant_free(grant);
}

static void print_contract(struct kvmneg_contract *contract) {
        const unsigned char *bytes;
        uint64_t size;

        bytes = kvmneg_contract_bytes(contract, &size);
        printf("contract%c", 0);
        for (uint64_t at = 0; at < size; at++)
                printf("%02x", bytes[at]);
        putchar(0);
        kvmneg_contract_free(contract);
}

static void print_refusal(struct kvmneg_refusal *refusal) {
        text("name", refusal->name);
        text("message", refusal->message);
        text("hint", refusal->hint);
        text("blockers", refusal->blockers);
        number("blocker_count", refusal->blocker_count);
        text("reply", refusal->reply);
        kvmneg_refusal_free(refusal);
}

static const char *argument(int argc, char **argv, int at) {
        return at >= argc || strcmp(argv[at], "-") == 0 ? NULL : argv[at];
}

static int pid_of(int argc, char **argv, int at) {
        const char *text = argument(argc, argv, at);

        return text ? atoi(text) : 0;
}

/* FILE with a contract, VM, VMM, PID */
static int receive(int argc, char **argv, int timeout, struct kvmneg_contract **ret_contract,
                   struct kvmneg_grant **ret_grant, struct kvmneg_refusal **ret_refusal) {
        struct kvmneg_contract *brought = NULL;
        int r = argument(argc, argv, 4) ? kvmneg_contract_open(argv[4], &brought, NULL) : 0;

        if (r == 0)
                r = kvmneg_receive(argument(argc, argv, 1), brought, argument(argc, argv, 5), argument(argc, argv, 6),
                                   pid_of(argc, argv, 7), timeout, ret_contract, ret_grant, ret_refusal);
        kvmneg_contract_free(brought);
        return r;
}

int main(int argc, char **argv) {
        const char *socket = argument(argc, argv, 1), *method = argv[3], *first = argument(argc, argv, 4);
        struct kvmneg_refusal *refusal = NULL;
        struct kvmneg_offer *offer = NULL;
        struct kvmneg_grant *grant = NULL;
        struct kvmneg_contract *contract = NULL;
        char *reply = NULL;
        int timeout = atoi(argv[2]), before = descriptors(), r = -ENOSYS;

        if (strncmp(method, "interrupted-", 12) == 0) {
                interrupt_all_the_time();
                method += 12;
        }
        if (strcmp(method, "negotiate") == 0)
                r = kvmneg_negotiate(socket, first, timeout, &offer, &refusal);
        else if (strcmp(method, "quiet-negotiate") == 0)
                r = kvmneg_negotiate(socket, first, timeout, &offer, NULL);
        else if (strcmp(method, "begin") == 0)
                r = kvmneg_begin(socket, first, argument(argc, argv, 5), pid_of(argc, argv, 6), timeout, &contract, &grant, &refusal);
        else if (strcmp(method, "begin-unopened") == 0)
                r = kvmneg_begin(socket, first, argument(argc, argv, 5), pid_of(argc, argv, 6), timeout, NULL, &grant, &refusal);
        else if (strcmp(method, "begin-only") == 0)
                r = kvmneg_begin(socket, first, argument(argc, argv, 5), pid_of(argc, argv, 6), timeout, NULL, NULL, NULL);
        else if (strcmp(method, "receive") == 0)
                r = receive(argc, argv, timeout, &contract, &grant, &refusal);
        else if (strcmp(method, "started") == 0)
                r = kvmneg_started(socket, first, timeout, &refusal);
        else if (strcmp(method, "end") == 0)
                r = kvmneg_end(socket, first, timeout, &refusal);
        else if (strcmp(method, "call") == 0)
                r = kvmneg_call(socket, first, argument(argc, argv, 5), timeout, &reply, &refusal);
        else if (strcmp(method, "quiet-call") == 0)
                r = kvmneg_call(socket, first, argument(argc, argv, 5), timeout, NULL, NULL);
        number("r", r);
        number("descriptors", descriptors() - before);
        if (offer)
                print_offer(offer);
        if (grant)
                print_grant(grant);
        if (contract)
                print_contract(contract);
        if (refusal)
                print_refusal(refusal);
        if (reply)
                text("reply", reply);
        free(reply);
        return 0;
}
