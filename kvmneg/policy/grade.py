# SPDX-License-Identifier: LGPL-2.1-or-later
"""How far a host holds a guest to its contract, from the grades in the host's report. Pure.

    enforced    KVM took every CPUID register, MSR and arm64 register that the contract binds, and showed it unchanged
    partial     it did not, for some of them
    unverified  nobody tried: the report has no grades

Capabilities, devices and what a vCPU is made with (kvm:, tap:, vhost-net:, arm:) do not count: they are the VMM's to
use or not, nothing that a guest reads. A report with grades lists them as untested; one without any grade was never
tried.
"""

from __future__ import annotations

from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.difference import Blocker
from kvmneg.policy.contract import GRADES, binding_mask

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.featureset import FeatureSet
    from kvmneg.features.report import Report
    from kvmneg.policy.contract import Contract

UNVERIFIED, PARTIAL, ENFORCED = GRADES

_SHOWN = ("cpuid", "msr", "hyperv", "arm64")
_ENLIGHTENMENTS = "hyperv"
# grade of a word (kvmneg.host.enforcement) → why that is not enough; leaks: a running guest saw something else
_REASONS = {
    "honoured": "",
    "replaced": "KVM takes this word and shows the guest another value",
    "refused": "KVM does not take this word",
    "leaks": "KVM lets the guest see what this word hides",
    "untested": "whether KVM keeps to this word is not tested",
}
_UNKNOWN = "this host's report has no grades: whether its KVM keeps to a contract was not tried"


def of(granted: FeatureSet, report: Report) -> str:
    """The grade of a contract on this host, one of kvmneg.policy.contract.GRADES."""
    if not report.enforcement:
        return UNVERIFIED
    return PARTIAL if broken(granted, report) else ENFORCED


def worse(contract: Contract, report: Report) -> bool:
    """Whether the contract promises more than this host keeps now."""
    return GRADES.index(of(contract.granted, report)) < GRADES.index(contract.grade)


def broken(granted: FeatureSet, report: Report) -> dict[str, str]:
    """The words that a contract binds and the host does not honour, with their grade, in the order of addresses."""
    known = catalogs.load(granted.architecture).words
    found = {
        word: grade
        for word, grade in report.enforcement.items()
        if word in known and _REASONS.get(grade, grade) and _seen(granted, word)
    }
    return {word: found[word] for word in sorted(found, key=words.order)}


def blockers(granted: FeatureSet, report: Report, wanted_by: str = "the request") -> list[Blocker]:
    """Why a contract over this set is not enforced on this host, one for each word; empty where it is."""
    where = f"host {report.host}"
    if not report.enforcement:
        return [Blocker("enforcement", "", None, wanted_by, where, "unknown", _UNKNOWN)]
    return [
        Blocker(word, word, None, wanted_by, where, "kvm", _REASONS.get(grade, f"KVM's grade is {grade!r}"))
        for word, grade in broken(granted, report).items()
    ]


def _seen(granted: FeatureSet, word: str) -> bool:
    """Whether a guest under the contract is shown the word: Hyper-V's only where any of it is granted."""
    kind = word.partition(":")[0]
    if kind not in _SHOWN or not binding_mask(granted, word):
        return False
    return kind != _ENLIGHTENMENTS or granted.value(word) != 0
