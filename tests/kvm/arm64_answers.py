# SPDX-License-Identifier: LGPL-2.1-or-later
"""Prints what guests answered under each table of this arm64 host, as tests/unit/data/arm64-answers-*.json have it.

    python -m tests.hosts run arm64-6.12 -- python3 -m tests.kvm.arm64_answers > FILE

{"kernel", "tables": {name: {word: {"bound", "value", "shown", "el1": [answer], "el0": [answer]}}}}; an answer is
[outcome, detail, x0, x1, x2, x3], numbers are hexadecimal.
"""

from __future__ import annotations

import json
import platform
import sys
from typing import TYPE_CHECKING, Any

from kvmneg.host import arm64, guest_arm64, kvm_arm64, proof_arm64, verify_arm64
from kvmneg.host.kvm import Kvm
from kvmneg.host.views_arm64 import MODE_NAMES, MODES, questions

if TYPE_CHECKING:
    from kvmneg.host.proof_arm64 import Table


def answers(kvm: Kvm, table: Table, offered: int) -> dict[str, Any]:
    """By word, with what KVM reads back after the run."""
    machine, _ = proof_arm64._made(kvm, table, offered)
    with machine:
        names = [word for word in proof_arm64.ordered(table.values) if questions(word)]
        for word in names:
            proof_arm64._set(machine, word, table.values[word], table.bound[word])
        rows: dict[str, Any] = {
            word: {"bound": hex(table.bound[word]), "value": hex(table.values[word])} for word in names
        }
        for mode, name in zip(MODES, MODE_NAMES, strict=True):
            for word in names:
                found = guest_arm64.ask(kvm, machine, mode, questions(word, mode))
                rows[word][name] = [[one.outcome, hex(one.detail), *map(hex, one.x)] for one in found]
        for word in names:
            shown = machine.get(word)
            rows[word]["shown"] = None if shown is None else hex(shown)
    return rows


def main() -> None:
    with Kvm.open() as kvm:
        probe = kvm_arm64.probe(kvm)
        offered = verify_arm64.offered_table(probe, arm64.decoder().offer(probe))
        emptied = verify_arm64._emptied(kvm, probe, offered, 0)
        tables = {"offer": offered, "emptied": emptied}
        found = {name: answers(kvm, table, offered.features) for name, table in tables.items()}
    json.dump({"kernel": platform.release(), "tables": found}, sys.stdout, sort_keys=True)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
