# SPDX-License-Identifier: LGPL-2.1-or-later
"""The arm64 build, cross-compiled and run by qemu-user: opening, a KVM of our own, faults, numbers.

There is no KVM in qemu-user; what a real arm64 KVM answers is shown elsewhere, on emulated hosts.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kvmneg.errors import BadInput
from kvmneg.host import ioctls
from kvmneg.policy.contract import Contract

ROOT = Path(__file__).resolve().parents[2]
COMPILER = "aarch64-linux-gnu-gcc"
SYSROOT = "/usr/aarch64-linux-gnu"
SOURCES = [path for path in sorted((ROOT / "csrc").rglob("*.[cS]")) if not path.name.startswith("x86")]
ARM64 = ("KVM_ARM_PREFERRED_TARGET", "KVM_ARM_VCPU_INIT", "KVM_SET_ONE_REG", "KVM_ARM_GET_REG_WRITABLE_MASKS")
FLAGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-I", ROOT / "csrc")
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=all", "-g")
ADDRESS = ("-fsanitize=address",)
# Leaks are looked for by ptrace(2), which qemu-user does not have: programs here count themselves what they allocate.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
TIMERS = tuple(f"timer_{verb}" for verb in ("create", "settime", "gettime", "delete"))
WRAP = ("-DWITH_TIMERS", *(f"-Wl,--wrap={name}" for name in ("ioctl", "calloc", "free", *TIMERS)))


@cache
def sanitizers(emulator: str) -> tuple[str, ...]:
    """Both; that of addresses only where it gets its room: under QEMU 10.0 it does not, and ends any program."""
    with TemporaryDirectory() as folder:
        source, program = Path(folder) / "none.c", Path(folder) / "none"
        source.write_text("int main(void) { return 0; }\n", "ascii")
        subprocess.run([COMPILER, *ADDRESS, source, "-o", program], check=True)
        ran = subprocess.run(
            [emulator, "-L", SYSROOT, program], capture_output=True, check=False, cwd=folder, env=ENVIRONMENT
        )
    return UNDEFINED if ran.returncode else (*ADDRESS, *UNDEFINED)


def build(program: Path, *arguments: str | Path) -> list[str]:
    """Cross-compiles, with the sanitizers; returns the command that runs the program."""
    if not shutil.which(COMPILER):
        pytest.skip(f"{COMPILER} is not installed")
    emulator = shutil.which("qemu-aarch64")
    if not emulator:
        pytest.skip("qemu-aarch64 is not installed")
    command = [COMPILER, *FLAGS, *sanitizers(emulator), *arguments, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [emulator, "-L", SYSROOT, str(program)]


def output(command: list[str]) -> list[list[str]]:
    """What it printed: lines of words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """tests/kvm/faults.c for arm64."""
    folder = tmp_path_factory.mktemp("arm64")
    return build(folder / "faults", ROOT / "tests/kvm/faults.c", *SOURCES, *WRAP)


def test_open_without_kvm(faults: list[str]) -> None:
    """A missing device, a directory, a plain file: each by its errno; cleanup takes NULL and -1."""
    assert output([*faults, "null"]) == [
        ["-1", "1", "1", "1"],
        [str(-errno.ENOENT), str(-errno.EISDIR)],
        [str(-errno.ENOTTY)],
        ["-1"],
    ]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOMEM])
def test_nth_ioctl_fails(faults: list[str], error: int) -> None:
    """As on x86: the error comes back, ret_ parameters are untouched, nothing leaks."""
    rows = output([*faults, "sweep", str(error)])
    assert {row[0] for row in rows} == {
        "open",
        "create_vm",
        "scratch",
        "capabilities",
        "probe",
        "list",
        "one",
        "apply",
        "dropped",
        "machine",
        "ask",
        "no_question",
    }
    for _scenario, kind, _nth, result, touched, descriptors, allocations, _ioctls, failed in rows:
        expected = {"none": 0, "error": -error, "allocation": -errno.ENOMEM}[kind]
        assert int(result) == expected
        assert touched == ("1" if expected == 0 else "0")
        assert (descriptors, allocations) == ("0", "0")
        assert failed.startswith("KVM_") or kind != "error"


def test_nonsense_is_not_believed(faults: list[str]) -> None:
    results = {(row[1], row[0]): int(row[3]) for row in output([*faults, "stubborn"])}
    assert results["lie", "open"] == -errno.EPROTONOSUPPORT
    assert results["lie", "list"] == -errno.E2BIG
    assert results["always", "list"] == -errno.E2BIG
    assert results["always", "create_vm"] == -errno.EINTR


def is_contract(data: bytes) -> bool:
    try:
        Contract.from_binary(data)
    except BadInput:
        return False
    return True


def test_contracts_are_read_as_on_x86(tmp_path: Path) -> None:
    """Of either architecture, damaged or not: what the fuzzer of the reader kept."""
    wrap = tuple(f"-Wl,--wrap={name}" for name in ("calloc", "realloc", "read"))
    program = build(tmp_path / "reader", ROOT / "tests/unit/reader.c", *SOURCES, *wrap)
    files = sorted((ROOT / "tests/fuzz/corpus/contract").iterdir())
    found = output([*program, "look", *map(str, files)])
    assert found == [[str(int(is_contract(file.read_bytes())))] for file in files]


def test_numbers(tmp_path: Path) -> None:
    """ioctl numbers and the layout of kvmneg.h's structures, as the arm64 compiler has them."""
    of_x86 = ("CPUID", "MSR", "REGS", "XCRS")
    names = [name for name in ioctls.kvm() if not any(word in name for word in of_x86)]
    assert set(ARM64) < set(names)
    lines = "".join(f'printf("{name} %lu\\n", (unsigned long) {name});\n' for name in names)
    source = tmp_path / "numbers.c"
    source.write_text(
        '#include <stdio.h>\n#include "kvm-constants.h"\n#include "kvmneg.h"\n'
        f"int main(void) {{\n{lines}"
        'printf("name %s\\n", kvmneg_ioctl_name(KVM_GET_REG_LIST));\n'
        'printf("init %zu\\n", sizeof(struct kvmneg_vcpu_init));\nreturn 0;\n}\n',
        "ascii",
    )
    printed = dict(output(build(tmp_path / "numbers", source, *SOURCES)))
    assert printed.pop("name") == "KVM_GET_REG_LIST"
    assert printed.pop("init") == "32"  # struct kvm_vcpu_init: target and seven words of features
    assert {name: int(number) for name, number in printed.items()} == {
        name: ioctls.kvm()[name] for name in names
    }
