# SPDX-License-Identifier: LGPL-2.1-or-later
"""The time as documents and the history carry it."""

from __future__ import annotations

import time


def now() -> str:
    """The present time: ISO 8601, UTC, seconds, like "2026-01-31T12:00:00Z"."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
