# SPDX-License-Identifier: LGPL-2.1-or-later
"""Features that an instruction can show: with the CPUID bit cleared, does the CPU still execute it?

Machine code of 64-bit mode (Intel SDM volume 2, AMD APM volumes 3 to 5). Each runs as the body of a function on a stack
of which 1 KiB below RSP is free; it may change all registers but RDI, RBP and, at its end, RSP. Left out is what a CPU
without the feature takes for another instruction or for none (LZCNT is BSR there, PREFETCHW a NOP).
"""

from __future__ import annotations

_RET = bytes([0xC3])

# feature, instructions (the last one is the feature's), their machine code
INSTRUCTIONS = (
    ("pni", "haddps xmm0, xmm0", "f20f7cc0"),
    ("ssse3", "pabsb xmm0, xmm0", "660f381cc0"),
    ("sse4.1", "pminud xmm0, xmm0", "660f383bc0"),
    ("sse4.2", "crc32 eax, eax", "f20f38f1c0"),
    ("popcnt", "popcnt eax, eax", "f30fb8c0"),
    ("pclmulqdq", "pclmulqdq xmm0, xmm0, 0", "660f3a44c000"),
    ("aes", "aesenc xmm0, xmm0", "660f38dcc0"),
    ("movbe", "movbe eax, [rsp - 16]", "0f38f04424f0"),
    (
        "cx16",
        "mov rsi, rsp; and rsi, -64; sub rsi, 0x400; cmpxchg16b [rsi]",
        "4889e6 4883e6c0 4881ee00040000 480fc70e",
    ),
    ("lahf-lm", "lahf", "9f"),
    ("avx", "vaddps ymm0, ymm0, ymm0", "c5fc58c0"),
    ("f16c", "vcvtph2ps xmm0, xmm0", "c4e27913c0"),
    ("fma", "vfmadd132ps xmm0, xmm0, xmm0", "c4e27998c0"),
    ("avx2", "vpaddd ymm0, ymm0, ymm0", "c5fdfec0"),
    ("bmi1", "andn eax, eax, eax", "c4e278f2c0"),
    ("bmi2", "pdep eax, eax, eax", "c4e27bf5c0"),
    ("adx", "adcx eax, eax", "660f38f6c0"),
    ("sha-ni", "sha1msg1 xmm0, xmm0", "0f38c9c0"),
    ("gfni", "gf2p8mulb xmm0, xmm0", "660f38cfc0"),
    ("vaes", "vaesenc ymm0, ymm0, ymm0", "c4e27ddcc0"),
    ("vpclmulqdq", "vpclmulqdq ymm0, ymm0, ymm0, 0", "c4e37d44c000"),
    ("avx-vnni", "{vex} vpdpbusd xmm0, xmm0, xmm0", "c4e27950c0"),
    ("avx512f", "vpaddd zmm0, zmm0, zmm0", "62f17d48fec0"),
    ("avx512bw", "vpaddb zmm0, zmm0, zmm0", "62f17d48fcc0"),
    ("avx512dq", "vpmullq zmm0, zmm0, zmm0", "62f2fd4840c0"),
    ("avx512cd", "vpconflictd zmm0, zmm0", "62f27d48c4c0"),
    ("avx512ifma", "vpmadd52luq zmm0, zmm0, zmm0", "62f2fd48b4c0"),
    ("avx512vbmi", "vpermb zmm0, zmm0, zmm0", "62f27d488dc0"),
    ("avx512vbmi2", "vpcompressb zmm0, zmm0", "62f27d4863c0"),
    ("avx512-vpopcntdq", "vpopcntd zmm0, zmm0", "62f27d4855c0"),
    ("avx512-bf16", "vcvtneps2bf16 ymm0, zmm0", "62f27e4872c0"),
    ("avx512-fp16", "vaddph zmm0, zmm0, zmm0", "62f57c4858c0"),
    ("sse4a", "extrq xmm0, xmm0", "660f79c0"),
    ("xop", "vphaddbw xmm0, xmm0", "8fe978c1c0"),
    ("fma4", "vfmaddps xmm0, xmm0, xmm0, xmm0", "c4e3f968c000"),
    ("tbm", "blcfill eax, eax", "8fe97801c8"),
    ("rdrand", "rdrand eax", "0fc7f0"),
    ("rdseed", "rdseed eax", "0fc7f8"),
    ("rdtscp", "rdtscp", "0f01f9"),
    ("rdpid", "rdpid rax", "f30fc7f8"),
    (
        "invpcid",
        "push 0; push 0; mov eax, 2; invpcid rax, [rsp]; add rsp, 16",
        "6a00 6a00 b802000000 660f38820424 4883c410",
    ),
    ("waitpkg", "xor eax, eax; xor edx, edx; xor ecx, ecx; tpause ecx", "31c0 31d2 31c9 660faef1"),
    ("movdiri", "movdiri [rsp - 16], eax", "0f38f94424f0"),
    ("serialize", "serialize", "0f01e8"),
    ("clflushopt", "clflushopt [rsp]", "660fae3c24"),
    ("clwb", "clwb [rsp]", "660fae3424"),
    ("clzero", "lea rax, [rsp - 0x400]; clzero", "488d842400fcffff 0f01fc"),
    ("xsave", "xor ecx, ecx; xgetbv", "31c9 0f01d0"),
    (
        "xsaveopt",
        "xor eax, eax; xor edx, edx; mov rsi, rsp; and rsi, -64; sub rsi, 0x400; xsaveopt [rsi]",
        "31c0 31d2 4889e6 4883e6c0 4881ee00040000 0fae36",
    ),
    (
        "xsavec",
        "xor eax, eax; xor edx, edx; mov rsi, rsp; and rsi, -64; sub rsi, 0x400; xsavec [rsi]",
        "31c0 31d2 4889e6 4883e6c0 4881ee00040000 0fc726",
    ),
)
# What the others need: cleared together with them it would be their reason too.
BASES = ("xsave",)

CODE = {feature: bytes.fromhex(code) + _RET for feature, _text, code in INSTRUCTIONS}
