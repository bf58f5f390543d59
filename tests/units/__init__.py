# SPDX-License-Identifier: LGPL-2.1-or-later
"""The project installed in a container with a systemd of its own: Debian's, of several releases."""
