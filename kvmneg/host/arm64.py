# SPDX-License-Identifier: LGPL-2.1-or-later
"""What KVM on arm64 answered, as words. Pure: answers in, {word: value} out. The twin of x86.py.

There is no catalogue for arm64 yet, so a report has KVM's capabilities and the CPU's identity and grants
nothing: registers and their rules come with a later version.
"""

from __future__ import annotations

from kvmneg.features import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvmneg.host.software import CpuClass

ARCHITECTURE = words.ARM64


def offer(capabilities: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Every capability KVM has, as kvm: words. The VM's answer binds, /dev/kvm's where the VM refuses."""
    answers = {name: vm if vm >= 0 else system for name, (system, vm) in capabilities.items()}
    return {f"kvm:{name}": answer for name, answer in answers.items() if answer > 0}


def identity(classes: Sequence[CpuClass]) -> dict[str, str]:
    """MIDR_EL1's fields of the first kind of CPU, as /proc/cpuinfo has them."""
    return dict(classes[0].identity) if classes else {}
