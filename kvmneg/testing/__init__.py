# SPDX-License-Identifier: LGPL-2.1-or-later
"""For tests that run guests on a real KVM: what a test needs, and the host it runs on (kvmneg.pytest_plugin)."""
