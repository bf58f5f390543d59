/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* SHA-256 as FIPS 180-4 section 6.2 has it. */

#include <string.h>

#include "sha256.h"

#define BLOCK 64

/* Section 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes. */
static const uint32_t constants[BLOCK] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
        0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
        0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
        0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
        0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
        0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
        0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static inline uint32_t rotate(uint32_t x, unsigned n) {
        return x >> n | x << (32 - n);
}

static uint32_t big_endian(const uint8_t *bytes) {
        return (uint32_t) bytes[0] << 24 | (uint32_t) bytes[1] << 16 | (uint32_t) bytes[2] << 8 | bytes[3];
}

static void put_big_endian(uint8_t *bytes, uint32_t value) {
        for (unsigned i = 0; i < 4; i++)
                bytes[i] = (uint8_t) (value >> (24 - 8 * i));
}

/* Round number n of eight: the variables a to h stay where they are, and their roles turn by one each time. */
#define V(i, n) v[((i) - (n)) & 7]
#define ROUND(n)                                                                                               \
        do {                                                                                                   \
                uint32_t e = V(4, n), a = V(0, n);                                                             \
                uint32_t sum = V(7, n) + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) +                      \
                               ((e & V(5, n)) ^ (~e & V(6, n))) + k[t + (n)] + w[t + (n)];                     \
                V(3, n) += sum;                                                                                \
                V(7, n) = sum + (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) +                               \
                          ((a & V(1, n)) ^ (a & V(2, n)) ^ (V(1, n) & V(2, n)));                               \
        } while (0)

/* Section 6.2.2. */
static void in_c(uint32_t state[static 8], const uint8_t *block, const uint32_t k[static BLOCK]) {
        uint32_t w[BLOCK], v[8];

        for (unsigned t = 0; t < 16; t++)
                w[t] = big_endian(block + 4 * t);
        for (unsigned t = 16; t < BLOCK; t++) {
                uint32_t s0 = rotate(w[t - 15], 7) ^ rotate(w[t - 15], 18) ^ w[t - 15] >> 3;
                uint32_t s1 = rotate(w[t - 2], 17) ^ rotate(w[t - 2], 19) ^ w[t - 2] >> 10;
                w[t] = w[t - 16] + s0 + w[t - 7] + s1;
        }
        memcpy(v, state, sizeof(v));
        for (unsigned t = 0; t < BLOCK; t += 8) {
                ROUND(0);
                ROUND(1);
                ROUND(2);
                ROUND(3);
                ROUND(4);
                ROUND(5);
                ROUND(6);
                ROUND(7);
        }
        for (unsigned i = 0; i < 8; i++)
                state[i] += v[i];
}

/* One block of the data, with zeros where the digest field is; what is behind the end is left as it is. */
static void take(uint8_t block[static BLOCK], const uint8_t *data, size_t size, size_t at, size_t zeroed) {
        size_t n = size - at < BLOCK ? size - at : BLOCK;

        memcpy(block, data + at, n);
        for (size_t i = 0; i < n; i++)
                if (at + i - zeroed < SHA256_BYTES) /* wraps where it is before */
                        block[i] = 0;
}

void kvmneg_internal_sha256(const uint8_t *data, size_t size, size_t zeroed, uint8_t ret_digest[static SHA256_BYTES]) {
        uint32_t state[8] = { 0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19 };
        size_t whole = size - size % BLOCK;
        sha256_compress *compress = kvmneg_internal_sha256_cpu ? kvmneg_internal_sha256_cpu() : NULL;
        uint8_t block[BLOCK];

        if (!compress)
                compress = in_c;
        for (size_t at = 0; at < whole; at += BLOCK)
                if (zeroed < at + BLOCK && at < zeroed + SHA256_BYTES) {
                        take(block, data, size, at, zeroed);
                        compress(state, block, constants);
                } else
                        compress(state, data + at, constants);

        /* Section 5.1.1: a one, zeros, and the length in bits at the end of a block. */
        memset(block, 0, sizeof(block));
        if (size > whole)
                take(block, data, size, whole, zeroed);
        block[size - whole] = 0x80;
        if (size - whole >= BLOCK - 8) {
                compress(state, block, constants);
                memset(block, 0, sizeof(block));
        }
        put_big_endian(block + BLOCK - 8, (uint32_t) ((uint64_t) size >> 29));
        put_big_endian(block + BLOCK - 4, (uint32_t) ((uint64_t) size << 3));
        compress(state, block, constants);
        for (unsigned i = 0; i < 8; i++)
                put_big_endian(ret_digest + 4 * i, state[i]);
}
