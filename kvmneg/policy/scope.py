# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a yes is about: what was judged, and what was not. Pure."""

from __future__ import annotations

from kvmneg.features import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmneg.features.report import Report

SCOPE = (
    "judged: CPUID words, feature MSRs, KVM capabilities, classes of portable state and a pinned TSC rate of the "
    "catalogue, against what this host measured and the pinned fence",
    "not judged: machine type and device state of another VMM build, ROM sizes, vhost-user and vDPA back "
    "ends, VFIO, the TSC rate of a guest that pins none, state that host or fence do not name, XSAVE components "
    "that an older kernel saves besides the guest's",
)
SCOPE_ARM64 = (
    "judged: ID and firmware registers, hypercalls, vCPU features and KVM capabilities of the catalogue, which "
    "registers are listed, against what this host measured, what its kernel lets be set, and the pinned fence",
    "not judged: machine type and device state of another VMM build, ROM sizes, vhost-user and vDPA back "
    "ends, VFIO, the counter's frequency, values of state registers",
)
_MIDR = "arm64:0x603000000013c000"
_NAMED = 4  # hosts of one kernel in a line
_FENCES = (", and the pinned fence", " and the pinned fence")


def scope(fenced: bool, architecture: str = words.X86_64, report: Report | None = None) -> list[str]:
    """What a yes is about, and where no fence was judged what is left of it.

    `report` is of the host that was judged: on arm64 it may not say what can be set there.
    """
    whole = SCOPE_ARM64 if architecture == words.ARM64 else SCOPE
    looked_up = [*unmeasured([report]), *_unlisted(report)] if report else []
    if fenced:
        return [*whole, *looked_up]
    judged, *rest = whole
    for fence in _FENCES:
        judged = judged.removesuffix(fence)
    return [judged, *rest[:-1], f"{rest[-1]}, any fence", *looked_up]


def _unlisted(report: Report) -> list[str]:
    """arm64: what this report leaves out, as an import or as a host of several kinds of cores does."""
    if report.architecture != words.ARM64:
        return []
    lines = []
    if not report.registers:
        lines.append(f"not judged: which registers {report.host} lists; its report does not say")
    if _MIDR not in report.offer_words:
        lines.append("not judged: which kinds of cores another host has; MIDR_EL1 is of one kind")
    return lines


def unmeasured(reports: Iterable[Report]) -> list[str]:
    """arm64: a line for each kernel whose settable fields were not measured, naming its hosts; x86 has none."""
    hosts: dict[str, list[str]] = {}
    for report in reports:
        if report.architecture == words.ARM64:
            from kvmneg.policy import levelling  # x86 shows guests whatever it is told

            if levelling.by_table(report):
                names = hosts.setdefault(_upstream(levelling.kernel(report)), [])
                if report.host not in names:
                    names.append(report.host)
    return [
        f"not measured: which fields can be set on {_some(names)}; {source}"
        for source, names in sorted(hosts.items())
    ]


def _upstream(release: str) -> str:
    """Where it was looked up, by a kernel's release: "6.1.172-216.amzn2023" is upstream's 6.1."""
    from kvmneg.policy.kernels import numbers

    version = ".".join(str(number) for number in numbers(release)[:2])
    if not version:
        return "the report names no kernel to look it up by, so none counts as settable"
    return f"it is taken from upstream Linux {version}"


def _some(hosts: list[str]) -> str:
    more = f" and {len(hosts) - _NAMED} more" if len(hosts) > _NAMED else ""
    return ", ".join(hosts[:_NAMED]) + more
