/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzzing what libkvmneg-client makes of the daemon's bytes, with libFuzzer (tools/fuzz.sh builds and runs it).
 *
 * The first byte of an input says in how large pieces the rest arrives at the first call, 0 all at once; the rest is
 * what a daemon writes before it closes the connection. Every method hears it, on a connection of its own: socket(2) is
 * one end of a pair that has those bytes to read, recv(2) is cut into pieces. The second call of Begin asks for the
 * digest that the reply has, if it has one, so that a grant is one; the file of a grant is always the same contract.
 *
 * reply_mutator.c changes values of the JSON as well as bytes.
 *
 * What is given is looked at: texts end, have no control characters but the ends of lines, as many lines as are said;
 * what is not given is not touched; no descriptor stays open. Memory is the sanitizers' matter.
 */
#define _GNU_SOURCE

#include <limits.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "contract.h"
#include "fuzzer.h"
#include "kvmneg-client.h"

#define DIGEST (KVMNEG_CLIENT_DIGEST_SIZE - 1)
#define HEXADECIMAL "0123456789abcdef"

static const uint8_t *sent;
static size_t sent_size, piece;
static int daemon_end = -1;

static struct contract_header file = { /* the smallest contract there is */
        .magic = "KVMNEGC", .version = 1, .architecture = KVMNEG_X86_64, .total = sizeof(file), .size = sizeof(file),
};
static char file_digest[KVMNEG_CLIENT_DIGEST_SIZE] = "sha256:";

/* -- the system, as linked by --wrap --------------------------------------------------------------------- */

int __wrap_socket(int domain, int type, int protocol);
int __wrap_connect(int fd, const struct sockaddr *address, socklen_t size);
ssize_t __wrap_recv(int fd, void *data, size_t size, int flags);
ssize_t __real_recv(int fd, void *data, size_t size, int flags);
int __wrap_kvmneg_contract_open(const char *path, struct kvmneg_contract **ret_contract,
                                struct kvmneg_contract_error *ret_error);

int __wrap_socket(int domain, int type, int protocol) {
        int ends[2];

        REQUIRE(socketpair(domain, type, protocol, ends) == 0);
        for (size_t at = 0; at < sent_size;) {
                ssize_t n = send(ends[1], sent + at, sent_size - at, MSG_NOSIGNAL);
                REQUIRE(n > 0);
                at += (size_t) n;
        }
        REQUIRE(shutdown(ends[1], SHUT_WR) == 0);
        daemon_end = ends[1];
        return ends[0];
}

int __wrap_connect(int fd, const struct sockaddr *address, socklen_t size) {
        (void) fd, (void) address, (void) size;
        return 0;
}

ssize_t __wrap_recv(int fd, void *data, size_t size, int flags) {
        return __real_recv(fd, data, piece && piece < size ? piece : size, flags);
}

int __wrap_kvmneg_contract_open(const char *path, struct kvmneg_contract **ret_contract,
                                struct kvmneg_contract_error *ret_error) {
        REQUIRE(path[0] == '/' && strlen(path) < PATH_MAX);
        return kvmneg_contract_open_memory(&file, sizeof(file), ret_contract, ret_error);
}

/* -- what was given -------------------------------------------------------------------------------------- */

static uint32_t lines(const char *text, bool one) {
        uint32_t count = 0;

        REQUIRE(text);
        for (const unsigned char *at = (const unsigned char *) text; *at; at++) {
                REQUIRE((*at >= ' ' && *at != 0x7f) || (*at == '\n' && !one));
                REQUIRE(at[0] != 0xc2 || at[1] >= 0xa0);
                count += *at == '\n';
        }
        REQUIRE(!*text || one || text[strlen(text) - 1] == '\n');
        return count;
}

static bool is_digest(const char *text) {
        return strncmp(text, "sha256:", 7) == 0 && strspn(text + 7, HEXADECIMAL) == 64 && text[DIGEST] == 0;
}

/* The reply's bytes as they came, with a NUL behind them. */
static void check_reply(const char *reply) {
        size_t size = strnlen((const char *) sent, sent_size);

        REQUIRE(size < sent_size && strlen(reply) == size && memcmp(reply, sent, size) == 0);
}

static void check_refusal(int r, struct kvmneg_refusal *refusal) {
        REQUIRE((r == -EREMOTEIO) == (refusal != NULL));
        if (!refusal)
                return;
        REQUIRE(refusal->name && lines(refusal->message, true) == 0 && lines(refusal->hint, true) == 0);
        REQUIRE(lines(refusal->blockers, false) == refusal->blocker_count);
        check_reply(refusal->reply);
        kvmneg_refusal_free(refusal);
}

static void check_result(int r) {
        REQUIRE(r == 0 || r == -EREMOTEIO || r == -EBADMSG || r == -EFBIG || r == -ECONNRESET || r == -EBADE);
        if (daemon_end >= 0)
                REQUIRE(close(daemon_end) == 0);
        daemon_end = -1;
}

