/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A VM's methods: what each asks, and which fields of a reply it needs. */

#include <kvmneg.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client.h"

struct kvmneg_offer *kvmneg_offer_free(struct kvmneg_offer *offer) {
        if (offer) {
                free((void *) offer->not_granted);
                free((void *) offer->scope);
                free((void *) offer->reply);
                free(offer);
        }
        return NULL;
}

struct kvmneg_grant *kvmneg_grant_free(struct kvmneg_grant *grant) {
        if (grant) {
                free((void *) grant->path);
                free(grant);
        }
        return NULL;
}

/* "sha256:" and 64 hexadecimal digits, into room for them. */
static int digest_of(const struct document *document, char digest[static KVMNEG_CLIENT_DIGEST_SIZE]) {
        static const char prefix[] = "sha256:";
        const size_t start = sizeof(prefix) - 1;
        const char *text = NULL;
        int r = kvmneg_client_string(document, "digest", &text);

        if (r < 0)
                return r;
        if (strlen(text) != KVMNEG_CLIENT_DIGEST_SIZE - 1 || strncmp(text, prefix, start) != 0 ||
            strspn(text + start, "0123456789abcdef") != 64)
                return -EBADMSG;
        memcpy(digest, text, KVMNEG_CLIENT_DIGEST_SIZE);
        return 0;
}

static int read_offer(const struct document *document, struct kvmneg_offer *offer) {
        char *text = NULL;
        int r = digest_of(document, offer->digest);

        if (r == 0)
                r = kvmneg_client_number(document, "generation", &offer->generation);
        if (r == 0)
                r = kvmneg_client_blockers(document, "notGranted", &text, &offer->not_granted_count);
        if (r < 0)
                return r;
        offer->not_granted = text;
        r = kvmneg_client_lines(document, "scope", &text);
        if (r == 0)
                offer->scope = text;
        return r;
}

int kvmneg_negotiate(const char *socket, const char *request, int timeout_ms, struct kvmneg_offer **ret_offer,
                     struct kvmneg_refusal **ret_refusal) {
        struct kvmneg_offer *offer;
        struct document *document = NULL;
        struct reply reply = { NULL, 0 };
        size_t size;
        char *call;
        int r = kvmneg_client_call_of_json("org.kvmneg.Negotiate", request, &call, &size);

        if (r == 0)
                r = kvmneg_client_ask(socket, call, size, timeout_ms, &reply, &document, ret_refusal);
        if (r < 0)
                return r;
        offer = calloc(1, sizeof(*offer));
        r = offer ? read_offer(document, offer) : -ENOMEM;
        kvmneg_client_document_free(document);
        if (r < 0) {
                free(reply.text);
                kvmneg_offer_free(offer);
                return r;
        }
        offer->reply = reply.text;
        *ret_offer = offer;
        return 0;
}

static int read_grant(const struct document *document, const char *digest, struct kvmneg_grant *grant) {
        const char *path = "";
        int r = digest_of(document, grant->digest);

        if (r == 0 && strcmp(grant->digest, digest) != 0)
                r = -EBADE;
        if (r == 0)
                r = kvmneg_client_number(document, "generation", &grant->generation);
        if (r == 0)
                r = kvmneg_client_number(document, "expiresInSeconds", &grant->expires_in_seconds);
        if (r == 0)
                r = kvmneg_client_string(document, "path", &path);
        if (r < 0)
                return r;
        if (path[0] != '/' || strlen(path) >= PATH_MAX)
                return -EBADMSG;
        grant->path = strdup(path);
        return grant->path ? 0 : -ENOMEM;
}

/* "sha256:" and the digits, of a contract's own bytes. */
static void digest_text(const struct kvmneg_contract *contract, char text[static KVMNEG_CLIENT_DIGEST_SIZE]) {
        struct kvmneg_contract_info info;
        char *at = stpcpy(text, "sha256:");

        kvmneg_contract_describe(contract, &info);
        for (size_t byte = 0; byte < sizeof(info.digest); byte++, at += 2)
                snprintf(at, 3, "%02x", info.digest[byte]);
}

/* The contract of a grant: the file under its path could be another's, so its own digest is compared. */
static int open_contract(const struct kvmneg_grant *grant, struct kvmneg_contract **ret_contract) {
        struct kvmneg_contract *contract = NULL;
        char digest[KVMNEG_CLIENT_DIGEST_SIZE];
        int r = kvmneg_contract_open(grant->path, &contract, NULL);

        if (r < 0)
                return r;
        digest_text(contract, digest);
        if (strcmp(grant->digest, digest) != 0) {
                kvmneg_contract_free(contract);
                return -EBADE;
        }
        *ret_contract = contract;
        return 0;
}

