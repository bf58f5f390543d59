/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * JSON of calls and replies; no other file knows it.
 *
 * By json-c, of the libraries in Debian 12 (json-c 0.16, jansson 2.14, cJSON 1.7.15; yyjson is not in it):
 *   - its parser has a depth limit that is given with each parser (jansson's is fixed at 2048 when it is built, cJSON's
 *     at 1000), a strict mode, and checks UTF-8;
 *   - it parses a given number of bytes and tells where it stopped;
 *   - its symbols are versioned (JSONC_0.14): jansson and json-glib have functions of the same names, and a VMM may have
 *     one of them in the same process;
 *   - it is on nearly every system already, as cryptsetup's, and is maintained with security fixes upstream and in Debian.
 */

#include <json-c/json.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "client.h"

struct document {
        struct json_object *root;
        struct json_object *parameters; /* of root; NULL: there are none */
};

/* How many objects and arrays there are at most: brackets in strings count too. json-c takes a kilobyte for `{}`. */
static size_t containers(const char *text, size_t size) {
        size_t count = 0;

        for (size_t at = 0; at < size; at++)
                count += text[at] == '{' || text[at] == '[';
        return count;
}

static int parse(const char *text, size_t size, int flags, struct json_object **ret_object) {
        struct json_tokener *parser = json_tokener_new_ex(KVMNEG_CLIENT_DEPTH_MAX);
        struct json_object *object;
        bool whole;

        if (!parser)
                return -ENOMEM;
        json_tokener_set_flags(parser, flags);
        object = json_tokener_parse_ex(parser, text, (int) size);
        whole = json_tokener_get_error(parser) == json_tokener_success && json_tokener_get_parse_end(parser) == size;
        json_tokener_free(parser);
        if (!whole || !json_object_is_type(object, json_type_object)) {
                json_object_put(object);
                return -EBADMSG;
        }
        *ret_object = object;
        return 0;
}

/*
 * Whether it is JSON to the letter, for text with bytes above ASCII: json-c 0.18 takes them for control characters where
 * it is strict. They can stand in strings alone, so any letter in their place is the same JSON.
 */
static int check_strictly(const char *text, size_t size) {
        char *copy = malloc(size);
        struct json_object *object;
        int r;

        if (!copy)
                return -ENOMEM;
        for (size_t at = 0; at < size; at++)
                copy[at] = (unsigned char) text[at] < 0x80 ? text[at] : 'x';
        r = parse(copy, size, JSON_TOKENER_STRICT, &object);
        free(copy);
        if (r == 0)
                json_object_put(object);
        return r;
}

/* One JSON object and nothing but it. -EBADMSG: it is something else, or nested too deep. */
static int parse_object(const char *text, size_t size, struct json_object **ret_object) {
        size_t ascii = 0;
        int r;

        if (size > KVMNEG_CLIENT_REPLY_MAX || containers(text, size) > KVMNEG_CLIENT_CONTAINERS_MAX)
                return -EFBIG;
        while (ascii < size && (unsigned char) text[ascii] < 0x80)
                ascii++;
        if (ascii == size)
                return parse(text, size, JSON_TOKENER_STRICT, ret_object);
        r = check_strictly(text, size);
        return r < 0 ? r : parse(text, size, JSON_TOKENER_VALIDATE_UTF8, ret_object);
}

/* -- calls ---------------------------------------------------------------------------------------------- */

/* Takes `parameters` over. */
static int call_of(const char *method, struct json_object *parameters, char **ret_call, size_t *ret_size) {
        struct json_object *call = json_object_new_object(), *name = json_object_new_string(method);
        const char *text = NULL;
        size_t size = 0;
        int r = -ENOMEM;

        if (call && name && json_object_object_add(call, "method", name) == 0) {
                name = NULL;
                if (json_object_object_add(call, "parameters", parameters) == 0) {
                        parameters = NULL;
                        text = json_object_to_json_string_length(
                                call, JSON_C_TO_STRING_PLAIN | JSON_C_TO_STRING_NOSLASHESCAPE, &size);
                }
        }
        if (text && size > KVMNEG_CLIENT_CALL_MAX)
                r = -EMSGSIZE;
        else if (text && (*ret_call = strndup(text, size))) {
                *ret_size = size;
                r = 0;
        }
        json_object_put(name);
        json_object_put(parameters);
        json_object_put(call);
        return r;
}

/* Methods, digests and UUIDs are; what is not would have to be checked for UTF-8, which json-c does not do when it prints. */
static bool is_ascii(const char *text, size_t size) {
        for (size_t at = 0; at < size; at++)
                if (text[at] < ' ' || text[at] > '~')
                        return false;
        return true;
}