static void negotiate(void) {
        struct kvmneg_offer *offer = NULL;
        struct kvmneg_refusal *refusal = NULL;
        int r = kvmneg_negotiate("/daemon", "{}", -1, &offer, &refusal);

        check_result(r);
        check_refusal(r, refusal);
        REQUIRE((r == 0) == (offer != NULL) && r != -EBADE);
        if (!offer)
                return;
        REQUIRE(is_digest(offer->digest) && offer->generation < INT64_MAX);
        REQUIRE(lines(offer->not_granted, false) == offer->not_granted_count);
        lines(offer->scope, false);
        check_reply(offer->reply);
        kvmneg_offer_free(offer);
}

static void check_grant(int r, const char *digest, bool open, struct kvmneg_contract *contract,
                        struct kvmneg_grant *grant, struct kvmneg_refusal *refusal) {
        check_result(r);
        check_refusal(r, refusal);
        REQUIRE((r == 0) == (grant != NULL) && (r == 0 && open) == (contract != NULL));
        if (!grant)
                return;
        REQUIRE(strcmp(grant->digest, digest) == 0 && grant->path[0] == '/');
        REQUIRE(grant->generation < INT64_MAX && grant->expires_in_seconds < INT64_MAX);
        REQUIRE(!open || strcmp(digest, file_digest) == 0);
        kvmneg_contract_free(contract);
        kvmneg_grant_free(grant);
}

static void begin(const char *digest, bool open) {
        struct kvmneg_grant *grant = NULL;
        struct kvmneg_contract *contract = NULL;
        struct kvmneg_refusal *refusal = NULL;
        int r = kvmneg_begin("/daemon", digest, "vm", 0, -1, open ? &contract : NULL, &grant, &refusal);

        check_grant(r, digest, open, contract, grant, refusal);
}

static void receive(void) {
        struct kvmneg_grant *grant = NULL;
        struct kvmneg_contract *contract = NULL, *brought = NULL;
        struct kvmneg_refusal *refusal = NULL;
        int r;

        REQUIRE(kvmneg_contract_open_memory(&file, sizeof(file), &brought, NULL) == 0);
        r = kvmneg_receive("/daemon", brought, "vm", NULL, 0, -1, &contract, &grant, &refusal);
        kvmneg_contract_free(brought);
        check_grant(r, file_digest, true, contract, grant, refusal);
}

static void tell(void) {
        struct kvmneg_refusal *refusal = NULL;
        int r = kvmneg_started("/daemon", "vm", -1, &refusal);

        check_result(r);
        REQUIRE(r != -EBADE);
        check_refusal(r, refusal);
        check_result(kvmneg_end("/daemon", "vm", -1, NULL));
}

static void call(void) {
        struct kvmneg_refusal *refusal = NULL;
        char *reply = NULL;
        int r = kvmneg_call("/daemon", "org.kvmneg.Guests.Saved", "{\"vm\": \"vm\"}", -1, &reply, &refusal);

        check_result(r);
        REQUIRE(r != -EBADE && (r == 0) == (reply != NULL));
        check_refusal(r, refusal);
        free(reply);
}

/* The first digest there is, else one that is not there. */
static void digest_in(char found[static KVMNEG_CLIENT_DIGEST_SIZE]) {
        const uint8_t *at = sent_size ? memmem(sent, sent_size, "sha256:", 7) : NULL;

        memset(found, '0', DIGEST);
        memcpy(found, "sha256:", 7);
        found[DIGEST] = 0;
        if (at && (size_t) (sent + sent_size - at) >= DIGEST) {
                char text[KVMNEG_CLIENT_DIGEST_SIZE] = "";
                memcpy(text, at, DIGEST);
                if (is_digest(text))
                        memcpy(found, text, sizeof(text));
        }
}

static void seal_file(void) {
        kvmneg_internal_sha256((const uint8_t *) &file, sizeof(file), offsetof(struct contract_header, digest),
                               file.digest);
        for (size_t at = 0; at < sizeof(file.digest); at++)
                snprintf(file_digest + 7 + 2 * at, 3, "%02x", file.digest[at]);
}

static int lowest_free(void) {
        int fd = dup(STDERR_FILENO);

        REQUIRE(fd >= 0 && close(fd) == 0);
        return fd;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
        static int before = -1;
        char digest[KVMNEG_CLIENT_DIGEST_SIZE];

        if (size == 0)
                return 0;
        if (before < 0) {
                seal_file();
                before = lowest_free();
        }
        piece = data[0];
        sent = data + 1;
        sent_size = size - 1;
        digest_in(digest);
        negotiate();
        piece = 0; /* one framing for all methods, and many calls of the system: once is enough */
        begin(digest, false);
        begin(digest, true);
        begin(file_digest, true);
        receive();
        tell();
        call();
        REQUIRE(lowest_free() == before);
        return 0;
}
