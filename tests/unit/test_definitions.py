# SPDX-License-Identifier: LGPL-2.1-or-later
"""Levels, platforms, what a guest boots with, and the compiler that makes the catalogue from its tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from strategies import ARCHITECTURE, NAMES

import kvmneg.features.catalog
from kvmneg.errors import UsageError
from kvmneg.features import rules
from kvmneg.policy import definitions

COMPILER = Path(__file__).parents[2] / "kvmneg" / "features" / "catalog" / "compile.py"

# x86-64 psABI 1.0, table 3.1 "Micro-Architecture Levels", by CPUID (leaf, register, bit) of the SDM. OSFXSR,
# OSXSAVE and SCE are the guest's own doing; SCE is syscall.
PSABI = {
    "x86-64-v1": {(1, "edx", bit) for bit in (0, 8, 15, 23, 24, 25, 26)} | {(0x80000001, "edx", 11)},
    "x86-64-v2": {(1, "ecx", bit) for bit in (0, 9, 13, 19, 20, 23)} | {(0x80000001, "ecx", 0)},
    "x86-64-v3": {(1, "ecx", bit) for bit in (12, 22, 26, 28, 29)}
    | {(7, "ebx", bit) for bit in (3, 5, 8)}
    | {(0x80000001, "ecx", 5)}
    | {(0xD, "eax", bit) for bit in (0, 1, 2)},
    "x86-64-v4": {(7, "ebx", bit) for bit in (16, 17, 28, 30, 31)} | {(0xD, "eax", bit) for bit in (5, 6, 7)},
}


def places(names: tuple[str, ...]) -> set[tuple[int, str, int]]:
    found = set()
    for name in names:
        feature = NAMES.feature(name)
        leaf, subleaf, register = feature.word.removeprefix("cpuid:").split(".")
        assert subleaf == "0" and feature.width == 1
        found.add((int(leaf, 16), register, feature.shift))
    return found


@pytest.mark.parametrize("name", PSABI)
def test_levels_are_the_psabis(name: str) -> None:
    wanted: set[tuple[int, str, int]] = set()
    for level in sorted(PSABI):
        wanted |= PSABI[level]
        if level == name:
            break
    assert places(definitions.level(name, ARCHITECTURE)) == wanted


def test_there_are_four_levels_and_two_platforms() -> None:
    assert definitions.levels(ARCHITECTURE) == tuple(sorted(PSABI))
    assert set(definitions.available("levels")) == {*PSABI, *definitions.levels("arm64")}
    assert set(definitions.available("platforms")) >= {"linux-5.10", "linux-5.15"}
    assert definitions.available("boot") == ("arm64", ARCHITECTURE)


def test_the_boot_set_is_of_the_catalogue() -> None:
    boot = definitions.Boot(ARCHITECTURE)
    for name in (*boot.require, *boot.optional):
        feature = NAMES.by_name[name]
        assert feature.width == 1 and (feature.rule in (rules.AND, rules.POLICY))
    for name in (*boot.carry, *boot.essential):
        assert NAMES.by_name[name].rule not in rules.BITWISE | rules.UNMERGED
    assert set(boot.essential) <= set(boot.carry)
    assert {"lm", "nx", "pae", "apic"} <= set(boot.require)
    assert not set(boot.require) & set(boot.optional)


def test_what_a_guest_boots_with_and_each_level_stand_by_themselves() -> None:
    """Else a request for a level would be refused for a base that it does not name."""
    boot = definitions.Boot(ARCHITECTURE)
    for level in definitions.levels(ARCHITECTURE):
        names = {*boot.require, *boot.optional, *definitions.level(level, ARCHITECTURE)}
        for name in names:
            for base, _least in NAMES.by_name[name].bases:
                assert base in names or not NAMES.by_name[base].is_bit, (level, name, base)


def test_other_names_and_architectures_are_refused() -> None:
    with pytest.raises(UsageError, match="no level is called 'x86-64-v5'") as caught:
        definitions.level("x86-64-v5", ARCHITECTURE)
    assert "x86-64-v4" in caught.value.hint
    for name in ("", "../levels/x86-64-v1", "x86-64-v1.toml", "\0"):
        with pytest.raises(UsageError, match="no level"):
            definitions.level(name, ARCHITECTURE)
    with pytest.raises(UsageError, match="is of x86_64"):
        definitions.level("x86-64-v1", "arm64")
    with pytest.raises(UsageError, match="no platform"):
        definitions.platform("linux-2.4", ARCHITECTURE)
    with pytest.raises(UsageError, match="not defined for x86_64"):
        definitions.platform("linux-6.1", ARCHITECTURE)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        # arch/x86/include/uapi/asm/kvm_para.h of that release, without the deprecated bit 2
        ("linux-5.10", {0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 24}),
        ("linux-5.15", {0, 1, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 24}),
    ],
)
def test_platforms(name: str, bits: set[int]) -> None:
    bounds, features = definitions.platform(name, ARCHITECTURE)
    assert bounds == ("cpuid:0x40000001.0.eax",)
    assert places(features) == {(0x40000001, "eax", bit) for bit in bits}


# -- names -------------------------------------------------------------------------------------------


def test_names_and_aliases() -> None:
    assert NAMES.feature("avx2").word == "cpuid:0x7.0.ebx"
    assert NAMES.feature("sse4_1").name == "sse4.1"  # Linux' name
    assert NAMES.feature("kvmclock").shift == 3  # QEMU uses the name for bit 0 too
    with pytest.raises(UsageError, match="no feature is called") as caught:
        NAMES.feature("avx-2")
    assert "avx2" in caught.value.hint
    with pytest.raises(UsageError) as caught:
        NAMES.feature("\ud800" * 100_000)
    assert "lists them" in caught.value.hint and len(caught.value.message) < 1000
    with pytest.raises(UsageError, match="several features") as caught:
        NAMES.feature("hv-time")
    assert "hv-reference-tsc" in caught.value.hint


def test_architectures_without_a_catalogue() -> None:
    for name in ("arm64_names", "x86_64_names", "", "../x"):
        with pytest.raises(UsageError, match="no catalogue"):
            kvmneg.features.catalog.load(name)
        with pytest.raises(UsageError, match="no catalogue"):
            kvmneg.features.catalog.names(name)


# -- the compiler ------------------------------------------------------------------------------------

GOOD = """
["cpuid:0x1.0.edx"]
rule = "and"
fpu = { bit = 0 }
fxsr = { bit = 24, requires = ["fpu"] }
["cpuid:0x7.0.edx"]
md-clear = { bit = 10, rule = "or" }
["cpuid:0x7.0.eax"]
level-func7 = { bits = "31:0", rule = "minimum" }
["cpuid:0x0.0.ebx"]
vendor = { bits = "31:0", rule = "equal" }
["cpuid:0x80000008.0.eax"]
phys-bits = { bits = "7:0", rule = "minimum" }
guest-phys-bits = { bits = "23:16", rule = "minimum-nonzero", unset = "phys-bits" }
["cpuid:0x14.0.ebx"]
trace = { bits = "31:0", rule = "equal-or-drop", requires = ["fpu"] }
["cpuid:0x14.0.eax"]
subleaf = { bits = "31:0", rule = "equal-or-drop", requires = ["fpu"], with = "trace" }
["cpuid:0x2"]
rule = "topology"
why = "caches"
"""


def compile_table(tmp_path: Path, table: str) -> subprocess.CompletedProcess[str]:
    source = tmp_path / "table.toml"
    source.write_text(table, "utf-8")
    command = [
        sys.executable,
        str(COMPILER),
        "--architecture",
        "x86_64",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    return subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)


def test_a_good_table_compiles(tmp_path: Path) -> None:
    done = compile_table(tmp_path, GOOD)
    assert (done.returncode, done.stderr) == (0, "")
    merging: dict[str, object] = {}
    exec((tmp_path / "out" / "_x86_64.py").read_text("utf-8"), merging)  # what the build writes is Python
    assert merging["LEAVES"] == {"cpuid:0x2": "topology"}
    # fxsr (bit 24) needs fpu (bit 0) of the same word, whose bottom is 0
    need = (1 << 24, 0, "cpuid:0x1.0.edx", 0, 1, 1)
    assert merging["REQUIREMENTS"]["cpuid:0x1.0.edx"][0] == need  # type: ignore[index]
    assert merging["DEPENDENTS"]["cpuid:0x1.0.edx"] == (1 << 24, 0)  # type: ignore[index]
    built = {"cpuid:0x1.0.edx": ("cpuid:0x1.0.edx", "cpuid:0x14.0.ebx", "cpuid:0x14.0.eax")}
    assert merging["BUILT_ON"] == built
    assert merging["GROUPS"] == (("cpuid:0x14.0.ebx", ("cpuid:0x14.0.eax",)),)
    assert merging["WORDS"][0] == ("cpuid:0x1.0.edx", 1 | 1 << 24, 0, 0, (), 1 | 1 << 24, 0)  # type: ignore[index]


BAD = [
    ('["cpuid:0x1.0.edx"]\nfpu = { bit = 0 }', "no rule: there is no default"),
    ('["cpuid:0x1.0.edx"]\nfpu = { bit = 0, rule = "xor" }', "no such rule 'xor'"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nfpu = {}', "either bit or bits"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nfpu = { bit = 0, bits = "1:0" }', "either bit or bits"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nfpu = { bit = 32 }', "do not lie in a 32-bit word"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nfpu = { bit = "0" }', "do not lie"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nfpu = { bit = true }', "do not lie"),
    ('["cpuid:0x1.0.edx"]\nrule = "minimum"\nn = { bits = "0:7" }', "do not lie"),
    ('["cpuid:0x1.0.edx"]\nrule = "minimum"\nn = { bits = "7-0" }', "bits are like"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nfpu = 0', "a lower-case name with a table"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nFPU = { bit = 0 }', "a lower-case name with a table"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nfpu = { bit = 0, rull = "or" }', "unknown keys ['rull']"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nx1 = { bit = 7 }\nx2 = { bit = 7 }', "another feature's too"),
    ('["cpuid:0x1.0.edx"]\nrule = "and"\nfpu = { bit = 0 }\nfpu = { bit = 1 }', "table.toml:"),
    ('["cpuid:0x7.0.ebx"]\nrule = "and"\nfpu = { bit = 1 }', "fpu is used for two features"),
    (
        '["cpuid:0x7.0.ebx"]\nrule = "and"\navx = { bit = 1, requires = ["sse9"] }',
        "requires 'sse9', which is no feature",
    ),
    ('["cpuid:0x7.0.ebx"]\nrule = "and"\navx = { bit = 1, requires = ["fpu>=x"] }', "which is no feature"),
    (
        '["cpuid:0x7.0.ebx"]\nrule = "and"\navx = { bit = 1, requires = ["!fpu"] }',
        "write ! before an or-feature",
    ),
    (
        '["cpuid:0x7.0.ebx"]\nrule = "and"\navx = { bit = 1, requires = ["md-clear"] }',
        "write ! before an or-feature",
    ),
    ('["cpuid:0x7.0.ebx"]\nrule = "and"\navx = { bit = 1, requires = ["vendor"] }', "cannot be built on"),
    (
        '["cpuid:0x7.0.ebx"]\nrule = "and"\navx = { bit = 1, requires = ["guest-phys-bits"] }',
        "cannot be built on",
    ),
    ('["cpuid:0x7.0.ebx"]\nrule = "and"\navx = { bit = 1, requires = ["fpu>=1"] }', "cannot be built on"),
    ('["cpuid:0x0.0.ecx"]\nv = { bits = "7:0", rule = "equal" }', "a whole word"),
    ('["cpuid:0x0.0.ecx"]\nv = { bits = "31:0", rule = "equal", requires = ["fpu"] }', "built on nothing"),
    ('["msr:0x48d"]\nc = { bits = "31:0", rule = "vmx-controls" }', "64 bits"),
    (
        '["msr:0x48d"]\nc = { bits = "63:0", rule = "vmx-controls", default1 = 0x100000000 }',
        "only of VMX controls",
    ),
    ('["msr:0x10a"]\nc = { bit = 0, rule = "and", default1 = 1 }', "only of VMX controls"),
    ('["msr:0x10a"]\nc = { bit = 0, rule = "and" }\n["msr:0x10a".controls]\na = { bit = 1 }', "has controls"),
    *(
        ('["msr:0x48d"]\nc = { bits = "63:0", rule = "vmx-controls" }\n["msr:0x48d".controls]\n' + row, what)
        for row, what in (
            ("a = { bit = 32 }", "do not lie"),
            ("a = { title = 'no bit' }", "do not lie"),
            ("a = 1", "a lower-case name"),
            ("A = { bit = 1 }", "a lower-case name"),
            ("a = { bit = 1, rule = 'and' }", "unknown keys ['rule']"),
            ("a = { bit = 1 }\nb = { bit = 1 }", "another control's too"),
            ("fpu = { bit = 1 }", "fpu is used for two features"),
            ("a = { bit = 1, requires = ['sse9'] }", "which is no feature"),
        )
    ),
    (
        '["msr:0x48d"]\nc = { bits = "63:0", rule = "vmx-controls" }\n["msr:0x48d".controls]\na = { bit = 1 }\n'
        '["msr:0x10a"]\nx = { bit = 0, rule = "and", requires = ["a>=1"] }',
        "cannot be built on",
    ),
    ('["cpuid:0x9.0.ecx"]\nv = { bits = "7:0", rule = "version-range" }', "16 bits"),
    ('["tsc:khz"]\nt = { bits = "31:0", rule = "interval" }', "an interval is 64 bits"),
    ('["cpuid:0x9.0.ecx"]\nm = { bit = 1, rule = "and", msr = 0x10 }', "one bit of a state: word"),
    (
        '["state:a"]\nm = { bit = 1, rule = "and", msr = 0x10 }\nn = { bit = 2, rule = "and", msr = 0x10 }',
        "another class's",
    ),
    ('["cpuid:0x9.0.ecx"]\n"a.b" = { bits = "7:0", rule = "minimum" }', "has no dot"),
    ('["cpuid:0x9.0.ecx"]\na = { bit = 0, rule = "policy" }', "has a value"),
    ('["cpuid:0x9.0.ecx"]\na = { bit = 0, rule = "and", value = 1 }', "has a value"),
    ('["cpuid:0x9.0.ecx"]\na = { bit = 0, rule = "policy", value = 2 }', "does not fit its bits"),
    ('["cpuid:0x9.0.ecx"]\na = { bit = 0, rule = "or", withheld = "no" }', "can be withheld"),
    ('["cpuid:0x9.0.ecx"]\na = { bits = "7:0", rule = "minimum-nonzero" }', "says what holds then"),
    (
        '["cpuid:0x9.0.ecx"]\na = { bits = "7:0", rule = "minimum", unset = "phys-bits" }',
        "says what holds then",
    ),
    (
        '["cpuid:0x9.0.ecx"]\na = { bits = "7:0", rule = "minimum-nonzero", unset = "phys-bits" }',
        "of the same word and width",
    ),
    (
        '["cpuid:0x9.0.ecx"]\na = { bits = "7:0", rule = "minimum-nonzero", unset = "nothing" }',
        "of the same word and width",
    ),
    (
        '["cpuid:0x9.0.ecx"]\na = { bits = "7:0", rule = "equal-or-drop", with = "trace" }',
        "only a whole word",
    ),
    ('["cpuid:0x9.0.ecx"]\na = { bits = "31:0", rule = "minimum", with = "trace" }', "only a whole word"),
    ('["cpuid:0x9.0.ecx"]\na = { bits = "31:0", rule = "equal-or-drop", with = "fpu" }', "by itself"),
    ('["cpuid:0x9.0.ecx"]\na = { bits = "31:0", rule = "equal-or-drop", with = "nothing" }', "by itself"),
    ('["cpuid:0x9.0.ecx"]\na = { bits = "31:0", rule = "equal-or-drop", with = "trace" }', "go together"),
    ('["cpuid:0x9"]\nrule = "and"', "a whole leaf must be one of"),
    ('["cpuid:0x9"]', "a whole leaf must be one of"),
    ('["cpuid:0x2"]\nrule = "topology"', "described twice"),
    ('["cpuid:0x9"]\nrule = "and"\na = { bit = 0 }', "is no word's address"),
    ('["cpuid:9.0.eax"]\nrule = "and"\na = { bit = 0 }', "is no leaf and no word"),
    ('["sgx:0x9"]\nrule = "and"\na = { bit = 0 }', "is no leaf and no word"),
    ("title = 1", "is no leaf and no word"),
    ("[", "table.toml:"),
]


@pytest.mark.parametrize(("table", "message"), BAD)
def test_a_bad_table_stops_the_build(tmp_path: Path, table: str, message: str) -> None:
    """The second table of a build whose first is good: what nobody classified has no default."""
    (tmp_path / "good.toml").write_text(GOOD, "utf-8")
    bad = tmp_path / "table.toml"
    bad.write_text(table, "utf-8")
    command = [
        sys.executable,
        str(COMPILER),
        "--architecture",
        "x86_64",
        "--output-dir",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "good.toml"), str(bad)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("catalogue: ") and message in done.stderr
    assert not (tmp_path / "out").exists()
