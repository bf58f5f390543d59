# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong on the way to an unpacked package; each message names the step and what was tried."""


class PackageError(Exception):
    """A step failed: a signature or hash that is wrong, a package that does not unpack."""


class NoTool(PackageError):
    """apt, dpkg-deb or tar is not there: this is no Debian."""


class Unreachable(PackageError):
    """The mirror does not answer: nothing is wrong with this project or with the package."""


class Missing(PackageError):
    """The archive answers, and does not have what was asked for; the message says what it has."""