int kvmneg_client_call_of_json(const char *method, const char *parameters, char **ret_call, size_t *ret_size) {
        struct json_object *object;
        size_t size = parameters ? strnlen(parameters, (size_t) KVMNEG_CLIENT_CALL_MAX + 1) : 0;
        int r;

        if (!parameters || !method)
                return -EINVAL;
        if (size > KVMNEG_CLIENT_CALL_MAX || strnlen(method, KVMNEG_CLIENT_CALL_MAX) == KVMNEG_CLIENT_CALL_MAX)
                return -EMSGSIZE;
        if (!is_ascii(method, strlen(method)))
                return -EINVAL;
        r = parse_object(parameters, size, &object);
        if (r < 0)
                return r == -ENOMEM ? r : -EINVAL;
        return call_of(method, object, ret_call, ret_size);
}

/* The value of a parameter; NULL where it is left out. */
static int value_of(const struct parameter *parameter, struct json_object **ret_value) {
        struct json_object *value = NULL;
        size_t size = parameter->text ? strnlen(parameter->text, (size_t) KVMNEG_CLIENT_CALL_MAX + 1) : 0;

        if (size > KVMNEG_CLIENT_CALL_MAX)
                return -EMSGSIZE;
        if (parameter->text && !is_ascii(parameter->text, size))
                return -EINVAL;
        if (parameter->number)
                value = json_object_new_int64(parameter->number);
        else if (parameter->text)
                value = json_object_new_string_len(parameter->text, (int) size);
        else if (!parameter->may_lack)
                return -EINVAL;
        if (!value && (parameter->number || parameter->text))
                return -ENOMEM;
        *ret_value = value;
        return 0;
}

int kvmneg_client_call_of(const char *method, const struct parameter *parameters, char **ret_call, size_t *ret_size) {
        struct json_object *object = json_object_new_object();

        if (!object)
                return -ENOMEM;
        for (const struct parameter *at = parameters; at->name; at++) {
                struct json_object *value = NULL;
                int r = value_of(at, &value);

                if (r == 0 && value && json_object_object_add(object, at->name, value) < 0)
                        r = -ENOMEM;
                if (r < 0) {
                        json_object_put(value);
                        json_object_put(object);
                        return r;
                }
        }
        return call_of(method, object, ret_call, ret_size);
}

/* -- replies -------------------------------------------------------------------------------------------- */

struct document *kvmneg_client_document_free(struct document *document) {
        if (document) {
                json_object_put(document->root);
                free(document);
        }
        return NULL;
}

/* A member that is there and not null, else NULL: both mean the same (UAPI.20). */
static struct json_object *member(struct json_object *object, const char *name) {
        struct json_object *found = NULL;

        return object && json_object_object_get_ex(object, name, &found) ? found : NULL;
}

/* A string without a NUL in it, as C has them; NULL where it is something else. */
static const char *string_of(struct json_object *object) {
        const char *text;

        if (!json_object_is_type(object, json_type_string))
                return NULL;
        text = json_object_get_string(object);
        return strlen(text) == (size_t) json_object_get_string_len(object) ? text : NULL;
}

/* The shape that UAPI.20 gives a reply to a call without `more`. */
static int checked(const struct document *document) {
        struct json_object *error = member(document->root, "error"), *continues = member(document->root, "continues");

        if (document->parameters && !json_object_is_type(document->parameters, json_type_object))
                return -EBADMSG;
        if (continues && (!json_object_is_type(continues, json_type_boolean) || json_object_get_boolean(continues)))
                return -EBADMSG;
        if (!error)
                return 0;
        return string_of(error) ? -EREMOTEIO : -EBADMSG;
}

int kvmneg_client_parse(const struct reply *reply, struct document **ret_document) {
        struct document *document = calloc(1, sizeof(*document));
        int r;

        if (!document)
                return -ENOMEM;
        r = parse_object(reply->text, reply->size, &document->root);
        if (r == 0) {
                document->parameters = member(document->root, "parameters");
                r = checked(document);
        }
        if (r < 0 && r != -EREMOTEIO) {
                kvmneg_client_document_free(document);
                return r;
        }
        *ret_document = document;
        return r;
}

int kvmneg_client_string(const struct document *document, const char *name, const char **ret_text) {
        const char *text = string_of(member(document->parameters, name));

        if (!text)
                return -EBADMSG;
        *ret_text = text;
        return 0;
}

