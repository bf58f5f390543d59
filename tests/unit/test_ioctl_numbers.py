# SPDX-License-Identifier: LGPL-2.1-or-later
"""ioctl numbers: ioctl-opt's, from the layouts in kvmneg.host.ioctls, against the C compiler's."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmneg.host import capabilities, ioctls

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HEADERS = ("linux/kvm.h", "linux/if_tun.h", "linux/vhost.h")
OF_ONE_ARCHITECTURE = {
    "x86_64": ("CPUID", "MSR", "MCE", "TSC", "REGS", "XCRS"),
    "aarch64": ("ARM", "ONE_REG", "REG_LIST"),
}


def known_here(name: str) -> bool:
    """Whether this architecture's headers can say the number: the structure must exist there."""
    others = (words for machine, words in OF_ONE_ARCHITECTURE.items() if machine != platform.machine())
    return not any(word in name for words in others for word in words)


def printed_by_c(folder: Path, *lines: str, flags: tuple[str, ...] = ()) -> dict[str, int]:
    """Compiles a program that prints `name number` for the lines, and runs it."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    includes = "".join(f"#include <{header}>\n" for header in (*HEADERS, "stdio.h"))
    includes += f'#include "{CSRC / "kvm-constants.h"}"\n#include "{CSRC / "kvmneg.h"}"\n'
    source = folder / "numbers.c"
    source.write_text(f"{includes}int main(void) {{\n{''.join(lines)}return 0;\n}}\n", "ascii")
    program = folder / "numbers"
    done = subprocess.run(["gcc", *flags, source, "-o", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(number, 0) for name, number in (line.split() for line in text.splitlines())}


def show(name: str) -> str:
    return f'printf("{name} %#lx\\n", (unsigned long) ({name}));\n'


def test_numbers(tmp_path: Path) -> None:
    ours = {name: number for name, number in (ioctls.kvm() | ioctls.network()).items() if known_here(name)}
    assert len(ours) > 10
    assert printed_by_c(tmp_path, *map(show, ours)) == ours


def test_every_ioctl_in_c_is_in_the_table() -> None:
    """No ioctl is made in csrc/ whose number is not checked here, and none is here that is not made."""
    text = "".join(path.read_text("ascii") for path in CSRC.rglob("*.c"))
    named = set(re.findall(r"\bNAME\((KVM_\w+)\)", text))
    made = set(re.findall(r"(?:ioctl|ioctl_pointer|get_cpuid|list_msrs)\([\w>-]+, (KVM_\w+)", text))
    assert made == named == set(ioctls.kvm())


def test_capability_numbers(tmp_path: Path) -> None:
    """The installed header's constants have the table's numbers, and all of them are in it."""
    header = Path("/usr/include/linux/kvm.h")
    if not header.exists():
        pytest.skip("linux/kvm.h is not installed")
    constants = re.findall(r"^\s*#define\s+(KVM_CAP_\w+)\s+\d+", header.read_text("utf-8"), re.MULTILINE)
    # kvm-constants.h is included as well: its numbers for what an older header lacks are checked with them.
    constants += re.findall(r"#define (KVM_CAP_\w+) \d+", (CSRC / "kvm-constants.h").read_text("ascii"))
    numbers = printed_by_c(tmp_path, *map(show, dict.fromkeys(constants)))
    by_name = {name: number for number, name in capabilities.NAMES.items()}
    assert len(numbers) > 200
    assert numbers == {
        constant: by_name.get(constant.removeprefix("KVM_CAP_").lower().replace("_", "-"))
        for constant in numbers
    }


def test_capability_names() -> None:
    """A name is a word's: lower case, digits, hyphens; no two alike; an unknown number has one too."""
    names = [capabilities.name(number) for number in range(256)]
    assert len(set(names)) == 256
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in names)
    assert capabilities.name(201) == "exit-hypercall"  # KVM_CAP_EXIT_HYPERCALL
    assert capabilities.name(255) == "cap-255"
