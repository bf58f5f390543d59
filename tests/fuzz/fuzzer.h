/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* What the fuzzers share: libFuzzer's interface (its header is clang's alone), and a check that is always there. */
#pragma once

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);

#define REQUIRE(condition)                                                                   \
        do {                                                                                 \
                if (!(condition)) {                                                          \
                        fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
                        abort();                                                             \
                }                                                                            \
        } while (0)
