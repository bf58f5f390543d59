# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inside an x86 host: applies contracts by libkvmneg, runs a guest under each, and tells what KVM made of them.

    python3 -m tests.hosts.applied SECONDS

reads *.contract, writes out/applied.json, and out/report.json, the host's report. After SECONDS it tells where it
stands, and ends.

By each contract's name:

    failed        libkvmneg's first failure {"word", "why", "stage"}, before the guest runs or after; null for none
    broken        {word: grade} of what guests that look for themselves do not see as promised; null where it failed
    given         what KVM's ioctls make of it without libkvmneg (tests.hosts.given)
    capabilities  {word: KVM_CHECK_EXTENSION's answer for this VM} of each that the contract binds
    state         the MSRs of KVM_GET_MSR_INDEX_LIST: what a VMM may carry with a guest
"""

from __future__ import annotations

import ctypes
import faulthandler
import fcntl
import json
import mmap
import struct
import sys
from pathlib import Path
from typing import Any

from kvmneg.errors import NotApplied
from kvmneg.host import capabilities, measure, verify_x86
from kvmneg.host.apply import Applied
from kvmneg.host.kvm import Kvm
from kvmneg.host.tables import CpuidEntry
from tests.hosts import given

PAGE = 4096
KVM_SET_USER_MEMORY_REGION, KVM_RUN = 0x4020AE46, 0xAE80
_EXIT_REASON = struct.Struct("=8xI")  # struct kvm_run
EXIT_HLT = 5
RESET = 0xFFFF_F000  # the page where a processor begins


def table(kvm: Kvm) -> list[CpuidEntry]:
    """A VMM's own: what KVM offers, with what a VMM has to give where KVM leaves it out."""
    return [
        entry._replace(ecx=entry.ecx | given.BY_VMM[1, 0, "ecx"]) if entry[:2] == (1, 0) else entry
        for entry in kvm.supported_cpuid()
    ]


def run(kvm: Kvm, held: Applied) -> dict[str, str] | None:
    """Apply, verify, run a guest to its HLT, verify again; what failed, if anything did."""
    with kvm.scratch() as scratch, mmap.mmap(-1, PAGE) as memory:
        memory[:] = b"\xf4" * PAGE
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        region = struct.pack("=IIQQQ", 0, 0, RESET, PAGE, address)
        fcntl.ioctl(scratch.vm, KVM_SET_USER_MEMORY_REGION, region)
        try:
            held.vm(scratch.vm)
            held.vcpu_init(scratch.vm, scratch.vcpu)
            held.vcpu(scratch.vcpu, table(kvm))
            held.verify(scratch.vcpu)
            with mmap.mmap(scratch.vcpu, PAGE) as shared:
                fcntl.ioctl(scratch.vcpu, KVM_RUN, 0)
                assert _EXIT_REASON.unpack_from(shared)[0] == EXIT_HLT
            held.verify(scratch.vcpu)
        except NotApplied as error:
            return {name: str(error.fields[name]) for name in ("word", "why", "stage")}
    return None


def apply(kvm: Kvm, binary: bytes) -> dict[str, Any]:
    """The record of one contract."""
    held = Applied.of(binary)
    bound = {word: (value, mask) for word, value, mask in held.words()}
    failed = run(kvm, held)
    broken = None if failed else verify_x86.prove(kvm, bound).grades()
    asked = [word for word in bound if word.startswith("kvm:")]
    return {
        "failed": failed,
        "broken": broken,
        "given": given.give(kvm.fd, binary),
        "capabilities": extensions(kvm, asked),
        "state": kvm.probe().state_msrs,
    }


def extensions(kvm: Kvm, asked: list[str]) -> dict[str, int]:
    """KVM_CHECK_EXTENSION on a VM (api.rst 4.4)."""
    numbers = {f"kvm:{name}": number for number, name in capabilities.NAMES.items()}
    with kvm.scratch() as scratch:
        return {
            word: fcntl.ioctl(scratch.vm, given.NUMBER["KVM_CHECK_EXTENSION"], numbers[word])
            for word in asked
            if word in numbers
        }


def main() -> None:
    # a guest that never leaves KVM_RUN is told where
    faulthandler.dump_traceback_later(float(sys.argv[1]), exit=True)
    out = Path("out")
    with Kvm.open() as kvm:
        found = {path.stem: apply(kvm, path.read_bytes()) for path in sorted(Path().glob("*.contract"))}
    (out / "applied.json").write_text(json.dumps(found), "ascii")
    (out / "report.json").write_text(json.dumps(measure.measure().to_json()), "utf-8")


if __name__ == "__main__":
    main()
