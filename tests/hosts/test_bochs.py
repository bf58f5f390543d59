# SPDX-License-Identifier: LGPL-2.1-or-later
"""What follows Bochs, with a program in its place that shows and says what Bochs does: no emulator is needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.hosts import bochs
from tests.hosts.errors import HostError

# Debian's build: a debugger on the terminal it is given, the guest's screen on another, which it writes to and waits.
BOCHS = r"""
import base64, fcntl, json, os, struct, sys, zlib
shown = os.open("/dev/ptmx", os.O_RDWR)  # its other end is never opened here
fcntl.ioctl(shown, 0x40045431, struct.pack("i", 0))  # TIOCSPTLCK: unlockpt(3)
number, = struct.unpack("I", fcntl.ioctl(shown, 0x80045430, bytes(4)))  # TIOCGPTN: ptsname(3)
print(f'\nBochs connected to screen "/dev/pts/{number}"\n', flush=True)

def say(kind, content):
    with open("port", "ab") as port:
        port.write(b"=kvmneg= %s %s\n" % (kind.encode(), base64.b64encode(zlib.compress(content))))

say("ready", b"")
written = 0
while written < int(sys.argv[1]):
    written += os.write(shown, b"\x1b[?12l\x1b[?25h")
print("x" * int(sys.argv[1]), flush=True)
say("end", json.dumps({"status": 7}).encode())
sys.stdin.read()
"""


class Stand:
    """In the place of Bochs' unpacked tree."""

    def __init__(self, shown: int) -> None:
        self._shown = shown

    def command(self, _program: str) -> list[str]:
        return [sys.executable, "-c", BOCHS, str(self._shown)]

    def path(self, name: str) -> Path:
        return Path("/nowhere", name)


@pytest.mark.parametrize("shown", [0, 1 << 17])
def test_it_never_waits_for_who_looks_at_its_screens(tmp_path: Path, shown: int) -> None:
    """A host that took minutes stood still for ever: the kernel keeps some tens of KiB of what is shown."""
    process = bochs._Process(Stand(shown), tmp_path)  # type: ignore[arg-type]
    try:
        assert process.result(30, None).status == 7
    finally:
        process.close()


def test_one_that_ends_is_told(tmp_path: Path) -> None:
    class Gone(Stand):
        def command(self, _program: str) -> list[str]:
            return [sys.executable, "-c", "print('no such CPU'); raise SystemExit(3)"]

    process = bochs._Process(Gone(0), tmp_path)  # type: ignore[arg-type]
    try:
        with pytest.raises(HostError, match=r"(?s)^boot: Bochs ended \(3\).*no such CPU"):
            process.result(30, None)
    finally:
        process.close()
