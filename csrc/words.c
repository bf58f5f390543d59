/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* Addresses of words as text, as kvmneg/features/words.py writes them. By hand: snprintf(3) may allocate. */

#include <string.h>

#include "contract.h"

/* Writes behind what is there; the longest address, "hyperv:0xffffffff.4294967295.eax", leaves room. */
static char *put(char *at, const char *text) {
        size_t length = strlen(text);

        memcpy(at, text, length);
        return at + length;
}

static char *put_number(char *at, uint64_t number, unsigned base) {
        static const char digits[] = "0123456789abcdef";
        char text[24];
        size_t n = sizeof(text);

        text[--n] = 0;
        do {
                text[--n] = digits[number % base];
                number /= base;
        } while (number > 0);
        return put(base == 16 ? put(at, "0x") : at, text + n);
}

void kvmneg_internal_cpuid_word(word_text ret_word, uint32_t space, uint32_t function, uint32_t index, unsigned place) {
        static const char *const registers[] = { ".eax", ".ebx", ".ecx", ".edx" };
        char *at = put(ret_word, space == SPACE_HYPERV ? "hyperv:" : "cpuid:");

        at = put(put_number(at, function, 16), ".");
        *put(put_number(at, index, 10), registers[place]) = 0;
}

void kvmneg_internal_number_word(word_text ret_word, const char *kind, uint64_t number) {
        *put_number(put(ret_word, kind), number, 16) = 0;
}

void kvmneg_internal_name_word(word_text ret_word, const char name[static CAPABILITY_NAME]) {
        memcpy(ret_word, name, CAPABILITY_NAME);
        ret_word[CAPABILITY_NAME] = 0;
}

void kvmneg_internal_text_word(word_text ret_word, const char *word) {
        *put(ret_word, word) = 0;
}
