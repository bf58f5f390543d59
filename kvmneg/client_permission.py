# SPDX-License-Identifier: LGPL-2.1-or-later
"""The methods that polkit may permit to those who are no admins (kvmneg.client)."""

FIELD = "allowInteractiveAuthentication"

# Those with that field; tests/bus/test_interactive.py holds them to the .varlink files.
METHODS = frozenset(
    f"org.kvmneg.{name}"
    for name in (
        "Begin", "Fence.Abort", "Fence.Audit", "Fence.Commit", "Fence.Emergency", "Fence.Lower", "Fence.Pin",
        "Fence.Raise", "Fence.Restore", "Fence.Unpin", "Guests.Handover", "Guests.Import", "Guests.Receive",
        "Guests.Waive", "Rollback.Add", "Rollback.Remove",
    )
)  # fmt: skip
