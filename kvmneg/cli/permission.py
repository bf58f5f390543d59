# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls that polkit may ask a person about: with an agent of its own on a terminal, as systemctl does it.

Whoever has an agent in their session (a desktop's) is asked by that: ours is registered as the one to fall back to.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

from kvmneg.client_permission import METHODS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from kvmneg.client import Client

AGENT = "/usr/bin/pkttyagent"


def call(client: Client, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A call of a person at a terminal. Raises as kvmneg.client.Client.call."""
    if method not in METHODS:
        return client.call(method, given)
    client.interactive = True
    with agent():
        return client.call(method, given)


@contextmanager
def agent() -> Iterator[None]:
    """Run polkit's agent for this terminal meanwhile, where it is installed."""
    read, write = os.pipe2(os.O_CLOEXEC)
    os.set_inheritable(write, True)
    try:
        child = os.posix_spawn(
            AGENT, [AGENT, "--notify-fd", str(write), "--fallback"], os.environ
        )  # for its parent, which is this process
    except OSError:
        child = 0  # none is installed; a session may have one
    finally:
        os.close(write)
    os.read(read, 1)  # ends once it is registered, or has ended
    os.close(read)
    try:
        yield
    finally:
        if child:
            from signal import SIGTERM

            os.kill(child, SIGTERM)  # it puts the terminal back as it was
            os.waitpid(child, 0)