int kvmneg_client_error_name(const struct document *document, const char **ret_name) {
        const char *name = string_of(member(document->root, "error"));

        if (!name)
                return -EBADMSG;
        *ret_name = name;
        return 0;
}

int kvmneg_client_number(const struct document *document, const char *name, uint64_t *ret_number) {
        struct json_object *number = member(document->parameters, name);
        int64_t value;

        if (!json_object_is_type(number, json_type_int))
                return -EBADMSG;
        value = json_object_get_int64(number);
        if (value < 0 || value == INT64_MAX) /* json-c makes INT64_MAX of anything larger */
                return -EBADMSG;
        *ret_number = (uint64_t) value;
        return 0;
}

/* -- text for people ------------------------------------------------------------------------------------ */

/* A string as a part of a line: what would move a terminal's cursor becomes a blank. Anything else adds nothing. */
static void put(FILE *stream, struct json_object *object) {
        const char *text = string_of(object);

        for (; text && *text; text++)
                if ((unsigned char) text[0] == 0xc2 && (unsigned char) text[1] < 0xa0) {
                        putc_unlocked(' ', stream); /* U+0080 to U+009F are control characters of two bytes */
                        text++;
                } else {
                        putc_unlocked((unsigned char) *text < ' ' || *text == 0x7f ? ' ' : *text, stream);
                }
}

/* "avx2 (cpuid:0x7.0.ebx bit 5), wanted by the request: host node7 does not offer it [kvm]", as kvmneg(1) prints it. */
static void put_blocker(FILE *stream, struct json_object *blocker) {
        struct json_object *bit = member(blocker, "bit");
        const char *feature = string_of(member(blocker, "feature")), *word = string_of(member(blocker, "word"));
        bool has_bit = json_object_is_type(bit, json_type_int);

        put(stream, member(blocker, "feature"));
        if (word && *word && (has_bit || !feature || strcmp(feature, word) != 0)) {
                fputs(" (", stream);
                put(stream, member(blocker, "word"));
                if (has_bit)
                        fprintf(stream, " bit %d", json_object_get_int(bit));
                putc(')', stream);
        }
        fputs(", wanted by ", stream);
        put(stream, member(blocker, "wantedBy"));
        fputs(": ", stream);
        put(stream, member(blocker, "because"));
        fputs(" [", stream);
        put(stream, member(blocker, "cause"));
        fputs("]\n", stream);
}

static void put_line(FILE *stream, struct json_object *text) {
        put(stream, text);
        putc('\n', stream);
}

/* What `one` writes of an object, or of each item of it where it is an array. Each is of `type`. */
static int print(struct json_object *object, enum json_type type, void (*one)(FILE *, struct json_object *),
                 char **ret_text, uint32_t *ret_count) {
        bool array = json_object_is_type(object, json_type_array);
        size_t count = array ? json_object_array_length(object) : object != NULL;
        size_t size = 0;
        char *text = NULL;
        FILE *stream;
        int r = 0;

        stream = open_memstream(&text, &size);
        if (!stream)
                return -ENOMEM;
        for (size_t at = 0; at < count && r == 0; at++) {
                struct json_object *item = array ? json_object_array_get_idx(object, at) : object;

                if (json_object_is_type(item, type))
                        one(stream, item);
                else
                        r = -EBADMSG;
        }
        if (ferror(stream))
                r = -ENOMEM;
        if (fclose(stream) != 0)
                r = -ENOMEM;
        if (r < 0) {
                free(text);
                return r;
        }
        *ret_text = text;
        if (ret_count)
                *ret_count = (uint32_t) count;
        return 0;
}

int kvmneg_client_text(const struct document *document, const char *name, char **ret_text) {
        struct json_object *text = member(document->parameters, name);

        if (json_object_is_type(text, json_type_array)) /* print() would take its items */
                return -EBADMSG;
        return print(text, json_type_string, put, ret_text, NULL);
}

int kvmneg_client_lines(const struct document *document, const char *name, char **ret_text) {
        struct json_object *lines = member(document->parameters, name);

        if (lines && !json_object_is_type(lines, json_type_array))
                return -EBADMSG;
        return print(lines, json_type_string, put_line, ret_text, NULL);
}

int kvmneg_client_blockers(const struct document *document, const char *name, char **ret_text, uint32_t *ret_count) {
        struct json_object *blockers = member(document->parameters, name);

        if (blockers && !json_object_is_type(blockers, json_type_array))
                return -EBADMSG;
        return print(blockers, json_type_object, put_blocker, ret_text, ret_count);
}
