# SPDX-License-Identifier: LGPL-2.1-or-later
"""What guests saw on this host, kept by combo in the state directory: running them takes longer than measuring.

    refresh(cache, kvm, combo)   run the guests on each kind of CPU, and keep what came of it under the combo's digest
    known(cache)                 {digest of the combo: Kept}

A kept proof counts as long as the combo is the same, over reboots too: nothing else moves what KVM does with a guest. A
cache that is damaged is an empty one.
"""

from __future__ import annotations

import json
import os
from functools import partial

from kvmneg import __version__, limits
from kvmneg.clock import now
from kvmneg.errors import StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from kvmneg.host.sight import Proof

FORMAT = "kvmneg.proofs/1"
_GRADES = ("replaced", "refused", "leaks", "untested")
_MARKS = ("hidden only", "trapped", "untested")  # the first is the worst


class Kept:
    """One combo's proof: when it ran, {word: grade} of what is not honoured, {feature: mark}.

    `seen` are words that only guests can tell of (Hyper-V's), and that they saw as they were to.
    """

    __slots__ = ("at", "grades", "instructions", "seen")

    def __init__(
        self, at: str, grades: dict[str, str], instructions: dict[str, str], seen: Sequence[str] = ()
    ) -> None:
        self.at = at
        self.grades = grades
        self.instructions = instructions
        self.seen = seen

    def to_json(self) -> dict[str, Any]:
        rows = {"at": self.at, "grades": self.grades, "instructions": self.instructions}
        return {**rows, "seen": list(self.seen)} if self.seen else rows

    @classmethod
    def from_json(cls, document: object) -> Kept | None:
        """None for anything that this version does not write."""
        if not isinstance(document, dict):
            return None
        at, grades, marks = (document.get(name) for name in ("at", "grades", "instructions"))
        seen = document.get("seen", [])
        if not (isinstance(at, str) and isinstance(grades, dict) and isinstance(marks, dict)):
            return None
        if not (isinstance(seen, list) and all(isinstance(word, str) for word in seen)):
            return None
        if not all(grade in _GRADES for grade in grades.values()):
            return None
        return cls(at, grades, marks, seen) if all(mark in _MARKS for mark in marks.values()) else None

    def add_to(self, parts: dict[str, Any], measured: dict[str, str]) -> None:
        """Put it into what was measured: a word's worse grade counts."""
        from kvmneg.host import enforcement  # with its catalogue; the measurement has loaded both

        tried = {
            word: grade
            for word, grade in parts["enforcement"].items()
            if grade != enforcement.UNTESTED or word not in self.seen
        }
        parts["enforcement"] = enforcement.joined(tried, self.grades)
        parts["instructions"] = self.instructions
        measured["guests"] = self.at


def known(cache: str) -> dict[str, Kept]:
    """Every proof that is kept, by the digest of its combo, the oldest first."""
    try:
        with open(cache, "rb") as file:
            document = json.loads(file.read(limits.REPORT_BYTES))
        rows = document["combos"].items() if document["format"] == FORMAT else ()
        found = {digest: Kept.from_json(row) for digest, row in rows}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    return {digest: kept for digest, kept in found.items() if kept is not None}


def refresh(cache: str, path: str, digest: str) -> Kept:
    """Run the guests on a KVM and keep what came of it. Raises NoKvm, KvmFault, StoreError.

    In a process of its own: it is ended by SIGALRM after limits.PROOF_SECONDS.
    """
    import signal

    signal.alarm(limits.PROOF_SECONDS)
    kept = prove(path)
    combos = known(cache)
    combos.pop(digest, None)
    combos[digest] = kept
    newest = list(combos)[-limits.PROOFS :]
    document = {"format": FORMAT, "combos": {digest: combos[digest].to_json() for digest in newest}}
    temporary = f"{cache}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="ascii") as file:
            json.dump(document, file)
        os.replace(temporary, cache)
    except OSError as error:
        raise StoreError(f"{cache} cannot be written: {error.strerror}") from None
    return kept


def verifier() -> Any:
    """This architecture's module: `prove(kvm, bound)`, `mark_of(kvm, feature)`, `CODE`."""
    from kvmneg.features.words import X86_64
    from kvmneg.host.measure import ARCHITECTURE

    if ARCHITECTURE == X86_64:
        from kvmneg.host import verify_x86

        return verify_x86
    from kvmneg.host import verify_arm64

    return verify_arm64


def prove(path: str) -> Kept:
    """Run the guests under what the host offers. Raises NoKvm, KvmFault.

    Also where they had too little time: what is kept is kept for good, and another run may see it.
    """
    found = on_each_kind(path)
    if found.late():
        import errno  # only here

        from kvmneg.errors import KvmFault

        raise KvmFault("KVM_RUN", errno.ETIME, "proof guests had too little time")
    seen = found.honoured("hyperv:")
    return Kept(f"{now()} by kvmneg {__version__}", found.grades(), dict(found.instructions), seen)


def on_each_kind(path: str, bound: Mapping[str, tuple[int, int]] | None = None) -> Proof:
    """Run the guests on each kind of CPU that this process may use: what one kind does not keep, the host does not.

    `bound` is a contract's, None for what the host offers. Raises NoKvm, KvmFault.
    """
    from kvmneg.host import sight, software, visit
    from kvmneg.host.kvm import Kvm

    verify = verifier()
    plan = visit.plan(software.cpu_classes())
    each = []
    for cpu in plan.cpus:
        with Kvm.open(path) as kvm:
            each.append(visit.on(cpu, partial(verify.prove, kvm, bound)))
    found = sight.worst(each)
    if len(plan.kinds) + len(plan.unvisited) > 1:
        found.kinds = [visit.cpulist(kind.cpus) for kind in plan.kinds]
    found.unvisited = plan.to_combo()
    return found
