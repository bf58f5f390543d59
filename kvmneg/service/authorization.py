# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may change the fence: root, the daemon's own user, and the members of the admin group."""

from __future__ import annotations

import os

from kvmneg.errors import NotPermitted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.service.peer import Peer

ADMIN_GROUP = "kvmneg-admin"


def is_admin(peer: Peer) -> bool:
    """All groups of the peer count (SO_PEERGROUPS), not only its primary one."""
    if peer.uid in (0, os.geteuid()):
        return True
    import grp  # rarely needed: the peers that change things are root

    try:
        admin = grp.getgrnam(ADMIN_GROUP).gr_gid
    except KeyError:
        return False
    return admin in peer.groups


def require_admin(peer: Peer, what: str) -> None:
    """Raises NotPermitted, saying who may."""
    if not is_admin(peer):
        raise NotPermitted(
            f"uid {peer.uid} may not {what}",
            hint=f"ask as root, as the daemon's user, or as a member of the group {ADMIN_GROUP}",
        )