/* A method that gives the VM of its parameters the contract `digest`. */
static int be_granted(const char *socket, const char *method, const struct parameter *parameters, const char *digest,
                      int timeout_ms, struct kvmneg_contract **ret_contract, struct kvmneg_grant **ret_grant,
                      struct kvmneg_refusal **ret_refusal) {
        struct kvmneg_grant *grant;
        struct document *document = NULL;
        struct reply reply = { NULL, 0 };
        size_t size;
        char *call;
        int r = kvmneg_client_call_of(method, parameters, &call, &size);

        if (r == 0)
                r = kvmneg_client_ask(socket, call, size, timeout_ms, &reply, &document, ret_refusal);
        if (r < 0)
                return r;
        grant = calloc(1, sizeof(*grant));
        r = grant ? read_grant(document, digest, grant) : -ENOMEM;
        kvmneg_client_document_free(document);
        free(reply.text);
        if (r == 0 && ret_contract)
                r = open_contract(grant, ret_contract);
        if (r == 0 && ret_grant)
                *ret_grant = grant;
        else
                kvmneg_grant_free(grant);
        return r;
}

int kvmneg_begin(const char *socket, const char *digest, const char *vm, int pid, int timeout_ms,
                 struct kvmneg_contract **ret_contract, struct kvmneg_grant **ret_grant,
                 struct kvmneg_refusal **ret_refusal) {
        const struct parameter parameters[] = {
                { .name = "digest", .text = digest },
                { .name = "vm", .text = vm },
                { .name = "pid", .number = pid, .may_lack = true },
                { .name = NULL },
        };

        if (pid < 0)
                return -EINVAL;
        return be_granted(socket, "org.kvmneg.Begin", parameters, digest, timeout_ms, ret_contract, ret_grant,
                          ret_refusal);
}

/* Base64 (RFC 4648, section 4) with padding, released with free(3). */
static int base64_of(const unsigned char *bytes, uint64_t size, char **ret_text) {
        static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        char *text, *put;

        if (size > KVMNEG_CLIENT_CALL_MAX / 4 * 3)
                return -EMSGSIZE;
        text = put = malloc((size + 2) / 3 * 4 + 1);
        if (!text)
                return -ENOMEM;
        for (uint64_t at = 0; at < size; at += 3) {
                uint64_t left = size - at;
                uint32_t three = (uint32_t) bytes[at] << 16;

                three |= left > 1 ? (uint32_t) bytes[at + 1] << 8 : 0;
                three |= left > 2 ? (uint32_t) bytes[at + 2] : 0;
                *put++ = digits[three >> 18];
                *put++ = digits[three >> 12 & 63];
                *put++ = left > 1 ? digits[three >> 6 & 63] : '=';
                *put++ = left > 2 ? digits[three & 63] : '=';
        }
        *put = 0;
        *ret_text = text;
        return 0;
}

int kvmneg_receive(const char *socket, const struct kvmneg_contract *contract, const char *vm, const char *vmm, int pid,
                   int timeout_ms, struct kvmneg_contract **ret_contract, struct kvmneg_grant **ret_grant,
                   struct kvmneg_refusal **ret_refusal) {
        struct parameter parameters[] = {
                { .name = "binary" },
                { .name = "vm", .text = vm },
                { .name = "vmm", .text = vmm, .may_lack = true },
                { .name = "pid", .number = pid, .may_lack = true },
                { .name = NULL },
        };
        char digest[KVMNEG_CLIENT_DIGEST_SIZE];
        const unsigned char *bytes;
        uint64_t size;
        char *binary;
        int r;

        if (pid < 0 || !contract)
                return -EINVAL;
        bytes = kvmneg_contract_bytes(contract, &size);
        r = base64_of(bytes, size, &binary);
        if (r < 0)
                return r;
        digest_text(contract, digest);
        parameters[0].text = binary;
        r = be_granted(socket, "org.kvmneg.Guests.Receive", parameters, digest, timeout_ms, ret_contract, ret_grant,
                       ret_refusal);
        free(binary);
        return r;
}

/* A method that says one thing about a VM, and has nothing to hear. */
static int tell(const char *socket, const char *method, const char *vm, int timeout_ms,
                struct kvmneg_refusal **ret_refusal) {
        const struct parameter parameters[] = { { .name = "vm", .text = vm }, { .name = NULL } };
        struct document *document = NULL;
        struct reply reply = { NULL, 0 };
        size_t size;
        char *call;
        int r = kvmneg_client_call_of(method, parameters, &call, &size);

        if (r == 0)
                r = kvmneg_client_ask(socket, call, size, timeout_ms, &reply, &document, ret_refusal);
        if (r < 0)
                return r;
        kvmneg_client_document_free(document);
        free(reply.text);
        return 0;
}

int kvmneg_started(const char *socket, const char *vm, int timeout_ms, struct kvmneg_refusal **ret_refusal) {
        return tell(socket, "org.kvmneg.Started", vm, timeout_ms, ret_refusal);
}

int kvmneg_end(const char *socket, const char *vm, int timeout_ms, struct kvmneg_refusal **ret_refusal) {
        return tell(socket, "org.kvmneg.End", vm, timeout_ms, ret_refusal);
}
