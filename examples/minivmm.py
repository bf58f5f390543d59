# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole VMM in one page of Python: the twin of minivmm.c, with the same steps, arguments, output and exit status.

    python minivmm.py "$(uuidgen)" '{"request": {"level": "x86-64-v2"}}' [--socket PATH] [--anyway]

kvmneg.client asks the daemon; kvmneg.host.apply is libkvmneg by cffi, which reads the contract's file and applies it.
On arm64 no guest runs: the vCPU's registers are read back instead.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from contextlib import closing
from typing import Any

from kvmneg.client import DEFAULT_SOCKET as SOCKET
from kvmneg.client import Client
from kvmneg.errors import KvmnegError, NotApplied
from kvmneg.features import words
from kvmneg.features.difference import Blocker
from kvmneg.host.apply import Applied
from kvmneg.host.kvm import Kvm, Scratch
from kvmneg.host.measure import ARCHITECTURE

KVM_CREATE_VCPU = 0xAE41


def applied(what: str, anyway: bool, step: Any, *arguments: Any) -> None:
    """Takes a step; where KVM does not keep to the contract, says so and, unless told to go on, gives up."""
    try:
        step(*arguments)
    except NotApplied as failure:
        print(f"minivmm: {what}: {failure}", file=sys.stderr)
        if not anyway:
            raise SystemExit(1) from None


def create(contract: Applied, kvm: Kvm, anyway: bool) -> Scratch:
    """A VM with one vCPU that has the contract; the same calls for a vCPU that is plugged in later."""
    vm = kvm.create_vm()
    applied("the VM", anyway, contract.vm, vm)
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    applied("the vCPU", False, contract.vcpu_init, vm, vcpu)
    applied("the vCPU", anyway, contract.vcpu, vcpu)
    return Scratch(vm, vcpu)


def run(contract: Applied, kvm: Kvm, machine: Scratch) -> int:
    """Runs a guest that executes CPUID for each word; how many it sees otherwise than promised."""
    from kvmneg.host import guest_x86

    bound = [row for row in contract.words() if row[0].startswith("cpuid:")]
    places = [words.parse_cpuid(word) for word, _, _ in bound]
    asked = [guest_x86.Question(guest_x86.ASK_CPUID, leaf, subleaf) for leaf, subleaf, _ in places]
    answers = guest_x86.ask(kvm, machine, guest_x86.REAL, asked)
    broken = 0
    for (word, value, mask), (_, _, register), answer in zip(bound, places, answers, strict=True):
        seen = getattr(answer, register)
        if (seen ^ value) & mask:
            broken += 1
            print(f"{word}: promised {value:#x} of {mask:#x}, the guest sees {seen:#x}")
    print(f"{len(bound)} words looked at by the guest, {broken} not as promised")
    return broken


def guest(kvmnegd: Client, vm: str, path: str, anyway: bool) -> int:
    """The life of a VM that holds the contract in a file."""
    contract = Applied.open(path)
    with Kvm.open() as kvm:
        machine = create(contract, kvm, anyway)  # 3. Apply it.
        try:
            kvmnegd.started(vm)  # 4. It runs.
            if ARCHITECTURE == words.X86_64:
                return run(contract, kvm, machine)
            applied("verify", anyway, contract.verify, machine.vcpu)
            return 0
        finally:
            os.close(machine.vcpu)
            os.close(machine.vm)


def main() -> int:
    parser = argparse.ArgumentParser(prog="minivmm")
    parser.add_argument("vm", metavar="UUID")
    parser.add_argument("request", metavar="REQUEST", type=json.loads)
    parser.add_argument("--socket", default=SOCKET)
    parser.add_argument("--anyway", action="store_true")
    given = parser.parse_args()
    with closing(Client(given.socket)) as kvmnegd:
        try:
            # 1. What may this guest see? An offer binds nobody.
            offer = kvmnegd.call("org.kvmneg.Negotiate", given.request)
            print(f"offered {offer['digest']}, generation {offer['generation']}")
            for row in offer["notGranted"]:
                print(Blocker.from_json(row).describe())
            # 2. Take it for this VM; from now on it counts.
            granted = kvmnegd.begin(offer["digest"], given.vm)
            broken = guest(kvmnegd, given.vm, granted["path"], given.anyway)
            kvmnegd.end(given.vm)  # 5. It is gone.
        except KvmnegError as error:
            print(f"minivmm: {error}", file=sys.stderr)
            return 1
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
