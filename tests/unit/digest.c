/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* kvmneg_internal_sha256() of standard input with 32 bytes at argv[1] taken for zeros; and whether the CPU did it. */
#include <stdio.h>
#include <stdlib.h>

#include "sha256.h"

int main(int argc, char **argv) {
        static uint8_t data[1 << 16];
        size_t size = fread(data, 1, sizeof(data), stdin);
        uint8_t digest[SHA256_BYTES];

        if (argc != 2)
                return 2;
        kvmneg_internal_sha256(data, size, strtoul(argv[1], NULL, 10), digest);
        for (size_t i = 0; i < sizeof(digest); i++)
                printf("%02x", digest[i]);
        puts(kvmneg_internal_sha256_cpu && kvmneg_internal_sha256_cpu() ? " cpu" : " c");
        return 0;
}
