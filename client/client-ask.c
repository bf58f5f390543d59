/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* One call and its reply, and why the daemon said no. */

#include <stdlib.h>
#include <string.h>

#include "client.h"

struct kvmneg_refusal *kvmneg_refusal_free(struct kvmneg_refusal *refusal) {
        if (refusal) {
                free((void *) refusal->name);
                free((void *) refusal->message);
                free((void *) refusal->hint);
                free((void *) refusal->blockers);
                free((void *) refusal->reply);
                free(refusal);
        }
        return NULL;
}

/* Why not, of an error reply, whose text it takes over. An error with odd parameters is one all the same: what cannot
 * be read of it is empty, and `reply` has it. */
static int refusal_of(const struct document *document, struct reply *reply, struct kvmneg_refusal **ret_refusal) {
        struct kvmneg_refusal *refusal;
        const char *name;
        char *text = NULL;

        if (!ret_refusal)
                return -EREMOTEIO;
        refusal = calloc(1, sizeof(*refusal));
        if (!refusal)
                return -ENOMEM;
        if (kvmneg_client_error_name(document, &name) == 0)
                refusal->name = strdup(name);
        refusal->message = kvmneg_client_text(document, "message", &text) == 0 ? text : strdup("");
        refusal->hint = kvmneg_client_text(document, "hint", &text) == 0 ? text : strdup("");
        refusal->blockers = kvmneg_client_blockers(document, "blockers", &text, &refusal->blocker_count) == 0 ?
                                    text :
                                    strdup("");
        if (!refusal->name || !refusal->message || !refusal->hint || !refusal->blockers) {
                kvmneg_refusal_free(refusal);
                return -ENOMEM;
        }
        refusal->reply = reply->text;
        reply->text = NULL;
        *ret_refusal = refusal;
        return -EREMOTEIO;
}

int kvmneg_client_ask(const char *socket, char *call, size_t size, int timeout_ms, struct reply *ret_reply,
                      struct document **ret_document, struct kvmneg_refusal **ret_refusal) {
        struct document *document = NULL;
        struct reply reply = { NULL, 0 };
        int r = kvmneg_client_exchange(socket, call, size, timeout_ms, &reply);

        free(call);
        if (r == 0)
                r = kvmneg_client_parse(&reply, &document);
        if (r == -EREMOTEIO)
                r = refusal_of(document, &reply, ret_refusal);
        if (r < 0) {
                kvmneg_client_document_free(document);
                free(reply.text);
                return r;
        }
        *ret_document = document;
        *ret_reply = reply;
        return 0;
}

int kvmneg_call(const char *socket, const char *method, const char *parameters, int timeout_ms, char **ret_reply,
                struct kvmneg_refusal **ret_refusal) {
        struct document *document = NULL;
        struct reply reply = { NULL, 0 };
        size_t size;
        char *call;
        int r = kvmneg_client_call_of_json(method, parameters ? parameters : "{}", &call, &size);

        if (r == 0)
                r = kvmneg_client_ask(socket, call, size, timeout_ms, &reply, &document, ret_refusal);
        if (r < 0)
                return r;
        kvmneg_client_document_free(document);
        if (ret_reply)
                *ret_reply = reply.text;
        else
                free(reply.text);
        return 0;
}
