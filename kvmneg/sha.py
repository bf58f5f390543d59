# SPDX-License-Identifier: LGPL-2.1-or-later
"""SHA-256 (FIPS 180-4) for digests of documents: Python's own, which imports in a tenth of OpenSSL's time.

`hashlib` loads libcrypto, 4 to 10 ms of a daemon's start; the standard library's `random` avoids it the same
way. A document of 13 KB takes 45 µs instead of 9; what is larger (the files of a VMM's build) goes to hashlib.
"""

from __future__ import annotations

__all__ = ["sha256"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hashlib import sha256
else:
    try:
        from _sha2 import sha256  # Python 3.12 and newer
    except ImportError:
        try:
            from _sha256 import sha256
        except ImportError:  # a Python that was built without
            from hashlib import sha256
