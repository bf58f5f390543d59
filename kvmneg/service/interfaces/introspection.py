# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.varlink.service: what this service is, and its interfaces as their checked-in, commented .varlink files."""

from __future__ import annotations

import os

from kvmneg import __version__
from kvmneg.service.varlink.message import SERVICE, InterfaceNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

INTERFACES = (SERVICE, "org.kvmneg", "org.kvmneg.Fence", "org.kvmneg.Guests", "org.kvmneg.Rollback")


def get_info() -> dict[str, Any]:
    """The reply of org.varlink.service.GetInfo."""
    return {
        "vendor": "kvmneg",
        "product": "kvmnegd",
        "version": __version__,
        "url": "",
        "interfaces": list(INTERFACES),
    }


def get_interface_description(interface: str) -> dict[str, Any]:
    """The reply of org.varlink.service.GetInterfaceDescription: the file's text. Raises InterfaceNotFound."""
    return {"description": description(interface)}


def description(interface: str) -> str:
    """The .varlink file of an interface of ours; the name comes from a client and is looked up, never opened."""
    if interface not in INTERFACES:
        raise InterfaceNotFound(interface)
    with open(os.path.join(os.path.dirname(__file__), interface + ".varlink"), encoding="utf-8") as file:
        return file.read()
