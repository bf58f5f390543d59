# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a yes is about: what was judged, and what was not. Pure."""

from __future__ import annotations

from kvmneg.features import words

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
_FENCES = (", and the pinned fence", " and the pinned fence")


def scope(fenced: bool, architecture: str = words.X86_64) -> list[str]:
    """What a yes is about, and where no fence was judged what is left of it."""
    whole = SCOPE_ARM64 if architecture == words.ARM64 else SCOPE
    if fenced:
        return list(whole)
    judged, *rest = whole
    for fence in _FENCES:
        judged = judged.removesuffix(fence)
    return [judged, *rest[:-1], f"{rest[-1]}, any fence"]
