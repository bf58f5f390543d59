# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inside an arm64 host: guests under many contracts, from it and to it, register by register.

    python3 -m tests.hosts.moved dump       runs a guest under each *.contract, writes out/NAME.dump
    python3 -m tests.hosts.moved restore    what becomes of each NAME.dump here, in out/moved.json; out/report.json

The twin of applied.py. By each contract's name:

    refused       libkvmneg's failure under the contract {"word", "why", "stage"}, null for none
    moved         what became of the registers under it (carried.restore), null where it was refused
    raw           {register: errno's name} of those that fail without libkvmneg and without a rule
    capabilities  {word: KVM's own answer} of those that the contract binds
"""

from __future__ import annotations

import fcntl
import json
import struct
import sys
from pathlib import Path
from typing import Any

from kvmneg.errors import NotApplied
from kvmneg.host import capabilities, measure
from kvmneg.host.apply import Applied
from kvmneg.host.kvm import Kvm
from tests.hosts import carried
from tests.kvm import arm64_guest as guest

OUT = Path("out")
SMCCC_FILTER = "arm:smccc-filter"
# struct kvm_device_attr: KVM_ARM_VM_SMCCC_CTRL (0), KVM_ARM_VM_SMCCC_FILTER (0) of a VM
_FILTER = struct.pack("=IIQQ", 0, 0, 0, 0)


def move(kvm: Kvm, binary: bytes, dumped: dict[str, Any]) -> dict[str, Any]:
    """The record of one contract and its guest."""
    refused, moved = None, None
    try:
        moved = carried.restore(kvm, carried.terms(binary), dumped)
    except NotApplied as error:
        refused = {name: str(error.fields[name]) for name in ("word", "why", "stage")}
    raw = carried.restore(kvm, None, dumped)["failed"]
    return {"refused": refused, "moved": moved, "raw": raw, "capabilities": answers(kvm, binary)}


def answers(kvm: Kvm, binary: bytes) -> dict[str, int]:
    """KVM_CHECK_EXTENSION on a VM (api.rst 4.4), and whether it has the filter of SMCCC calls."""
    numbers = {f"kvm:{name}": number for number, name in capabilities.NAMES.items()}
    found = {}
    with guest.Vm(kvm.fd) as vm:
        for word, _value, _mask in Applied.of(binary).words():
            if word in numbers:
                found[word] = fcntl.ioctl(vm.fd, guest.NUMBER["KVM_CHECK_EXTENSION"], numbers[word])
            elif word == SMCCC_FILTER:
                found[word] = int(guest.tried(vm.fd, guest.NUMBER["KVM_HAS_DEVICE_ATTR"], _FILTER) == 0)
    return found


def main() -> None:
    contracts = {path.stem: path.read_bytes() for path in sorted(Path().glob("*.contract"))}
    with Kvm.open() as kvm:
        if sys.argv[1] == "dump":
            for name, binary in contracts.items():
                dumped = carried.dump(kvm, carried.terms(binary))
                (OUT / f"{name}.dump").write_text(json.dumps(dumped), "ascii")
        else:
            found = {
                name: move(kvm, binary, json.loads(Path(f"{name}.dump").read_bytes()))
                for name, binary in contracts.items()
            }
            (OUT / "moved.json").write_text(json.dumps(found), "ascii")
            (OUT / "report.json").write_text(json.dumps(measure.measure().to_json()), "utf-8")


if __name__ == "__main__":
    main()
