# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg.sha is SHA-256, and does not load OpenSSL."""

from __future__ import annotations

import hashlib
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from kvmneg.sha import sha256


def test_the_standards_own_example() -> None:
    """FIPS 180-4's test vector, from NIST's examples: "abc"."""
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(b"abc").hexdigest() == expected


@given(st.binary(max_size=300))
def test_it_is_what_openssl_says(data: bytes) -> None:
    assert sha256(data).digest() == hashlib.sha256(data).digest()


def test_openssl_is_not_loaded() -> None:
    code = "import sys, kvmneg.sha; sys.exit('_hashlib' in sys.modules)"
    subprocess.run(
        [sys.executable, "-S", "-P", "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
