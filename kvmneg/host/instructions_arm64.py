# SPDX-License-Identifier: LGPL-2.1-or-later
"""Features that an instruction can show: with the ID field lowered, does the CPU still execute it?

Machine code of A64 (Arm ARM DDI 0487, C6.2, C7.2, C8). Each runs as the body of a function with the MMU off and x0 to
x3 zero; it may change all registers but X19, X20 and X30. What accesses memory atomically does it at an address that is
not aligned: an exception that only an instruction which exists can raise. Left out is what a CPU without the feature
takes for a hint (BTI, DGH, ESB, PACIASP).
"""

from __future__ import annotations

_RET = 0xD65F03C0

# feature, the least value that has it, what Linux calls it, instructions (the last one is the feature's), machine code
INSTRUCTIONS = (
    ("aa64isar0-aes", 1, "aes", "aese v0.16b, v0.16b", "4e284800"),
    ("aa64isar0-sha1", 1, "sha1", "sha1h s0, s0", "5e280800"),
    ("aa64isar0-sha2", 1, "sha2", "sha256su0 v0.4s, v0.4s", "5e282800"),
    ("aa64isar0-crc32", 1, "crc32", "crc32w w0, w0, w0", "1ac04800"),
    (
        "aa64isar0-atomic",
        2,
        "atomics",
        "adr x1, .; add x1, x1, #1; ldadd w0, w0, [x1]",
        "10000001 91000421 b8200020",
    ),
    ("aa64isar0-rdm", 1, "asimdrdm", "sqrdmlah v0.4s, v0.4s, v0.4s", "6e808400"),
    ("aa64isar0-sha3", 1, "sha3", "eor3 v0.16b, v0.16b, v0.16b, v0.16b", "ce000000"),
    ("aa64isar0-sm3", 1, "sm3", "sm3partw1 v0.4s, v0.4s, v0.4s", "ce60c000"),
    ("aa64isar0-sm4", 1, "sm4", "sm4e v0.4s, v0.4s", "cec08400"),
    ("aa64isar0-dp", 1, "asimddp", "sdot v0.4s, v0.16b, v0.16b", "4e809400"),
    ("aa64isar0-fhm", 1, "asimdfhm", "fmlal v0.4s, v0.4h, v0.4h", "4e20ec00"),
    ("aa64isar0-ts", 1, "flagm", "cfinv", "d500401f"),
    ("aa64isar0-tlb", 1, "", "tlbi vmalle1os", "d508811f"),
    ("aa64isar0-rndr", 1, "rng", "mrs x0, s3_3_c2_c4_0", "d53b2400"),
    ("aa64isar1-dpb", 1, "dcpop", "adr x1, .; dc cvap, x1", "10000001 d50b7c21"),
    ("aa64isar1-apa", 1, "paca", "pacia x0, x1", "dac10020"),
    ("aa64isar1-api", 1, "paca", "pacia x0, x1", "dac10020"),
    ("aa64isar1-jscvt", 1, "jscvt", "fjcvtzs w0, d0", "1e7e0000"),
    ("aa64isar1-fcma", 1, "fcma", "fcadd v0.4s, v0.4s, v0.4s, #90", "6e80e400"),
    ("aa64isar1-lrcpc", 1, "lrcpc", "adr x1, .; ldapr w0, [x1]", "10000001 b8bfc020"),
    ("aa64isar1-gpa", 1, "pacg", "pacga x0, x0, x0", "9ac03000"),
    ("aa64isar1-gpi", 1, "pacg", "pacga x0, x0, x0", "9ac03000"),
    ("aa64isar1-frintts", 1, "frint", "frint32z d0, d0", "1e684000"),
    ("aa64isar1-sb", 1, "sb", "sb", "d50330ff"),
    ("aa64isar1-specres", 1, "", "cfp rctx, x0", "d50b7380"),
    ("aa64isar1-bf16", 1, "bf16", "bfdot v0.4s, v0.8h, v0.8h", "6e40fc00"),
    ("aa64isar1-i8mm", 1, "i8mm", "smmla v0.4s, v0.16b, v0.16b", "4e80a400"),
    ("aa64isar2-wfxt", 2, "wfxt", "wfet x0", "d5031000"),
    ("aa64isar2-gpa3", 1, "pacg", "pacga x0, x0, x0", "9ac03000"),
    ("aa64isar2-apa3", 1, "paca", "pacia x0, x1", "dac10020"),
    ("aa64isar2-mops", 1, "mops", "adr x0, .; setp [x0]!, x2!, x3", "10000000 19c30440"),
    ("aa64isar2-bc", 1, "hbc", "bc.eq .+4", "54000030"),
    ("aa64pfr0-sve", 1, "sve", "rdvl x0, #1", "04bf5020"),
    ("aa64pfr0-dit", 1, "dit", "mrs x0, s3_3_c4_c2_5", "d53b42a0"),
    ("aa64pfr1-ssbs", 2, "ssbs", "mrs x0, s3_3_c4_c2_6", "d53b42c0"),
    ("aa64pfr1-mte", 1, "mte", "irg x0, x0", "9adf1000"),
    ("aa64pfr1-sme", 1, "sme", "rdsvl x0, #1", "04bf5820"),
    ("aa64mmfr1-lo", 1, "", "mrs x0, s3_0_c10_c4_7", "d538a4e0"),
    ("aa64mmfr1-pan", 1, "", "mrs x0, s3_0_c4_c2_3", "d5384260"),
    ("aa64mmfr2-uao", 1, "", "mrs x0, s3_0_c4_c2_4", "d5384280"),
    ("aa64mmfr3-tcrx", 1, "", "mrs x0, s3_0_c2_c0_3", "d5382060"),
    ("aa64mmfr3-s1pie", 1, "", "mrs x0, s3_0_c10_c2_3", "d538a260"),
    ("aa64dfr0-pmuver", 1, "", "mrs x0, s3_3_c9_c12_0", "d53b9c00"),
    ("aa64zfr0-svever", 1, "sve2", "eor3 z0.d, z0.d, z0.d, z0.d", "04203800"),
    ("aa64zfr0-aes", 1, "sveaes", "aese z0.b, z0.b, z0.b", "4522e000"),
    ("aa64zfr0-bitperm", 1, "svebitperm", "bdep z0.b, z0.b, z0.b", "4500b400"),
    ("aa64zfr0-bf16", 1, "svebf16", "bfdot z0.s, z0.h, z0.h", "64608000"),
    ("aa64zfr0-sha3", 1, "svesha3", "rax1 z0.d, z0.d, z0.d", "4520f400"),
    ("aa64zfr0-sm4", 1, "svesm4", "sm4e z0.s, z0.s, z0.s", "4523e000"),
    ("aa64zfr0-i8mm", 1, "svei8mm", "smmla z0.s, z0.b, z0.b", "45009800"),
    ("aa64zfr0-f32mm", 1, "svef32mm", "fmmla z0.s, z0.s, z0.s", "64a0e400"),
    ("aa64zfr0-f64mm", 1, "svef64mm", "fmmla z0.d, z0.d, z0.d", "64e0e400"),
)
# Of instructions that only a kernel executes; a program is told that there are none.
KERNELS = (
    "aa64isar0-tlb", "aa64mmfr1-lo", "aa64mmfr1-pan", "aa64mmfr2-uao", "aa64mmfr3-tcrx", "aa64mmfr3-s1pie",
    "aa64dfr0-pmuver",
)  # fmt: skip
# What others need: without these SVE's own would be undefined in any case.
BASES = ("aa64pfr0-sve",)

CODE = {
    feature: (*(int(word, 16) for word in code.split()), _RET)
    for feature, _least, _linux, _text, code in INSTRUCTIONS
}
LEAST = {feature: least for feature, least, *_ in INSTRUCTIONS}
LINUX = {feature: flag for feature, _least, flag, *_ in INSTRUCTIONS}
