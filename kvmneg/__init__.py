# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmneg: KVM feature negotiation. The public face is `kvmneg.client` and the varlink interfaces."""

__version__ = "0.1.0"
