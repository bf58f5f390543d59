/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the files of libkvmneg-client share and nobody else sees. */
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>

#include "kvmneg-client.h"

/* A reply's bytes; `text` has a NUL after its `size` bytes and none in them. Release with free(3). */
struct reply {
        char *text;
        size_t size;
};

/* Sends `call` with the NUL behind it and gives the reply (client-socket.c). */
int kvmneg_client_exchange(const char *socket, const char *call, size_t size, int timeout_ms, struct reply *ret_reply);

/* JSON, all of it in client-json.c. */
struct document; /* what was parsed */

/* Sends a call, which it releases, and parses the reply (client-ask.c). Release both, on success only. */
int kvmneg_client_ask(const char *socket, char *call, size_t size, int timeout_ms, struct reply *ret_reply,
                      struct document **ret_document, struct kvmneg_refusal **ret_refusal);

struct document *kvmneg_client_document_free(struct document *document);

/* A text, or a number where that is not 0; what has neither is left out where it may be, else it is -EINVAL. */
struct parameter {
        const char *name;
        const char *text;
        int64_t number;
        bool may_lack;
};

/* The call {"method": method, "parameters": ...}, released with free(3). `parameters` is JSON, or an array that ends
 * with one that has no name. -EINVAL, -EMSGSIZE. */
int kvmneg_client_call_of_json(const char *method, const char *parameters, char **ret_call, size_t *ret_size);
int kvmneg_client_call_of(const char *method, const struct parameter *parameters, char **ret_call, size_t *ret_size);

/* 0: a result. -EREMOTEIO: an error, and *ret_document is it too. Anything else: no document. */
int kvmneg_client_parse(const struct reply *reply, struct document **ret_document);

/* A string of the parameters, or of the reply itself for "error"; it is the document's. -EBADMSG where it is none. */
int kvmneg_client_string(const struct document *document, const char *name, const char **ret_text);
int kvmneg_client_error_name(const struct document *document, const char **ret_name);
/* An integer that is not negative. */
int kvmneg_client_number(const struct document *document, const char *name, uint64_t *ret_number);

/* Text for people, released with free(3): a string, "" where it is absent or null; a line for each of an array of
 * strings, and of an array of Blocker. */
int kvmneg_client_text(const struct document *document, const char *name, char **ret_text);
int kvmneg_client_lines(const struct document *document, const char *name, char **ret_text);
int kvmneg_client_blockers(const struct document *document, const char *name, char **ret_text, uint32_t *ret_count);
