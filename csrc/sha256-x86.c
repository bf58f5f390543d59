/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * SHA-256 by the CPU's own instructions (Intel SDM vol. 2B, SHA256RNDS2, SHA256MSG1, SHA256MSG2): eight times as fast,
 * and the digest is most of what reading a contract takes. The C library knows whether the CPU has them; CPUID itself
 * would be an exit to the hypervisor each time.
 */

#include "sha256.h"

#if __has_include(<sys/platform/x86.h>)
#include <immintrin.h>
#include <sys/platform/x86.h>

#define CODE __attribute__((target("sha,sse4.1")))

/* The instructions take the eight variables as a, b, e, f and c, d, g, h, the first of each in the highest lane. */
CODE static void compress(uint32_t state[static 8], const uint8_t *block, const uint32_t constants[static 64]) {
        const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
        __m128i dcba = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *) state), 0x1b);
        __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i *) (state + 4)), 0x1b);
        const __m128i abef_before = _mm_unpackhi_epi64(hgfe, dcba), cdgh_before = _mm_unpacklo_epi64(hgfe, dcba);
        __m128i abef = abef_before, cdgh = cdgh_before, w[4];

        for (unsigned i = 0; i < 4; i++)
                w[i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *) block + i), swap);
#pragma GCC unroll 16
        for (unsigned i = 0; i < 16; i++) { /* four rounds, and the words of those that are four such steps ahead */
                __m128i sum = _mm_add_epi32(w[i % 4], _mm_loadu_si128((const __m128i *) constants + i));
                __m128i ahead = _mm_alignr_epi8(w[(i + 3) % 4], w[(i + 2) % 4], 4);

                cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
                abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
                ahead = _mm_add_epi32(ahead, _mm_sha256msg1_epu32(w[i % 4], w[(i + 1) % 4]));
                w[i % 4] = _mm_sha256msg2_epu32(ahead, w[(i + 3) % 4]);
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
        dcba = _mm_unpackhi_epi64(cdgh, abef);
        hgfe = _mm_unpacklo_epi64(cdgh, abef);
        _mm_storeu_si128((__m128i *) state, _mm_shuffle_epi32(dcba, 0x1b));
        _mm_storeu_si128((__m128i *) (state + 4), _mm_shuffle_epi32(hgfe, 0x1b));
}

sha256_compress *kvmneg_internal_sha256_cpu(void) {
        return CPU_FEATURE_ACTIVE(SHA) && CPU_FEATURE_ACTIVE(SSE4_1) && CPU_FEATURE_ACTIVE(SSSE3) ? compress : NULL;
}

#else
sha256_compress *kvmneg_internal_sha256_cpu(void) {
        return NULL;
}
#endif
