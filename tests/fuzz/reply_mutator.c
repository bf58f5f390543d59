/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * How reply_fuzzer.c's inputs are changed: bytes as libFuzzer does it, or a value of the JSON as a whole becomes
 * another one, mostly of another type; an object gets a member more, under a name that the client asks for. Most of the
 * time the message is ended by a NUL, as the daemon does.
 */
#include <string.h>

#include "fuzzer.h"

#define COUNT(table) (sizeof(table) / sizeof((table)[0]))

static const char *const values[] = {
        "null", "true", "false", "0", "7", "-1", "1.5", "1e999", "9223372036854775806", "9223372036854775807",
        "18446744073709551616", "\"\"", "\"x\"", "\"/run/x\"", "\"run/x\"", "\"a\\u0000b\"", "\"\\u0085\\u001b\"",
        "\"\xc2\x85\xc2\xa0\x7f\"", "\"\\ud800\"", "[]", "{}", "[[]]", "[{}]", "[\"x\",\"y\"]", "[5]", "[null]",
        "[{},5]", "[\"x\",[]]", "{\"feature\":\"avx2\",\"word\":\"cpuid:0x7.0.ebx\",\"bit\":5,\"because\":\"no\"}",
        "\"sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"",
};

static const char *const names[] = {
        "error", "parameters", "continues", "digest", "generation", "notGranted", "scope", "path", "expiresInSeconds",
        "message", "hint", "blockers", "feature", "word", "bit", "wantedBy", "because", "cause", "new",
};

static uint32_t draw(uint32_t *state) {
        *state = *state * 1664525 + 1013904223;
        return *state >> 8;
}

/* Where a value ends that begins at `at`: a string, brackets with what is in them, or up to the next of ",]}". */
static size_t end_of(const char *text, size_t size, size_t at) {
        unsigned depth = 0;
        bool in_string = false;

        for (; at < size; at++) {
                char c = text[at];

                if (in_string && c == '\\') {
                        at++;
                        continue;
                }
                if (c == '"')
                        in_string = !in_string;
                if (in_string)
                        continue;
                if (depth == 0 && (c == ',' || c == ']' || c == '}'))
                        return at;
                depth += c == '{' || c == '[';
                depth -= c == '}' || c == ']';
        }
        return size;
}

/* `from` to `to` become `length` bytes of text, if there is room. Returns the new size. */
static size_t replace(char *text, size_t size, size_t most, size_t from, size_t to, const char *with, size_t length) {
        if (size - (to - from) + length > most)
                return size;
        memmove(text + from + length, text + to, size - to);
        memcpy(text + from, with, length);
        return size - (to - from) + length;
}

/* The place behind a random one of the characters; `size` where there is none. */
static size_t behind(const char *text, size_t size, const char *characters, uint32_t *state) {
        size_t start = draw(state) % size;

        for (size_t i = 0; i < size; i++) {
                size_t at = (start + i) % size;
                if (text[at] && strchr(characters, text[at]))
                        return at + 1;
        }
        return size;
}

static size_t change_value(char *text, size_t size, size_t most, uint32_t *state) {
        size_t at = behind(text, size, ":[", state);
        const char *value = values[draw(state) % COUNT(values)];

        return at == size ? size : replace(text, size, most, at, end_of(text, size, at), value, strlen(value));
}

static size_t add_member(char *text, size_t size, size_t most, uint32_t *state) {
        char member[256];
        size_t at = behind(text, size, "{", state);
        int length = snprintf(member, sizeof(member), "\"%s\":%s%s", names[draw(state) % COUNT(names)],
                              values[draw(state) % COUNT(values)], at < size && text[at] == '}' ? "" : ",");

        return at == size ? size : replace(text, size, most, at, at, member, (size_t) length);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
        char *text = (char *) data + 1; /* behind the size of pieces */
        uint32_t state = seed;

        if (size < 4 || draw(&state) % 3 == 0) {
                size = LLVMFuzzerMutate(data, size, most);
        } else {
                do
                        size = 1 + (draw(&state) % 2 ? change_value : add_member)(text, size - 1, most - 1, &state);
                while (draw(&state) % 3 == 0);
        }
        if (draw(&state) % 8 && size > 0 && size < most && data[size - 1] != 0)
                data[size++] = 0;
        return size;
}
