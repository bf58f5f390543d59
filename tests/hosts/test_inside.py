# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tests of the KVM layer, run inside hosts whose KVM is the kernel's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conftest import MINIMUM_ARM64, MINIMUM_X86
from tests.hosts import inside
from tests.packages.errors import Unreachable

if TYPE_CHECKING:
    from tests.hosts.catalogue import Host
    from tests.summary import Part

pytestmark = pytest.mark.hosts
MINIMUM = {"arm64": MINIMUM_ARM64, "amd64": MINIMUM_X86}


def run(host: Host, *words: str) -> inside.Inside:
    """Runs them; skips where the mirror is needed and not there."""
    try:
        return inside.run(host, *words)
    except Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")


def test_kvm_suite(qemu_host: Host, summary_parts: list[Part]) -> None:
    """All of tests/kvm that needs a KVM passes there, on that kernel, and made the ioctls that it must."""
    found = run(qemu_host, "-m", "kvm", "tests/kvm")
    assert found.part is not None, found.tail()
    summary_parts.append(found.part)
    assert found.result.status == 0, found.tail()
    assert not found.part.problem
    assert qemu_host.kernel in found.part.kind
    assert not set(MINIMUM[qemu_host.architecture]) - found.part.succeeded()
    assert "failed" not in found.part.outcomes
