# SPDX-License-Identifier: LGPL-2.1-or-later
"""The embedded store's tests: fences whose text is a function of their generation, so that a half one shows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg.store.interface import Audit

if TYPE_CHECKING:
    from kvmneg.store.sqlite import SqliteStore

AUDIT = Audit(0, 42, "2026-11-21T06:00:00Z", "a test", "pytest")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def text_of(generation: int) -> str:
    return f"fence {generation}\n" * 4000


def pin(store: SqliteStore, text: str) -> int:
    """Pin any text; the new generation."""
    return store.pin(text, sha256(text), expected_generation=None, audit=AUDIT).generation


def content(directory: Path) -> dict[str, bytes]:
    """The files of a state directory, but for its lock."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory that is not there yet."""
    return tmp_path / "state"
