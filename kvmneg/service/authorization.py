# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may change the fence: root, the daemon's own user, and the members of the admin group.

Nobody else, unless there is a bus with polkit on it and that permits the one action (kvmneg.service.bus.child).
"""

from __future__ import annotations

import os

from kvmneg import limits
from kvmneg.errors import NotPermitted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.service.varlink.peer import Peer

admin_group = "kvmneg-admin"  # kvmneg.toml may name another

# units/org.kvmneg1.policy has these, each behind "org.kvmneg1."
ACTIONS = (
    "pin", "unpin", "raise", "lower", "emergency", "restore", "rollback", "import", "waive", "register", "audit",
)  # fmt: skip


def is_admin(peer: Peer) -> bool:
    """All groups of the peer count (SO_PEERGROUPS), not only its primary one."""
    if peer.uid in (0, os.geteuid()):
        return True
    import grp  # rarely needed: the peers that change things are root

    try:
        admin = grp.getgrnam(admin_group).gr_gid
    except KeyError:
        return False
    return admin in peer.groups


def is_preferred(peer: Peer) -> bool:
    """Whether what is reserved is for this peer: nobody else shuts it out, however many users they come as."""
    return peer.uid < limits.SYSTEM_UIDS or is_admin(peer)


def require_admin(peer: Peer, what: str, action: str) -> None:
    """Raises NotPermitted, saying who may; with polkit's action, one of ACTIONS, that would permit it."""
    if not (is_admin(peer) or permitted(peer, action)):
        raise NotPermitted(
            f"uid {peer.uid} may not {what}",
            hint=f"ask as root, as the daemon's user, or as a member of the group {admin_group}",
            action=polkit_name(action),
        )


def permitted(peer: Peer, action: str) -> bool:
    """Whether polkit permitted the action for the call at hand."""
    return polkit_name(action) in peer.permitted


def polkit_name(action: str) -> str:
    """The action as polkit knows it."""
    return "org.kvmneg1." + action
