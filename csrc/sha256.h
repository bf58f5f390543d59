/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * SHA-256 (FIPS 180-4) of bytes in memory, for a contract's digest: it tells damage, it keeps no secret.
 *
 * Why it is here: the kernel's (AF_ALG) is a socket family that seccomp filters of VMMs refuse and small kernels
 * leave out; libnettle, libgcrypt and libcrypto are good, and each would be a library that every VMM, the wheel and
 * both architectures' builds load for one function of a standard that does not change. This needs libc.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define SHA256_BYTES 32

/* Takes one block of 64 bytes into the state (FIPS 180-4 section 6.2.2); the constants are those of section 4.2.2. */
typedef void sha256_compress(uint32_t state[static 8], const uint8_t *block, const uint32_t constants[static 64]);

/* One by this CPU's own instructions; NULL where it has none. Weak: what is built without it does it in C. */
__attribute__((weak)) sha256_compress *kvmneg_internal_sha256_cpu(void);

/* The digest of `size` bytes as if the SHA256_BYTES at `zeroed` were 0; `zeroed` = `size` for none. */
void kvmneg_internal_sha256(const uint8_t *data, size_t size, size_t zeroed, uint8_t ret_digest[static SHA256_BYTES]);
