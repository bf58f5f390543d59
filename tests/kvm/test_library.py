# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkvmneg.so for C users: what it exports is what its header declares, in C and in C++."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from kvmneg._libkvmneg import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ABI = Path(__file__).with_name("abi.txt")
# Without a layout: the library's own, and what only the other architecture fills in.
OPAQUE = {"x86_64": {"kvmneg_contract"}, "arm64": {"kvmneg_contract", "kvmneg_cpuid"}}
FOREIGN = {"x86_64": "arm64", "aarch64": "x86"}
OTHER = {"x86_64": "-D__aarch64__", "aarch64": "-D__x86_64__"}


def declared(*flags: str) -> set[str]:
    """The functions of kvmneg.h as the compiler reads it."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    text = subprocess.run(
        ["gcc", "-E", "-P", "-DKVMNEG_CDEF", *flags, CSRC / "kvmneg.h"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return set(re.findall(r"\b(kvmneg_\w+)\(", text))


def test_exports(compile_c: Callable[..., Path]) -> None:
    """Every declared function, with the version KVMNEG_0, and nothing internal."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    foreign = FOREIGN[platform.machine()]
    sources = [path for path in sorted(CSRC.rglob("*.[cS]")) if not path.name.startswith(foreign)]
    script = f"-Wl,--version-script={CSRC / 'libkvmneg.map'}"
    library = compile_c("libkvmneg.so", "-shared", "-fPIC", script, *sources)
    text = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in text.splitlines() if " T " in line}
    assert exported == {f"{function}@@KVMNEG_0" for function in declared()}


def test_version_script_names_both_architectures() -> None:
    """A function of the other architecture is in the script too: there is one for all."""
    this = f"-U__{platform.machine()}__"
    other = declared(this, OTHER[platform.machine()])
    script = (CSRC / "libkvmneg.map").read_text("ascii")
    named = set(re.findall(r"^\s+(kvmneg_\w+);$", script, re.MULTILINE))
    assert named == declared() | other
    assert other != declared()


def test_header_in_cpp(tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    source = tmp_path / "user.cc"
    source.write_text('#include "kvmneg.h"\nint main() { return kvmneg_close(-1) + 1; }\n', "ascii")
    subprocess.run(
        ["g++", "-Wall", "-Wextra", "-Werror", "-I", CSRC, "-fsyntax-only", source],
        check=True,
        capture_output=True,
    )


def test_layout_is_the_one_that_programs_were_built_with() -> None:
    """tests/kvm/abi.txt has every structure of the header with its size, and every constant with its value."""
    rows = [line.split() for line in ABI.read_text("ascii").splitlines() if not line.startswith("#")]
    here = {"x86_64": "x86_64", "aarch64": "arm64"}[platform.machine()]
    listed = {(kind, name): int(value) for kind, name, where, value in rows if where in ("both", here)}
    found = {
        ("struct", name): ffi.sizeof(f"struct {name}")
        for name in ffi.list_types()[1]
        if name not in OPAQUE[here]
    }
    found |= {("constant", name): getattr(lib, name) for name in dir(lib) if name.startswith("KVMNEG_")}
    assert found == listed
