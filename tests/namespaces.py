# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs in namespaces of their own, which not every root may make: a chroot or a container has none."""

from __future__ import annotations

import subprocess
from functools import cache

import pytest


@cache
def _refused(*kinds: str) -> str:
    done = subprocess.run(["unshare", *kinds, "true"], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def unshare(*kinds: str) -> list[str]:
    """The command before the program's own; skips where this root may not make them."""
    why = _refused(*kinds)
    if why:
        pytest.skip(f"this root may make no namespaces: {why}")
    return ["unshare", *kinds]
