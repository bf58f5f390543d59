# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which call of KVM's a process waits in, as far as /proc shows it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvmneg.host import wedged

_IOCTL = {"x86_64": 16, "aarch64": 29}[os.uname().machine]


@pytest.mark.parametrize(
    ("line", "call"),
    [
        (f"{_IOCTL} 0x5 0xae01 0x0 0x0 0x0 0x0 0x7ffd 0x7f01\n", "KVM_CREATE_VM"),
        (f"{_IOCTL} 0x5 0xc008ae05 0x7f00 0x0 0x0 0x0 0x7ffd 0x7f01\n", "KVM_GET_SUPPORTED_CPUID"),
        (f"{_IOCTL} 0x5 0x4010aeab 0x7f00 0x0 0x0 0x0 0x7ffd 0x7f01\n", "KVM_GET_ONE_REG"),
        (f"{_IOCTL} 0x5 0xaeff 0x7f00 0x0 0x0 0x0 0x7ffd 0x7f01\n", "ioctl 0xaeff"),
        (f"{_IOCTL} 0x5 0x5401 0x7f00 0x0 0x0 0x0 0x7ffd 0x7f01\n", ""),  # a terminal's
        ("0 0x5 0xae01 0x0 0x0 0x0 0x0 0x7ffd 0x7f01\n", ""),
        ("running\n", ""),
        ("-1 0x7ffd 0x7f01\n", ""),
        ("", ""),
    ],
)
def test_a_line_of_proc(line: str, call: str) -> None:
    assert wedged.named(line) == call


# What the header defines for each architecture; the structures of the others are not in it.
_ONLY = {"x86_64": ("CPUID", "MSR", "IRQCHIP"), "aarch64": ("ARM",)}
_OTHERS = {word for machine, words in _ONLY.items() if machine != os.uname().machine for word in words}
_HERE = [number for number, name in wedged._NAMES.items() if not any(word in name for word in _OTHERS)]


@pytest.mark.parametrize("number", _HERE)
def test_the_names_are_the_kernels(number: int) -> None:
    """A compiler finds each in the kernel's header, with its number."""
    claim = f"({wedged._NAMES[number]} & 0xffff) == 0xae{number:02x}"
    done = subprocess.run(
        [os.environ.get("CC", "cc"), "-x", "c", "-fsyntax-only", "-"],
        input=f'#include <linux/kvm.h>\n_Static_assert({claim}, "");\n', capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_process_that_waits_elsewhere_or_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert wedged.waits_in(child.pid) == ""
        assert child.stdin
        child.stdin.close()
    assert wedged.waits_in(child.pid) == ""
    assert "does not answer" in str(wedged.fault(10, child.pid))
